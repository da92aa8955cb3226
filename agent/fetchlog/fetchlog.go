// Package fetchlog remembers how store paths were found and fetched lately, for
// people who ask why something took as long as it did. It lives in memory and is
// small: of each path so many steps, of those that are alike only sums.
package fetchlog

import (
	"cmp"
	"container/list"
	"slices"
	"strings"
	"sync"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p"
)

const (
	// maxPaths bounds the paths remembered, the ones used last.
	maxPaths = 1024
	// maxFirst and maxLast bound the steps of a path: how it began, and what was last.
	maxFirst, maxLast = 40, 24
	// maxSources bounds the machines told apart per path.
	maxSources = 32
	// maxWhy bounds what is kept of why something failed, in bytes: others may have said it.
	maxWhy = 512
	// usual is how many fetches, and blocks asked for and given, are steps of their own;
	// of the others only those that took longer than slow are.
	usual = 4
	slow  = 500 * time.Millisecond
)

// Kinds of steps besides those of p2p, by their names there.
const (
	LookUp      = "look-up"      // somebody wants the facts of the path, which are not here
	FactsAsked  = "facts-asked"  // Peer is asked for them
	Facts       = "facts"        // Peer answered, with the facts of Count paths
	FactsNone   = "facts-none"   // Peer answered that the path is not valid
	FactsFailed = "facts-failed" // Peer did not answer; Why says why
	FactsLate   = "facts-late"   // the storehouse is slow, or away: peers are asked, too
	Known       = "known"        // the look-up is over
	Unknown     = "unknown"      // so it is, in vain; Why says why
	Fetch       = "fetch"        // Count blocks of Bytes in all are wanted
	Fetched     = "fetched"      // that fetch is over; Count blocks of Bytes came
	NotFetched  = "unfetched"    // it ended without all of them; Why says why
)

// Step is one thing done for a path.
type Step struct {
	At         time.Time
	Kind       string
	Peer       p2p.PeerID // "" = nobody in particular
	Tier       p2p.Tier   // of Peer
	Count      int
	Bytes      uint64
	Took       time.Duration // since what the step ends began; 0 = it ends nothing
	Background bool          // of a fetch: nobody waits for it
	Why        string
	Times      int // how often it was so one after the other, at least 1; At is of the first
}

// Source is what one machine did for a path.
type Source struct {
	Peer    p2p.PeerID
	Tier    p2p.Tier
	Blocks  int
	Bytes   uint64
	Late    int // how often somebody else was asked because it took long
	Failed  int
	Slowest time.Duration // to give one block
	total   time.Duration
}

// Mean is how long it took to give a block, on average.
func (s Source) Mean() time.Duration {
	if s.Blocks == 0 {
		return 0
	}
	return s.total / time.Duration(s.Blocks)
}

// Account is what is remembered of a path.
type Account struct {
	Steps   []Step
	LeftOut int           // steps between the first and the last ones
	Sources []Source      // what gave most first
	Local   int           // blocks that were had from this machine: of other files, or another store
	Open    int           // fetches under way
	Fetches int           // for which somebody waited, and are over
	Waited  time.Duration // in all of them together
	Slowest time.Duration // of them
}

// Log is safe for use by many goroutines; a nil one remembers nothing.
type Log struct {
	mu    sync.Mutex
	paths map[flox.StorePath]*list.Element // of *path
	order *list.List                       // used last first
}

type path struct {
	name    flox.StorePath
	first   []Step
	last    []Step // once first is full
	leftOut int
	told    map[string]int // by kind, of those of which only some are
	sources map[p2p.PeerID]*Source
	sum     Account // but for what is above
}

// New gives an empty log.
func New() *Log { return &Log{paths: make(map[flox.StorePath]*list.Element), order: list.New()} }

