package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/worker"
)

// builder is the storehouse's word on derivations: it "builds" the outputs it is
// given, once what it needs was uploaded.
type builder struct {
	floxv1connect.UnimplementedBuildsHandler
	h       *house
	outputs map[string]*flox.PathInfo // by .drv
	log     flox.StorePath            // of aDrv
	told    int                       // realisations
	asked   atomic.Int32              // questions about builds, and builds
}

func (b *builder) Realisations(context.Context, *connect.Request[floxv1.RealisationsRequest]) (*connect.Response[floxv1.RealisationsResponse], error) {
	return connect.NewResponse(&floxv1.RealisationsResponse{}), nil
}

func (b *builder) RegisterRealisation(context.Context, *connect.Request[floxv1.RegisterRealisationRequest]) (*connect.Response[floxv1.RegisterRealisationResponse], error) {
	b.h.set(func() { b.told++ })
	return connect.NewResponse(&floxv1.RegisterRealisationResponse{}), nil
}

func (b *builder) has(p string) bool { return b.h.has(flox.StorePath(p)) }

func (b *builder) Missing(_ context.Context, req *connect.Request[floxv1.MissingRequest]) (*connect.Response[floxv1.MissingResponse], error) {
	b.asked.Add(1)
	m := &floxv1.MissingResponse{}
	for _, p := range req.Msg.GetPaths() {
		if b.outputs[p.GetPath()] != nil && b.has(p.GetPath()) {
			m.WillBuild = append(m.WillBuild, p.GetPath())
		} else {
			m.Unknown = append(m.Unknown, p.GetPath())
		}
	}
	return connect.NewResponse(m), nil
}

func (b *builder) Build(_ context.Context, req *connect.Request[floxv1.BuildRequest], stream *connect.ServerStream[floxv1.BuildEvent]) error {
	b.asked.Add(1)
	for _, p := range req.Msg.GetPaths() {
		out, outcome := b.outputs[p.GetPath()], &floxv1.BuildOutcome{Status: uint32(worker.NoSubstituters), Message: "nobody has " + p.GetPath()}
		if out != nil && b.has(p.GetPath()) {
			outcome = &floxv1.BuildOutcome{TimesBuilt: 1, StartUnix: 1, StopUnix: 2, Outputs: []*floxv1.BuiltOutput{{
				Name: "out", Path: string(out.Path), Id: nix.RealisationID{DrvHash: sha256.Sum256(nil), Output: "out"}.String(),
			}}}
			b.h.publish(out)
			for _, e := range []*floxv1.BuildEvent{
				{Event: &floxv1.BuildEvent_Start{Start: &floxv1.BuildStart{Drv: p.GetPath()}}},
				{Event: &floxv1.BuildEvent_Line{Line: &floxv1.BuildLine{Drv: p.GetPath(), Text: "a line of the builder"}}},
				{Event: &floxv1.BuildEvent_Stop{Stop: &floxv1.BuildStop{Drv: p.GetPath(), Outcome: outcome}}},
			} {
				if err := stream.Send(e); err != nil {
					return err
				}
			}
		}
		if err := stream.Send(&floxv1.BuildEvent{Event: &floxv1.BuildEvent_Result{Result: &floxv1.BuildResult{Path: p, Outcome: outcome}}}); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) Referrers(context.Context, *connect.Request[floxv1.ReferrersRequest]) (*connect.Response[floxv1.ReferrersResponse], error) {
	return connect.NewResponse(&floxv1.ReferrersResponse{}), nil
}

// nixClient runs the installed Nix against an agent. Nothing is mounted here:
// what a client reads in the store directory itself is for integration/.
type nixClient struct {
	t   *testing.T
	tmp string
	env []string
}

func newNixClient(t *testing.T, a *Agent) *nixClient {
	t.Helper()
	if _, err := exec.LookPath("nix-store"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("Nix is not installed: install nix-bin")
		}
		t.Skip("Nix is not installed")
	}
	tmp := t.TempDir()
	if err := os.MkdirAll(filepath.Join(tmp, "conf"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tmp, "conf", "nix.conf"), []byte("experimental-features = nix-command\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return &nixClient{t: t, tmp: tmp, env: []string{
		"HOME=" + tmp, "PATH=" + os.Getenv("PATH"), "NIX_CONF_DIR=" + tmp + "/conf", "NIX_USER_CONF_FILES=",
		"NIX_REMOTE=unix://" + a.cfg.NixSocket, "NIX_STORE_DIR=" + string(testStore), "NIX_STATE_DIR=" + tmp + "/state",
		"NIX_LOG_DIR=" + tmp + "/log", "NIX_DATA_DIR=" + tmp + "/share",
	}}
}

