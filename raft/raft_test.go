package raft

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/ballast"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("RAFT_TEST_WRITER"); dir != "" {
		writer(dir)
	}
	goleak.VerifyTestMain(m)
}

// testKind is the kind of the processor of the tests.
const testKind = 7

// counter is a Processor: "add KEY" counts and answers how often, "fail" is
// refused after it wrote, anything else is unknown.
type counter struct{}

func (counter) Apply(tx *Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	verb, key, _ := strings.Cut(string(command), " ")
	switch verb {
	case "add":
		n := uint64(0)
		b, err := tx.Get([]byte(key))
		switch {
		case err == nil:
			n = binary.BigEndian.Uint64(b)
		case !errors.Is(err, flox.ErrNotFound):
			return nil, err
		}
		b = binary.BigEndian.AppendUint64(nil, n+1)
		return b, tx.Set([]byte(key), b)
	case "time":
		return binary.BigEndian.AppendUint64(nil, uint64(at.UnixMilli())), nil
	case "fail":
		if err := tx.Set([]byte("fail"), []byte("half")); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%s may not: %w", key, flox.ErrDenied)
	}
	return nil, fmt.Errorf("verb %q: %w", verb, ErrUnknownCommand)
}

// start runs a node until the test ends or stop is called.
func start(t *testing.T, cfg Config) (n *Node, stop func() error) {
	t.Helper()
	n, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.Register(testKind, counter{})
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- n.Run(ctx) }()
	stopped := false
	stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-result
	}
	t.Cleanup(func() { stop() })
	return n, stop
}

// single runs a server without peers in dir.
func single(t *testing.T, dir string) (*Node, func() error) {
	t.Helper()
	n, stop := start(t, Config{Dir: dir, ID: "a", Bootstrap: true, ReserveBytes: 1})
	if err := n.Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	return n, stop
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// add proposes "add key" and gives the count it is answered with.
func add(t *testing.T, n *Node, key string, opt ProposeOptions) uint64 {
	t.Helper()
	reply, _, err := n.Propose(within(t), testKind, []byte("add "+key), opt)
	if err != nil {
		t.Fatal(err)
	}
	return binary.BigEndian.Uint64(reply)
}

// count reads a key's count.
func count(t *testing.T, n *Node, c Consistency, key string) uint64 {
	t.Helper()
	v, err := n.View(within(t), testKind, c)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	b, err := v.Get([]byte(key))
	if errors.Is(err, flox.ErrNotFound) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	return binary.BigEndian.Uint64(b)
}

// What was answered is there after a restart, and the log goes on behind it.
func TestRestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n, stop := single(t, dir)
	for range 5 {
		add(t, n, "x", ProposeOptions{})
	}
	before := n.Applied()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	n, _ = single(t, dir)
	if got := count(t, n, Linearizable, "x"); got != 5 {
		t.Errorf("count %d after restart, want 5", got)
	}
	if add(t, n, "x", ProposeOptions{}) != 6 || n.Applied() <= before {
		t.Errorf("after restart: applied %d, before %d", n.Applied(), before)
	}
}

