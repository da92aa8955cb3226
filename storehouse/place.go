package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/pack"
	"github.com/floxctl/flox/p2p"
)

const (
	placeBatch   = 2048             // blocks of one Fetch between servers
	placeTimeout = 10 * time.Minute // of one Fetch: 2,048 blocks over a poor line
	maxPlacing   = 16               // Fetches served at once
	// heldFor is how long blocks that came for a path that is not valid yet stay
	// at least, whatever is collected.
	heldFor = time.Hour
)

// place has every block of manifests copied to other voters, until a majority of
// them holds all durably. They are here already. It gives the servers that hold them.
// ErrUnreachable when no majority can be had.
func (s *Server) place(ctx context.Context, manifests ...flox.CID) ([]string, error) {
	_, voters, votes := s.servers.others()
	all := len(voters)
	placed := []string{string(s.id.peer)}
	need := (all + 1) / 2 // beside this one
	if !votes {
		need = all/2 + 1
	}
	if need == 0 || s.cfg.Bucket != "" { // durable here means that the bucket has it
		return placed, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel() // who is not needed any more gets it later, as any server that lacks something
	type answer struct {
		peer p2p.PeerID
		err  error
	}
	answers := make(chan answer, all)
	for _, v := range voters {
		group.Go(func() { answers <- answer{v, s.placeOn(ctx, v, manifests)} })
	}
	var failed error
	for range voters {
		a := <-answers
		if errors.Is(a.err, flox.ErrDenied) { // this server, which is taken out: nobody refuses who uploads
			a.err = errors.New(a.err.Error())
		}
		if a.err != nil {
			failed = errors.Join(failed, fmt.Errorf("server %s: %w", a.peer, a.err))
			continue
		}
		placed = append(placed, string(a.peer))
		if need--; need == 0 {
			slices.Sort(placed)
			return placed, nil
		}
	}
	return nil, fmt.Errorf("the content is on %d of %d voters, not on a majority; it is not lost, try again: %w: %w",
		len(placed), all+1, failed, flox.ErrUnreachable)
}

// placeOn has one server fetch what it lacks of manifests' blocks from here.
func (s *Server) placeOn(ctx context.Context, to p2p.PeerID, manifests []flox.CID) error {
	client := s.servers.client(to)
	send := func(ids [][]byte) error {
		ctx, cancel := context.WithTimeout(ctx, placeTimeout)
		defer cancel()
		resp, err := client.Fetch(ctx, connect.NewRequest(&floxv1.FetchRequest{Ids: ids, From: string(s.id.peer)}))
		if err != nil {
			return api.FromConnect(err)
		}
		if n := len(resp.Msg.GetMissing()); n > 0 {
			return fmt.Errorf("it could not get %d of %d blocks: %w", n, len(ids), flox.ErrUnreachable)
		}
		return nil
	}
	var ids [][]byte
	for _, manifest := range manifests {
		m, err := content.OpenManifest(ctx, manifest, s.packs)
		if err != nil {
			return err
		}
		var failed error
		err = m.Blocks(ctx, func(id flox.CID, _ uint32) bool {
			if ids = append(ids, id[:]); len(ids) == placeBatch {
				failed, ids = send(ids), ids[:0]
			}
			return failed == nil
		})
		if err = errors.Join(failed, err); err != nil {
			return err
		}
	}
	if len(ids) == 0 {
		return nil
	}
	return send(ids)
}

// houses answers other servers.
type houses struct {
	floxv1connect.UnimplementedServersHandler
	*Server
	slots chan struct{}
}

// caller refuses everybody who is no server.
func (h *houses) caller(peer string) error {
	if !h.servers.allowed(p2p.PeerID(peer)) {
		return fmt.Errorf("%s is no server of this storehouse: %w", peer, flox.ErrDenied)
	}
	return nil
}

// Fetch is floxv1connect.ServersHandler.
func (h *houses) Fetch(ctx context.Context, req *connect.Request[floxv1.FetchRequest]) (*connect.Response[floxv1.FetchResponse], error) {
	missing, err := h.fetch(ctx, req.Peer().Addr, req.Msg)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(&floxv1.FetchResponse{Missing: missing}), nil
}

func (h *houses) fetch(ctx context.Context, caller string, req *floxv1.FetchRequest) (missing []uint32, err error) {
	if err := h.caller(caller); err != nil {
		return nil, err
	}
	from := p2p.PeerID(req.GetFrom())
	if err := h.caller(string(from)); err != nil {
		return nil, err
	}
	ids, err := keysOf(req.GetIds(), placeBatch)
	if err != nil {
		return nil, err
	}
	if _, err := h.disk.admit(Essential(ctx)); err != nil {
		return nil, err
	}
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	missing, _, err = h.bring(ctx, h.held.session(), ids, from)
	return missing, err
}

// bring makes blocks durable here, fetching those that are not from the servers
// named, in that order. It gives the indexes of those that nobody gave, and how many
// bytes came, also when it fails. What is put into the session stays as long as that is open.
func (s *Server) bring(ctx context.Context, session *pack.Session, ids []flox.CID, from ...p2p.PeerID) (missing []uint32, came uint64, err error) {
	has, err := session.Pin(ctx, ids)
	if err != nil {
		return nil, 0, err
	}
	for i, ok := range has {
		if !ok {
			missing = append(missing, uint32(i))
		}
	}
	for _, peer := range from {
		if len(missing) == 0 {
			break
		}
		var n uint64
		missing, n, err = s.bringFrom(ctx, session, ids, missing, peer)
		if came += n; err != nil {
			return nil, came, err
		}
	}
	return missing, came, session.Sync(ctx)
}

// bringFrom is bring of some of ids from one server. It gives what that did not give.
func (s *Server) bringFrom(ctx context.Context, session *pack.Session, ids []flox.CID, wanted []uint32, peer p2p.PeerID) (missing []uint32, came uint64, err error) {
	wants := make([]p2p.Want, len(wanted))
	for i, k := range wanted {
		wants[i] = p2p.Want{ID: ids[k]}
	}
	got := make([]bool, len(wanted))
	var failed error
	fetchErr := s.swarm.FetchFrom(ctx, peer, wants, func(i int, data []byte, _ p2p.Source) {
		if failed == nil {
			failed = session.Put(ctx, wants[i].ID, data)
			got[i] = failed == nil
			came += uint64(len(data))
		}
	})
	if failed != nil {
		return nil, came, failed // the disk, not the peer
	}
	if err := ctx.Err(); err != nil {
		return nil, came, err
	}
	for i, ok := range got {
		if !ok {
			missing = append(missing, wanted[i])
		}
	}
	if len(missing) > 0 {
		s.cfg.Log.Debug("blocks not had from a server", "server", string(peer), "blocks", len(missing), "error", fetchErr)
	}
	return missing, came, nil
}

// holding keeps blocks that came for a path that is not valid yet, for heldFor
// at least and twice that at most.
type holding struct {
	packs *pack.Store

	mu          sync.Mutex
	now, before *pack.Session
	since       time.Time
}

// session gives the one to put blocks into now.
func (h *holding) session() *pack.Session {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.now == nil || time.Since(h.since) > heldFor {
		if h.before != nil {
			h.before.Close()
		}
		h.before, h.now, h.since = h.now, h.packs.Session(), time.Now()
	}
	return h.now
}

// close lets go of everything.
func (h *holding) close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range []*pack.Session{h.now, h.before} {
		if s != nil {
			s.Close()
		}
	}
	h.now, h.before = nil, nil
	return nil
}
