package storehouse

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
)

// farm is a storehouse that builds with real Nix, a member of it, and a Nix that
// evaluates.
type farm struct {
	t *testing.T
	*Server
	n *stockNix
	m *member
}

// newFarm starts one in dir; "" is a new one.
func newFarm(t *testing.T, n *stockNix, dir string, jobs int) *farm {
	t.Helper()
	return newFarmOf(t, n, dir, jobs, func(*Config) {})
}

func newFarmOf(t *testing.T, n *stockNix, dir string, jobs int, change func(*Config)) *farm {
	t.Helper()
	if dir == "" {
		dir = t.TempDir()
		t.Cleanup(func() { unprotect(filepath.Join(dir, "builder", "inputs")) })
	}
	cfg := farmConfig(n, dir, jobs)
	cfg.Socket = filepath.Join(t.TempDir(), "s.sock")
	change(&cfg)
	s, _ := start(t, cfg)
	n.token(s, uploadToken(t, s))
	return &farm{t, s, n, join(t, s.Invite())}
}

func farmConfig(n *stockNix, dir string, jobs int) Config {
	cfg := testConfig(dir)
	cfg.StoreDir = flox.StoreDir(n.storeDir)
	cfg.Builds = BuildsConfig{On: true, Jobs: jobs, SandboxPaths: []string{"/bin", "/usr", "/lib", "/lib64"}}
	return cfg
}

// evaluator is a Nix whose derivations a farm builds.
func evaluator(t *testing.T) *stockNix {
	n := newNix(t, "")
	n.storeDir = n.dir + "/store"
	n.configure("experimental-features = nix-command ca-derivations\n")
	return n
}

// upload evaluates an expression and uploads the derivation with all it refers to.
func (f *farm) upload(expr string) (drv string) {
	f.t.Helper()
	name, _, _ := strings.Cut(strings.Fields(f.n.run("nix-instantiate", "-E", expr))[0], "!")
	f.n.run("nix", "copy", "--derivation", "--to", cacheURL(f.Server), name)
	return filepath.Base(name)
}

// mk is an expression of a derivation that runs a shell script.
func mk(name, script, more string) string {
	return fmt.Sprintf(`(derivation { name = "%s"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" ''%s'' ]; PATH = "/usr/bin:/bin"; %s })`, name, script, more)
}

// happened is what a caller of Build was told.
type happened struct {
	results []*floxv1.BuildResult
	started []string // derivations
	stopped []string
	lines   map[string][]string // by derivation
	waited  []uint32
}

// build asks for all outputs of derivations. seen is called with every event.
func (f *farm) build(ctx context.Context, req *floxv1.BuildRequest, seen func(*floxv1.BuildEvent)) (*happened, error) {
	stream, err := f.m.builds.Build(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, api.FromConnect(err)
	}
	defer stream.Close()
	h := &happened{lines: map[string][]string{}}
	for stream.Receive() {
		e := stream.Msg()
		switch v := e.GetEvent().(type) {
		case *floxv1.BuildEvent_Start:
			h.started = append(h.started, v.Start.GetDrv())
		case *floxv1.BuildEvent_Stop:
			h.stopped = append(h.stopped, v.Stop.GetDrv())
		case *floxv1.BuildEvent_Line:
			h.lines[v.Line.GetDrv()] = append(h.lines[v.Line.GetDrv()], v.Line.GetText())
		case *floxv1.BuildEvent_Wait:
			h.waited = append(h.waited, v.Wait.GetPlace())
		case *floxv1.BuildEvent_Result:
			h.results = append(h.results, v.Result)
		}
		if seen != nil {
			seen(e)
		}
	}
	return h, api.FromConnect(stream.Err())
}

// outs asks for all outputs of derivations.
func outs(drvs ...string) *floxv1.BuildRequest {
	req := &floxv1.BuildRequest{}
	for _, drv := range drvs {
		req.Paths = append(req.Paths, &floxv1.DerivedPath{Path: drv, Outputs: []string{"*"}})
	}
	return req
}

