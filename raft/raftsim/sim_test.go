package raftsim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/raft"
)

const (
	simKind    = 7
	simClients = 5
	// simEpoch is how long clients stay with the same keys: it bounds the
	// histories that the checker has to search.
	simEpoch = 2 * time.Minute
	simKeys  = 2 // at a time
)

// counter is a state of numbers; a command is the key of the one to raise.
type counter struct{}

func (counter) Apply(tx *raft.Tx, command []byte, _ time.Time, _ uint64) ([]byte, error) {
	n := uint64(0)
	b, err := tx.Get(command)
	switch {
	case err == nil:
		n = binary.BigEndian.Uint64(b)
	case !errors.Is(err, flox.ErrNotFound):
		return nil, err
	}
	b = binary.BigEndian.AppendUint64(nil, n+1)
	return b, tx.Set(command, b)
}

// simOp is what a client asked of a key: to count, or how far it is.
type simOp struct {
	key string
	add bool
}

// simAnswer is what it was told.
type simAnswer struct {
	count   uint64
	unknown bool
}

// simModel is one key: a number that every add raises by one and answers.
func simModel() porcupine.Model {
	return porcupine.Model{
		Partition: func(history []porcupine.Operation) (parts [][]porcupine.Operation) {
			byKey := map[string][]porcupine.Operation{}
			for _, o := range history {
				key := o.Input.(simOp).key
				byKey[key] = append(byKey[key], o)
			}
			for _, p := range byKey {
				parts = append(parts, p)
			}
			return parts
		},
		Init: func() any { return uint64(0) },
		Step: func(state, input, output any) (bool, any) {
			n, in, out := state.(uint64), input.(simOp), output.(simAnswer)
			if in.add {
				n++
			}
			return out.unknown || out.count == n, n
		},
	}
}

// sim is a cluster, what its clients were told, and when.
type sim struct {
	*Cluster
	t     *testing.T
	blind bool // the negative control: clients repeat themselves without a session

	mu      sync.Mutex
	history []porcupine.Operation
}

// newSim is called in the bubble.
func newSim(t *testing.T, dir string, seed uint64) *sim {
	return &sim{t: t, Cluster: New(t, Config{Dir: dir, Seed: seed, Register: func(n *raft.Node) { n.Register(simKind, counter{}) }})}
}

