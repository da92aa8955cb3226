package raft

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
)

// writer is a process that writes as fast as it can and says on standard
// output what was answered. It is killed, so it never ends by itself.
func writer(dir string) {
	n, err := Open(Config{Dir: dir, ID: "a", Bootstrap: true, ReserveBytes: 1, SnapshotEvery: 200, SnapshotCheck: 10 * time.Millisecond, KeepEntries: 50})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	n.Register(testKind, counter{})
	ctx := context.Background()
	go func() {
		fmt.Fprintln(os.Stderr, n.Run(ctx))
		os.Exit(1)
	}()
	if err := n.Ready(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for i := range 8 {
		go func() {
			s := n.NewSession()
			for {
				reply, _, err := s.Propose(ctx, testKind, fmt.Appendf(nil, "add k%d", i))
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				os.Stdout.WriteString(fmt.Sprintf("%d %d\n", i, binary.BigEndian.Uint64(reply)))
			}
		}()
	}
	select {}
}

// kill -9 at any moment, snapshots under way included, loses no answered
// command and applies none twice, and the next start needs no cleaning up.
func TestKillLosesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var acked [8]uint64
	for round := range 5 {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), "RAFT_TEST_WRITER="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		var first [8]bool
		for seen := 0; lines.Scan(); seen++ {
			worker, n, _ := strings.Cut(lines.Text(), " ")
			w, err1 := strconv.Atoi(worker)
			v, err2 := strconv.ParseUint(n, 10, 64)
			if err := errors.Join(err1, err2); err != nil {
				t.Fatal(err)
			}
			// Each worker counts a key of its own, so an answer may skip what was
			// applied but not answered before a kill, and nothing else.
			if v <= acked[w] || (first[w] && v != acked[w]+1) {
				t.Fatalf("round %d: worker %d was answered %d after %d", round, w, v, acked[w])
			}
			acked[w], first[w] = v, true
			if seen == 400+137*round {
				cmd.Process.Signal(syscall.SIGKILL) //nolint:errcheck // may be dead already
			}
		}
		if err := cmd.Wait(); err == nil || cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("round %d: writer ended by itself: %v", round, err)
		}
	}
	n, _ := single(t, dir)
	for w, v := range acked {
		if got := count(t, n, Linearizable, fmt.Sprint("k", w)); got < v || got > v+5 {
			t.Errorf("worker %d: %d applied, %d answered", w, got, v)
		}
	}
}

// cluster is some servers over loopback, three at first.
type cluster struct {
	t     *testing.T
	nodes []*Node
	stop  []func() error
	cfg   []Config
	away  []bool
	trip  time.Duration // a round trip between servers takes longer by this, and a connection three
}

// spare makes room for one more server and gives its number.
func (c *cluster) spare(cfg Config) int {
	c.nodes, c.stop, c.cfg, c.away = append(c.nodes, nil), append(c.stop, nil), append(c.cfg, cfg), append(c.away, true)
	return len(c.cfg) - 1
}

func (c *cluster) listen(i int) {
	c.t.Helper()
	address := "127.0.0.1:0"
	if c.cfg[i].Address != "" {
		address = c.cfg[i].Address
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		c.t.Fatal(err)
	}
	c.cfg[i].Layer, c.cfg[i].Address = tcpLayer{l, 3 * c.trip}, l.Addr().String()
	if c.trip > 0 {
		c.cfg[i].Address = slowLine(c.t, c.cfg[i].Address, c.trip/2)
	}
}

func (c *cluster) start(i int) {
	c.t.Helper()
	c.listen(i)
	n, stop := start(c.t, c.cfg[i])
	c.nodes[i], c.away[i] = n, false
	c.stop[i] = func() error { c.away[i] = true; return stop() }
}

// newCluster starts three servers that agree.
func newCluster(t *testing.T, edit func(*Config)) *cluster {
	return newFarCluster(t, 0, edit)
}

// newFarCluster is newCluster with long ways between the servers.
func newFarCluster(t *testing.T, trip time.Duration, edit func(*Config)) *cluster {
	c := &cluster{t: t, trip: trip}
	for i := range 3 {
		c.spare(Config{Dir: t.TempDir(), ID: fmt.Sprint("n", i), Bootstrap: i == 0, ReserveBytes: 1, Heartbeat: 600 * time.Millisecond, PromoteAfter: 80 * time.Millisecond})
		if edit != nil {
			edit(&c.cfg[i])
		}
		c.start(i)
	}
	if err := c.nodes[0].Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	for i := 1; i < 3; i++ {
		if err := c.nodes[0].AddServer(within(t), c.cfg[i].ID, c.cfg[i].Address, true); err != nil {
			t.Fatal(err)
		}
	}
	c.until("three voters", func(s []ServerStatus) bool {
		return len(s) == 3 && !slices.ContainsFunc(s, func(m ServerStatus) bool { return !m.Voter || !m.Healthy })
	})
	return c
}