// must builds what must succeed, and gives its outputs by name.
func (f *farm) must(drv string, status buildfarm.Status) (*happened, map[string]*floxv1.BuiltOutput) {
	f.t.Helper()
	h, err := f.build(within(f.t), outs(drv), nil)
	if err != nil || len(h.results) != 1 {
		f.t.Fatalf("%d results, %v", len(h.results), err)
	}
	got := h.results[0].GetOutcome()
	if got.GetStatus() != uint32(status) {
		f.t.Fatalf("status %d, want %d: %s", got.GetStatus(), status, got.GetMessage())
	}
	outputs := map[string]*floxv1.BuiltOutput{}
	for _, o := range got.GetOutputs() {
		outputs[o.GetName()] = o
	}
	return h, outputs
}

// read gives a store path of the storehouse that is a file.
func (f *farm) read(path string) string {
	f.t.Helper()
	info, err := f.Info(within(f.t), flox.StorePath(path).HashPart())
	if err != nil {
		f.t.Fatal(err)
	}
	text, err := f.fileText(within(f.t), info, 1<<20)
	if err != nil {
		f.t.Fatal(err)
	}
	return string(text)
}

func (f *farm) log(drv string) (*floxv1.BuildRecord, string, error) {
	stream, err := f.m.builds.BuildLog(within(f.t), connect.NewRequest(&floxv1.BuildLogRequest{Drv: drv}))
	if err != nil {
		return nil, "", err
	}
	defer stream.Close()
	var record *floxv1.BuildRecord
	var log strings.Builder
	for stream.Receive() {
		if r := stream.Msg().GetRecord(); r != nil {
			record = r
		}
		log.Write(stream.Msg().GetData())
	}
	return record, log.String(), stream.Err()
}

func TestBuildsAChain(t *testing.T) {
	t.Parallel()
	f := newFarm(t, evaluator(t), "", 2)
	chain := `let a = ` + mk("a", "echo from a; echo 1 > $out", "") + `; b = ` + mk("b", "read x < $a; echo $x 2 > $out", "inherit a; allowSubstitutes = false;") +
		`; c = ` + mk("c", "read x < $b; echo $x 3 > $out", "inherit b;") + `; in ` + mk("d", "read x < $c; echo hello; mkdir $dev; echo $x 4 > $out; echo $out > $dev/ref", `inherit c; outputs = [ "out" "dev" ];`)
	drv := f.upload(chain)
	missing, err := f.m.builds.Missing(within(t), connect.NewRequest(&floxv1.MissingRequest{Paths: outs(drv).GetPaths()}))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range missing.Msg.GetWillBuild() {
		names = append(names, flox.StorePath(d).Name())
	}
	if want := []string{"a.drv", "b.drv", "c.drv", "d.drv"}; !slices.Equal(names, want) {
		t.Errorf("Missing says %v will be built, want %v", names, want)
	}
	h, out := f.must(drv, buildfarm.Built)
	if got := f.read(out["out"].GetPath()); got != "1 2 3 4\n" {
		t.Errorf("d is %q", got)
	}
	if !slices.Equal(h.started, missing.Msg.GetWillBuild()) || !slices.Equal(h.stopped, h.started) {
		t.Errorf("started %v, stopped %v, want %v", h.started, h.stopped, missing.Msg.GetWillBuild())
	}
	if got := h.lines[drv]; !slices.Equal(got, []string{"hello"}) {
		t.Errorf("lines of d: %q", got)
	}
	// Signed, with references and derivers, for stock Nix to take.
	f.n.run("nix", "copy", "--from", cacheURL(f.Server)+"?trusted=0", "--option", "trusted-public-keys", f.PublicKey(), f.n.storeDir+"/"+out["dev"].GetPath())
	f.n.run("grep", out["out"].GetPath(), f.n.real(f.n.storeDir+"/"+out["dev"].GetPath())+"/ref")
	derivers, err := f.m.builds.ValidDerivers(within(t), connect.NewRequest(&floxv1.ValidDeriversRequest{Path: out["dev"].GetPath()}))
	if err != nil || !slices.Equal(derivers.Msg.GetDrvs(), []string{drv}) {
		t.Errorf("derivers %v, %v", derivers.Msg.GetDrvs(), err)
	}
	record, log, err := f.log(drv)
	if err != nil || log != "hello\n" || record.GetStatus() != 0 || len(record.GetOutputs()) != 2 {
		t.Errorf("log %q, record %v, %v", log, record, err)
	}
	ask(f.t, "GET", cacheURL(f.Server)+"/log/"+drv, "", nil, nil).check(f.t, 200, "hello\n")
	if got := f.n.run("nix", "log", "--store", cacheURL(f.Server), f.n.storeDir+"/"+drv); !strings.Contains(got, "hello") {
		f.t.Errorf("nix log says %q", got)
	}
	referrers, err := f.m.builds.Referrers(within(t), connect.NewRequest(&floxv1.ReferrersRequest{Path: out["out"].GetPath()}))
	if err != nil || !slices.Contains(referrers.Msg.GetPaths(), out["dev"].GetPath()) {
		t.Errorf("referrers %v, %v", referrers.Msg.GetPaths(), err)
	}
	// Again: nothing is done, and the outputs are told all the same.
	h, again := f.must(drv, buildfarm.AlreadyValid)
	if len(h.started) > 0 || again["dev"].GetPath() != out["dev"].GetPath() || again["dev"].GetId() == "" {
		t.Errorf("again: started %v, outputs %v", h.started, again)
	}
}