func (n *nixClient) try(args ...string) (stdout, stderr string, err error) {
	n.t.Helper()
	cmd := exec.CommandContext(within(n.t, time.Minute), args[0], args[1:]...)
	cmd.Env, cmd.Dir = n.env, n.tmp
	cmd.WaitDelay = 5 * time.Second
	var out, bad bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &bad
	err = cmd.Run()
	return strings.TrimSpace(out.String()), bad.String(), err
}

func (n *nixClient) run(args ...string) string {
	n.t.Helper()
	out, bad, err := n.try(args...)
	if err != nil {
		n.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, bad)
	}
	return out
}

// runNixAgent is runAgent with a socket for Nix, following its storehouse.
func runNixAgent(t *testing.T, h *house) *Agent {
	t.Helper()
	a, _ := runAgent(t, h, func(c *Config) { c.NixSocket = filepath.Join(filepath.Dir(c.Socket), "nix.socket") }, nil)
	following(t, a)
	until(t, "the socket for Nix is there", func() bool { _, err := os.Stat(a.cfg.NixSocket); return err == nil })
	return a
}

// What a stock client asks of its daemon, it hears of the storehouse.
func TestStockNixReadsTheStorehouse(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	dep := h.make(t, "dep", nil, testFile{name: "a", data: []byte("1")})
	top := h.make(t, "top", []flox.StorePath{dep.Path}, testFile{name: "b", data: []byte("2")})
	h.publish(dep, top)
	a := runNixAgent(t, h)
	n := newNixClient(t, a)
	at := testStore.Join
	if got := n.run("nix-store", "-qR", at(top.Path)); got != at(dep.Path)+"\n"+at(top.Path) {
		t.Errorf("closure %q", got)
	}
	if got := n.run("nix-store", "-q", "--referrers", at(dep.Path)); got != at(top.Path) {
		t.Errorf("referrers %q", got)
	}
	if got := n.run("nix", "path-info", "-rs", at(top.Path)); !strings.Contains(got, at(dep.Path)) {
		t.Errorf("path-info %q", got)
	}
	absent := at("0123456789abcdfghijklmnpqrsvwxyz-none")
	if _, bad, err := n.try("nix", "path-info", absent); err == nil || !strings.Contains(bad, "is not valid") {
		t.Errorf("info of nothing: %v, %s", err, bad)
	}
	if _, bad, err := n.try("nix-store", "-r", absent); err == nil || !strings.Contains(bad, "nobody has") {
		t.Errorf("realise nothing: %v, %s", err, bad)
	}
	link := filepath.Join(n.tmp, "result")
	n.run("nix-store", "-r", at(top.Path), "--add-root", link, "--indirect")
	if got := n.run("nix-store", "--gc", "--print-roots"); !strings.Contains(got, link+" -> "+at(top.Path)) {
		t.Errorf("roots %q", got)
	}
	set, err := a.roots.set(t.Context())
	if err != nil || set.Len() != 1 {
		t.Errorf("the storehouse is told of %d paths, %v", set.Len(), err)
	}
	if got := n.run("nix-store", "--gc", "--print-live"); !strings.Contains(got, at(dep.Path)) {
		t.Errorf("live %q", got)
	}
	n.run("rm", link)
	if got := n.run("nix-store", "--gc", "--print-roots"); strings.Contains(got, link) {
		t.Errorf("roots %q after the link is gone", got)
	}
}

