package raft

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/floxctl/flox"
)

// spoil flips a bit of a random file of a server, or cuts it short.
func spoil(t *testing.T, rng *rand.Rand, dir string) string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && d.Name() != "lock" {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for {
		path := files[rng.IntN(len(files))]
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) == 0 {
			continue
		}
		// Files are mostly zero behind their content, where nothing can be wrong.
		at, what := rng.IntN(len(b)), "flip"
		for try := 0; b[at] == 0 && try < 200; try++ {
			at = rng.IntN(len(b))
		}
		if rng.IntN(4) == 0 {
			b, what = b[:at], "cut"
		} else {
			b[at] ^= 1 << rng.IntN(8)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%s of %s at %d", what, path, at)
	}
}

// dump gives a server's state of the test kind.
func dump(n *Node) (map[string]string, error) {
	v, err := n.View(context.Background(), testKind, Local)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	all := map[string]string{}
	err = v.Iterate(nil, nil, func(k, value []byte) bool { all[string(k)] = string(value); return true })
	return all, err
}

// comesBack starts a server whose files were spoiled and reports whether it runs
// with the state that the others have; if not, it ended with an error.
func (c *cluster) comesBack(i int, what string) bool {
	c.t.Helper()
	c.listen(i)
	n, err := Open(c.cfg[i])
	if err != nil {
		c.cfg[i].Layer.Close()
		return false
	}
	n.Register(testKind, counter{})
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- n.Run(ctx) }()
	c.nodes[i], c.away[i] = n, false
	c.stop[i] = func() error { c.away[i] = true; cancel(); return <-result }
	c.t.Cleanup(func() { cancel() })
	leader := c.nodes[c.leader()]
	wait, stop := context.WithTimeout(ctx, 30*time.Second)
	defer stop()
	_, err = n.Wait(wait, leader.Applied())
	if err == nil {
		want, err1 := dump(leader)
		got, err2 := dump(n)
		if err = errors.Join(err1, err2); err == nil && !maps.Equal(got, want) {
			c.t.Fatalf("after a %s, server %d has %q, the leader %q", what, i, got, want)
		}
	}
	if err == nil {
		return true
	}
	if wait.Err() != nil {
		c.t.Fatalf("after a %s, server %d neither runs nor ends: %+v", what, i, n.Status())
	}
	if err := c.stop[i](); !errors.Is(err, flox.ErrCorrupt) && !errors.Is(err, ErrUnknownCommand) {
		c.t.Errorf("after a %s, server %d ended with %v, want ErrCorrupt", what, i, err)
	}
	return false
}

// replace has a server that was damaged begin anew.
func (c *cluster) replace(i int, what string) {
	c.t.Helper()
	if !c.away[i] {
		_ = c.stop[i]() // which may find the damage now
	}
	if err := Discard(c.cfg[i].Dir); err != nil {
		c.t.Fatal(err)
	}
	if !c.comesBack(i, "discard") {
		c.t.Fatalf("server %d does not come back after %s", i, what)
	}
	c.until("it votes again", func(s []ServerStatus) bool { m := byID(s, c.cfg[i].ID); return m.Voter && m.Healthy })
}

