package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
)

// client talks to an agent over its real socket.
func client(t *testing.T, a *Agent) floxv1connect.AgentClient {
	t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", a.cfg.Socket)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	c := floxv1connect.NewAgentClient(&http.Client{Transport: transport}, "http://agent")
	until(t, "the socket is served", func() bool {
		_, err := c.Status(t.Context(), connect.NewRequest(&floxv1.StatusRequest{}))
		return err == nil
	})
	return c
}

// all receives a whole stream.
func all[T any](stream *connect.ServerStreamForClient[T], err error) (out []*T, _ error) {
	if err != nil {
		return nil, err
	}
	defer func() { _ = stream.Close() }()
	for stream.Receive() {
		m := *stream.Msg() //nolint:govet // read once, by this test
		out = append(out, &m)
	}
	return out, api.FromConnect(stream.Err())
}

// world is a tool that needs a library, published.
func world(t *testing.T, h *house) (tool, lib *flox.PathInfo) {
	t.Helper()
	lib = h.make(t, "lib", nil, testFile{name: "lib/l.so", data: randomBytes(5, 90_000)})
	tool = h.make(t, "tool", []flox.StorePath{lib.Path},
		testFile{name: "bin/tool", data: randomBytes(6, 600_000), exec: true},
		testFile{name: "share/big", data: randomBytes(7, 3_000_000)},
		testFile{name: "share/small", data: []byte("inline")},
		testFile{name: "share/empty"})
	h.publish(lib, tool)
	return tool, lib
}

func TestControlShowsPaths(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	tool, lib := world(t, h)
	a, _ := runAgent(t, h, nil, nil)
	c, ctx := client(t, a), within(t, 40*time.Second)
	full := testStore.Join(tool.Path)

	r, err := c.Path(ctx, connect.NewRequest(&floxv1.PathRequest{Path: full, Closure: true}))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range r.Msg.GetPaths() {
		names = append(names, p.GetInfo().GetPath())
	}
	if !slices.Equal(names, []string{string(tool.Path), string(lib.Path)}) {
		t.Errorf("closure %v", names)
	}
	if p := r.Msg.GetPaths()[0]; p.GetFiles() != 4 || p.GetContentBytes() != 3_600_006 || p.GetLocalBytes() != 6 || p.GetKept() {
		t.Errorf("tool: %v", p)
	}
	list, err := all(c.List(ctx, connect.NewRequest(&floxv1.ListRequest{Path: full + "/share", Recursive: true})))
	var shown []string
	for _, e := range list {
		shown = append(shown, fmt.Sprintf("%s %s %d", e.GetPath(), e.GetKind(), e.GetSize()))
	}
	if err != nil || !slices.Equal(shown, []string{"big regular 3000000", "empty regular 0", "small regular 6"}) {
		t.Errorf("list: %q %v", shown, err)
	}
	list, err = all(c.List(ctx, connect.NewRequest(&floxv1.ListRequest{Path: string(tool.Path)})))
	if err != nil || len(list) != 2 || list[0].GetPath() != "bin" || list[0].GetKind() != "directory" {
		t.Errorf("list: %v %v", list, err)
	}
	for name, want := range map[string][]byte{"bin/tool": randomBytes(6, 600_000), "share/big": randomBytes(7, 3_000_000), "share/small": []byte("inline"), "share/empty": nil} {
		parts, err := all(c.Cat(ctx, connect.NewRequest(&floxv1.CatRequest{Path: full + "/" + name})))
		var got []byte
		for _, p := range parts {
			got = append(got, p.GetData()...)
		}
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("cat %s: %d bytes, %v", name, len(got), err)
		}
	}
	for given, want := range map[string]error{
		full + "/share":          flox.ErrBadInput,
		full + "/nothing":        flox.ErrNotFound,
		"/etc/passwd":            flox.ErrBadInput,
		string(storePath(t, 77)): flox.ErrNotFound,
		"":                       flox.ErrBadInput,
	} {
		if _, err := all(c.Cat(ctx, connect.NewRequest(&floxv1.CatRequest{Path: given}))); !errors.Is(err, want) {
			t.Errorf("cat %q: %v, want %v", given, err, want)
		}
	}
}

