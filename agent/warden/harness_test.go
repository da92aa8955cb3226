package warden

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/fuse"
)

// The tests start this binary again: as the child of a warden, which serves a
// small store, and as a warden that is killed.
const modeEnv = "FLOX_WARDEN_TEST"

func TestMain(m *testing.M) {
	switch os.Getenv(modeEnv) {
	case "reload":
		_, err := Reload(context.Background(), os.Getenv("FLOX_WARDEN_CONTROL"), "")
		fmt.Println(errors.Is(err, flox.ErrDenied), err)
		os.Exit(0)
	case "child":
		if !Standby() {
			os.Exit(0)
		}
		behave()
		if err := childMain(); err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	case "map":
		if err := mapMain(os.Getenv("FLOX_WARDEN_MAP")); err != nil {
			fmt.Fprintln(os.Stderr, "map:", err)
			os.Exit(1)
		}
		os.Exit(0)
	case "hold":
		if err := holdMain(os.Getenv("FLOX_WARDEN_MAP")); err != nil {
			fmt.Fprintln(os.Stderr, "hold:", err)
			os.Exit(1)
		}
		os.Exit(0)
	case "debugger":
		if err := debugMain(); err != nil {
			fmt.Fprintln(os.Stderr, "debugger:", err)
			os.Exit(1)
		}
		os.Exit(0)
	case "exit":
		os.Exit(3)
	case "warden":
		var cfg Config
		if err := json.Unmarshal([]byte(os.Getenv("FLOX_WARDEN_CONFIG")), &cfg); err != nil {
			panic(err)
		}
		fmt.Fprintln(os.Stderr, "warden:", Run(context.Background(), cfg))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

func needMount(t *testing.T) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "needs root"
	} else if _, err := os.Stat("/dev/fuse"); err != nil {
		why = "needs /dev/fuse"
	}
	if why == "" {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// host is a place for one warden. It is not below t.TempDir, which only root
// may enter.
type host struct {
	cfg Config
	top string
}

func newHost(t *testing.T) *host {
	t.Helper()
	needMount(t)
	top, err := os.MkdirTemp("", "flox-warden")
	if err != nil {
		t.Fatal(err)
	}
	h := &host{top: top}
	t.Cleanup(func() {
		unix.Unmount(h.cfg.MountDir, unix.MNT_FORCE|unix.MNT_DETACH)
		unix.Unmount(h.cfg.LinksDir, unix.MNT_FORCE|unix.MNT_DETACH)
		os.RemoveAll(top)
	})
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	prog := filepath.Join(top, "prog")
	if err := errors.Join(os.Chmod(top, 0o755), os.WriteFile(prog, self, 0o755)); err != nil {
		t.Fatal(err)
	}
	level := slog.LevelError + 1
	if os.Getenv("FLOX_WARDEN_LOG") != "" {
		level = slog.LevelDebug
	}
	h.cfg = Config{
		MountDir: filepath.Join(top, "store"), LinksDir: filepath.Join(top, "links"), RunDir: filepath.Join(top, "run"), Child: []string{prog},
		Env: []string{modeEnv + "=child"}, UID: 65533, GID: 65532,
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})),
	}
	return h
}

// start runs a warden in this process until the test ends or stop is called.
// Both functions give Run's error; wait does not ask it to end.
func (h *host) start(t *testing.T) (stop, wait func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, h.cfg) }()
	wait = sync.OnceValue(func() error {
		select {
		case err := <-done:
			return err
		case <-time.After(30 * time.Second):
			return errors.New("Run does not end")
		}
	})
	stop = func() error {
		cancel()
		return wait()
	}
	t.Cleanup(func() { stop() })
	return stop, wait
}

// path is a path in the mount.
func (h *host) path(rest string) string { return filepath.Join(h.cfg.MountDir, storePath, rest) }

