package buildfarm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

func TestMain(m *testing.M) {
	Inside()
	if os.Getenv(ordinary) != "" {
		// As one that gave up root: what it is, is nobody's to see.
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
			panic(err)
		}
	}
	goleak.VerifyTestMain(m)
}

// hostPaths let a sandboxed build use the host's shell.
var hostPaths = []string{"/bin", "/usr", "/lib", "/lib64"}

// newBuilder is a Builder in a directory of the test.
func newBuilder(t *testing.T, change func(*Config)) *Builder {
	t.Helper()
	if _, err := exec.LookPath("nix-store"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("stock Nix is needed: %v", err)
		}
		t.Skipf("needs stock Nix: %v", err)
	}
	cfg := Config{Dir: filepath.Join(t.TempDir(), "builder"), SandboxPaths: hostPaths}
	if os.Getenv("BUILDFARM_TEST_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	if change != nil {
		change(&cfg)
	}
	b, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(b.Close(), remove(cfg.Dir)); err != nil {
			t.Error(err)
		}
	})
	return b
}

// origin is a store that derivations come from.
type origin struct{ *place }

func newOrigin(t *testing.T) origin {
	t.Helper()
	p, err := newBuilder(t, nil).place()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	return origin{p}
}

func (o origin) storeDir() flox.StoreDir { return o.b.cfg.StoreDir }

// instantiate evaluates an expression and gives the derivation it is.
func (o origin) instantiate(t *testing.T, expr string) (flox.StorePath, *nix.Derivation) {
	t.Helper()
	out, err := o.run(t.Context(), "nix-instantiate", "--expr", expr)
	if err != nil {
		t.Fatal(err)
	}
	name, _, _ := strings.Cut(strings.Fields(out)[0], "!")
	drv := o.parse(t, name)
	text, err := os.ReadFile(filepath.Join(o.dir, "store", string(drv)))
	if err != nil {
		t.Fatal(err)
	}
	d, err := nix.ParseDerivation(o.storeDir(), strings.TrimSuffix(drv.Name(), nix.DrvExtension), text)
	if err != nil {
		t.Fatal(err)
	}
	return drv, d
}

