package raftsim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/raft"
)

// Servers is how many servers a Cluster has.
const Servers = 5

// Config says what a Cluster runs. Dir and Register are needed.
type Config struct {
	// Dir is where the servers' directories are made; see Dir.
	Dir string
	// Seed is of the network and the faults; the order of goroutines is the scheduler's.
	Seed uint64
	// Level is that of the servers' program; 0 = raft's default.
	Level uint32
	// Register registers the Processors of a server that is about to run.
	Register func(*raft.Node)
}

// Cluster is five servers, their network, and what goes wrong.
type Cluster struct {
	t       testing.TB
	cfg     Config
	rng     *rand.Rand
	net     *network
	started time.Time
	made    int // servers ever
	faults  map[string]int

	mu      sync.Mutex
	servers []*server
}

// server is one server over its crashes.
type server struct {
	cfg    raft.Config
	node   *raft.Node // nil = it is down
	cancel context.CancelFunc
	result chan error
}

// New starts five servers that all vote. It is called in the bubble.
func New(t testing.TB, cfg Config) *Cluster {
	t.Helper()
	c := &Cluster{
		t: t, cfg: cfg, rng: rand.New(rand.NewPCG(cfg.Seed, 1)), net: newNetwork(rand.New(rand.NewPCG(cfg.Seed, 2))),
		started: time.Now(), faults: map[string]int{},
	}
	for i := range Servers {
		v := &server{cfg: c.config(i == 0)}
		c.servers = append(c.servers, v)
		c.boot(v)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	first := c.servers[0].node
	if err := first.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	for _, v := range c.servers[1:] {
		if err := first.AddServer(ctx, v.cfg.ID, v.cfg.Address, true); err != nil {
			t.Fatal(err)
		}
	}
	c.voters(ctx)
	return c
}

// voters waits until all servers are healthy voters.
func (c *Cluster) voters(ctx context.Context) {
	for ctx.Err() == nil {
		list, _ := c.servers[0].node.Servers(ctx)
		have := 0
		for _, m := range list {
			if m.Voter && m.Healthy {
				have++
			}
		}
		if have == Servers {
			return
		}
		time.Sleep(time.Second)
	}
	c.t.Errorf("not %d healthy voters", Servers)
}

func (c *Cluster) config(bootstrap bool) raft.Config {
	c.made++
	id := fmt.Sprint("s", c.made)
	return raft.Config{
		Dir: filepath.Join(c.cfg.Dir, id), ID: id, Address: id, Bootstrap: bootstrap, ReserveBytes: 1, Heartbeat: 2 * time.Second,
		SnapshotEvery: 50, SnapshotCheck: 5 * time.Second, KeepEntries: 16, DeadAfter: 30 * time.Second, CacheBytes: 8 << 20,
		Level: c.cfg.Level, Log: slog.New(slog.DiscardHandler), Hooks: &raft.Hooks{Crash: make(chan func(), 1), SegmentBytes: 64 << 10},
	}
}

// boot starts a server, again or for the first time.
func (c *Cluster) boot(v *server) {
	v.cfg.Layer = c.net.listen(v.cfg.Address)
	n, err := raft.Open(v.cfg)
	if err != nil {
		c.t.Errorf("server %s does not start: %v", v.cfg.ID, err)
		return
	}
	c.cfg.Register(n)
	ctx, cancel := context.WithCancel(context.Background())
	v.cancel, v.result = cancel, make(chan error, 1)
	go func() { v.result <- n.Run(ctx) }()
	c.mu.Lock()
	v.node = n
	c.mu.Unlock()
}

// crash ends a server as a kill would: without a word to the others, and
// without what its state had not written yet.
func (c *Cluster) crash(v *server) {
	c.mu.Lock()
	v.node = nil
	c.mu.Unlock()
	state, left := filepath.Join(v.cfg.Dir, "state"), filepath.Join(c.cfg.Dir, "left")
	copied := error(nil)
	v.cfg.Hooks.Crash <- func() { copied = os.CopyFS(left, os.DirFS(state)) }
	if err := <-v.result; err != nil {
		c.t.Errorf("server %s: %v", v.cfg.ID, err)
	}
	v.cancel()
	if copied == nil {
		copied = errors.Join(os.RemoveAll(state), os.Rename(left, state))
	}
	if copied != nil {
		c.t.Errorf("crash of %s: %v", v.cfg.ID, copied)
	}
}

// Run lets clients work while things go wrong, one or two of them at a time, until
// the cluster is length old.
// work is one client: it must return soon after ctx ends. When Run returns, all
// servers are up and reach each other.
func (c *Cluster) Run(length time.Duration, clients int, work func(ctx context.Context, client int, rng *rand.Rand)) {
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for i := range clients {
		rng := rand.New(rand.NewPCG(uint64(i), c.rng.Uint64()))
		all.Go(func() { work(ctx, i, rng) })
	}
	for c.Age() < length {
		c.harm(ctx)
		c.pause(10)
		if c.rng.IntN(2) == 0 {
			c.faults["another beside it"]++
			c.harm(ctx)
		}
		c.pause(10)
		c.mend()
		time.Sleep(time.Duration(c.rng.IntN(10)) * time.Second)
	}
	cancel()
	all.Wait()
}

// pause lets at least a second go by, and at most that many.
func (c *Cluster) pause(seconds int) {
	time.Sleep(time.Duration(1+c.rng.IntN(seconds)) * time.Second)
}

// Stop ends the servers.
func (c *Cluster) Stop() {
	for _, v := range c.servers {
		v.cancel()
		if err := <-v.result; err != nil {
			c.t.Errorf("server %s: %v", v.cfg.ID, err)
		}
	}
}

// Age is how long ago, in simulated time, the cluster began.
func (c *Cluster) Age() time.Duration { return time.Since(c.started) }

// Faults says how often what went wrong.
func (c *Cluster) Faults() map[string]int { return c.faults }

// Any gives one of the servers that are up.
func (c *Cluster) Any(rng *rand.Rand) *raft.Node {
	up := c.Nodes()
	return up[rng.IntN(len(up))]
}

// Nodes gives the servers that are up.
func (c *Cluster) Nodes() (up []*raft.Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, v := range c.servers {
		if v.node != nil {
			up = append(up, v.node)
		}
	}
	return up
}

// Answer is what a client was told of its command.
type Answer struct {
	Reply   []byte
	Index   uint64     // at which the state holds it; later than its own entry if it was repeated
	Node    *raft.Node // who answered
	Refused error      // wraps raft.ErrRefused
	Unknown bool       // nobody said in time what became of it
}

// Propose has a command carried out, over as many servers and tries as it takes
// until ctx ends. Errors that no fault explains fail the test.
func (c *Cluster) Propose(ctx context.Context, rng *rand.Rand, kind uint32, command []byte, opt raft.ProposeOptions) Answer {
	for ctx.Err() == nil {
		n := c.Any(rng)
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		reply, index, err := n.Propose(try, kind, command, opt)
		cancel()
		switch {
		case err == nil:
			return Answer{Reply: reply, Index: index, Node: n}
		case errors.Is(err, raft.ErrSessionExpired):
			c.t.Errorf("session %s: %v", opt.Session, err)
			return Answer{Unknown: true}
		case errors.Is(err, raft.ErrRefused):
			return Answer{Refused: err, Index: index, Node: n}
		case errors.Is(err, raft.ErrUnknownOutcome), errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLevel),
			errors.Is(err, flox.ErrClosed), errors.Is(err, flox.ErrBusy):
			time.Sleep(50 * time.Millisecond)
		default:
			c.t.Errorf("propose: %v", err)
			return Answer{Unknown: true}
		}
	}
	return Answer{Unknown: true}
}

