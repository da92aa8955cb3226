package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/fetchlog"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/p2p"
)

const (
	// lookupLife is how long a look-up goes on after the first who asked, so
	// that the answer is here when they ask again.
	lookupLife = 30 * time.Second
	// peerHedge is how long the storehouse may take, besides the way to it, before
	// peers are asked too.
	peerHedge = 50 * time.Millisecond
	// maxOvertaken bounds the questions to the storehouse whose answers are taken in
	// though peers were faster.
	maxOvertaken = 64
	// factsTimeout bounds one question to one machine.
	factsTimeout = 3 * time.Second
	// trackerTimeout bounds one question to the tracker, which the DHT is faster than otherwise.
	trackerTimeout = time.Second
	// maxFactPeers is how many connected peers one round asks, and how many of
	// those that announced the path.
	maxFactPeers = 8
	// peerStagger is how long a peer may take before the next is asked too.
	peerStagger = 50 * time.Millisecond
	// retryMin and retryMax bound the pause between rounds of a look-up or fetch.
	retryMin, retryMax = 100 * time.Millisecond, 2 * time.Second
)

// resolver turns store path names into verified path infos: from disk, from the
// storehouse, or from any peer that has the signed info. Each path is looked up
// once at a time, however many wait for it, and the look-up outlives them.
type resolver struct {
	facts     *facts
	negatives *negatives
	calls     *calls
	host      finder
	houses    *houses
	traffic   *traffic
	staged    func(p flox.StorePath) (*flox.PathInfo, bool) // what was added on this machine
	shut      func() error                                  // why staged does not tell; nil = it does
	book      *traceBook                                    // nil = traces are not asked for
	far       func() bool                                   // whether round trips are long: near, blocks come from who is nearest
	// root keeps a block of a manifest that came with facts, and gives the pages of
	// the manifest if it is its root; nil = none are asked for.
	root    func(ctx context.Context, id flox.CID, data []byte) (pages []flox.CID)
	history *fetchlog.Log
	log     *slog.Logger

	life context.Context //nolint:containedctx // ends with the agent: look-ups outlive their callers
	work sync.WaitGroup  // look-ups under way; Run waits for them

	overtaken atomic.Int32 // questions to the storehouse that peers were faster with

	mu      sync.Mutex
	places  *places
	flights map[string]*lookupFlight
	began   uint64 // how many look-ups were
}

// finder is what the resolver needs of the p2p host.
type finder interface {
	Peers() []p2p.PeerStat
	FindProviders(ctx context.Context, key flox.CID, max int) ([]p2p.PeerAddr, error)
	AddPeer(p p2p.PeerAddr) error
}

type lookupFlight struct {
	done chan struct{}
	info *flox.PathInfo
	err  error

	who     asker
	number  uint64
	drop    func()
	waiting int // guarded by the resolver's mutex

	mu   sync.Mutex
	last error // of the newest round, for those who give up earlier
}

// lookup finds the info of p. ErrNotFound: the storehouse says it is not valid.
// ErrUnreachable: nobody who knows could be asked before ctx ended.
func (r *resolver) lookup(ctx context.Context, p flox.StorePath) (*flox.PathInfo, error) {
	return r.lookupFor(ctx, p, elsewhere, nil)
}

// lookupFor is lookup for somebody people can see waiting.
func (r *resolver) lookupFor(ctx context.Context, p flox.StorePath, who asker, watch *wait) (*flox.PathInfo, error) {
	info, err := r.find(ctx, p, who, watch)
	if errors.Is(err, flox.ErrNotFound) {
		if shut := r.shut(); shut != nil {
			return nil, fmt.Errorf("%s is not valid in the storehouse; whether it was added on this machine cannot be told: %w", p, shut)
		}
	}
	return info, err
}

func (r *resolver) find(ctx context.Context, p flox.StorePath, who asker, watch *wait) (*flox.PathInfo, error) {
	hash := p.HashPart()
	known := r.facts.get
	if who == elsewhere { // what the kernel hears is on the disk
		known = r.facts.early
	}
	if info, ok := known(hash); ok {
		return matchName(info, p)
	}
	if info, ok := r.staged(p); ok {
		return matchName(info, p)
	}
	if r.negatives.holds(hash) {
		return nil, fmt.Errorf("%s is not valid in the storehouse: %w", p, flox.ErrNotFound)
	}
	f, err := r.join(ctx, p, who)
	if err != nil {
		return nil, err
	}
	defer r.leave(f)
	watch.explained(f.newest)
	select {
	case <-f.done:
		if f.err != nil {
			if r.life.Err() != nil {
				return nil, stopping(ctx)
			}
			if info, ok := known(hash); ok { // it was looked up under another name
				return matchName(info, p)
			}
			return nil, f.err
		}
		if info, ok := known(hash); ok {
			return matchName(info, p)
		}
		if who != elsewhere {
			return nil, fmt.Errorf("what was answered about %s is not kept: %w", p, cmp.Or(r.facts.full(), flox.ErrUnreachable))
		}
		return matchName(f.info, p)
	case <-ctx.Done():
		return nil, fmt.Errorf("no answer about %s in time: %w", p, because(f.newest(), flox.ErrUnreachable))
	}
}