func (o origin) parse(t *testing.T, name string) flox.StorePath {
	t.Helper()
	p, err := o.storeDir().Parse(strings.TrimSpace(name))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// realise builds what a derivation needs, and gives it.
func (o origin) realise(t *testing.T, plan *nix.Derivation) (inputs []flox.StorePath) {
	t.Helper()
	for in := range plan.Inputs {
		out, err := o.run(t.Context(), "nix-store", "--realise", o.storeDir().Join(in))
		if err != nil {
			t.Fatal(err)
		}
		inputs = append(inputs, o.parse(t, out))
	}
	return inputs
}

// Closure is Source.
func (o origin) Closure(ctx context.Context, paths []flox.StorePath) ([]*flox.PathInfo, error) {
	if len(paths) == 0 {
		return nil, nil
	}
	args := []string{"--query", "--requisites"}
	for _, p := range paths {
		args = append(args, o.storeDir().Join(p))
	}
	out, err := o.run(ctx, "nix-store", args...)
	if err != nil {
		return nil, err
	}
	s, err := o.serve(ctx, io.Discard)
	if err != nil {
		return nil, err
	}
	defer s.end()
	var infos []*flox.PathInfo
	for _, line := range strings.Fields(out) { // references first, as Nix prints them
		p, err := o.storeDir().Parse(line)
		if err != nil {
			return nil, err
		}
		infos = append(infos, s.infos([]flox.StorePath{p})...)
	}
	return infos, s.err
}

// Nar is Source.
func (o origin) Nar(ctx context.Context, w io.Writer, info *flox.PathInfo) error {
	return nix.DumpPath(ctx, w, filepath.Join(o.dir, "store", string(info.Path)))
}

// taken collects what was built.
type taken struct {
	order []string
	nars  map[string]string
}

func (k *taken) take(_ context.Context, output string, info *flox.PathInfo, nar func(io.Writer) error) error {
	var b strings.Builder
	k.order = append(k.order, output)
	if err := nar(&b); err != nil {
		return err
	}
	if uint64(b.Len()) != info.NarSize {
		return fmt.Errorf("NAR of %d bytes, its info says %d", b.Len(), info.NarSize)
	}
	k.nars[output] = b.String()
	return nil
}

// built is what became of a job in a test.
type built struct {
	*Result
	taken
	log    string
	events []Event
}

func build(ctx context.Context, b *Builder, from Source, job *Job) (*built, error) {
	got := &built{taken: taken{nars: map[string]string{}}}
	var log strings.Builder
	job.Take = got.take
	var err error
	got.Result, err = b.Build(ctx, job, from, &log, func(e Event) { got.events = append(got.events, e) })
	got.log = log.String()
	return got, err
}

const sh = `derivation ({ system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" script ]; PATH = "/usr/bin:/bin"; } // `

// script is an expression of a derivation that runs a shell script.
func script(name, script, more string) string {
	return fmt.Sprintf(`let script = ''%s''; in %s { name = "%s"; %s })`, script, sh, name, more)
}

func TestBuildsSeveralOutputs(t *testing.T) {
	from, b := newOrigin(t), newBuilder(t, nil)
	drv, plan := from.instantiate(t, script("two", "echo hello; mkdir $dev; echo $out > $dev/ref; echo content > $out; echo bye >&2", `outputs = [ "dev" "out" ];`))
	got, err := build(t.Context(), b, from, &Job{Drv: drv, Plan: plan})
	if err != nil || got.Status != Built {
		t.Fatalf("%+v, %v", got.Result, err)
	}
	if want := []string{"out", "dev"}; !slices.Equal(got.order, want) {
		t.Errorf("outputs were given as %v, want %v: dev refers to out", got.order, want)
	}
	if refs := got.Outputs["dev"].References; !slices.Equal(refs, []flox.StorePath{plan.Outputs["out"].Path}) {
		t.Errorf("references of dev: %v", refs)
	}
	if got.Outputs["out"].Path != plan.Outputs["out"].Path || got.Outputs["out"].Deriver != drv || !strings.Contains(got.nars["out"], "content") {
		t.Errorf("out is %+v: %q", got.Outputs["out"], got.nars["out"])
	}
	if want := "hello\nbye\n"; got.log != want {
		t.Errorf("log %q, want %q", got.log, want)
	}
	var kinds []EventKind
	for _, e := range got.events {
		if e.Kind != EventMessage {
			kinds = append(kinds, e.Kind)
			if e.Drv != drv {
				t.Errorf("event %+v, want one of %s", e, drv)
			}
		}
	}
	if want := []EventKind{EventStart, EventLine, EventLine, EventStop}; !slices.Equal(kinds, want) {
		t.Errorf("events %v, want %v", kinds, want)
	}
	// Again: nothing is left of the first time.
	again, err := build(t.Context(), b, from, &Job{Drv: drv, Plan: plan})
	if err != nil || again.Status != Built || !maps.Equal(again.nars, got.nars) {
		t.Errorf("again: %+v, %v", again.Result, err)
	}
}

func TestBuildsNothingButTheJob(t *testing.T) {
	from, b := newOrigin(t), newBuilder(t, nil)
	drv, plan := from.instantiate(t, `let first = `+script("first", "echo one > $out", "allowSubstitutes = false;")+`; in `+
		script("second", "read x < $first; echo $x two > $out", "inherit first;"))
	got, err := build(t.Context(), b, from, &Job{Drv: drv, Plan: plan, Inputs: from.realise(t, plan)})
	if err != nil || got.Status != Built || !strings.Contains(got.nars["out"], "one two") {
		t.Fatalf("%+v, %v: %q", got.Result, err, got.nars["out"])
	}
	for _, e := range got.events {
		if e.Kind == EventStart && e.Drv != drv {
			t.Errorf("%s was built as well", e.Drv)
		}
	}
}

func TestFixedAndFloatingOutputs(t *testing.T) {
	from, b := newOrigin(t), newBuilder(t, nil)
	fixed := `outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = builtins.hashString "sha256" "fixed";`
	for _, c := range []struct {
		name, expr, ca string
		status         Status
		message        string
	}{
		{"fixed", script("fixed", "printf fixed > $out", fixed), "fixed:sha256:", Built, ""},
		{"wrong", script("wrong", "printf wrong > $out", fixed), "", OutputRejected, "hash mismatch in fixed-output derivation"},
		{"floating", script("floating", "echo floating > $out", `__contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";`), "fixed:r:sha256:", Built, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			drv, plan := from.instantiate(t, c.expr)
			got, err := build(t.Context(), b, from, &Job{Drv: drv, Plan: plan})
			if err != nil || got.Status != c.status || !strings.Contains(got.Message, c.message) {
				t.Fatalf("%+v, %v; want status %d with %q", got.Result, err, c.status, c.message)
			}
			if out := got.Outputs["out"]; c.ca != "" && (out == nil || !strings.HasPrefix(out.CA, c.ca)) {
				t.Errorf("out is %+v, want a content address %s…", out, c.ca)
			}
		})
	}
}