func (s *sim) record(client int, op simOp, a simAnswer, call time.Duration) {
	end := int64(math.MaxInt64)
	if !a.unknown {
		end = s.Age().Nanoseconds()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.history = append(s.history, porcupine.Operation{ClientId: client, Input: op, Call: call.Nanoseconds(), Output: a, Return: end})
}

// client counts and reads, through whichever server, until ctx ends.
func (s *sim) client(ctx context.Context, id int, rng *rand.Rand) {
	for i := 0; ctx.Err() == nil; i++ {
		time.Sleep(time.Duration(rng.IntN(4000)) * time.Millisecond)
		op := simOp{key: fmt.Sprintf("e%d-%d", s.Age()/simEpoch, rng.IntN(simKeys)), add: rng.IntN(3) > 0}
		call := s.Age()
		if op.add {
			s.record(id, op, s.add(rng, op.key, fmt.Sprintf("c%d-%d", id, i)), call)
			continue
		}
		if n, ok := s.read(s.Any(rng), op.key); ok {
			s.record(id, op, simAnswer{count: n}, call)
		}
	}
}

// add counts once.
func (s *sim) add(rng *rand.Rand, key, session string) simAnswer {
	opt := raft.ProposeOptions{Session: session, Sequence: 1}
	if s.blind {
		opt = raft.ProposeOptions{}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	a := s.Propose(ctx, rng, simKind, []byte(key), opt)
	if a.Refused != nil {
		s.t.Errorf("add %s: %v", key, a.Refused)
	}
	if a.Unknown || a.Refused != nil {
		return simAnswer{unknown: true}
	}
	got := binary.BigEndian.Uint64(a.Reply)
	s.ownWrite(a.Node, key, got, a.Index)
	return simAnswer{count: got}
}

// ownWrite looks that a write is in the state of the server that answered it.
func (s *sim) ownWrite(n *raft.Node, key string, want, index uint64) {
	v, err := n.View(context.Background(), simKind, raft.Local)
	if err != nil {
		return // it went down meanwhile
	}
	defer v.Close()
	b, err := v.Get([]byte(key))
	if err != nil || binary.BigEndian.Uint64(b) < want || v.Index() < index {
		s.t.Errorf("%s was answered %d at %d, and the server has %v %v at %d", key, want, index, b, err, v.Index())
	}
}

// read asks for a key, of all that was answered.
func (s *sim) read(n *raft.Node, key string) (uint64, bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	v, err := n.View(ctx, simKind, raft.Linearizable)
	if err != nil {
		return 0, false
	}
	defer v.Close()
	b, err := v.Get([]byte(key))
	switch {
	case errors.Is(err, flox.ErrNotFound):
		return 0, true
	case err != nil:
		s.t.Errorf("read %s: %v", key, err)
		return 0, false
	}
	return binary.BigEndian.Uint64(b), true
}

// run lets clients work while things go wrong, and then compares the servers.
func (s *sim) run(length time.Duration) {
	s.Run(length, simClients, s.client)
	s.agree()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	records, err := s.Compare(ctx)
	if err != nil || records == 0 {
		s.t.Errorf("%d records: %v", records, err)
	}
	s.Stop()
}

// agree reads every key of the last epochs on every server into the history,
// when all is over.
func (s *sim) agree() {
	last := int(s.Age() / simEpoch)
	for epoch := max(0, last-5); epoch <= last; epoch++ {
		for k := range simKeys {
			op := simOp{key: fmt.Sprintf("e%d-%d", epoch, k)}
			for i, v := range s.Nodes() {
				call := s.Age()
				n, ok := s.read(v, op.key)
				if !ok {
					s.t.Errorf("server %d does not answer when all is over", i)
					continue
				}
				s.record(simClients+i, op, simAnswer{count: n}, call)
			}
		}
	}
}

// Five servers over twenty minutes (HOURS says how many hours instead) of
// partitions, also one-way ones, crashes that lose unwritten state, snapshots,
// hand-overs, and servers that are replaced: no acknowledged write is lost, doubled
// or out of order, and every read is linearizable. The storehouse's own test has its
// facts in place of the counter, and hours.
func TestSimulation(t *testing.T) {
	Stretches(t, 20*time.Minute, 12*time.Minute, func(cfg Config, length time.Duration) {
		var s *sim
		synctest.Test(t, func(t *testing.T) {
			s = newSim(t, cfg.Dir, cfg.Seed)
			s.run(length)
		})
		checkSim(t, s, porcupine.Ok)
	})
}

// checkSim has the history judged.
func checkSim(t *testing.T, s *sim, want porcupine.CheckResult) {
	t.Helper()
	acked, unknown := 0, 0
	for _, o := range s.history {
		if o.Output.(simAnswer).unknown {
			unknown++
		} else {
			acked++
		}
	}
	t.Logf("%d operations answered, %d not, faults: %v", acked, unknown, s.Faults())
	if acked == 0 || len(s.Faults()) < 3 {
		t.Error("nothing happened")
	}
	if got := porcupine.CheckOperationsTimeout(simModel(), s.history, 10*time.Minute); got != want {
		t.Errorf("history is %s, want %s", got, want)
	}
}

// The negative control: clients that repeat themselves without a session count
// twice, and the checker says so.
func TestSimulationCanFail(t *testing.T) {
	var s *sim
	dir := Dir(t)
	synctest.Test(t, func(t *testing.T) {
		s = newSim(t, dir, 7)
		s.blind = true
		s.run(20 * time.Minute)
	})
	checkSim(t, s, porcupine.Illegal)
}

// dice is a processor that breaks the rules: each server writes another number.
type dice struct{ counter }

func (d dice) Apply(tx *raft.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	if err := tx.Set([]byte("dice"), binary.BigEndian.AppendUint64(nil, rand.Uint64())); err != nil {
		return nil, err
	}
	return d.counter.Apply(tx, command, at, index)
}

// The negative control of Compare: servers that differ in one record.
func TestCompareCanFail(t *testing.T) {
	dir := Dir(t)
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Config{Dir: dir, Seed: 1, Register: func(n *raft.Node) { n.Register(simKind, dice{}) }})
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		c.Propose(ctx, rand.New(rand.NewPCG(1, 1)), simKind, []byte("k"), raft.ProposeOptions{})
		if n, err := c.Compare(ctx); !errors.Is(err, flox.ErrCorrupt) || !strings.Contains(err.Error(), "dice") {
			t.Errorf("%d records, %v, want a difference in what is called dice", n, err)
		}
		c.Stop()
	})
}