// Note remembers a step for p.
func (l *Log) Note(p flox.StorePath, s Step) {
	if l == nil || p == "" {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.of(p).add(s)
}

// LookUp notes that the facts of p are looked up, and gives what is called with the
// outcome.
func (l *Log) LookUp(p flox.StorePath) (end func(error)) {
	began := time.Now()
	l.Note(p, Step{At: began, Kind: LookUp})
	return func(err error) {
		over := Step{At: time.Now(), Kind: Known, Took: time.Since(began)}
		if err != nil {
			over.Kind, over.Why = Unknown, err.Error()
		}
		l.Note(p, over)
	}
}

// AskFacts notes that a machine is asked for the facts of p, and gives what is called
// with the outcome: of how many paths it told, or that p is not valid.
func (l *Log) AskFacts(p flox.StorePath, peer p2p.PeerID, storehouse bool) (end func(paths int, invalid bool, err error)) {
	tier := p2p.TierFar
	if storehouse {
		tier = p2p.TierStorehouse
	}
	began := time.Now()
	l.Note(p, Step{At: began, Kind: FactsAsked, Peer: peer, Tier: tier})
	return func(paths int, invalid bool, err error) {
		over := Step{At: time.Now(), Kind: Facts, Peer: peer, Tier: tier, Count: paths, Took: time.Since(began)}
		switch {
		case err != nil:
			over.Kind, over.Why = FactsFailed, err.Error()
		case invalid:
			over.Kind = FactsNone
		}
		l.Note(p, over)
	}
}

// Local counts a block of p that did not come from elsewhere.
func (l *Log) Local(p flox.StorePath) {
	if l == nil || p == "" {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.of(p).sum.Local++
}

// Begin notes a fetch for p, and gives what is called with its end.
func (l *Log) Begin(p flox.StorePath, blocks int, bytes uint64, background bool) (end func(blocks int, bytes uint64, err error)) {
	if l == nil || p == "" {
		return func(int, uint64, error) {}
	}
	began := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	of := l.of(p)
	of.sum.Open++
	told := of.few(Fetch)
	if told {
		of.add(Step{At: began, Kind: Fetch, Count: blocks, Bytes: bytes, Background: background})
	}
	return func(blocks int, bytes uint64, err error) {
		over := Step{At: time.Now(), Kind: Fetched, Count: blocks, Bytes: bytes, Background: background}
		over.Took = over.At.Sub(began)
		if err != nil {
			over.Kind, over.Why = NotFetched, err.Error()
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		of := l.of(p)
		of.sum.Open = max(of.sum.Open-1, 0) // it may have been forgotten in between
		if !background {
			of.sum.Fetches++
			of.sum.Waited += over.Took
			of.sum.Slowest = max(of.sum.Slowest, over.Took)
		}
		if told || err != nil || over.Took >= slow && !background {
			of.add(over)
		}
	}
}

// Steps gives what hears of the steps of a fetch for p.
func (l *Log) Steps(p flox.StorePath) func(p2p.Step) {
	if l == nil || p == "" {
		return nil
	}
	return func(s p2p.Step) {
		l.mu.Lock()
		defer l.mu.Unlock()
		of := l.of(p)
		if of.count(s) {
			of.add(Step{
				At: s.At, Kind: s.Kind.String(), Peer: s.Peer, Tier: s.Tier, Count: s.Count,
				Bytes: uint64(s.Bytes), Took: s.Took, Why: s.Why, //nolint:gosec // a size
			})
		}
	}
}

// Of gives what is remembered of p.
func (l *Log) Of(p flox.StorePath) (Account, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e, ok := l.paths[p]
	if !ok {
		return Account{}, false
	}
	of := e.Value.(*path) //nolint:forcetypeassert // there is nothing else in it
	a := of.sum
	a.Steps, a.LeftOut = slices.Concat(of.first, of.last), of.leftOut
	for _, s := range of.sources {
		a.Sources = append(a.Sources, *s)
	}
	slices.SortFunc(a.Sources, func(x, y Source) int {
		return cmp.Or(cmp.Compare(y.Bytes, x.Bytes), cmp.Compare(y.Failed, x.Failed), cmp.Compare(x.Peer, y.Peer))
	})
	return a, true
}

// First is how many of the steps of an account are before what was left out.
func (a Account) First() int { return min(len(a.Steps), maxFirst) }

// of finds or makes what is remembered of p; l.mu is held.
func (l *Log) of(p flox.StorePath) *path {
	if e, ok := l.paths[p]; ok {
		l.order.MoveToFront(e)
		return e.Value.(*path) //nolint:forcetypeassert // there is nothing else in it
	}
	if l.order.Len() >= maxPaths {
		oldest := l.order.Back()
		delete(l.paths, l.order.Remove(oldest).(*path).name) //nolint:forcetypeassert // there is nothing else in it
	}
	made := &path{name: p, told: make(map[string]int), sources: make(map[p2p.PeerID]*Source)}
	l.paths[p] = l.order.PushFront(made)
	return made
}

// add appends a step; one that is like the last counts with it.
func (p *path) add(s Step) {
	s.Times = 1
	if len(s.Why) > maxWhy {
		s.Why = strings.ToValidUTF8(s.Why[:maxWhy], "") + "…"
	}
	steps := &p.first
	if len(p.last) > 0 {
		steps = &p.last
	}
	if n := len(*steps); n > 0 && (*steps)[n-1].alike(s) {
		(*steps)[n-1].Times++
		return
	}
	if len(p.first) < maxFirst {
		p.first = append(p.first, s)
		return
	}
	if len(p.last) == maxLast {
		p.last = append(p.last[:0], p.last[1:]...)
		p.leftOut++
	}
	p.last = append(p.last, s)
}

// alike reports whether nobody would want to read both.
func (s Step) alike(o Step) bool {
	return s.Kind == o.Kind && s.Peer == o.Peer && s.Why == o.Why && s.Count == 0 && o.Count == 0 && s.Bytes == 0 && o.Bytes == 0
}

// count adds a step to the sums, and says whether it is worth a line of its own.
func (p *path) count(s p2p.Step) bool {
	from := p.sources[s.Peer]
	if from == nil && s.Peer != "" && len(p.sources) < maxSources {
		from = &Source{Peer: s.Peer}
		p.sources[s.Peer] = from
	}
	if from == nil {
		from = &Source{} // nobody's
	}
	from.Tier = s.Tier
	switch s.Kind { //nolint:exhaustive // the others are always told
	case p2p.StepGave:
		from.Blocks++
		from.Bytes += uint64(s.Bytes) //nolint:gosec // a size
		from.total += s.Took
		from.Slowest = max(from.Slowest, s.Took)
		if s.Took >= slow {
			return true
		}
	case p2p.StepLate:
		from.Late++
		return true
	case p2p.StepFailed:
		from.Failed++
		return true
	case p2p.StepAsked, p2p.StepSent:
	default:
		return true
	}
	return p.few(s.Kind.String())
}

// few reports whether there were few steps of a kind yet, and counts one.
func (p *path) few(kind string) bool {
	p.told[kind]++
	return p.told[kind] <= usual
}
