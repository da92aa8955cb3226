package fuse

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// The mount is real, so no process may both serve and touch it: the tests start
// this binary again, once to serve (a memStore) and once for every touch.
const modeEnv = "FLOX_FUSE_TEST"

func init() {
	if os.Getenv(modeEnv) == "touch" {
		runtime.LockOSThread() // signals of a timer go to the main thread first
	}
}

func TestMain(m *testing.M) {
	switch os.Getenv(modeEnv) {
	case "serve":
		if err := serveMain(); err != nil {
			fmt.Fprintln(os.Stderr, "serve:", err)
			os.Exit(1)
		}
		os.Exit(0)
	case "nobody":
		if err := mountAsNobody(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	case "touch":
		touchMain()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// needMount is for tests of a real mount: they need root and /dev/fuse.
func needMount(t testing.TB) {
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

// mount is a mount under test: this process keeps the device, as a warden does.
type mount struct {
	*Device
	table string
	opts  serveOptions
	srv   *served
}

// serveOptions are the first line a serving process reads.
type serveOptions struct {
	Init                       []byte
	Table                      string
	LookupTimeout, ReadTimeout time.Duration
	MaxInFlight                int
	WithoutResend              bool
	Links                      map[string]string // shown in place of the store
}

func newMount(t testing.TB, opts serveOptions) *mount {
	t.Helper()
	needMount(t)
	top := t.TempDir()
	at := filepath.Join(top, "mnt")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	dev, err := Mount(MountConfig{Dir: at, Source: "floxd-test", WithoutResend: opts.WithoutResend})
	if err != nil {
		t.Fatal(err)
	}
	m := &mount{Device: dev, table: filepath.Join(top, "nodes"), opts: opts}
	t.Cleanup(func() {
		// Force ends whatever a failed test left waiting.
		unix.Unmount(at, unix.MNT_FORCE|unix.MNT_DETACH)
		if m.srv != nil {
			m.srv.kill()
		}
		dev.File.Close()
	})
	m.start(t)
	return m
}

// served is a serving process.
type served struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

// start starts a server for the mount.
func (m *mount) start(t testing.TB) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), modeEnv+"=serve")
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{m.File}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.srv = &served{cmd: cmd, in: in, out: json.NewDecoder(out)}
	o := m.opts
	o.Init, o.Table = m.Init, m.table
	b, _ := json.Marshal(o)
	if _, err := fmt.Fprintf(in, "%s\n", b); err != nil {
		t.Fatal(err)
	}
	m.ask(t, command{Cmd: "ping"})
}

func (s *served) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
	s.in.Close()
}

// command is what a test tells its serving process.
type command struct {
	Cmd   string
	Arg   string
	Kind  string
	N     int
	Paths []string
}

// reply is its answer.
type reply struct {
	Err     string
	Stats   Stats
	Took    Takeover
	Waiting []Wait
	Limit   int
	Full    bool
	Nodes   []uint64
	Heap    int // KiB the heap ever had
	Live    int // bytes of the heap in use, after a collection
}

func (m *mount) ask(t testing.TB, c command) reply {
	t.Helper()
	b, _ := json.Marshal(c)
	if _, err := fmt.Fprintf(m.srv.in, "%s\n", b); err != nil {
		t.Fatal("serving process:", err)
	}
	var r reply
	if err := m.srv.out.Decode(&r); err != nil {
		t.Fatal("serving process:", err)
	}
	if r.Err != "" {
		t.Fatalf("%+v: %s", c, r.Err)
	}
	return r
}

func (m *mount) total(t testing.TB) uint64 {
	t.Helper()
	return m.ask(t, command{Cmd: "stats"}).Stats.Total
}

// serveMain is the serving process.
func serveMain() error {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	if !lines.Scan() {
		return errors.New("no options")
	}
	var o serveOptions
	if err := json.Unmarshal(lines.Bytes(), &o); err != nil {
		return err
	}
	store := newMemStore()
	world(store)
	var mapped atomic.Int32 // 0 no, 1 yes, 2 nobody can say, 3 nor gives up
	level := slog.LevelError
	if os.Getenv("FLOX_FUSE_LOG") != "" {
		level = slog.LevelDebug
	}
	links := newMemLinks(o.Links)
	cfg := ServerConfig{
		Device: os.NewFile(3, "fuse"), Init: o.Init, Store: store, NodeTable: o.Table, Journal: o.Table + ".journal",
		LookupTimeout: o.LookupTimeout, ReadTimeout: o.ReadTimeout, MaxInFlight: o.MaxInFlight,
		Mapped: func(ctx context.Context, _ uint64, _ uint32) bool {
			switch mapped.Load() {
			case 2:
				<-ctx.Done()
			case 3:
				time.Sleep(time.Minute)
			}
			return mapped.Load() == 1
		},
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})),
	}
	if o.Links != nil {
		cfg.Store, cfg.Links, cfg.NodeTable = nil, links, ""
	}
	s, err := NewServer(cfg)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var c command
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return err
		}
		var r reply
		switch c.Cmd {
		case "stop": // and say how Run ended
			stop()
			r.Err = fmt.Sprint(<-ended)
		case "ended": // by itself
			r.Err = fmt.Sprint(<-ended)
		case "mapped":
			mapped.Store(int32(c.N))
		case "link", "unlink", "remember", "holdlinks":
			r.Err = links.obey(s, c)
		default:
			r = obey(s, store, c)
		}
		if err := out.Encode(r); err != nil {
			return err
		}
	}
	return nil
}