// report waits for the report of the n-th child, counted from 1.
func (h *host) report(t *testing.T, n int) report {
	t.Helper()
	var r report
	for range 6000 {
		b, err := os.ReadFile(filepath.Join(h.cfg.RunDir, fmt.Sprintf("report-%d", n)))
		if err == nil && json.Unmarshal(b, &r) == nil {
			return r
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("no report of child %d", n)
	return r
}

// ask has the child ask its warden and gives what it got.
func (h *host) ask(t *testing.T, q query) query {
	t.Helper()
	in, out := filepath.Join(h.cfg.RunDir, "ask"), filepath.Join(h.cfg.RunDir, "told")
	os.Remove(out)
	b, _ := json.Marshal(q)
	if err := errors.Join(os.WriteFile(in+".new", b, 0o666), os.Chmod(in+".new", 0o666), os.Rename(in+".new", in)); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		if b, err := os.ReadFile(out); err == nil && json.Unmarshal(b, &q) == nil {
			return q
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("no answer to %+v", q)
	return q
}

// awaitReader waits until somebody reads the file that hangs.
func (h *host) awaitReader(t *testing.T) {
	t.Helper()
	for range 1000 {
		if h.ask(t, query{Ask: "reading"}).Waiting > 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("nobody reads")
}

// run runs a shell command on the mount, in another process.
func run(t *testing.T, format string, args ...any) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	script := fmt.Sprintf(format, args...)
	out, err := exec.CommandContext(ctx, "sh", "-c", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

// behave makes a child what its program's name says, so that a test can have
// other programs than this one.
func behave() {
	name := filepath.Base(os.Args[0])
	if len(os.Args) > 1 && os.Args[1] == "version" {
		if strings.Contains(name, "silent") {
			fmt.Fprintln(os.Stderr, "what do you\x1b want?")
			os.Exit(2)
		}
		fmt.Printf("{\"version\": %q, \"stateFormat\": %d}\n", version(), stateFormat())
		os.Exit(0)
	}
	if strings.Contains(name, "exits") {
		os.Exit(3)
	}
}

// version is that of a copy of this program: how many bytes were added to it.
func version() string {
	info, err := os.Stat("/proc/self/exe")
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("v%d", info.Size())
}

// stateFormat is what a copy of this program says it knows.
func stateFormat() int {
	if strings.Contains(filepath.Base(os.Args[0]), "older") {
		return 1
	}
	return 2
}

// report is what a child says about itself when it serves.
type report struct {
	PID    int
	Took   fuse.Takeover
	Status string // of /proc/self
	Env    []string
	Before *Ended
}

// query is a question a test wants asked.
type query struct {
	Ask  string
	PID  uint32
	Link string
	KiB  int

	Waiting int
	Text    string
	Mapped  []string // names of the entries, of those the store has
	InUse   []string
	Err     string
	Fetched uint64 // FUSE requests since the child began
}

// mapMain reads a file through a mapping; an error would be a SIGBUS.
func mapMain(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, fileSize, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	if !bytes.Equal(b, bytes.Repeat([]byte("x"), fileSize)) {
		return errors.New("wrong bytes")
	}
	return nil
}

// holdMain has the lock of its own memory held by a thread that waits for the bytes
// of a mapped file, and another thread wait for that lock to change it: whoever
// wants to read what is mapped waits behind both.
func holdMain(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	addr, err := unix.MmapPtr(int(f.Fd()), 0, nil, fileSize, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		return err
	}
	read := make(chan error, 1)
	go func() {
		_, err := mem.ReadAt(make([]byte, 1), int64(uintptr(addr)))
		read <- err
	}()
	for {
		select {
		case err := <-read:
			return err
		case <-time.After(10 * time.Millisecond):
			b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANON)
			if err != nil {
				return err
			}
			if err := unix.Munmap(b); err != nil {
				return err
			}
		}
	}
}

// wedged makes a child say nothing any more.
var wedged atomic.Bool

// closedUnless gives what is closed, or never is if stuck.
func closedUnless(stuck *atomic.Bool) <-chan struct{} {
	c := make(chan struct{})
	if !stuck.Load() {
		close(c)
	}
	return c
}

// letGo makes a child live on when its warden has let it go.
var letGo atomic.Bool

// childMain is the child of a warden: a server of tinyStore.
func childMain() error {
	c, err := FromEnv()
	if err != nil {
		return err
	}
	if _, err := FromEnv(); !errors.Is(err, flox.ErrNotFound) {
		return fmt.Errorf("FromEnv leaves itself in the environment: %w", err)
	}
	c.StateFormat = stateFormat()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	store := &tinyStore{release: filepath.Join(c.RunDir, "release")}
	s, err := fuse.NewServer(fuse.ServerConfig{
		Device: c.Device, Init: c.Init, Store: store, NodeTable: c.NodeTable(), Mapped: c.Mapped,
		ReadTimeout: 1500 * time.Millisecond, LookupTimeout: 10 * time.Second, Journal: c.Journal(),
		Serving: func() { c.Serving(version()) },
	})
	if err != nil {
		return err
	}
	go func() {
		if err := c.Run(ctx); errors.Is(err, flox.ErrClosed) && !letGo.Load() {
			stop()
		}
	}()
	beaten := false // one that never beat is not missed: it may be of a version that does not
	go c.Beats(ctx, func() {
		if s.Stats(); beaten {
			<-closedUnless(&wedged)
		}
		beaten = true
	})
	go func() {
		for ctx.Err() == nil {
			answerTest(ctx, c, s)
			time.Sleep(5 * time.Millisecond)
		}
	}()
	if _, err := os.Stat(filepath.Join(c.RunDir, "touch-yourself")); err == nil {
		os.Remove(filepath.Join(c.RunDir, "touch-yourself"))
		go os.Stat(filepath.Join(c.MountDir, hungPath)) // as nobody should
		for len(s.Waiting()) == 0 && ctx.Err() == nil {
			go s.Run(ctx)
			time.Sleep(10 * time.Millisecond)
		}
		writeReport(c, s)
		<-ctx.Done()
		return nil
	}
	if c.Links != nil {
		l, err := fuse.NewServer(fuse.ServerConfig{Device: c.Links, Init: c.LinksInit, Links: oneLink{c}, Journal: c.LinksJournal()})
		if err != nil {
			return err
		}
		go l.Run(ctx)
	}
	writeReport(c, s)
	if !strings.Contains(os.Args[0], "mute") {
		c.Ready(version())
	}
	if err := s.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

func writeReport(c *Conn, s *fuse.Server) {
	status, _ := os.ReadFile("/proc/self/status")
	b, _ := json.Marshal(report{PID: os.Getpid(), Took: s.Takeover(), Status: string(status), Env: os.Environ(), Before: c.Before()})
	for n := 1; ; n++ {
		f, err := os.OpenFile(filepath.Join(c.RunDir, fmt.Sprintf("report-%d", n)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err == nil {
			f.Write(b)
			f.Close()
		}
		return
	}
}

func answerTest(ctx context.Context, c *Conn, s *fuse.Server) {
	in := filepath.Join(c.RunDir, "ask")
	b, err := os.ReadFile(in)
	if err != nil {
		return
	}
	os.Remove(in)
	var q query
	if json.Unmarshal(b, &q) != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	switch q.Ask {
	case askExe:
		q.Text, err = c.Exe(ctx, q.PID)
	case askRoot:
		q.Text, _, err = c.RootTarget(ctx, q.Link)
	case askReadAhead:
		err = c.SetReadAhead(ctx, q.KiB)
	case "reading": // the one file whose READs take long
		for _, r := range s.Waiting() {
			if node, _ := s.Node(tinyID, 2); r.Op == "READ" && r.Node == node {
				q.Waiting++
			}
		}
	case askWaiting:
		q.Waiting, err = c.Waiting(ctx)
	case "wedge":
		wedged.Store(true)
	case "let go":
		letGo.Store(true)
		err = c.life.Close()
	case "drop":
		node, _ := s.Node(tinyID, 1)
		err = s.DropPages(ctx, []uint64{node})
	case askPages:
		var runs []PageRun
		runs, err = c.Pages(ctx, q.PID)
		for i, e := range tiny {
			node, _ := s.Node(tinyID, uint32(i))
			for _, r := range runs {
				if r.Node == node && r.Off == 0 && r.Len > 0 {
					q.Mapped = append(q.Mapped, e.Name)
				}
			}
		}
	case askInUse:
		var used map[uint64]struct{}
		used, err = c.InUse(ctx)
		for i, e := range tiny {
			node, _ := s.Node(tinyID, uint32(i))
			if _, ok := used[node]; ok {
				q.InUse = append(q.InUse, e.Name)
			}
			if c.Mapped(ctx, node, 1) {
				q.Mapped = append(q.Mapped, e.Name)
			}
		}
	}
	if err != nil {
		q.Err = err.Error()
	}
	q.Fetched = s.Stats().Total
	b, _ = json.Marshal(q)
	out := filepath.Join(c.RunDir, "told")
	os.WriteFile(out+".new", b, 0o644)
	os.Rename(out+".new", out)
}

const (
	storePath = "0c2y7sqz9mdkmv3xhbqf1r8gwn6jipa4-tiny"
	hungPath  = "1c2y7sqz9mdkmv3xhbqf1r8gwn6jipa4-hung"
	fileSize  = 200_000
)

// tiny is the tree of storePath: a directory of four files. "prog" is the
// program that serves it.
var (
	tinyID = flox.CID{42}
	tiny   = []flox.Entry{
		{Kind: flox.Directory, Span: 4},
		{Name: "conf", Kind: flox.Regular, Size: 6},
		{Name: "hung", Kind: flox.Regular, Size: fileSize},
		{Name: "prog", Kind: flox.Regular, Executable: true},
		{Name: "sleep", Kind: flox.Regular, Executable: true},
	}
	sleep, _ = os.ReadFile("/bin/sleep")
)

func init() {
	if info, err := os.Stat("/proc/self/exe"); err == nil {
		tiny[3].Size = uint64(info.Size())
	}
	tiny[4].Size = uint64(len(sleep))
}

// oneLink is a fuse.Links of one owner and one link, into the store.
type oneLink struct{ c *Conn }

func (l oneLink) Known(yield func(owner, name string) bool) { yield("o", "n") }

func (l oneLink) Listed(owner string) []string {
	return []string{map[string]string{"": "o", "o": "n"}[owner]}
}

func (l oneLink) Owner(_ context.Context, owner string) (string, error) {
	if !strings.EqualFold(owner, "o") {
		return "", flox.ErrNotFound
	}
	return "o", nil
}

func (l oneLink) Link(_ context.Context, owner, name string) (spelling, target string, err error) {
	if name != "n" {
		return "", "", flox.ErrNotFound
	}
	target, err = l.Target(owner, name)
	return name, target, err
}

func (l oneLink) Target(string, string) (string, error) {
	return filepath.Join(l.c.MountDir, storePath), nil
}

// tinyStore is a flox.Store and flox.Tree whose file "hung" and path hungPath
// wait until the file release is there.
type tinyStore struct{ release string }

func (s *tinyStore) wait(ctx context.Context) error {
	for {
		if _, err := os.Stat(s.release); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (s *tinyStore) Lookup(ctx context.Context, name string, _ flox.Reader) (flox.CID, bool, error) {
	switch name {
	case storePath:
		return tinyID, true, nil
	case hungPath:
		if err := s.wait(ctx); err != nil {
			return flox.CID{}, false, err
		}
	}
	return flox.CID{}, false, flox.ErrNotFound
}

func (s *tinyStore) Log(context.Context, string) (flox.CID, error) {
	return flox.CID{}, flox.ErrNotFound
}

func (s *tinyStore) Names(context.Context, string, int) ([]flox.Named, error) { return nil, nil }

func (s *tinyStore) Tree(context.Context, flox.CID, flox.Reader) (flox.Tree, error) { return s, nil }

func (s *tinyStore) Usage() flox.Usage { return flox.Usage{} }

func (s *tinyStore) Entry(_ context.Context, i uint32) (flox.Entry, error) { return tiny[i], nil }

func (s *tinyStore) Child(_ context.Context, _ uint32, name string) (uint32, flox.Entry, error) {
	for i, e := range tiny {
		if i > 0 && e.Name == name {
			return uint32(i), e, nil
		}
	}
	return 0, flox.Entry{}, flox.ErrNotFound
}

func (s *tinyStore) Children(_ context.Context, _, from uint32, yield func(uint32, flox.Entry) bool) error {
	for i := max(from, 1); int(i) < len(tiny) && yield(i, tiny[i]); i++ {
	}
	return nil
}

func (s *tinyStore) ReadAt(ctx context.Context, i uint32, p []byte, off int64, _ flox.Reader) (int, error) {
	var content []byte
	switch tiny[i].Name {
	case "conf":
		content = []byte("hello\n")
	case "sleep":
		content = sleep
	case "prog":
		self, err := os.Open("/proc/self/exe")
		if err != nil {
			return 0, err
		}
		defer self.Close()
		n, err := self.ReadAt(p, off)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return n, err
	case "hung":
		if err := s.wait(ctx); err != nil {
			return 0, err
		}
		content = []byte(strings.Repeat("x", fileSize))
	}
	if off > int64(len(content)) {
		return 0, nil
	}
	return copy(p, content[off:]), nil
}