func TestControlDownloadsKeepsAndVerifies(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	tool, lib := world(t, h)
	a, _ := runAgent(t, h, nil, nil)
	c, ctx := client(t, a), within(t, 40*time.Second)
	download := func(keep bool) *floxv1.DownloadProgress {
		t.Helper()
		said, err := all(c.Download(ctx, connect.NewRequest(&floxv1.DownloadRequest{Paths: []string{string(tool.Path)}, Closure: true, Keep: keep})))
		if err != nil || len(said) == 0 {
			t.Fatalf("download: %d messages, %v", len(said), err)
		}
		return said[len(said)-1]
	}
	// Kept before anything of it is here.
	if r, err := c.Keep(ctx, connect.NewRequest(&floxv1.KeepRequest{Paths: []string{string(lib.Path)}})); err != nil || len(r.Msg.GetKept()) != 1 {
		t.Errorf("keep: %v %v", r, err)
	}
	last := download(true)
	if !last.GetFinished() || last.GetDoneBytes() != last.GetTotalBytes() || last.GetTotalBytes() != 3_690_006 || last.GetDonePaths() != 2 {
		t.Errorf("download ended with %v", last)
	}
	before := a.traffic.total()
	if last = download(false); !last.GetFinished() || a.traffic.total() != before {
		t.Errorf("the second download fetched %d bytes", a.traffic.total()-before)
	}
	said, err := all(c.Verify(ctx, connect.NewRequest(&floxv1.VerifyRequest{})))
	if v := said[len(said)-1]; err != nil || !v.GetFinished() || v.GetDoneBytes() != 3_690_000 || len(v.GetBad()) != 0 {
		t.Errorf("verify: %v %v", said, err)
	}
	if _, err := c.CacheGC(ctx, connect.NewRequest(&floxv1.CacheGCRequest{})); err != nil {
		t.Error(err)
	}
	if u, err := c.CacheUsage(ctx, connect.NewRequest(&floxv1.CacheUsageRequest{})); err != nil || u.Msg.GetKeptBytes() < 3_690_000 {
		t.Errorf("kept content did not survive: %v %v", u, err)
	}
	// Valid no longer, and the storehouse away: it can be let go of.
	h.remove(tool.Path)
	until(t, "the path is gone", func() bool { _, ok := a.facts.get(tool.Path.HashPart()); return !ok })
	r, err := c.Unkeep(ctx, connect.NewRequest(&floxv1.KeepRequest{Paths: []string{string(tool.Path)}}))
	if err != nil || len(r.Msg.GetKept()) != 1 {
		t.Errorf("unkeep: %v %v", r, err)
	}
	_, err = c.Unkeep(ctx, connect.NewRequest(&floxv1.KeepRequest{Paths: []string{string(tool.Path)}}))
	if !errors.Is(api.FromConnect(err), flox.ErrNotFound) {
		t.Errorf("unkeep again: %v", err)
	}
}