func TestFailures(t *testing.T) {
	from, b := newOrigin(t), newBuilder(t, func(c *Config) { c.MaxLog = 100_000 })
	for _, c := range []struct {
		name, script string
		change       func(*Job)
		status       Status
		message      string
	}{
		{"exit", "echo why; exit 3", nil, PermanentFailure, "exit code 3"},
		{"timeout", "echo slow; sleep 600", func(j *Job) { j.Timeout = time.Second }, TimedOut, "timed out after 1 seconds"},
		{"silent", "sleep 600", func(j *Job) { j.MaxSilent = time.Second }, TimedOut, "timed out after 1 seconds of silence"},
		{"chatty", "while :; do echo all work and no play makes the log a long one; done", nil, LogLimitExceeded, "killed after writing more than"},
		{"nothing", "true", nil, OutputRejected, "failed to produce output path"},
	} {
		t.Run(c.name, func(t *testing.T) {
			drv, plan := from.instantiate(t, script("fails-"+c.name, c.script, ""))
			job := &Job{Drv: drv, Plan: plan}
			if c.change != nil {
				c.change(job)
			}
			got, err := build(t.Context(), b, from, job)
			if err != nil || got.Status != c.status || !strings.Contains(got.Message, c.message) || len(got.nars) > 0 {
				t.Fatalf("status %d, %q, %v; want %d with %q", got.Status, got.Message, err, c.status, c.message)
			}
			if c.name == "exit" && !slices.Equal(got.Tail, []string{"why"}) {
				t.Errorf("tail %q", got.Tail)
			}
		})
	}
}

// running lists processes whose command line has what.
func running(t *testing.T, what string) (found []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), what) {
			found = append(found, f+" "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return found
}

func TestCancelledBuildLeavesNothing(t *testing.T) {
	from, b := newOrigin(t), newBuilder(t, nil)
	mark := fmt.Sprintf("86%d", os.Getpid())
	// One that ignores signals and one that left its session.
	drv, plan := from.instantiate(t, script("endless", "trap : TERM INT HUP; (setsid sleep "+mark+" &); echo begun; sleep "+mark, ""))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	job := &Job{Drv: drv, Plan: plan, Take: (&taken{}).take}
	begun := false
	_, err := b.Build(ctx, job, from, io.Discard, func(e Event) {
		if e.Kind == EventLine {
			begun = len(running(t, mark)) > 0
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) || !begun {
		t.Fatalf("%v; it ran: %v", err, begun)
	}
	if left := running(t, mark); len(left) > 0 {
		t.Errorf("left running: %v", left)
	}
	// The store is usable.
	drv, plan = from.instantiate(t, script("after", "echo fine > $out", ""))
	if got, err := build(t.Context(), b, from, &Job{Drv: drv, Plan: plan}); err != nil || got.Status != Built {
		t.Errorf("afterwards: %+v, %v", got.Result, err)
	}
}

func TestHiddenDirectoriesAndOwnMounts(t *testing.T) {
	secret := t.TempDir()
	if err := os.WriteFile(filepath.Join(secret, "key"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	from := newOrigin(t)
	b := newBuilder(t, func(c *Config) { c.Hide, c.Sandbox = []string{secret}, SandboxOff })
	drv, plan := from.instantiate(t, script("looks", "for f in "+secret+"/*; do echo saw $f; done; ls /proc | grep -c '^[0-9]' ; echo done > $out", ""))
	got, err := build(t.Context(), b, from, &Job{Drv: drv, Plan: plan})
	if err != nil || got.Status != Built {
		t.Fatalf("%+v, %v", got.Result, err)
	}
	if strings.Contains(got.log, "key") {
		t.Errorf("the build saw what is hidden: %q", got.log)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), b.cfg.Dir) {
		t.Errorf("a mount of the builder is seen outside: %v", err)
	}
}

func TestCollects(t *testing.T) {
	from := newOrigin(t)
	b := newBuilder(t, func(c *Config) { c.MaxDisk = 1 << 20 })
	for i := range 3 {
		drv, plan := from.instantiate(t, script(fmt.Sprint("large-", i), "head -c 1500000 /dev/zero > $out", ""))
		if got, err := build(t.Context(), b, from, &Job{Drv: drv, Plan: plan}); err != nil || got.Status != Built {
			t.Fatalf("%+v, %v", got.Result, err)
		}
	}
	files, err := os.ReadDir(b.inputs.dir)
	if err != nil || len(files) != 1 || b.inputs.used > 2<<20 {
		t.Errorf("%d bytes are kept, in %v; want about a MiB or the last output; %v", b.inputs.used, files, err)
	}
}