// until waits until the leader's list of the servers is as it should be.
func (c *cluster) until(what string, ok func([]ServerStatus) bool) {
	c.t.Helper()
	ctx := within(c.t)
	var last []ServerStatus
	for ctx.Err() == nil {
		for i, n := range c.nodes {
			if c.away[i] {
				continue
			}
			if s, err := n.Servers(ctx); err == nil {
				last = s
			}
			break
		}
		if ok(last) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	c.t.Fatalf("waiting for %s: %+v", what, last)
}

// leader waits for one of the running servers to lead and gives its number.
func (c *cluster) leader() int {
	c.t.Helper()
	ctx := within(c.t)
	for ctx.Err() == nil {
		for i, n := range c.nodes {
			if !c.away[i] && n.Status().State == "leader" {
				if _, err := n.ReadIndex(ctx); err == nil {
					return i
				}
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	c.t.Fatal("no leader")
	return -1
}

// same waits until every running server has applied what the leader has, and
// compares a key.
func (c *cluster) same(key string, want uint64) {
	c.t.Helper()
	index := c.nodes[c.leader()].Applied()
	for i, n := range c.nodes {
		if c.away[i] {
			continue
		}
		if _, err := n.Wait(within(c.t), index); err != nil {
			c.t.Fatal(err)
		}
		if got := count(c.t, n, Local, key); got != want {
			c.t.Errorf("server %d has %d, want %d", i, got, want)
		}
	}
}

// The leader goes away under load: what was answered is on the others, nothing
// is applied twice by the retries, and the old leader catches up.
func TestLeaderLost(t *testing.T) {
	t.Parallel()
	c := newCluster(t, nil)
	first := c.leader()
	var answered atomic.Uint64
	halfway := make(chan struct{})
	const writers, each = 4, 60
	g, ctx := errgroup.WithContext(within(t))
	for w := range writers {
		g.Go(func() error {
			session := fmt.Sprint("w", w)
			for s := uint64(1); s <= each; s++ {
				if err := c.propose(ctx, session, s); err != nil {
					return err
				}
				if answered.Add(1) == writers*each/2 {
					close(halfway)
				}
			}
			return nil
		})
	}
	select {
	case <-halfway:
	case <-ctx.Done():
		t.Fatal(g.Wait())
	}
	if err := c.stop[first](); err != nil {
		t.Errorf("stop of the leader: %v", err)
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if now := c.leader(); now == first {
		t.Fatal("a stopped server leads")
	}
	c.same("x", writers*each)
	c.start(first)
	c.same("x", writers*each)
}

// propose asks every server in turn until one answers, as a client does.
func (c *cluster) propose(ctx context.Context, session string, sequence uint64) error {
	for ctx.Err() == nil {
		for _, n := range c.nodes {
			_, _, err := n.Propose(ctx, testKind, []byte("add x"), ProposeOptions{Session: session, Sequence: sequence})
			if err == nil {
				return nil
			}
			if errors.Is(err, ErrRefused) {
				return err
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return ctx.Err()
}

// A server that was away for longer than the log reaches back gets a snapshot
// over the wire, and the log goes on behind it, also after a restart.
func TestSnapshotToLaggingServer(t *testing.T) {
	t.Parallel()
	c := newCluster(t, func(cfg *Config) {
		cfg.KeepEntries = 8
		cfg.SnapshotEvery = 1 << 30
		cfg.Heartbeat = time.Second
		cfg.Hooks = &Hooks{SegmentBytes: 4096}
	})
	leader := c.leader()
	away := (leader + 1) % 3
	if err := c.stop[away](); err != nil {
		t.Fatal(err)
	}
	n := c.nodes[leader]
	for i := range 50 {
		add(t, n, "x", ProposeOptions{})
		add(t, n, strings.Repeat("y", 200+i), ProposeOptions{})
	}
	if err := n.Snapshot(within(t)); err != nil {
		t.Fatal(err)
	}
	add(t, n, "x", ProposeOptions{})
	c.start(away)
	c.same("x", 51)
	if got, err := os.ReadFile(filepath.Join(c.cfg[away].Dir, "state", "current")); err != nil || string(got) == "1\n" {
		t.Fatalf("state %q %v: no snapshot was restored, so this test shows nothing", got, err)
	}
	if err := c.stop[away](); err != nil {
		t.Fatal(err)
	}
	add(t, c.nodes[c.leader()], "x", ProposeOptions{})
	c.start(away)
	c.same("x", 52)
}

// A snapshot moves over a pipe bit for bit; a flip or a cut anywhere is noticed.
func TestArchive(t *testing.T) {
	t.Parallel()
	src := t.TempDir()
	var files []archiveFile
	for name, content := range map[string]string{"a.sst": strings.Repeat("table ", 1000), "MANIFEST-1": "", "000002.log": "x"} {
		if err := os.WriteFile(filepath.Join(src, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := sumFile(src, name)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	stream, err := io.ReadAll(newArchive(src, 42, files))
	if err != nil || int64(len(stream)) != archiveSize(files) {
		t.Fatalf("stream of %d bytes, %v; want %d", len(stream), err, archiveSize(files))
	}
	got, err := unpack(bytes.NewReader(stream), filepath.Join(t.TempDir(), "d"))
	if err != nil || got.applied != 42 || len(got.files) != len(files) {
		t.Fatalf("unpack: %+v %v", got, err)
	}
	for i := 0; i < len(stream); i += 1 + len(stream)/300 {
		flipped := bytes.Clone(stream)
		flipped[i] ^= 0x40
		// The applied index is covered by meta.json, and a changed name only renames.
		got, err := unpack(bytes.NewReader(flipped), filepath.Join(t.TempDir(), "d"))
		if err == nil && got.applied == 42 && got.files[0].Name == files[0].Name && got.files[1].Name == files[1].Name && got.files[2].Name == files[2].Name {
			t.Errorf("flip at %d was not noticed", i)
		}
		if _, err := unpack(bytes.NewReader(stream[:i]), filepath.Join(t.TempDir(), "d")); !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("cut at %d: %v", i, err)
		}
	}
	if err := os.WriteFile(filepath.Join(src, "a.sst"), []byte(strings.Repeat("tablE ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(newArchive(src, 42, files)); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("file that changed on disk: %v, want ErrCorrupt", err)
	}
}

// Snapshots: the two newest stay, what a crash left goes, a damaged one is left
// out, and a crash between taking a snapshot and restoring it is made good.
func TestSnapshotStore(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n, stop := single(t, dir)
	for range 4 {
		add(t, n, "x", ProposeOptions{})
		if err := n.Snapshot(within(t)); err != nil {
			t.Fatal(err)
		}
	}
	names, err := filepath.Glob(filepath.Join(dir, "snapshots", "0*"))
	if err != nil || len(names) != keptSnapshots {
		t.Fatalf("%v %v, want %d snapshots", names, err, keptSnapshots)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "snapshots", ".tmp-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	// As if the process had died right before the state was replaced.
	if err := os.WriteFile(filepath.Join(dir, "state", "current"), []byte("2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openState(vfs.Default, filepath.Join(dir, "state"), 1<<20, n.cfg.Log); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("state that is not there: %v", err)
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, "state", "current")), os.Mkdir(filepath.Join(dir, "snapshots", ".tmp-9"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := spoilFiles(filepath.Join(names[1], "meta.json")); err != nil {
		t.Fatal(err)
	}
	n, _ = single(t, dir)
	if got := count(t, n, Linearizable, "x"); got != 4 {
		t.Errorf("count %d, want 4", got)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "snapshots", ".tmp-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// FuzzUnpack: no stream writes outside its directory, and errors say what kind they are.
func FuzzUnpack(f *testing.F) {
	empty, _ := io.ReadAll(newArchive("", 1, nil))
	f.Add(empty)
	f.Add(append(empty[:16:16], 0, 0, 0, 1, 0, 2, '.', '.', 0, 0, 0, 0, 0, 0, 0, 0))
	f.Add(append(empty[:16:16], 0, 0, 0, 1, 0, 1, 'a', 0xff, 0, 0, 0, 0, 0, 0, 1, 'x'))
	root := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := filepath.Join(root, "a", "b")
		defer os.RemoveAll(dir)
		if _, err := unpack(bytes.NewReader(b), dir); err != nil && !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("error without a sentinel: %v", err)
		}
		if names, err := os.ReadDir(root); err != nil || len(names) > 1 {
			t.Errorf("%v %v beside the directory", names, err)
		}
	})
}

// A server that restarts right behind a snapshot it took in goes on with the
// entries behind it: raft asks the log for an entry that only the snapshot knows.
func TestLogAroundSnapshot(t *testing.T) {
	t.Parallel()
	n, stop := single(t, t.TempDir())
	for range 10 {
		add(t, n, "x", ProposeOptions{})
	}
	if err := n.Snapshot(within(t)); err != nil {
		t.Fatal(err)
	}
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
	newest := *n.snapshots.newest.Load()
	if newest.Index != last {
		t.Fatalf("snapshot at %d, log ends at %d", newest.Index, last)
	}
	entry := func(index uint64) []*raft.Log { return []*raft.Log{{Index: index, Term: 9}} }
	if err := n.log.StoreLogs(entry(last + 5)); err == nil {
		t.Error("stored behind a gap that no snapshot fills")
	}
	newest.Index, newest.Term = last+4, 8
	n.snapshots.newest.Store(&newest) // as if another server's had been taken in
	if err := n.log.StoreLogs(entry(last + 5)); err != nil {
		t.Fatal(err)
	}
	if first, err := n.log.FirstIndex(); err != nil || first != last+5 {
		t.Errorf("log begins at %d %v, want %d", first, err, last+5)
	}
	var l raft.Log
	if err := n.log.GetLog(last+4, &l); err != nil || l.Term != 8 {
		t.Errorf("last entry of the snapshot: term %d %v, want 8", l.Term, err)
	}
	if err := n.log.GetLog(last+3, &l); !errors.Is(err, raft.ErrLogNotFound) {
		t.Errorf("entry inside the snapshot: %v, want not found", err)
	}
}