// A build of what was written here: nothing leaves the machine before, what the
// build needs does then, and what was built is known when the client hears of it.
func TestStockNixBuildsInTheStorehouse(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	b := &h.builds
	b.h, b.outputs = h, make(map[string]*flox.PathInfo)
	a := runNixAgent(t, h)
	n := newNixClient(t, a)
	if err := os.WriteFile(filepath.Join(n.tmp, "src"), []byte("source"), 0o644); err != nil {
		t.Fatal(err)
	}
	source := n.run("nix-store", "--add", filepath.Join(n.tmp, "src"))
	if got := n.run("nix", "path-info", source); got != source {
		t.Errorf("added %q, info %q", source, got)
	}
	drv := n.run("nix-instantiate", "-E", `derivation { name = "made"; system = "x86_64-linux"; builder = "/bin/sh"; src = builtins.toFile "s" "text"; }`)
	if len(h.added) > 0 || h.takes.offers > 0 {
		t.Error("the storehouse heard of what is only written here")
	}
	drvPath := flox.StorePath(filepath.Base(drv))
	text, err := a.staged.Derivation(t.Context(), drvPath)
	if err != nil {
		t.Fatal(err)
	}
	outPath := text.Outputs["out"].Path
	built := h.make(t, "made", nil, testFile{name: "f", data: []byte("built")})
	built.Path = outPath
	sign(built, h.key)
	b.outputs[string(drvPath)] = built

	// The stock client would read the .drv in the mount.
	var shown []string
	c := nixDial(t, a, worker.NotTrusted, func(f worker.LogFrame) {
		shown = append(shown, f.Text)
		for _, field := range f.Fields {
			shown = append(shown, field.Text)
		}
	})
	targets := []worker.DerivedPath{{Path: drvPath, All: true}, {Path: flox.StorePath(filepath.Base(source))}}
	missing, err := c.Missing(t.Context(), targets)
	if err != nil || !slices.Equal(missing.Build, []flox.StorePath{drvPath}) || len(missing.Unknown) > 0 {
		t.Errorf("missing %+v, %v", missing, err)
	}
	results, err := c.BuildResults(t.Context(), targets, worker.BuildNormal)
	if err != nil || len(results) != 2 || results[0].Status != worker.Built || len(results[0].Outputs) != 1 || results[1].Status != worker.AlreadyValid {
		t.Fatalf("results %+v, %v", results, err)
	}
	if !slices.Contains(shown, "building '"+drv+"'") || !slices.Contains(shown, "a line of the builder") {
		t.Errorf("the client saw %q", shown)
	}
	if known, ok := a.facts.get(outPath.HashPart()); !ok || known.Path != outPath {
		t.Error("what was built is not known here")
	}
	asked := b.asked.Load()
	again, err := c.BuildResults(t.Context(), targets, worker.BuildNormal)
	if err != nil || len(again) != 2 || again[0].Status != worker.AlreadyValid || len(again[0].Outputs) != 1 || again[0].Outputs[0].Path != outPath {
		t.Errorf("a second time: %+v, %v", again, err)
	}
	missing, err = c.Missing(t.Context(), targets)
	if err != nil || len(missing.Build)+len(missing.Substitute)+len(missing.Unknown) > 0 || b.asked.Load() != asked {
		t.Errorf("nothing is to be done, but missing %+v, %v, and the storehouse was asked %d times", missing, err, b.asked.Load()-asked)
	}
	if _, err := a.staged.Path(flox.StorePath(filepath.Base(source))); err != nil || b.has(filepath.Base(source)) {
		t.Errorf("a source that no build needs left the machine, or: %v", err)
	}
	leaves(t, a, c) // what it built stays while it is here
	n.run("nix-store", "--delete", source)
	if _, err := a.staged.Path(flox.StorePath(filepath.Base(source))); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("deleted, but %v", err)
	}
}