func TestBuildsContentAddressed(t *testing.T) {
	t.Parallel()
	f := newFarm(t, evaluator(t), "", 1)
	ca := `__contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";`
	// Two ways to the same content, and who uses it.
	low := func(how string) string { return mk("low", how, ca) }
	high := func(low string) string {
		return `let low = ` + low + `; in ` + mk("high", "read x < $low; echo $x high > $out", "inherit low; "+ca)
	}
	first, second := f.upload(high(low("echo low > $out"))), f.upload(high(low("printf 'low\\n' > $out")))
	_, out := f.must(first, buildfarm.Built)
	if got := f.read(out["out"].GetPath()); got != "low high\n" {
		t.Fatalf("high is %q", got)
	}
	r := out["out"].GetRealisation()
	if r.GetPath() != out["out"].GetPath() || len(r.GetInputs()) != 1 || len(r.GetSignatures()) == 0 {
		t.Errorf("realisation %v", r)
	}
	h, again := f.must(second, statusResolves)
	if again["out"].GetPath() != out["out"].GetPath() || slices.Contains(h.started, second) {
		t.Errorf("what resolves to the same is %v, started %v", again, h.started)
	}
	ids := &floxv1.RealisationsRequest{Ids: []string{again["out"].GetId(), "sha256:" + strings.Repeat("0", 64) + "!out"}}
	ask(f.t, "GET", cacheURL(f.Server)+"/realisations/"+ids.Ids[0]+".doi", "", nil, nil).check(f.t, 200, `"outPath":"`+out["out"].GetPath()+`"`)
	known, err := f.m.builds.Realisations(within(t), connect.NewRequest(ids))
	if err != nil || len(known.Msg.GetRealisations()) != 1 || known.Msg.GetRealisations()[0].GetPath() != out["out"].GetPath() {
		t.Errorf("realisations %v, %v", known.Msg, err)
	}
}

