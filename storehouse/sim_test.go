package storehouse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	cluster "github.com/floxctl/flox/raft"
	"github.com/floxctl/flox/raft/raftsim"
)

const (
	simClients = 6
	// simEpoch is how long clients stay with the same subjects: it bounds the
	// histories that the checker has to search.
	simEpoch = 2 * time.Minute
	// simTurn is when all clients turn to one subject at once.
	simTurn = 4 * time.Second
	// simUnknown is of how many answers about a subject clients do not wait for.
	simUnknown = 3
	// simLast is how many epochs at the end are read on every server when all is over.
	simLast = 3
)

// simSubject is what has a history of its own: a few paths, two invites.
type simSubject struct {
	part   simPart
	serial uint64
}

// subjectAt gives one of two subjects of an epoch.
func subjectAt(part simPart, epoch, which uint64) simSubject {
	switch part.(type) {
	case simUpstreams:
		epoch /= simUpstreamEpochs
	case simSalt:
		epoch, which = 0, 0
	}
	return simSubject{part, 2*epoch + which}
}

// epoch is that of now.
func (s *simulation) epoch() uint64 { return uint64(s.Age() / simEpoch) } //nolint:gosec // not negative

func (s simSubject) name() string {
	return fmt.Sprintf("%T-%d", s.part, s.serial)[len("storehouse.sim"):]
}

// simPart is a part of the facts, with the model that its answers are held against.
// Questions, states and what was said are values that can be compared.
type simPart interface {
	// ask makes up a command, as the model and as the log takes it. near is an index
	// of the log not long ago.
	ask(rng *rand.Rand, subject simSubject, near uint64) (ask any, c simCommand)
	// heard is what a reply says, and which entry's it is; 0 = it does not say.
	heard(subject simSubject, ask any, reply []byte) (said any, index uint64, err error)
	// read looks at a subject.
	read(r *cluster.Reader, subject simSubject) (said any, err error)
	// next gives what may follow when an entry asks this of a state; simLook is a
	// read. A refusal says a sentinel of package flox.
	next(state, ask any, index uint64) []simNext
}

// simCommand is for the log.
type simCommand struct {
	kind, level uint32
	message     proto.Message
}

// simNext is a state that may follow, and what is said then.
type simNext struct{ state, said any }

// simLook asks how a subject is.
type simLook struct{}

// simSomewhere stands for the index of an entry of which it is not known.
const simSomewhere = math.MaxUint64

// simParts begin in these states.
var simParts = map[simPart]any{
	simPaths{}: pathsState{}, simMembers{}: membersState{}, simUpstreams{}: upstreamState{}, simStarts{}: startsState{}, simSalt{}: saltState{},
	simProfiles{}: profilesState{},
}

// simAnswer is what a client was told: of a state at an index, or of an entry
// somewhere between two.
type simAnswer struct {
	said     any
	from, to uint64
	unknown  bool
}

// simState is a part's state and the least index at which it may be that.
type simState struct {
	index uint64
	of    any
}

// simModel is one subject.
func simModel(part simPart) porcupine.Model {
	return (&porcupine.NondeterministicModel{
		Init: func() []any { return []any{simState{of: simParts[part]}} },
		Step: func(state, input, output any) (after []any) {
			s, a := state.(simState), output.(simAnswer)
			from, index := max(a.from, s.index), a.from
			if input != (simLook{}) {
				from = max(a.from, s.index+1)
			}
			if from > a.to {
				return nil // an entry or a state behind this one
			}
			if a.from != a.to {
				index = simSomewhere
			}
			for _, n := range part.next(s.of, input, index) {
				if a.unknown || n.said == a.said {
					after = append(after, simState{from, n.state})
				}
			}
			return after
		},
	}).ToModel()
}

// simulation is the facts of a storehouse on five servers, what clients were told
// of them, and when.
type simulation struct {
	*raftsim.Cluster
	t *testing.T
	// careless is for the negative controls: what is asked as up to date is answered from
	// any state if it is of this part, and so is what may be of some age.
	careless simPart
	// What the audit log, the counters and the profiles say that is not so, in the end.
	audit, counts, profiles error

	mu      sync.Mutex
	history map[simSubject][]porcupine.Operation
	changes map[string]*simChange // of profiles, by their tags
	tags    int                   // that were given
	unknown int
	stale   int                      // answers that may be old
	tooOld  error                    // of the last one that was older than that
	acked   []simAck                 // in the order of both
	seen    map[*cluster.Node]uint64 // the newest index seen on a server
}