// A command proposed again with its session and sequence is applied once and
// answered as the first time, refusals included, also after a restart.
func TestRetryAppliedOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n, stop := single(t, dir)
	opt := func(sequence uint64) ProposeOptions { return ProposeOptions{Session: "s", Sequence: sequence} }
	if got := add(t, n, "x", opt(1)); got != 1 {
		t.Fatalf("first: %d", got)
	}
	_, _, err := n.Propose(within(t), testKind, []byte("fail bob"), opt(2))
	if !errors.Is(err, ErrRefused) || !errors.Is(err, flox.ErrDenied) || err.Error() != "bob may not: denied" {
		t.Fatalf("refusal: %v", err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	n, _ = single(t, dir)
	if got := add(t, n, "x", opt(1)); got != 1 {
		t.Errorf("retry answered %d, want the first answer 1", got)
	}
	_, _, again := n.Propose(within(t), testKind, []byte("fail alice"), opt(2))
	if again == nil || again.Error() != err.Error() || !errors.Is(again, flox.ErrDenied) || !errors.Is(again, ErrRefused) {
		t.Errorf("retry of a refusal: %v, want %v", again, err)
	}
	if got := count(t, n, Linearizable, "x"); got != 1 {
		t.Errorf("applied %d times, want once", got)
	}
	if got := count(t, n, Local, "fail"); got != 0 {
		t.Error("a refused command left something behind")
	}
	// Sequences whose reply is forgotten are refused, not applied again.
	for s := uint64(3); s <= KeptReplies+2; s++ {
		add(t, n, "y", opt(s))
	}
	if _, _, err := n.Propose(within(t), testKind, []byte("add x"), opt(1)); !errors.Is(err, flox.ErrClosed) {
		t.Errorf("sequence behind the kept replies: %v, want refused", err)
	}
	if got := add(t, n, "y", opt(3)); got != 1 {
		t.Errorf("oldest kept reply %d, want 1", got)
	}
	if _, _, err := n.Propose(within(t), testKind, []byte("add x"), ProposeOptions{Session: "other", Sequence: 2}); !errors.Is(err, ErrSessionExpired) {
		t.Errorf("unknown session at sequence 2: %v, want expired", err)
	}
}

// The Session helper begins again by itself when its session was forgotten.
func TestSessionBeginsAgain(t *testing.T) {
	t.Parallel()
	n, _ := single(t, t.TempDir())
	s := n.NewSession()
	for i := range 3 {
		reply, _, err := s.Propose(within(t), testKind, []byte("add x"))
		if err != nil || binary.BigEndian.Uint64(reply) != uint64(i+1) {
			t.Fatalf("%d: %v %v", i, reply, err)
		}
	}
	s.next = 40
	s.name = "never seen"
	if _, _, err := s.Propose(within(t), testKind, []byte("add x")); err != nil {
		t.Fatal(err)
	}
	if got := count(t, n, Linearizable, "x"); got != 4 {
		t.Errorf("count %d, want 4", got)
	}
}

// Time in the log never goes back, whatever the clock of a leader does.
func TestTimeNeverGoesBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n, stop := single(t, dir)
	ask := func() int64 {
		reply, _, err := n.Propose(within(t), testKind, []byte("time"), ProposeOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return int64(binary.BigEndian.Uint64(reply))
	}
	future := time.Now().Add(time.Hour).UnixMilli()
	n.lastTime.Store(future) // as if the clock had been an hour ahead
	first := ask()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	n, _ = single(t, dir)
	if second := ask(); first < future || second < first {
		t.Errorf("times %d, %d, want neither before %d", first, second, future)
	}
}

// An entry this program does not know stops the node with the state untouched;
// a program that knows it goes on from there.
func TestUnknownStopsNode(t *testing.T) {
	t.Parallel()
	entry := func(edit func(*floxv1.Envelope)) []byte {
		e := &floxv1.Envelope{Version: EnvelopeVersion, Kind: testKind, Command: []byte("add x")}
		edit(e)
		b, err := encodeEntry(e)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	flipped := entry(func(*floxv1.Envelope) {})
	flipped[len(flipped)-1] ^= 1
	for name, c := range map[string]struct {
		entry []byte
		is    error
	}{
		"version":       {entry(func(e *floxv1.Envelope) { e.Version = 2 }), ErrUnknownCommand},
		"kind":          {entry(func(e *floxv1.Envelope) { e.Kind = 9 }), ErrUnknownCommand},
		"command":       {entry(func(e *floxv1.Envelope) { e.Command = []byte("frobnicate") }), ErrUnknownCommand},
		"field":         {entry(func(e *floxv1.Envelope) { e.ProtoReflect().SetUnknown([]byte{0xf8, 0x07, 1}) }), ErrUnknownCommand},
		"flipped bit":   {flipped, flox.ErrCorrupt},
		"short":         {[]byte("ab"), flox.ErrCorrupt},
		"no protobuf":   {sumOf([]byte{0xff, 0xff}), ErrUnknownCommand},
		"in a session":  {entry(func(e *floxv1.Envelope) { e.Session, e.Sequence, e.Command = "s", 1, []byte("zap") }), ErrUnknownCommand},
		"empty command": {entry(func(e *floxv1.Envelope) { e.Command = nil }), ErrUnknownCommand},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			n, stop := single(t, dir)
			add(t, n, "x", ProposeOptions{})
			before := n.Applied()
			n.raft.Load().Apply(c.entry, time.Second) // past the checks of Propose
			<-n.machine.closed
			err := stop()
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), fmt.Sprintf("log entry %d ", before+1)) {
				t.Errorf("Run: %v, want %v naming the entry", err, c.is)
			}
			if got := n.Applied(); got != before {
				t.Errorf("applied %d, want %d as before", got, before)
			}
			if _, _, err := n.Propose(within(t), testKind, []byte("add x"), ProposeOptions{}); err == nil {
				t.Error("a stopped node took a command")
			}
			// It must stop at the same entry again, not skip it.
			n, stop = start(t, Config{Dir: dir, ID: "a", Bootstrap: true, ReserveBytes: 1})
			<-n.machine.closed
			if err := stop(); !errors.Is(err, c.is) {
				t.Errorf("started again: %v, want %v", err, c.is)
			}
		})
	}
}