// leaves ends a connection, and waits until the agent keeps nothing for it any more.
func leaves(t *testing.T, a *Agent, c *worker.Client) {
	t.Helper()
	sessions := func() int {
		a.nix.roots.mu.Lock()
		defer a.nix.roots.mu.Unlock()
		return len(a.nix.roots.sessions)
	}
	before := sessions()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	until(t, "a connection has ended", func() bool { return sessions() < before })
}

// nixDial connects a client that is trusted or not.
func nixDial(t *testing.T, a *Agent, trust worker.Trust, log ...func(worker.LogFrame)) *worker.Client {
	t.Helper()
	return nixDialAs(t, a, worker.Peer{Trust: trust}, log...)
}

// nixDialAs connects a client.
func nixDialAs(t *testing.T, a *Agent, peer worker.Peer, log ...func(worker.LogFrame)) *worker.Client {
	t.Helper()
	here, there := net.Pipe()
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(done)
		_ = a.nix.server.Serve(ctx, there, peer)
	}()
	t.Cleanup(func() { cancel(); <-done })
	cfg := worker.ClientConfig{Dir: testStore}
	if len(log) > 0 {
		cfg.Log = log[0]
	}
	c, err := worker.NewClient(t.Context(), here, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// An input-addressed path that nobody vouches for: an ordinary user cannot add
// it, root can for this machine alone, and a valid path stays what it is.
func TestForgedPathsStayOnTheMachine(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	bash := h.make(t, "bash", nil, testFile{name: "bin/bash", data: []byte("real")})
	h.publish(bash)
	a := runNixAgent(t, h)
	var nar bytes.Buffer
	w := nix.NewNarWriter(&nar)
	if err := errors.Join(w.Entry(nix.NarEntry{Kind: flox.Symlink, Target: "/evil"}), w.Close()); err != nil {
		t.Fatal(err)
	}
	forged := func(p flox.StorePath) *worker.Info {
		return &worker.Info{PathInfo: flox.PathInfo{Path: p, NarHash: sha256.Sum256(nar.Bytes()), NarSize: uint64(nar.Len())}}
	}
	ctx := within(t, time.Minute)
	const other = flox.StorePath("0123456789abcdfghijklmnpqrsvwxyz-other")
	user, root := nixDial(t, a, worker.NotTrusted), nixDial(t, a, worker.Trusted)
	err := user.AddNar(ctx, forged(other), bytes.NewReader(nar.Bytes()), worker.AddOptions{NoCheckSigs: true})
	if err == nil || !strings.Contains(err.Error(), "lacks a valid signature") {
		t.Errorf("a user adds it: %v", err)
	}
	for _, p := range []flox.StorePath{bash.Path, other} {
		next := 0
		err := root.AddNars(ctx, 1, func() (*worker.Info, io.Reader, error) { next++; return forged(p), bytes.NewReader(nar.Bytes()), nil }, worker.AddOptions{NoCheckSigs: true})
		if err != nil || next != 1 {
			t.Errorf("root adds %s: %v", p, err)
		}
	}
	if got, err := user.Info(ctx, bash.Path); err != nil || got.NarHash != bash.NarHash {
		t.Errorf("a valid path changed: %v, %v", got, err)
	}
	if _, err := user.Info(ctx, other); err != nil {
		t.Errorf("what root added for this machine: %v", err)
	}
	if _, err := a.PublishStaged(ctx, other); !errors.Is(err, flox.ErrUntrusted) {
		t.Errorf("it may be published: %v", err)
	}
	// A path is known by its hash part: one of another name is another path, and refused.
	for _, p := range []flox.StorePath{bash.Path, other} {
		namesake := p[:33] + "namesake"
		err := root.AddNar(ctx, forged(namesake), bytes.NewReader(nar.Bytes()), worker.AddOptions{NoCheckSigs: true})
		if err == nil || !strings.Contains(err.Error(), "hash part") || !strings.Contains(err.Error(), string(p)) {
			t.Errorf("root adds %s beside %s: %v", namesake, p, err)
		}
		if _, err := user.Info(ctx, namesake); !errors.Is(err, flox.ErrNotFound) {
			t.Errorf("%s: %v", namesake, err)
		}
	}
	b := runNixAgent(t, h)
	if _, err := nixDial(t, b, worker.NotTrusted).Info(ctx, other); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("another machine: %v", err)
	}
}