func TestControlTellsOfItself(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	c, ctx := client(t, a), within(t, 40*time.Second)
	s, err := c.Status(ctx, connect.NewRequest(&floxv1.StatusRequest{}))
	if err != nil || !s.Msg.GetStorehouse().GetConnected() || s.Msg.GetStorehouse().GetName() != "test" || s.Msg.GetStoreDir() != string(testStore) {
		t.Errorf("status: %v %v", s, err)
	}
	p, err := c.Peers(ctx, connect.NewRequest(&floxv1.PeersRequest{}))
	if err != nil || len(p.Msg.GetPeers()) != 1 || p.Msg.GetPeers()[0].GetRole() != "storehouse" {
		t.Errorf("peers: %v %v", p, err)
	}
	d, err := c.Doctor(ctx, connect.NewRequest(&floxv1.DoctorRequest{}))
	if err != nil || len(d.Msg.GetFindings()) != 5 {
		t.Fatalf("doctor: %v %v", d, err)
	}
	for _, f := range d.Msg.GetFindings() {
		if f.GetLevel() != "ok" && f.GetFix() == "" {
			t.Errorf("a finding without a fix: %v", f)
		}
	}
	st, err := os.Stat(a.cfg.Socket)
	if err != nil || st.Mode().Perm() != 0o666 {
		t.Errorf("the socket is %v, want it for everybody: %v", st.Mode(), err)
	}
	big := strings.Repeat("x", 8<<20)
	if _, err := c.Path(ctx, connect.NewRequest(&floxv1.PathRequest{Path: big})); err == nil {
		t.Error("a request of 8 MiB was read")
	}
	up := c.Add(ctx)
	for i := range 3 {
		if err := up.Send(&floxv1.AddRequest{Name: "thing", Nar: make([]byte, 1000+i)}); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := up.CloseAndReceive(); err != nil || r.Msg.GetInfo().GetPath() != "thing" || !slices.Equal(h.added, []string{"thing: 3003 bytes"}) {
		t.Errorf("add: %v %v, the storehouse has %v", r, err, h.added)
	}
}

func TestOnlyRootAndTheAgentsUserTakeContentAway(t *testing.T) {
	t.Parallel()
	for uid, allowed := range map[int]bool{0: true, os.Geteuid(): true, 12345: false, -1: false} {
		err := mayTake(context.WithValue(t.Context(), callerKey{}, uid))
		if allowed != (err == nil) || !allowed && !errors.Is(err, flox.ErrDenied) {
			t.Errorf("user %d: %v", uid, err)
		}
	}
	if err := mayTake(t.Context()); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("nobody known: %v", err)
	}
}

func TestWatchShowsWhoWaitsForWhatAndWhy(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	tool, _ := world(t, h)
	a, _ := runAgent(t, h, nil, nil)
	c, ctx := client(t, a), within(t, 40*time.Second)
	tr := treeOf(ctx, t, a, tool.Path)
	big := entryOf(ctx, t, tr, "share/big")
	h.set(func() { clear(h.blocks) })
	reading, giveUp := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = tr.ReadAt(reading, big, make([]byte, 1000), 0, flox.Reader{PID: uint32(os.Getpid())})
	}()
	watching, stop := context.WithCancel(ctx)
	stream, err := c.Watch(watching, connect.NewRequest(&floxv1.WatchReadsRequest{IntervalMs: 50}))
	if err != nil {
		t.Fatal(err)
	}
	for stream.Receive() {
		reads := stream.Msg().GetReads()
		if len(reads) != 1 || reads[0].GetReason() == "" {
			continue
		}
		r := reads[0]
		if r.GetPath() != testStore.Join(tool.Path)+"/share/big" || r.GetOperation() != opRead || r.GetPid() != uint32(os.Getpid()) ||
			r.GetCommand() == "" || r.GetTotalBytes() < 1000 || r.GetSource() != "nobody yet" || r.GetEtaMs() != -1 {
			t.Errorf("a read that waits is shown as %v", r)
		}
		break
	}
	stop()
	_ = stream.Close()
	giveUp()
	<-done
}