func TestBuildFailures(t *testing.T) {
	t.Parallel()
	f := newFarm(t, evaluator(t), "", 1)
	bad := f.upload(`let bad = ` + mk("bad", "echo why it failed; exit 7", "") + `; in ` + mk("user", "echo > $out", "inherit bad;"))
	good := f.upload(mk("good", "echo > $out", ""))
	req := outs(bad, good)
	req.Options = &floxv1.BuildOptions{KeepGoing: true}
	h, err := f.build(within(t), req, nil)
	if err != nil || len(h.results) != 2 {
		t.Fatalf("%v, %v", h, err)
	}
	if got := h.results[0].GetOutcome(); got.GetStatus() != uint32(buildfarm.DependencyFailed) {
		t.Errorf("the user: %v", got)
	}
	if got := h.results[1].GetOutcome(); got.GetStatus() != uint32(buildfarm.Built) {
		t.Errorf("what does not need it: %v", got)
	}
	missing, err := f.m.builds.Missing(within(t), connect.NewRequest(&floxv1.MissingRequest{Paths: req.GetPaths()}))
	if err != nil || len(missing.Msg.GetWillBuild()) != 2 {
		t.Fatalf("%v, %v", missing, err)
	}
	failed := missing.Msg.GetWillBuild()[0]
	h, err = f.build(within(t), outs(failed), nil)
	if err != nil || len(h.results) != 1 {
		t.Fatalf("%v, %v", h, err)
	}
	got := h.results[0].GetOutcome()
	if got.GetStatus() != uint32(buildfarm.PermanentFailure) || !strings.Contains(got.GetMessage(), "exit code 7") || !slices.Equal(got.GetTail(), []string{"why it failed"}) {
		t.Errorf("the failure: %v", got)
	}
	if record, log, err := f.log(failed); err != nil || log != "why it failed\n" || record.GetStatus() != uint32(buildfarm.PermanentFailure) {
		t.Errorf("its log: %q, %v, %v", log, record, err)
	}
	// What the storehouse does not have.
	unknown := strings.Repeat("0", 32) + "-x"
	h, err = f.build(within(t), &floxv1.BuildRequest{Paths: []*floxv1.DerivedPath{{Path: unknown}, {Path: unknown + ".drv", Outputs: []string{"out"}}}}, nil)
	if err != nil || len(h.results) != 2 || h.results[0].GetOutcome().GetStatus() != uint32(buildfarm.NoSubstituters) ||
		!strings.Contains(h.results[1].GetOutcome().GetMessage(), "not valid in the storehouse") {
		t.Errorf("%v, %v", h, err)
	}
}

func TestOneBuildForAll(t *testing.T) {
	t.Parallel()
	f := newFarm(t, evaluator(t), "", 1)
	drv := f.upload(mk("shared", "echo begun; sleep 2; echo > $out", ""))
	var group sync.WaitGroup
	starts := make([]int64, 3)
	for i := range starts {
		group.Go(func() {
			h, err := f.build(within(t), outs(drv), nil)
			if err != nil || len(h.results) != 1 || h.results[0].GetOutcome().GetStatus() != uint32(buildfarm.Built) {
				t.Errorf("%v, %v", h, err)
				return
			}
			starts[i] = h.results[0].GetOutcome().GetStartUnix()
		})
	}
	group.Wait()
	if starts[0] == 0 || starts[1] != starts[0] || starts[2] != starts[0] {
		t.Errorf("built at %v, want one build for all", starts)
	}
	entries, err := os.ReadDir(filepath.Join(f.cfg.StateDir))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "build-log-") {
			t.Errorf("%s is left", e.Name())
		}
	}
}

// What is signed is what its own build made: another that used the same inputs, and
// wrote to them, has changed nothing.
func TestNoBuildPoisonsAnother(t *testing.T) {
	t.Parallel()
	f := newFarm(t, evaluator(t), "", 1)
	lib := `lib = ` + mk("lib", "mkdir $out; echo good > $out/data", "") + `; `
	evil := f.upload(mk("evil", "chmod u+w $lib $lib/data; echo evil > $lib/data; echo evil > $lib/more; mv $lib $lib.old; echo evil > $lib; echo evil > $out", lib))
	honest := f.upload(mk("honest", "cat $lib/* > $out", lib))
	f.must(evil, buildfarm.Built)
	_, out := f.must(honest, buildfarm.Built)
	if got := f.read(out["out"].GetPath()); got != "good\n" {
		t.Errorf("after a hostile build an honest one is signed as %q", got)
	}
}