// place splits "NAME/sub/path" and finds the entry.
func (m *memStore) place(path string) (id flox.CID, index uint32, name string) {
	name, sub, _ := strings.Cut(path, "/")
	m.mu.Lock()
	defer m.mu.Unlock()
	id = m.names[name]
	return id, m.trees[id].index(sub), name
}

func obey(s *Server, store *memStore, c command) (r reply) {
	gate := c.Arg
	if path, ok := strings.CutPrefix(gate, "read "); ok {
		_, index, name := store.place(path)
		gate = fmt.Sprintf("read %s %d", name, index)
	}
	switch c.Cmd {
	case "ping":
	case "stats":
		r.Stats = s.Stats()
	case "takeover":
		r.Took = s.Takeover()
	case "waiting":
		r.Waiting = s.Waiting()
		r.Limit, r.Full = s.Full()
	case "hold":
		store.hold(gate)
	case "release":
		store.release(gate)
	case "fail":
		store.fail(gate, map[string]error{"unreachable": flox.ErrUnreachable, "corrupt": flox.ErrCorrupt}[c.Kind])
	case "add":
		store.add(c.Arg, file("", []byte(c.Arg)))
	case "stage": // add a directory that may be deleted
		store.mu.Lock()
		store.staged[c.Arg] = true
		store.mu.Unlock()
		store.add(c.Arg, dir("", file("file", []byte(c.Arg))))
	case "delete":
		store.mu.Lock()
		delete(store.names, c.Arg)
		store.mu.Unlock()
	case "many":
		store.mu.Lock()
		store.many = c.N
		store.mu.Unlock()
	case "wide": // add a store path of N files
		store.addMade(c.Arg, wideTree(c.N))
	case "huge": // add a store path that is a file of N bytes
		store.addMade(c.Arg, hugeFile(c.N))
	case "nodes", "drop":
		for _, p := range c.Paths {
			id, index, _ := store.place(p)
			n, ok := s.Node(id, index)
			if got, at, back := s.Resolve(n); ok && (!back || got != id || at != index) {
				r.Err = "Resolve does not invert Node"
			}
			r.Nodes = append(r.Nodes, n)
		}
		if c.Cmd == "drop" {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			if err := s.DropPages(ctx, r.Nodes); err != nil {
				r.Err = err.Error()
			}
		}
	case "heap":
		var ms runtime.MemStats
		runtime.ReadMemStats(&ms)
		r.Heap = int(ms.HeapSys >> 10)
		runtime.GC()
		runtime.ReadMemStats(&ms)
		r.Live = int(ms.HeapAlloc)
	default:
		r.Err = "what?"
	}
	return r
}

// op is one thing a touching process does, and what came of it.
type op struct {
	Do, Path string
	Off      int64
	Len      int

	Errno  string // "" = worked
	Mode   uint32
	Size   int64
	Ino    uint64
	Nlink  uint64
	Mtime  int64
	Blocks int64
	Text   string   // target, sha256, output
	Names  []string // of a directory
	Count  int
	Took   time.Duration
}

// touch does ops on the mount in another process and fails the test if it
// does not end.
func (m *mount) touch(t testing.TB, ops ...op) []op {
	t.Helper()
	return m.begin(t, ops...).wait(t, 60*time.Second)
}

// toucher is a process that touches the mount.
type toucher struct {
	cmd  *exec.Cmd
	out  *strings.Builder
	done chan error
}

// begin starts a touching process; paths are relative to the mount.
func (m *mount) begin(t testing.TB, ops ...op) *toucher {
	t.Helper()
	b, _ := json.Marshal(ops)
	var out strings.Builder
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), modeEnv+"=touch", "FLOX_FUSE_DIR="+m.Dir)
	cmd.Stdin = bytes.NewReader(b)
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &toucher{cmd: cmd, out: &out, done: make(chan error, 1)}
	go func() { c.done <- cmd.Wait() }()
	return c
}

// wait gives the results.
func (c *toucher) wait(t testing.TB, limit time.Duration) []op {
	t.Helper()
	select {
	case err := <-c.done:
		if err != nil {
			t.Fatalf("touching process: %v: %s", err, c.out)
		}
	case <-time.After(limit):
		c.cmd.Process.Kill()
		t.Fatalf("touching process hangs")
	}
	var ops []op
	if err := json.Unmarshal([]byte(c.out.String()), &ops); err != nil {
		t.Fatal(err)
	}
	return ops
}