// Random flips and cuts in the files of one of three servers (ROT=1000 for
// the long form): it runs with the same state as the others, or ends with an
// error; then what it has is discarded, and it is a voter again with the state of
// the others. The process never ends, nothing wrong is ever served.
func TestRot(t *testing.T) {
	t.Parallel()
	rounds := 12
	if testing.Short() { // as under the race detector
		rounds = 3
	}
	if n, err := strconv.Atoi(os.Getenv("ROT")); err == nil {
		rounds = n
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	c := newCluster(t, func(cfg *Config) {
		cfg.SnapshotEvery = 1 << 30
		cfg.KeepEntries = 16
		cfg.Hooks = &Hooks{SegmentBytes: 4096}
	})
	found := 0
	for round := range rounds {
		leader := c.leader()
		for i := range 20 {
			if _, _, err := c.nodes[leader].NewSession().Propose(within(t), testKind, fmt.Appendf(nil, "add k%d", i%7)); err != nil {
				t.Fatal(err)
			}
		}
		bad := (leader + 1 + round%2) % 3
		if round%3 == 0 {
			for _, n := range []*Node{c.nodes[leader], c.nodes[bad]} {
				if err := n.Snapshot(within(t)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := c.stop[bad](); err != nil {
			t.Fatal(err)
		}
		what := spoil(t, rng, c.cfg[bad].Dir)
		if !c.comesBack(bad, what) {
			found++
		}
		// Also where nobody read what is damaged: two servers of three must not be.
		c.replace(bad, what)
	}
	t.Logf("%d of %d were found", found, rounds)
}

// A server that was discarded gives no vote and begins no cluster until the
// leader has taken its vote away: it may have voted before.
func TestDiscardedDoesNotVote(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	leader := c.leader()
	lost, other := (leader+1)%3, (leader+2)%3
	add(t, c.nodes[leader], "x", ProposeOptions{})
	if err := c.stop[lost](); err != nil {
		t.Fatal(err)
	}
	if err := Discard(c.cfg[lost].Dir); err != nil {
		t.Fatal(err)
	}
	if err := c.stop[other](); err != nil {
		t.Fatal(err)
	}
	if err := c.stop[leader](); err != nil {
		t.Fatal(err)
	}
	c.cfg[lost].Bootstrap = true
	c.start(lost)
	n := c.nodes[lost]
	c.start(leader)
	// Two of three would be enough if it voted.
	ctx, cancel := context.WithTimeout(context.Background(), 6*c.cfg[0].Heartbeat)
	defer cancel()
	if _, err := c.nodes[leader].ReadIndex(ctx); err == nil {
		t.Fatal("a server without memory voted")
	}
	if n.Status().State == "leader" {
		t.Fatal("a server without memory leads")
	}
	c.start(other)
	c.until("all vote again", func(s []ServerStatus) bool {
		m := byID(s, c.cfg[lost].ID)
		_, err := os.Stat(filepath.Join(c.cfg[lost].Dir, rejoinFile))
		return m.Voter && m.Healthy && errors.Is(err, os.ErrNotExist)
	})
	if got := count(t, n, Linearizable, "x"); got != 1 {
		t.Errorf("count %d, want 1", got)
	}
}

// Rot in an entry's head, which the sum inside it does not cover, in a term and
// in a vote is found.
func TestLogSums(t *testing.T) {
	t.Parallel()
	n, stop := single(t, t.TempDir())
	add(t, n, "x", ProposeOptions{})
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	n, err := Open(n.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	last, err := n.log.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	var l raft.Log
	if err := n.log.GetLog(last, &l); err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*raft.Log){
		"term": func(l *raft.Log) { l.Term++ }, "type": func(l *raft.Log) { l.Type++ },
		"index": func(l *raft.Log) { l.Index++ }, "data": func(l *raft.Log) { l.Data = append(l.Data, 0) },
	} {
		bad := l
		edit(&bad)
		if err := checkEntry(last, &bad); !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", name, err)
		}
	}
	key := []byte("CurrentTerm")
	if err := n.log.WAL.Set(summedKey(key), append(make([]byte, 7), 9, 0, 0, 0, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := n.log.GetUint64(key); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("term: %v, want ErrCorrupt", err)
	}
}

// What is given up stays until the state is back from the others, also when it is
// given up twice.
func TestDiscardKeepsWhatThereWas(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	lost := (c.leader() + 1) % 3
	add(t, c.nodes[c.leader()], "x", ProposeOptions{})
	if err := c.stop[lost](); err != nil {
		t.Fatal(err)
	}
	dir := c.cfg[lost].Dir
	exists := func(name ...string) bool {
		_, err := os.Stat(filepath.Join(append([]string{dir}, name...)...))
		return err == nil
	}
	for range 2 {
		if err := Discard(dir); err != nil {
			t.Fatal(err)
		}
		for _, part := range []string{"log", "state"} {
			if exists(part) || !exists(asideDir, part) {
				t.Fatalf("%s: there %v, kept %v", part, exists(part), exists(asideDir, part))
			}
		}
		if there, err := filepath.Glob(filepath.Join(dir, asideDir, "state", "*", "*")); len(there) == 0 {
			t.Fatalf("what is kept is empty: %v", err)
		}
		if err := os.Mkdir(filepath.Join(dir, "state"), 0o700); err != nil { // as a start that was killed leaves it
			t.Fatal(err)
		}
	}
	c.start(lost)
	c.until("it votes again and keeps nothing", func(s []ServerStatus) bool {
		m := byID(s, c.cfg[lost].ID)
		return m.Voter && m.Healthy && !exists(asideDir)
	})
	if got := count(t, c.nodes[lost], Linearizable, "x"); got != 1 {
		t.Errorf("count %d, want 1", got)
	}
}