// Watchers, a reader who takes nothing, and reads that wait: none of them keeps
// the agent from ending, and nothing of it is used after.
func TestTheAgentEndsWhateverIsUnderWay(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	tool, _ := world(t, h)
	a, stop := runAgent(t, h, func(c *Config) { c.NoPrefetch = true }, nil) // what is not here must stay so
	c, ctx := client(t, a), within(t, 40*time.Second)
	tr := treeOf(ctx, t, a, tool.Path)
	big := entryOf(ctx, t, tr, "share/big")
	watch, err := c.Watch(ctx, connect.NewRequest(&floxv1.WatchReadsRequest{IntervalMs: 50}))
	if err != nil || !watch.Receive() {
		t.Fatal(err)
	}
	slow, err := (&net.Dialer{}).DialContext(ctx, "unix", a.cfg.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	body := fmt.Sprintf(`{"path":%q}`, testStore.Join(tool.Path)+"/share/big")
	frame := append([]byte{0, 0, 0, 0, byte(len(body))}, body...)
	fmt.Fprintf(slow, "POST /flox.v1.Agent/Cat HTTP/1.1\r\nHost: agent\r\nContent-Type: application/connect+json\r\nConnect-Protocol-Version: 1\r\nContent-Length: %d\r\n\r\n%s", len(frame), frame)
	until(t, "the slow reader's bytes come in", func() bool { return a.traffic.total() > 1_000_000 })
	h.set(func() { clear(h.blocks); h.broken = errors.New("out of order") })
	reads := make(chan error, 2)
	go func() {
		_, err := tr.ReadAt(t.Context(), big, make([]byte, 3_000_000), 0, flox.Reader{})
		reads <- err
	}()
	go func() {
		_, _, err := a.store.Lookup(t.Context(), string(storePath(t, 5)), flox.Reader{})
		reads <- err
	}()
	until(t, "both wait", func() bool { return a.waits.count() >= 2 })
	stop()
	for range 2 {
		if err := <-reads; err == nil || errors.Is(err, flox.ErrNotFound) {
			t.Errorf("a read under way ended with %v", err)
		}
	}
	for watch.Receive() {
	}
	_ = watch.Close()
	if _, err := os.Stat(a.cfg.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Errorf("closed a second time: %v", err)
	}
}

func TestASecondAgentIsRefused(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, stop := runAgent(t, h, nil, nil)
	_ = client(t, a)
	if _, err := New(a.cfg); !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("a second agent on the state directory: %v, want ErrBusy and the process", err)
	}
	other := a.cfg
	other.StateDir = filepath.Join(t.TempDir(), "other")
	b, err := New(other)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Run(t.Context()); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("a second agent on the socket: %v, want ErrBusy", err)
	}
	if _, err := os.Stat(a.cfg.Socket); err != nil {
		t.Errorf("the first one's socket: %v", err)
	}
	stop()

	// What a killed one left is replaced, what is no socket is not.
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: a.cfg.Socket})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	_ = left.Close()
	again, stop := runAgent(t, h, func(c *Config) { *c = a.cfg }, nil)
	_ = client(t, again)
	stop()
	if err := os.WriteFile(a.cfg.Socket, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err = New(a.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Run(t.Context()); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("a file in the socket's place: %v, want ErrBusy", err)
	}
	if b, err := os.ReadFile(a.cfg.Socket); err != nil || string(b) != "precious" {
		t.Errorf("the file in the socket's place was touched: %q %v", b, err)
	}
}

func TestConfigurationsThatCannotWorkAreRefused(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	good := Config{StateDir: t.TempDir(), Socket: filepath.Join(t.TempDir(), "s"), Invite: h.invite, Listen: []string{"127.0.0.1:0"}, NoMDNS: true}
	for name, change := range map[string]func(*Config){
		"no state directory": func(c *Config) { c.StateDir = "" },
		"no socket":          func(c *Config) { c.Socket = "" },
		"no invite":          func(c *Config) { c.Invite = nil },
		"store directory":    func(c *Config) { c.StoreDir = "/elsewhere/store" },
		"address":            func(c *Config) { c.Listen = []string{"nonsense"} },
	} {
		cfg := good
		change(&cfg)
		if _, err := New(cfg); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v, want ErrBadInput", name, err)
		}
	}
	line, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer line.Close()
	good.Listen = []string{line.Addr().String()}
	if _, err := New(good); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("a port in use: %v, want ErrBusy", err)
	}
}
