// Package schedule decides which build a worker gets next, and says why. It is pure: it
// has no clock, goroutine or file, and the same calls lead to the same decisions.
//
// It must not know what a derivation is, who a worker is reached by, or what is recorded
// where: a caller tells it what there is, and carries out what it decides. A Scheduler is
// not safe for use by many goroutines.
package schedule

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/floxctl/flox"
)

// Config says how a Scheduler weighs. A zero field is its default.
type Config struct {
	// Window is the time over which counts what an owner has used. Default 1 h.
	Window time.Duration
	// Weights are the shares of owners; an owner that is not named has 1.
	Weights map[string]float64
	// Patience is how long a build may be ready before it goes ahead of all others,
	// whatever they are, at every fourth lease of a worker that can build it.
	// Default 30 min.
	Patience time.Duration
	// Bandwidth is in how many bytes a second workers fetch what they lack, for
	// comparing that with the time that a slower worker takes. Default 50 MB/s.
	Bandwidth float64
}

// What bounds one decision, and what a Scheduler keeps.
const (
	// MaxWorkers is how many workers there may be.
	MaxWorkers = 4096
	// MaxBuilds is how many builds there may be.
	MaxBuilds = 1 << 20

	maxCandidates = 8    // builds compared by what they would fetch
	maxCompared   = 32   // workers they are compared on
	maxSteps      = 1024 // of work put off, done at a time
	maxHave       = 1 << 16
	overdueTurn   = 4
)

// Builtin is the system of derivations that Nix itself carries out, on any worker.
const Builtin = "builtin"

// Build is something to be built.
type Build struct {
	ID    string
	Owner string // whose share it counts in
	// Interactive: somebody waits for it. It goes before what nobody waits for.
	Interactive bool
	Priority    int // higher goes first
	System      string
	Features    []string // that its worker must have
	// Memory and Disk are what it wants of its worker, in bytes; 0 = nothing in particular.
	Memory, Disk uint64
	// Expect is how long it should take on a worker of speed 1. At least 1 ms counts.
	Expect time.Duration
	Queued time.Time
	// Needs are builds that must be done before. They are known to the Scheduler, or
	// come before this one in the same Add.
	Needs []string
	// Inputs are the paths that its worker has to have.
	Inputs []Input
}

// Input is a store path, and the bytes to be fetched by a worker that lacks it.
type Input struct {
	Path  uint64 // a hash of its name
	Bytes uint64
}

// Worker is a machine that builds.
type Worker struct {
	ID      string
	Systems []string
	// Features are those it has. Of Mandatory, it takes only builds that ask for all.
	Features, Mandatory []string
	Slots               int     // builds at a time
	Speed               float64 // against others; 0 = 1
	// Memory and Disk are for all its builds together, in bytes; 0 = any amount.
	Memory, Disk uint64
	Paused       bool // it gets no more
}

// Lease is a decision: a worker shall do a build.
type Lease struct {
	Build, Worker string
	Reason        Reason
}

// Reason is why a build was chosen for a worker, in the order in which it was decided.
type Reason struct {
	Overdue     bool // it waited longer than Patience; nothing else was asked
	Interactive bool
	Priority    int
	Owner       string
	Share       float64       // seconds that its owner used in the window, by weight
	Path        time.Duration // the longest chain of builds that begins with it
	Users       int           // builds that wait for it
	Fetch       uint64        // bytes that the worker lacks
	Of          int           // builds that were ready
}

// String says it in one line.
func (r Reason) String() string {
	if r.Overdue {
		return fmt.Sprintf("it was ready for longest, of %d that were ready", r.Of)
	}
	class := "batch"
	if r.Interactive {
		class = "interactive"
	}
	return fmt.Sprintf("%s, priority %d; %s used %.0f s; longest chain %s; %d wait for it; %d bytes to fetch; of %d that were ready",
		class, r.Priority, r.Owner, r.Share, r.Path.Round(time.Millisecond), r.Users, r.Fetch, r.Of)
}