// sumOf puts a right checksum before b.
func sumOf(b []byte) []byte {
	e, _ := encodeEntry(&floxv1.Envelope{})
	return append(binary.BigEndian.AppendUint32(e[:0], crc32.Checksum(b, castagnoli)), b...)
}

// A node refuses what it could not apply itself before it is in the log.
func TestProposeRefuses(t *testing.T) {
	t.Parallel()
	n, _ := single(t, t.TempDir())
	last := n.Status().Last
	if _, _, err := n.Propose(within(t), 99, []byte("add x"), ProposeOptions{}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("unknown kind: %v", err)
	}
	if _, _, err := n.Propose(within(t), testKind, make([]byte, MaxCommand+1), ProposeOptions{}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("huge command: %v", err)
	}
	n.cfg.ReserveBytes = 1 << 62
	if _, _, err := n.Propose(within(t), testKind, []byte("add x"), ProposeOptions{}); !errors.Is(err, flox.ErrFull) {
		t.Errorf("full disk: %v, want ErrFull", err)
	}
	if _, _, err := n.Propose(within(t), testKind, []byte("add x"), ProposeOptions{Freeing: true}); !errors.Is(err, flox.ErrFull) {
		t.Errorf("full disk, what makes room: %v, want ErrFull", err)
	}
	if n.Status().Last != last {
		t.Error("something refused reached the log")
	}
	if got := count(t, n, Linearizable, "x"); got != 0 {
		t.Error("reads must go on when the disk is full")
	}
	_, free, err := ballast.Disk(n.cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	n.cfg.ReserveBytes = 4 * uint64(free) //nolint:gosec // of a disk
	if _, _, err := n.Propose(within(t), testKind, []byte("add x"), ProposeOptions{}); !errors.Is(err, flox.ErrFull) {
		t.Errorf("what is kept for the log: %v, want ErrFull", err)
	}
	if _, _, err := n.Propose(within(t), testKind, []byte("add x"), ProposeOptions{Freeing: true}); err != nil {
		t.Errorf("what makes room on a full disk: %v", err)
	}
}

// A second process on the same directory is told who holds it.
func TestSecondOpener(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	single(t, dir)
	_, err := Open(Config{Dir: dir, ID: "a", Bootstrap: true})
	if !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("got %v, want ErrBusy naming process %d", err, os.Getpid())
	}
}