// simAck is that an entry was answered.
type simAck struct {
	at    time.Duration
	index uint64
}

// newSimulation is called in the bubble. broken changes a processor, for the
// negative controls.
func newSimulation(t *testing.T, cfg raftsim.Config, broken func(kind uint32, p cluster.Processor) cluster.Processor) *simulation {
	cfg.Level = level
	cfg.Register = func(n *cluster.Node) {
		for kind, p := range processors(0) {
			if broken != nil {
				p = broken(kind, p)
			}
			n.Register(kind, slowly{p})
		}
	}
	return &simulation{t: t, Cluster: raftsim.New(t, cfg), history: map[simSubject][]porcupine.Operation{}, changes: map[string]*simChange{}, seen: map[*cluster.Node]uint64{}}
}

// slowly is a processor on a server that takes its time, as another one does not.
type slowly struct{ cluster.Processor }

func (p slowly) Apply(tx *cluster.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	if rand.IntN(3) == 0 {
		time.Sleep(time.Duration(rand.IntN(5000)) * time.Microsecond)
	}
	return p.Processor.Apply(tx, command, at, index)
}

// simClient is one of the clients, with a session that it keeps.
type simClient struct {
	*simulation
	id      int
	rng     *rand.Rand
	session cluster.ProposeOptions
}

// client asks and reads, through whichever server, until ctx ends.
func (s *simulation) client(ctx context.Context, id int, rng *rand.Rand) {
	c := &simClient{simulation: s, id: id, rng: rng}
	parts := slices.SortedFunc(func(yield func(simPart) bool) {
		for p := range simParts {
			if !yield(p) {
				return
			}
		}
	}, func(a, b simPart) int { return cmp.Compare(fmt.Sprintf("%T", a), fmt.Sprintf("%T", b)) })
	for ctx.Err() == nil {
		if rng.IntN(2) == 0 { // on its own
			time.Sleep(time.Duration(rng.IntN(3000)) * time.Millisecond)
			c.one(subjectAt(parts[rng.IntN(len(parts))], s.epoch(), rng.Uint64N(2)))
			continue
		}
		turn := s.Age()/simTurn + 1 // with the others
		time.Sleep(turn*simTurn - s.Age())
		subject := subjectAt(parts[int(turn)%len(parts)], s.epoch(), uint64(turn)/8%2) //nolint:gosec // not negative
		if rng.IntN(3) > 0 {
			c.write(subject)
			continue
		}
		for range 5 {
			c.read(c.Any(rng), subject)
			time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
		}
	}
}

// one asks one thing.
func (c *simClient) one(subject simSubject) {
	switch c.rng.IntN(5) {
	case 0:
		c.read(c.Any(c.rng), subject)
	case 1:
		c.readStale(subject)
	default:
		c.write(subject)
	}
}

// write has a command carried out. Some clients do not wait long for the answer.
func (c *simClient) write(subject simSubject) {
	if subject.part == (simProfiles{}) {
		c.changeProfile(subject)
		return
	}
	ask, cmd := subject.part.ask(c.rng, subject, c.near())
	c.put(subject, ask, cmd)
}

// put has a command carried out, and gives what was said; nil if there was no answer.
func (c *simClient) put(subject simSubject, ask any, cmd simCommand) (said any) {
	b, err := proto.Marshal(cmd.message)
	if err != nil {
		c.t.Error(err)
		return nil
	}
	limit := time.Minute
	if c.rng.IntN(6) == 0 && c.mayGiveUp(subject) {
		limit = time.Duration(1+c.rng.IntN(2000)) * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if c.session.Session == "" {
		c.session = cluster.ProposeOptions{Session: fmt.Sprintf("c%d-%d", c.id, c.Age())}
	}
	c.session.Sequence++
	c.session.Level = cmd.level
	// Its entry comes behind all that was answered by now.
	call, after := c.Age(), c.near()
	a := c.Propose(ctx, c.rng, cmd.kind, b, c.session)
	out := simAnswer{from: after + 1, to: simSomewhere, unknown: a.Unknown}
	switch {
	case a.Unknown:
		if c.session.Sequence == 1 {
			c.session = cluster.ProposeOptions{} // its first must be answered
		}
	case a.Refused != nil:
		out.said, out.to = sentinel(a.Refused), a.Index
	default:
		index := uint64(0)
		if out.said, index, err = subject.part.heard(subject, ask, a.Reply); err != nil || index > a.Index {
			c.t.Errorf("%s: %v, an answer of entry %d at %d", subject.name(), err, index, a.Index)
		}
		if out.to = a.Index; index != 0 {
			if index <= after {
				c.t.Errorf("%s: an answer of entry %d, and entry %d was answered before", subject.name(), index, after)
			}
			out.from, out.to = index, index
		}
	}
	c.record(c.id, subject, ask, out, call)
	if !a.Unknown {
		c.ownWrite(a, subject)
	}
	return out.said
}

// sentinel is what kind of a refusal it is.
func sentinel(err error) error {
	for _, kind := range []error{flox.ErrBadInput, flox.ErrNotFound, flox.ErrBusy, flox.ErrDenied, flox.ErrFull} {
		if errors.Is(err, kind) {
			return kind
		}
	}
	return err
}

// mayGiveUp says whether one client more may not wait for an answer about a subject:
// with many whose answer nobody knows the checker does not come to an end.
func (s *simulation) mayGiveUp(subject simSubject) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	unknown := 0
	for _, o := range s.history[subject] {
		if o.Output.(simAnswer).unknown {
			unknown++
		}
	}
	return unknown < simUnknown
}