// Compare looks that the whole states of all servers are equal at one log index,
// record for record, and says how many records that are. It waits, until ctx
// ends, for the servers to have applied the same.
func (c *Cluster) Compare(ctx context.Context) (records int, err error) {
	for {
		indexes, states, err := c.states(ctx)
		if err != nil {
			return 0, err
		}
		same := len(states) == Servers
		for _, i := range indexes {
			same = same && i == indexes[0]
		}
		if same {
			for i, s := range states[1:] {
				if err := differ(states[0], s); err != nil {
					return 0, fmt.Errorf("servers %s and %s at entry %d: %w", c.servers[0].cfg.ID, c.servers[i+1].cfg.ID, indexes[0], err)
				}
			}
			return len(states[0]), nil
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return 0, fmt.Errorf("%d servers at the entries %v, want %d at one: %w", len(states), indexes, Servers, ctx.Err())
		}
	}
}

// record is one of a state.
type record struct{ key, value []byte }

// states reads the whole states of all servers.
func (c *Cluster) states(ctx context.Context) (indexes []uint64, states [][]record, err error) {
	for _, n := range c.Nodes() {
		s, err := n.Freeze(ctx)
		if err != nil {
			return nil, nil, err
		}
		var all []record
		err = s.Each(ctx, func(key, value []byte) error {
			if !raft.IsLocal(key) {
				all = append(all, record{bytes.Clone(key), bytes.Clone(value)})
			}
			return nil
		})
		indexes, states = append(indexes, s.Index()), append(states, all)
		if err := errors.Join(err, s.Close()); err != nil {
			return nil, nil, err
		}
	}
	return indexes, states, nil
}

// differ names the first record in which two states differ.
func differ(a, b []record) error {
	for i := range min(len(a), len(b)) {
		if !bytes.Equal(a[i].key, b[i].key) || !bytes.Equal(a[i].value, b[i].value) {
			return fmt.Errorf("record %d is %q = %.200q and %q = %.200q: %w", i, a[i].key, a[i].value, b[i].key, b[i].value, flox.ErrCorrupt)
		}
	}
	if len(a) != len(b) {
		return fmt.Errorf("%d and %d records: %w", len(a), len(b), flox.ErrCorrupt)
	}
	return nil
}

// Dir makes a directory where crashes cost nothing, if there is such a place: a
// simulated crash loses what a process holds, not what a kernel does. It is
// removed when the test ends.
func Dir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "raft-sim-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) }) //nolint:errcheck // as good as it goes
	return dir
}