// Garbage in the directory is an error that names it, not a panic or an empty log.
func TestGarbage(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(dir string) error{
		"log is text": func(d string) error {
			return os.WriteFile(filepath.Join(d, "log", "wal-meta.db"), []byte("hello"), 0o600)
		},
		"log is noise": func(d string) error {
			return os.WriteFile(filepath.Join(d, "log", "wal-meta.db"), bytes.Repeat([]byte{0xa5}, 1<<16), 0o600)
		},
		// Bbolt would free as many pages as it says, and then write over one that is in use.
		"log has a page without an end": func(d string) error {
			return spoilPages(d, leafPage, func(page []byte) { page[15] ^= 0x80 })
		},
		"log has a page in use that is free": func(d string) error {
			return spoilPages(d, freePage, func(page []byte) {
				binary.LittleEndian.PutUint16(page[10:], 2)
				binary.LittleEndian.PutUint64(page[16:], 2)
				binary.LittleEndian.PutUint64(page[24:], 4)
			})
		},
		"log is gone": func(d string) error { return os.RemoveAll(filepath.Join(d, "log")) },
		"state pointer": func(d string) error {
			return os.WriteFile(filepath.Join(d, "state", "current"), []byte("seven"), 0o600)
		},
		"state is gone":  func(d string) error { return os.RemoveAll(filepath.Join(d, "state", "00000001")) },
		"state manifest": func(d string) error { return spoilFiles(filepath.Join(d, "state", "00000001", "MANIFEST-*")) },
		// Pebble would open what was flushed before it was started last, and what came last, with
		// a hole between them.
		"state manifest is cut behind its first record": func(d string) error {
			files, err := filepath.Glob(filepath.Join(d, "state", "00000001", "MANIFEST-*[0-9]"))
			for _, f := range files {
				b, readErr := os.ReadFile(f)
				err = errors.Join(err, readErr, os.Truncate(f, 7+int64(binary.LittleEndian.Uint16(b[4:]))))
			}
			return err
		},
		"log is a file": func(d string) error {
			return errors.Join(os.RemoveAll(filepath.Join(d, "log")), os.WriteFile(filepath.Join(d, "log"), nil, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			n, stop := single(t, dir)
			add(t, n, "x", ProposeOptions{})
			if err := stop(); err != nil {
				t.Fatal(err)
			}
			n, stop = single(t, dir)
			add(t, n, "y", ProposeOptions{})
			if err := stop(); err != nil {
				t.Fatal(err)
			}
			if err := spoil(dir); err != nil {
				t.Fatal(err)
			}
			n, err := Open(Config{Dir: dir, ID: "a", Bootstrap: true})
			if err == nil {
				n.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), dir) {
				t.Errorf("%v: does not name the directory", err)
			}
		})
	}
}

// What the head of a page of bbolt says that it is: number (8 bytes), kind and entries
// (2 each), how many pages follow (4).
const (
	leafPage = 0x02
	freePage = 0x10
)

// spoilPages changes the pages of a kind in the log's bbolt file.
func spoilPages(dir string, kind uint16, spoil func(page []byte)) error {
	file := filepath.Join(dir, "log", "wal-meta.db")
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	for page := range slices.Chunk(b, os.Getpagesize()) {
		if binary.LittleEndian.Uint16(page[8:]) == kind {
			spoil(page)
		}
	}
	return os.WriteFile(file, b, 0o600)
}

func spoilFiles(pattern string) error {
	files, err := filepath.Glob(pattern)
	if err == nil && len(files) == 0 {
		err = errors.New("nothing to spoil")
	}
	for _, f := range files {
		err = errors.Join(err, os.WriteFile(f, []byte(strings.Repeat("garbage ", 100)), 0o600))
	}
	return err
}

// A state whose pointer was lost is made again from log and snapshots.
func TestStateRebuilt(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n, stop := single(t, dir)
	for range 10 {
		add(t, n, "x", ProposeOptions{Session: ""})
	}
	if err := n.Snapshot(within(t)); err != nil {
		t.Fatal(err)
	}
	add(t, n, "x", ProposeOptions{})
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "state", "current")); err != nil {
		t.Fatal(err)
	}
	n, _ = single(t, dir)
	if got := count(t, n, Linearizable, "x"); got != 11 {
		t.Errorf("count %d, want 11", got)
	}
}

