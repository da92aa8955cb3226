package raft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/floxctl/flox"
)

const (
	simServers = 5
	simClients = 5
	// simEpoch is how long clients stay with the same keys: it bounds the
	// histories that the checker has to search.
	simEpoch = 2 * time.Minute
	simKeys  = 2 // at a time
)

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

// sim is five servers, their network, their clients, and what goes wrong.
type sim struct {
	t       *testing.T
	rng     *rand.Rand
	net     *simNet
	dir     string
	blind   bool // the negative control: clients repeat themselves without a session
	started time.Time

	mu      sync.Mutex
	servers []*simServer
	made    int // servers ever
	history []porcupine.Operation
	faults  map[string]int
}

// simServer is one server over its crashes.
type simServer struct {
	cfg    Config
	node   *Node // nil = it is down
	cancel context.CancelFunc
	result chan error
}

func (s *sim) config(bootstrap bool) Config {
	s.made++
	id := fmt.Sprint("s", s.made)
	return Config{
		Dir: filepath.Join(s.dir, id), ID: id, Address: id, Bootstrap: bootstrap, ReserveBytes: 1, Heartbeat: 2 * time.Second,
		SnapshotEvery: 50, SnapshotCheck: 5 * time.Second, KeepEntries: 16, DeadAfter: 30 * time.Second, CacheBytes: 8 << 20,
		segmentBytes: 64 << 10, Log: slog.New(slog.DiscardHandler), crash: make(chan func(), 1),
	}
}

// boot starts a server, again or for the first time.
func (s *sim) boot(v *simServer) {
	v.cfg.Layer = s.net.listen(v.cfg.Address)
	n, err := Open(v.cfg)
	if err != nil {
		s.t.Errorf("server %s does not start: %v", v.cfg.ID, err)
		return
	}
	n.Register(testKind, counter{})
	ctx, cancel := context.WithCancel(context.Background())
	v.cancel, v.result = cancel, make(chan error, 1)
	go func() { v.result <- n.Run(ctx) }()
	s.mu.Lock()
	v.node = n
	s.mu.Unlock()
}

// crash ends a server as a kill would: without a word to the others, and
// without what its state had not written yet.
func (s *sim) crash(v *simServer) {
	s.mu.Lock()
	n := v.node
	v.node = nil
	s.mu.Unlock()
	left := filepath.Join(s.dir, "left")
	copied := error(nil)
	v.cfg.crash <- func() { copied = os.CopyFS(left, os.DirFS(filepath.Join(v.cfg.Dir, "state"))) }
	<-n.machine.closed
	if err := <-v.result; err != nil {
		s.t.Errorf("server %s: %v", v.cfg.ID, err)
	}
	v.cancel()
	if copied == nil {
		copied = errors.Join(os.RemoveAll(filepath.Join(v.cfg.Dir, "state")), os.Rename(left, filepath.Join(v.cfg.Dir, "state")))
	}
	if copied != nil {
		s.t.Errorf("crash of %s: %v", v.cfg.ID, copied)
	}
}

// any gives one of the servers that are up.
func (s *sim) any(rng *rand.Rand) *Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	var up []*Node
	for _, v := range s.servers {
		if v.node != nil {
			up = append(up, v.node)
		}
	}
	return up[rng.IntN(len(up))]
}

func (s *sim) record(client int, op simOp, a simAnswer, call time.Time) {
	end := int64(math.MaxInt64)
	if !a.unknown {
		end = time.Since(s.started).Nanoseconds()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.history = append(s.history, porcupine.Operation{ClientId: client, Input: op, Call: call.Sub(s.started).Nanoseconds(), Output: a, Return: end})
}

// client counts and reads, through whichever server, until ctx ends.
func (s *sim) client(ctx context.Context, id int, rng *rand.Rand) {
	for i := 0; ctx.Err() == nil; i++ {
		time.Sleep(time.Duration(rng.IntN(4000)) * time.Millisecond)
		epoch := time.Since(s.started) / simEpoch
		op := simOp{key: fmt.Sprintf("e%d-%d", epoch, rng.IntN(simKeys)), add: rng.IntN(3) > 0}
		call := time.Now()
		if op.add {
			s.record(id, op, s.add(rng, op.key, fmt.Sprintf("c%d-%d", id, i)), call)
			continue
		}
		if n, ok := s.read(s.any(rng), op.key); ok {
			s.record(id, op, simAnswer{count: n}, call)
		}
	}
}

// add counts once, over as many servers and tries as it takes within a minute.
func (s *sim) add(rng *rand.Rand, key, session string) simAnswer {
	opt := ProposeOptions{Session: session, Sequence: 1}
	if s.blind {
		opt = ProposeOptions{}
	}
	for until := time.Now().Add(time.Minute); time.Now().Before(until); {
		n := s.any(rng)
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		reply, index, err := n.Propose(ctx, testKind, []byte("add "+key), opt)
		cancel()
		switch {
		case err == nil:
			got := binary.BigEndian.Uint64(reply)
			s.ownWrite(n, key, got, index)
			return simAnswer{count: got}
		case errors.Is(err, ErrUnknownOutcome), errors.Is(err, ErrNotLeader), errors.Is(err, flox.ErrClosed), errors.Is(err, flox.ErrBusy):
			time.Sleep(50 * time.Millisecond)
		default:
			s.t.Errorf("add %s: %v", key, err)
		}
	}
	return simAnswer{unknown: true}
}

// ownWrite looks that a write is in the state of the server that answered it.
func (s *sim) ownWrite(n *Node, key string, want, index uint64) {
	v, err := n.View(context.Background(), testKind, Local)
	if err != nil {
		return // it went down meanwhile
	}
	defer v.Close()
	b, err := v.Get([]byte(key))
	if err != nil || binary.BigEndian.Uint64(b) < want || v.Index() < index {
		s.t.Errorf("%s was answered %d at %d, and %s has %v %v at %d", key, want, index, n.cfg.ID, b, err, v.Index())
	}
}

// read asks for a key, of all that was answered.
func (s *sim) read(n *Node, key string) (uint64, bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	v, err := n.View(ctx, testKind, Linearizable)
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