// Temporary roots go with their connection; symlinks outlive the agent.
func TestRootsOfNixClients(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	p := h.make(t, "p", nil, testFile{name: "a", data: []byte("1")})
	h.publish(p)
	a := runNixAgent(t, h)
	c := nixDial(t, a, worker.Trusted)
	if err := c.AddTempRoot(t.Context(), p.Path); err != nil {
		t.Fatal(err)
	}
	roots, err := a.nix.roots.find(t.Context())
	if err != nil || len(roots) != 1 || roots[0].Target != p.Path {
		t.Errorf("roots %v, %v", roots, err)
	}
	c.Close()
	until(t, "the temporary root is gone", func() bool { roots, err := a.nix.roots.find(t.Context()); return err == nil && len(roots) == 0 })
	link := filepath.Join(t.TempDir(), "l")
	if err := errors.Join(os.Symlink(testStore.Join(p.Path), link), a.nix.roots.add(link), a.nix.roots.add(link)); err != nil {
		t.Fatal(err)
	}
	again := openNixRoots(a)
	if roots, err := again.find(t.Context()); err != nil || !slices.Equal(roots, []worker.Root{{Link: link, Target: p.Path}}) {
		t.Errorf("after a restart: %v, %v", roots, err)
	}
}

// A closure that is asked about as a whole is one question.
func TestManyPathsAreOneQuestion(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var want, asked []flox.StorePath
	for _, name := range []string{"a", "b", "c"} {
		info := h.make(t, name, nil, testFile{name: "f", data: []byte(name)})
		asked = append(asked, info.Path)
		if name != "c" {
			h.publish(info)
			want = append(want, info.Path)
		}
	}
	a := runNixAgent(t, h)
	c := nixDial(t, a, worker.NotTrusted)
	slices.Sort(want)
	questions := func() int {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.asked
	}
	before := questions()
	for range 2 {
		got, err := c.ValidPaths(within(t, time.Minute), asked, false)
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("valid %v, %v, want %v", got, err, want)
		}
	}
	if n := questions() - before; n != 1 {
		t.Errorf("%d questions to the storehouse, want 1: what it said is known here", n)
	}
}

// Another Nix uses this machine as its remote builder, for what needs no trust.
func TestRemoteBuilder(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.builds.h, h.builds.outputs = h, make(map[string]*flox.PathInfo)
	a := runNixAgent(t, h)
	c := nixDial(t, a, worker.NotTrusted)
	ctx := within(t, time.Minute)
	src, err := c.AddContent(ctx, worker.Content{Name: "src", Method: nix.CAText, Algo: nix.SHA256}, strings.NewReader("source"))
	if err != nil {
		t.Fatal(err)
	}
	floating := nix.DrvOutput{Kind: nix.OutputFloating, Recursive: true, Algo: nix.SHA256}
	drv := &nix.Derivation{
		Name: "made", Outputs: map[string]nix.DrvOutput{"out": floating}, Sources: []flox.StorePath{src.Path},
		Platform: "x86_64-linux", Builder: "/bin/sh", Env: map[string]string{"out": nix.Placeholder("out")},
	}
	path, _, err := drv.DrvPath(testStore)
	if err != nil {
		t.Fatal(err)
	}
	out := h.make(t, "made", nil, testFile{name: "f", data: []byte("built")})
	h.builds.outputs[string(path)] = out
	got, err := c.BuildDerivation(ctx, path, drv, worker.BuildNormal)
	if err != nil || got.Status != worker.Built || len(got.Outputs) != 1 || got.Outputs[0].Path != out.Path {
		t.Fatalf("%+v, %v", got, err)
	}
	if !h.builds.has(string(src.Path)) {
		t.Error("the derivation's source is not in the storehouse")
	}
}