// dies kills the process and waits until it is gone.
func (c *toucher) dies(t testing.TB, limit time.Duration) {
	t.Helper()
	select {
	case err := <-c.done:
		t.Fatalf("touching process ended by itself: %v: %s", err, c.out)
	default:
	}
	c.cmd.Process.Kill()
	c.gone(t, limit)
}

// gone waits until a killed process is gone.
func (c *toucher) gone(t testing.TB, limit time.Duration) {
	t.Helper()
	select {
	case <-c.done:
	case <-time.After(limit):
		t.Fatalf("killed process is still there after %v", limit)
	}
}

// touchMain is the touching process. It uses system calls as they are: the os
// package would hide EINTR.
func touchMain() {
	var ops []op
	list := []byte(os.Getenv("FLOX_FUSE_OPS"))
	if len(list) == 0 {
		list, _ = io.ReadAll(os.Stdin)
	}
	if err := json.Unmarshal(list, &ops); err != nil {
		panic(err)
	}
	top := os.Getenv("FLOX_FUSE_DIR")
	for i := range ops {
		o := &ops[i]
		start := time.Now()
		err := o.run(filepath.Join(top, o.Path))
		o.Took = time.Since(start)
		var errno syscall.Errno
		switch {
		case errors.As(err, &errno):
			o.Errno = unix.ErrnoName(errno)
		case err != nil:
			o.Errno = err.Error()
		}
	}
	json.NewEncoder(os.Stdout).Encode(ops)
}

func (o *op) run(path string) error {
	switch o.Do {
	case "stat":
		var st unix.Stat_t
		err := unix.Lstat(path, &st)
		o.Mode, o.Size, o.Ino, o.Nlink = st.Mode, st.Size, st.Ino, uint64(st.Nlink)
		o.Mtime, o.Blocks = st.Mtim.Sec, st.Blocks
		return err
	case "readlink":
		var err error
		o.Text, err = os.Readlink(path)
		return err
	case "readdir":
		return o.readdir(path)
	case "walk":
		return o.walk(path)
	case "peek":
		return o.peek(path)
	case "read":
		return o.read(path)
	case "mmap":
		return o.mmap(path)
	case "create":
		_, err := unix.Open(path, unix.O_CREAT|unix.O_WRONLY, 0o644)
		return err
	case "statfs":
		var st unix.Statfs_t
		err := unix.Statfs(path, &st)
		o.Size, o.Blocks, o.Count = int64(st.Bfree)*st.Bsize, int64(st.Blocks), int(st.Files)
		return err
	case "xattr":
		_, err := unix.Lgetxattr(path, "user.x", make([]byte, 64))
		return err
	case "access":
		return unix.Access(path, unix.X_OK)
	case "ioctl":
		return o.ioctl(path)
	case "exec":
		cmd := exec.Command(path)
		cmd.Env = []string{modeEnv + "=touch", "FLOX_FUSE_OPS=[]"}
		b, err := cmd.Output()
		o.Text = strings.TrimSpace(string(b))
		return err
	case "tick": // from here on, every Len milliseconds a signal
		signal.Notify(make(chan os.Signal, 1), syscall.SIGALRM)
		every := unix.NsecToTimeval(int64(o.Len) * 1e6)
		_, err := unix.Setitimer(unix.ITIMER_REAL, unix.Itimerval{Interval: every, Value: every})
		return err
	case "sleep":
		time.Sleep(time.Duration(o.Len) * time.Millisecond)
		return nil
	}
	return errors.New("what?")
}

func (o *op) readdir(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	seen := map[string]bool{}
	for {
		n, err := unix.Getdents(fd, buf)
		if n <= 0 || err != nil {
			o.Count = len(seen)
			if len(seen) > 2000 {
				o.Names = nil
			}
			return err
		}
		var names []string
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
		for _, name := range names {
			if seen[name] {
				return fmt.Errorf("%s is listed twice", name)
			}
			seen[name] = true
		}
		o.Names = append(o.Names, names...)
	}
}

func (o *op) read(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := make([]byte, o.Len)
	if o.Len == 0 { // all of it, and one byte more to see that it ends
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		buf = make([]byte, st.Size+1)
	}
	at := 0
	for at < len(buf) {
		n, err := unix.Pread(fd, buf[at:], o.Off+int64(at))
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
		at += n
	}
	o.Count, o.Text = at, sum(buf[:at])
	return nil
}

func (o *op) mmap(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	b, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(b)
	if o.Len != 0 { // page faults one by one, without read-ahead
		if err := unix.Madvise(b, unix.MADV_RANDOM); err != nil {
			return err
		}
	}
	o.Count, o.Text = len(b), sum(b)
	return nil
}

func (o *op) ioctl(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.IoctlGetTermios(fd, unix.TCGETS)
	return err
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:8])
}