// matchName guards against a name with a valid hash part and another name behind it.
func matchName(info *flox.PathInfo, p flox.StorePath) (*flox.PathInfo, error) {
	if info.Path != p {
		return nil, fmt.Errorf("%s is not valid, %s is: %w", p, info.Path, flox.ErrNotFound)
	}
	return info, nil
}

func (f *lookupFlight) newest() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last
}

// search asks in rounds until somebody proves the path, the storehouse says it
// is not valid, or ctx ends.
func (r *resolver) search(ctx context.Context, p flox.StorePath, f *lookupFlight) (*flox.PathInfo, error) {
	asked := make(map[p2p.PeerID]bool)
	end := r.history.LookUp(p)
	for pause := retryMin; ; pause = min(2*pause, retryMax) {
		info, err := r.round(ctx, p, asked)
		if final(err) {
			end(err)
			return info, err
		}
		f.mu.Lock()
		f.last = err
		f.mu.Unlock()
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			err = fmt.Errorf("no answer about %s: %w", p, because(err, flox.ErrUnreachable))
			end(err)
			return nil, err
		}
	}
}

// final says that to ask again or elsewhere gives nothing better.
func final(err error) bool {
	var here *unkept
	return err == nil || errors.Is(err, flox.ErrNotFound) || errors.As(err, &here)
}

// round asks the storehouse and, when it is slow or away, peers. The first
// verified info wins; only the storehouse can say no.
func (r *resolver) round(ctx context.Context, p flox.StorePath, asked map[p2p.PeerID]bool) (*flox.PathInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, factsTimeout)
	defer cancel()
	type answer struct {
		info *flox.PathInfo
		err  error
	}
	house, peers := make(chan answer, 1), make(chan answer, 1)
	asking, answered := context.WithTimeout(r.life, factsTimeout)
	tied := context.AfterFunc(ctx, answered)
	r.work.Go(func() {
		defer answered()
		info, err := r.askStorehouse(asking, p)
		house <- answer{info, err}
	})
	hedge := time.NewTimer(peerHedge + r.houses.distance())
	defer hedge.Stop()
	var failed []error
	for peersAsked, open := false, 1; open > 0; {
		select {
		case a := <-house:
			if final(a.err) {
				return a.info, a.err
			}
			failed = append(failed, a.err)
			open--
			if !peersAsked {
				open++ // now: there is nothing else to wait for
				hedge.Reset(0)
			}
		case a := <-peers:
			if a.err == nil {
				r.overtake(asking, tied)
				return a.info, nil
			}
			failed = append(failed, a.err)
			open--
		case <-hedge.C:
			if len(failed) == 0 {
				open++
			}
			peersAsked = true
			r.history.Note(p, fetchlog.Step{At: time.Now(), Kind: fetchlog.FactsLate})
			r.work.Go(func() {
				info, err := r.askPeers(ctx, p, asked)
				peers <- answer{info, err}
			})
		}
	}
	return nil, because(failed...)
}

// askHouse also brings the infos of the path's closure: whoever starts a
// program needs them next, and one round trip is cheaper than twenty.
func (r *resolver) askHouse(ctx context.Context, house p2p.PeerID, p flox.StorePath) (*flox.PathInfo, error) {
	found, response, err := r.ask(ctx, house, p, true)
	if err != nil {
		return nil, fmt.Errorf("storehouse: %w", err)
	}
	if found != nil {
		return found, nil
	}
	for _, hash := range response.GetInvalid() {
		if hash == p.HashPart() {
			r.negatives.remember(hash, response.GetIndex())
			return nil, fmt.Errorf("%s is not valid in the storehouse: %w", p, flox.ErrNotFound)
		}
	}
	return nil, fmt.Errorf("storehouse: no answer about %s: %w", p, flox.ErrUnreachable)
}

// ask puts one question to one machine and stores what can be verified.
func (r *resolver) ask(ctx context.Context, peer p2p.PeerID, p flox.StorePath, closure bool) (*flox.PathInfo, *floxv1.PathsResponse, error) {
	request := connect.NewRequest(&floxv1.PathsRequest{
		HashParts: []string{p.HashPart()}, Closure: closure, Traces: closure && r.book != nil, Roots: closure && r.root != nil && r.far(),
		MaxAgeMs: r.houses.maxAge(),
	})
	trip := r.traffic.trips.next()
	told := r.history.AskFacts(p, peer, closure)
	response, err := r.calls.facts(peer).Paths(ctx, request)
	if err != nil {
		err = &unreachable{api.FromConnect(err)}
		told(0, false, err)
		return nil, nil, err
	}
	told(len(response.Msg.GetFound()), slices.Contains(response.Msg.GetInvalid(), p.HashPart()), nil)
	r.traffic.trips.waited(trip)
	found := response.Msg.GetFound()
	if !closure {
		found = slices.DeleteFunc(found, func(m *floxv1.PathInfo) bool { return m.GetPath() != string(p) }) // not asked for
	}
	for _, m := range found {
		r.traffic.facts(m)
	}
	if err := r.take(peer, p, found, response.Msg.GetFoundSignatures()); err != nil {
		return nil, nil, err
	}
	// What is known stays, whatever was answered now.
	known, ok := r.facts.early(p.HashPart())
	if closure {
		if ok && known.Path == p && r.root != nil {
			r.took(ctx, known, response.Msg.GetRoots())
		}
		r.book.found(p, response.Msg)
	}
	if ok {
		known, err = matchName(known, p) // HASH-name.lock beside HASH-name
		return known, response.Msg, err
	}
	return nil, response.Msg, nil
}