// near is the last index that was answered.
func (s *simulation) near() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.acked) == 0 {
		return 0
	}
	return s.acked[len(s.acked)-1].index
}

// answered gives the newest index that was answered by a time.
func (s *simulation) answered(by time.Duration) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, _ := slices.BinarySearchFunc(s.acked, by, func(a simAck, by time.Duration) int { return cmp.Compare(a.at, by) })
	if i == 0 {
		return 0
	}
	return s.acked[i-1].index
}

// ownWrite looks that an answer is in the state of the server that gave it.
func (s *simulation) ownWrite(a raftsim.Answer, subject simSubject) {
	s.mu.Lock()
	if last := len(s.acked) - 1; last < 0 || s.acked[last].index < a.Index {
		s.acked = append(s.acked, simAck{s.Age(), a.Index})
	}
	s.mu.Unlock()
	if has := a.Node.Applied(); has < a.Index {
		s.t.Errorf("%s was answered at %d by a server whose state is that of %d", subject.name(), a.Index, has)
	}
}

// record adds to a subject's history.
func (s *simulation) record(client int, subject simSubject, ask any, a simAnswer, call time.Duration) {
	end := int64(math.MaxInt64)
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.unknown {
		s.unknown++
	} else {
		end = s.Age().Nanoseconds()
	}
	s.history[subject] = append(s.history[subject], porcupine.Operation{ClientId: client, Input: ask, Call: call.Nanoseconds(), Output: a, Return: end})
}

// read asks a server how a subject is, of all that was answered.
func (c *simClient) read(n *cluster.Node, subject simSubject) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	how := cluster.Linearizable
	if c.careless == subject.part {
		how = cluster.Local
	}
	call := c.Age()
	v, err := n.View(ctx, subject.kind(), how)
	if err != nil {
		return false
	}
	_, ok := c.look(v, n, subject, call)
	return ok
}

// look records what a view says, gives it, and closes the view.
func (c *simClient) look(v *cluster.Reader, n *cluster.Node, subject simSubject, call time.Duration) (said any, ok bool) {
	said, err := subject.part.read(v, subject)
	if err := errors.Join(err, v.Close()); err != nil {
		c.t.Errorf("read %s: %v", subject.name(), err)
		return nil, false
	}
	c.record(c.id, subject, simLook{}, simAnswer{said: said, from: v.Index(), to: v.Index()}, call)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen[n] = max(c.seen[n], v.Index())
	return said, true
}

// readStale asks a server for a state of some age at most. It must be one that
// there was, hold all that was answered longer ago, and be none before one that this
// server showed already.
func (c *simClient) readStale(subject simSubject) {
	ages := []time.Duration{0, 100 * time.Millisecond, 2 * time.Second, 20 * time.Second}
	n, age := c.Any(c.rng), ages[c.rng.IntN(len(ages))]
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c.mu.Lock()
	shown := c.seen[n]
	c.mu.Unlock()
	asked := max(c.Age()-age, 0)
	must := c.answered(asked)
	view := n.ViewWithin
	if c.careless != nil {
		view = func(ctx context.Context, kind uint32, _ time.Duration) (*cluster.Reader, error) {
			return n.View(ctx, kind, cluster.Local)
		}
	}
	v, err := view(ctx, subject.kind(), age)
	if err != nil {
		return // it says that it cannot tell
	}
	c.mu.Lock()
	c.stale++
	if v.Index() < must || v.Index() < shown {
		c.tooOld = fmt.Errorf("a state of %v ago at most is that of entry %d; then %d was answered already, and this server had shown %d: %w",
			age, v.Index(), must, shown, flox.ErrCorrupt)
	}
	c.mu.Unlock()
	c.look(v, n, subject, asked) // as if it had been asked then
}