// Scheduler holds the builds that wait and the workers that are there.
type Scheduler struct {
	cfg     Config
	nodes   map[string]*node
	workers map[string]*worker
	order   []*worker // by speed, fastest first
	classes map[string]*class
	owners  map[string]*owner
	ready   int
	seq     uint64
	// decision numbers the calls of Next.
	decision uint64
	later    heap[*node] // that wait for a time
	stale    heap[*node] // whose path is to be looked at again
}

// New makes one without builds and workers.
func New(cfg Config) *Scheduler {
	cfg.Window = cmp.Or(max(cfg.Window, 0), time.Hour)
	cfg.Patience = cmp.Or(max(cfg.Patience, 0), 30*time.Minute)
	cfg.Bandwidth = cmp.Or(max(cfg.Bandwidth, 0), 50e6)
	return &Scheduler{
		cfg: cfg, nodes: map[string]*node{}, workers: map[string]*worker{}, classes: map[string]*class{}, owners: map[string]*owner{},
		later: heap[*node]{slot: slotLater, before: func(a, b *node) bool { return a.notBefore.Before(b.notBefore) }},
		stale: heap[*node]{slot: slotStale, before: func(a, b *node) bool { return a.seq > b.seq }},
	}
}

// state is where a build stands.
type state uint8

const (
	waits  state = iota // for others
	put                 // off until a time
	isOpen              // ready for a worker
	leased
)

// node is a build.
type node struct {
	Build
	seq       uint64 // those it needs have smaller ones
	needs     []*node
	users     []*node       // that need it; some may be gone
	lost      int           // so many of them
	unmet     int           // needs that are not done
	gone      bool          // it was taken out
	path      time.Duration // see Reason
	anew      bool          // path is to be found from the users
	state     state
	notBefore time.Time
	since     time.Time // that it is ready
	class     *class
	worker    *worker
	held      *worker // that takes nothing else until there is room for it
	at        [slots]int
}

// Add takes in builds, all or none. Errors: ErrBusy if one is known, ErrNotFound if it
// needs one that is not, ErrFull.
func (s *Scheduler) Add(builds []Build) error {
	if len(s.nodes)+len(builds) > MaxBuilds {
		return fmt.Errorf("%d builds wait and %d are added, want at most %d: %w", len(s.nodes), len(builds), MaxBuilds, flox.ErrFull)
	}
	for i := range builds {
		if err := s.add(builds[i]); err != nil {
			for k := i - 1; k >= 0; k-- {
				s.Remove(builds[k].ID)
			}
			return err
		}
	}
	s.settle(max(maxSteps, 4*len(builds)))
	for i := range builds {
		if n := s.nodes[builds[i].ID]; n.unmet == 0 {
			s.open(n, n.Queued)
		}
	}
	return nil
}

func (s *Scheduler) add(b Build) error {
	if s.nodes[b.ID] != nil {
		return fmt.Errorf("build %s waits already: %w", b.ID, flox.ErrBusy)
	}
	n := &node{Build: b}
	for i := range n.at {
		n.at[i] = -1
	}
	n.Expect = max(n.Expect, time.Millisecond)
	for _, id := range b.Needs {
		in := s.nodes[id]
		if in == nil {
			return fmt.Errorf("build %s needs %s, which is not in the queue: %w", b.ID, id, flox.ErrNotFound)
		}
		n.needs = append(n.needs, in)
	}
	s.seq++
	n.seq, n.unmet, n.path = s.seq, len(n.needs), n.Expect
	for _, in := range n.needs {
		in.users = append(in.users, n)
		in.moved()
	}
	n.class = s.classOf(n)
	s.nodes[b.ID] = n
	s.owner(b.Owner).builds++
	s.look(n, false)
	return nil
}

// open makes a build ready.
func (s *Scheduler) open(n *node, since time.Time) {
	n.state, n.since = isOpen, since
	n.class.push(n)
	s.ready++
}