// took keeps the root block of a path's manifest, and pages of it, if they came
// with the facts. What is neither is dropped.
func (r *resolver) took(ctx context.Context, info *flox.PathInfo, blocks [][]byte) {
	want := []flox.CID{info.Manifest}
	for i, b := range blocks[:min(len(blocks), maxTracePages)] { // one path was asked for
		id := content.Hash(b)
		if !slices.Contains(want, id) {
			r.log.Warn("block beside facts refused: it is not of the signed manifest", "path", string(info.Path))
			return
		}
		r.traffic.block(len(b), p2p.Source{Tier: p2p.TierStorehouse, Wire: len(b)}, true)
		if pages := r.root(ctx, id, b); i == 0 {
			want = pages
		}
	}
}

// askPeers asks connected peers, nearest first, and those that announced the
// path. One that does not answer at once is overtaken by the next. The
// storehouse is not among them; asked remembers who was, from round to round,
// so that the next round asks others.
func (r *resolver) askPeers(ctx context.Context, p flox.StorePath, asked map[p2p.PeerID]bool) (*flox.PathInfo, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan *flox.PathInfo, 2*maxFactPeers)
	announced := make(chan []p2p.PeerID, 1)
	r.work.Go(func() { announced <- r.providers(ctx, p) })
	queue := r.connected(asked)
	now := time.NewTimer(0)
	defer now.Stop()
	tried := 0
	for open, looking := 0, true; open > 0 || looking || len(queue) > 0; {
		var next <-chan time.Time
		if len(queue) > 0 {
			next = now.C
		}
		select {
		case <-next:
			peer := queue[0]
			queue = queue[1:]
			if asked[peer] {
				now.Reset(0)
				continue
			}
			asked[peer] = true
			tried, open = tried+1, open+1
			r.work.Go(func() { answers <- r.askPeer(ctx, peer, p) })
			now.Reset(peerStagger)
		case info := <-answers:
			open--
			if info != nil {
				return info, nil
			}
			now.Reset(0)
		case peers := <-announced:
			looking = false
			queue = append(queue, peers...)
		case <-ctx.Done():
			return nil, fmt.Errorf("none of %d peers said anything in time: %w", tried, flox.ErrUnreachable)
		}
	}
	return nil, fmt.Errorf("none of %d peers knows it: %w", tried, flox.ErrUnreachable)
}

// connected lists connected peers that were not asked yet; when all were, it
// begins anew.
func (r *resolver) connected(asked map[p2p.PeerID]bool) []p2p.PeerID {
	var fresh, again []p2p.PeerID
	for _, peer := range r.host.Peers() {
		switch {
		case peer.Role == p2p.Storehouse || r.houses.is(peer.ID):
		case asked[peer.ID]:
			again = append(again, peer.ID)
		default:
			fresh = append(fresh, peer.ID)
		}
	}
	if len(fresh) == 0 {
		clear(asked)
		fresh = again
	}
	return fresh[:min(len(fresh), maxFactPeers)]
}

// providers finds peers that announced p.
func (r *resolver) providers(ctx context.Context, p flox.StorePath) []p2p.PeerID {
	found, err := r.host.FindProviders(ctx, p2p.PathKey(p), maxFactPeers)
	if err != nil {
		r.log.Debug("providers not found", "path", string(p), "error", err)
	}
	var ids []p2p.PeerID
	for _, peer := range found[:min(len(found), maxFactPeers)] {
		if !r.houses.is(peer.ID) && r.host.AddPeer(peer) == nil {
			ids = append(ids, peer.ID)
		}
	}
	return ids
}

// askPeer asks one peer; nil if it does not know p, or not in time.
func (r *resolver) askPeer(ctx context.Context, peer p2p.PeerID, p flox.StorePath) *flox.PathInfo {
	ctx, cancel := context.WithTimeout(ctx, factsTimeout/3)
	defer cancel()
	info, _, err := r.ask(ctx, peer, p, false)
	if err != nil {
		r.log.Debug("peer does not know path", "peer", string(peer), "path", string(p), "error", err)
	}
	return info
}