// Readers keep their moment while commands are applied, and see writes in key order.
func TestReader(t *testing.T) {
	t.Parallel()
	n, _ := single(t, t.TempDir())
	for _, k := range []string{"p/b", "p/a", "q", "p/c"} {
		add(t, n, k, ProposeOptions{})
	}
	v, err := n.View(within(t), testKind, Linearizable)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	add(t, n, "p/d", ProposeOptions{})
	for _, c := range []struct{ prefix, from, want string }{
		{"p/", "", "p/a p/b p/c"}, {"p/", "p/b", "p/b p/c"}, {"", "", "p/a p/b p/c q"}, {"p/", "a", "p/a p/b p/c"}, {"z", "", ""},
	} {
		var got []string
		err := v.Iterate([]byte(c.prefix), []byte(c.from), func(k, _ []byte) bool { got = append(got, string(k)); return true })
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("iterate %q from %q: %q %v, want %q", c.prefix, c.from, got, err, c.want)
		}
	}
	if v.Index() >= n.Applied() {
		t.Errorf("index %d of a reader made before %d", v.Index(), n.Applied())
	}
	if other, err := n.View(within(t), testKind+1, Local); err != nil {
		t.Error(err)
	} else {
		if _, err := other.Get([]byte("q")); !errors.Is(err, flox.ErrNotFound) {
			t.Errorf("one kind sees another's keys: %v", err)
		}
		other.Close()
	}
}

// Follow wakes when something is applied, and ends with its context.
func TestFollow(t *testing.T) {
	t.Parallel()
	n, _ := single(t, t.TempDir())
	at := n.Applied()
	got := make(chan uint64, 1)
	go func() {
		index, err := n.Follow(within(t), at)
		if err != nil {
			index = 0
		}
		got <- index
	}()
	add(t, n, "x", ProposeOptions{})
	if index := <-got; index <= at {
		t.Errorf("woke at %d, want more than %d", index, at)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := n.Follow(ctx, n.Applied()); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want canceled", err)
	}
}

// Sessions that nobody uses are forgotten by log time, a few per entry.
func TestSessionsExpire(t *testing.T) {
	t.Parallel()
	n, _ := single(t, t.TempDir())
	for i := range 20 {
		add(t, n, "x", ProposeOptions{Session: fmt.Sprint("s", i), Sequence: 1})
	}
	n.lastTime.Add((SessionTTL + time.Second).Milliseconds())
	for range 3 {
		add(t, n, "x", ProposeOptions{})
	}
	db, err := n.machine.state.acquire()
	if err != nil {
		t.Fatal(err)
	}
	defer db.release()
	left := 0
	err = iterate(db, []byte{ownSpace}, nil, nil, func(k, _ []byte) bool {
		if bytes.IndexByte([]byte{sessionKey, replyKey, expiryKey}, k[0]) >= 0 {
			left++
		}
		return true
	})
	if err != nil || left > 0 {
		t.Errorf("%d keys of expired sessions left, %v", left, err)
	}
	b, err := get(db, []byte{ownSpace, countKey})
	if err != nil || binary.BigEndian.Uint64(b) != 0 {
		t.Errorf("session count %v %v, want 0", b, err)
	}
}

// FuzzDecodeEntry: any bytes are refused or decode to an envelope that
// encodes to an entry of the same meaning.
func FuzzDecodeEntry(f *testing.F) {
	good, err := encodeEntry(&floxv1.Envelope{Version: 1, Session: "s", Sequence: 2, TimeUnixMs: 3, Kind: 4, Command: []byte("c")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{})
	f.Add(sumOf([]byte{8, 1}))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeEntry(b)
		if err != nil {
			if !errors.Is(err, flox.ErrCorrupt) && !errors.Is(err, ErrUnknownCommand) {
				t.Errorf("error without a sentinel: %v", err)
			}
			return
		}
		again, err := encodeEntry(e)
		if err != nil {
			t.Fatal(err)
		}
		e2, err := decodeEntry(again)
		if err != nil || !proto.Equal(e, e2) {
			t.Errorf("%v became %v, %v", e, e2, err)
		}
	})
}