// shut takes a build from those that are ready, or wait for a time.
func (s *Scheduler) shut(n *node) {
	switch n.state {
	case isOpen:
		n.class.drop(n)
		s.ready--
	case put:
		s.later.remove(n)
	case leased:
		n.worker.release(n)
		s.owner(n.Owner).running -= n.Expect
		n.worker = nil
	}
	if n.held != nil {
		n.held.held, n.held = nil, nil
	}
}

// Done takes out a build that is done, at a time, having taken so long; what waited for
// it alone is ready.
func (s *Scheduler) Done(id string, at time.Time, took time.Duration) {
	n := s.nodes[id]
	if n == nil {
		return
	}
	s.owner(n.Owner).use(s.cfg.Window, at, took)
	s.Remove(id)
	for _, u := range n.users {
		if u.unmet--; u.unmet == 0 && !u.gone && u.state == waits {
			s.open(u, at)
		}
	}
}

// Remove takes out a build, whatever it does. What needs it waits until it, too, is
// taken out.
func (s *Scheduler) Remove(id string) {
	n := s.nodes[id]
	if n == nil {
		return
	}
	s.shut(n)
	s.stale.remove(n)
	n.gone = true
	for _, in := range n.needs {
		if !in.gone {
			in.lose()
			if in.path == in.Expect+n.path {
				s.look(in, true)
			}
		}
	}
	if n.class.users--; n.class.users == 0 {
		s.dropClass(n.class)
	}
	s.owner(n.Owner).builds--
	delete(s.nodes, id)
}

// lose notes that one of the users is gone.
func (n *node) lose() {
	if n.lost++; 2*n.lost > len(n.users) {
		n.users, n.lost = slices.DeleteFunc(n.users, func(u *node) bool { return u.gone }), 0
	}
	n.moved()
}

// wanted is how many builds wait for it.
func (n *node) wanted() int { return len(n.users) - n.lost }

// moved puts a ready build where it belongs after what it is ranked by changed.
func (n *node) moved() {
	if n.state == isOpen {
		n.class.fix(n)
	}
}

// PutOff has a build that was leased wait until a time, because its worker failed it.
func (s *Scheduler) PutOff(id string, until time.Time) {
	n := s.nodes[id]
	if n == nil || n.state == waits {
		return
	}
	s.shut(n)
	n.state, n.notBefore = put, until
	s.later.push(n)
}

// Leased notes a lease that was decided elsewhere, or before. ErrNotFound; ErrBusy if
// the build is not ready.
func (s *Scheduler) Leased(build, by string) error {
	n, w := s.nodes[build], s.workers[by]
	switch {
	case n == nil || w == nil:
		return fmt.Errorf("lease of %s by %s, which are not both known: %w", build, by, flox.ErrNotFound)
	case n.state != isOpen && n.state != put:
		return fmt.Errorf("lease of %s by %s: it is not ready: %w", build, by, flox.ErrBusy)
	}
	s.lease(n, w)
	return nil
}

func (s *Scheduler) lease(n *node, w *worker) {
	s.shut(n)
	n.state, n.worker = leased, w
	w.take(n)
	s.owner(n.Owner).running += n.Expect
}

// Change sets what a build is ranked by.
func (s *Scheduler) Change(id string, interactive bool, priority int) error {
	n := s.nodes[id]
	if n == nil {
		return fmt.Errorf("build %s: %w", id, flox.ErrNotFound)
	}
	if n.state == isOpen {
		n.class.drop(n)
		defer func() { n.class.push(n) }()
	}
	n.Interactive, n.Priority = interactive, priority
	return nil
}

// Len is how many builds there are, and how many of them are ready.
func (s *Scheduler) Len() (builds, ready int) { return len(s.nodes), s.ready }

// Wake is when a build that waits for a time is due; zero = none does.
func (s *Scheduler) Wake() time.Time {
	if s.later.len() == 0 {
		return time.Time{}
	}
	return s.later.top().notBefore
}

// Used notes what an owner used before.
func (s *Scheduler) Used(name string, at time.Time, took time.Duration) {
	s.owner(name).use(s.cfg.Window, at, took)
}