// kind is the kind of a subject's facts.
func (s simSubject) kind() uint32 {
	_, c := s.part.ask(rand.New(rand.NewPCG(1, 1)), s, 0)
	return c.kind
}

// run lets clients work while things go wrong, and then compares the servers.
func (s *simulation) run(length time.Duration) {
	s.Run(length, simClients, s.client)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	records, err := s.Compare(ctx)
	if err != nil || records == 0 {
		s.t.Errorf("%d records: %v", records, err)
	}
	s.agree()
	some := s.Nodes()[0]
	s.audit, s.counts, s.profiles = s.auditAgrees(some), s.countsAgree(some), s.profilesAgree(some)
	s.Stop()
}

// agree reads the last subjects on every server into the history, when all is over.
func (s *simulation) agree() {
	last := s.epoch()
	for part := range simParts {
		for back := range 2 * min(last+1, simLast) {
			for i, n := range s.Nodes() {
				c := &simClient{simulation: s, id: simClients + i}
				if !c.read(n, subjectAt(part, last-back/2, back%2)) {
					s.t.Errorf("server %d does not answer when all is over", i)
				}
			}
		}
	}
}

// judge gives the subjects whose history no order of what was asked explains.
func (s *simulation) judge(t *testing.T) (wrong []simSubject) {
	t.Helper()
	asked, longest := 0, 0
	for subject, history := range s.history {
		asked += len(history)
		longest = max(longest, len(history))
		switch got := porcupine.CheckOperationsTimeout(simModel(subject.part), history, time.Minute); got {
		case porcupine.Ok:
		case porcupine.Illegal:
			wrong = append(wrong, subject)
		case porcupine.Unknown:
			t.Errorf("%s: %d operations are too many for the checker", subject.name(), len(history))
		}
	}
	t.Logf("%d operations on %d subjects, at most %d on one; %d unanswered, %d from states that may be old; faults: %v",
		asked, len(s.history), longest, s.unknown, s.stale, s.Faults())
	if asked == 0 || s.unknown == 0 || s.stale == 0 || len(s.Faults()) < 3 {
		t.Error("too little happened")
	}
	return wrong
}

// story is the history of a subject, for who has to find out what was wrong.
func (s *simulation) story(subject simSubject) (text string) {
	slices.SortFunc(s.history[subject], func(a, b porcupine.Operation) int {
		return cmp.Or(cmp.Compare(a.Output.(simAnswer).to, b.Output.(simAnswer).to), cmp.Compare(a.Call, b.Call))
	})
	for _, o := range s.history[subject] {
		a := o.Output.(simAnswer)
		end := "never"
		if !a.unknown {
			end = time.Duration(o.Return).String()
		}
		text += fmt.Sprintf("\n%v to %s: client %d asked %+v, was told %+v, entry %d to %d", time.Duration(o.Call), end, o.ClientId, o.Input, a.said, a.from, a.to)
	}
	return text
}

// The facts of a storehouse on five servers, over two hours (HOURS=250 for the long
// form) of partitions, also one-way ones, crashes that lose unwritten state,
// snapshots, hand-overs, servers that are replaced, and two of them at once: no
// acknowledged command is lost, doubled or out of order, what is read as up to date
// is linearizable, what may be old is no older than that, and in the end all servers
// have the same, record for record.
func TestSimulation(t *testing.T) {
	t.Parallel()
	raftsim.Stretches(t, 2*time.Hour, 10*time.Minute, func(cfg raftsim.Config, length time.Duration) {
		var s *simulation
		synctest.Test(t, func(t *testing.T) {
			s = newSimulation(t, cfg, nil)
			s.run(length)
		})
		if err := errors.Join(s.audit, s.counts, s.profiles, s.tooOld); err != nil {
			t.Error(err)
		}
		for _, subject := range s.judge(t) {
			t.Errorf("%s is no possible history:%s", subject.name(), s.story(subject))
		}
	})
}