// BenchmarkPropose is a command's way through log and state, 64 clients.
func BenchmarkPropose(b *testing.B) {
	n, err := Open(Config{Dir: b.TempDir(), ID: "a", Bootstrap: true})
	if err != nil {
		b.Fatal(err)
	}
	n.Register(testKind, counter{})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	defer func() { cancel(); <-done }()
	if err := n.Ready(ctx); err != nil {
		b.Fatal(err)
	}
	command := append([]byte("add x "), make([]byte, 500)...)
	b.SetParallelism(32)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, _, err := n.Propose(ctx, testKind, command, ProposeOptions{}); err != nil {
				b.Error(err)
			}
		}
	})
}

// BenchmarkReadIndex is what a linearizable read costs beside the read.
func BenchmarkReadIndex(b *testing.B) {
	n, err := Open(Config{Dir: b.TempDir(), ID: "a", Bootstrap: true})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	defer func() { cancel(); <-done }()
	if err := n.Ready(ctx); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := n.ReadIndex(ctx); err != nil {
			b.Fatal(err)
		}
	}
}

// tcpLayer is a Layer over loopback.
type tcpLayer struct {
	net.Listener
	shake time.Duration // that a handshake takes
}

func (l tcpLayer) Dial(address string, timeout time.Duration) (net.Conn, error) {
	time.Sleep(l.shake)
	return net.DialTimeout("tcp", address, timeout)
}

// A heartbeat that is handled while raft shuts down has the log open; one that
// comes later is not handled.
func TestNoHeartbeatAfterTheEnd(t *testing.T) {
	t.Parallel()
	n := &Node{}
	handled := make(chan struct{})
	release := make(chan struct{})
	count := 0
	handle := n.whileOpen(func(raft.RPC) {
		count++
		close(handled)
		<-release
	})
	go handle(raft.RPC{})
	<-handled
	closed := make(chan struct{})
	go func() {
		n.beats.Lock()
		close(closed)
	}()
	select {
	case <-closed:
		t.Error("the node goes on to close while a heartbeat is handled")
	case <-time.After(20 * time.Millisecond):
	}
	close(release)
	<-closed
	handle(raft.RPC{})
	if count != 1 {
		t.Errorf("%d heartbeats handled, want 1", count)
	}
}

// A server that is killed while its disk has no room at all starts again, twice, and can
// be read; Pebble by itself would try to write its files for ever.
func TestStartOnADiskThatIsFullToTheLastByte(t *testing.T) {
	t.Parallel()
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=256m"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("needs root: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	cfg := Config{Dir: filepath.Join(disk, "a"), ID: "a", Bootstrap: true, ReserveBytes: 16 << 20}
	n, stop := start(t, cfg)
	if err := n.Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		add(t, n, "x", ProposeOptions{})
	}
	dead := filepath.Join(disk, "dead") // what a kill leaves
	if err := errors.Join(os.CopyFS(dead, os.DirFS(cfg.Dir)), stop(), os.RemoveAll(cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	_, free, err := ballast.Disk(disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(disk, "filler"), make([]byte, free), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.Dir = dead
	for range 2 {
		n, stop := start(t, cfg)
		if err := n.Ready(within(t)); err != nil {
			t.Fatal(err)
		}
		if got := count(t, n, Linearizable, "x"); got != 20 {
			t.Errorf("%d of 20 are there", got)
		}
		if _, _, err := n.Propose(within(t), testKind, []byte("add x"), ProposeOptions{}); !errors.Is(err, flox.ErrFull) {
			t.Errorf("a command on a full disk: %v, want ErrFull", err)
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(disk, "filler")); err != nil {
		t.Fatal(err)
	}
	n, _ = start(t, cfg)
	if err := n.Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	if got := add(t, n, "x", ProposeOptions{}); got != 21 {
		t.Errorf("%d, want 21", got)
	}
}
