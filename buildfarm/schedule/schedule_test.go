package schedule

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	linux = "x86_64-linux"
	arm   = "aarch64-linux"
)

var start = time.Unix(1_700_000_000, 0)

// build makes one, with what with says changed.
func build(id string, with ...func(*Build)) Build {
	b := Build{ID: id, Owner: "a", System: linux, Expect: time.Second, Queued: start}
	for _, f := range with {
		f(&b)
	}
	return b
}

func needs(ids ...string) func(*Build)        { return func(b *Build) { b.Needs = ids } }
func of(name string) func(*Build)             { return func(b *Build) { b.Owner = name } }
func takes(d time.Duration) func(*Build)      { return func(b *Build) { b.Expect = d } }
func priority(n int) func(*Build)             { return func(b *Build) { b.Priority = n } }
func interactive(b *Build)                    { b.Interactive = true }
func queued(after time.Duration) func(*Build) { return func(b *Build) { b.Queued = start.Add(after) } }
func system(name string) func(*Build)         { return func(b *Build) { b.System = name } }
func features(names ...string) func(*Build)   { return func(b *Build) { b.Features = names } }
func memory(gib uint64) func(*Build)          { return func(b *Build) { b.Memory = gib << 30 } }
func input(path, bytes uint64) func(*Build) {
	return func(b *Build) { b.Inputs = append(b.Inputs, Input{path, bytes}) }
}

func host(id string, with ...func(*Worker)) Worker {
	w := Worker{ID: id, Systems: []string{linux}, Slots: 1}
	for _, f := range with {
		f(&w)
	}
	return w
}

// farm is a Scheduler under test, at a time.
type farm struct {
	*Scheduler
	t   *testing.T
	now time.Time
}

func newFarm(t *testing.T, cfg Config, workers ...Worker) *farm {
	t.Helper()
	f := &farm{New(cfg), t, start}
	for _, w := range workers {
		if err := f.SetWorker(w); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func (f *farm) add(builds ...Build) {
	f.t.Helper()
	if err := f.Add(builds); err != nil {
		f.t.Fatal(err)
	}
}

// next is Next as "build worker", "" = nothing.
func (f *farm) next() string {
	l, ok := f.Next(f.now)
	if !ok {
		return ""
	}
	return l.Build + " " + l.Worker
}

// done ends a build that took a second, a second later.
func (f *farm) done(id string) {
	f.now = f.now.Add(time.Second)
	f.Done(id, f.now, time.Second)
}

// order is in which order one worker builds everything.
func (f *farm) order() (ids []string) {
	f.t.Helper()
	for {
		l, ok := f.Next(f.now)
		if !ok {
			return ids
		}
		ids = append(ids, l.Build)
		f.done(l.Build)
	}
}

// What goes before what, one thing at a time: in each case the last of the builds is
// first, and what the others say of themselves would have them before it.
func TestOrder(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		builds []Build
		want   string
	}{
		{"somebody waits", []Build{build("batch", priority(9)), build("person", interactive)}, "person batch"},
		{"priority before share", []Build{build("low", of("b")), build("high", of("greedy"), priority(1))}, "high low"},
		{"who has used less", []Build{build("greedy", of("greedy"), takes(time.Hour)), build("modest", of("b"))}, "modest greedy"},
		{"the longest chain", []Build{
			build("long", takes(9*time.Second)), build("first", takes(time.Second)), build("then", needs("first"), takes(10*time.Second)),
		}, "first then long"},
		{"what most wait for", []Build{
			build("one"), build("two"), build("x", needs("one")), build("y", needs("two")), build("z", needs("two")),
		}, "two one"},
		{"what waits longest", []Build{build("late", queued(time.Minute)), build("early")}, "early late"},
		{"any system", []Build{build("nix", system(Builtin), interactive), build("x")}, "nix x"},
	} {
		f := newFarm(t, Config{}, host("w"))
		f.Used("greedy", start, time.Minute)
		f.add(tt.builds...)
		if got := strings.Join(f.order(), " "); !strings.HasPrefix(got, tt.want) {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

// Which worker may do what.
func TestWorkersThatCan(t *testing.T) {
	t.Parallel()
	kvm := func(w *Worker) { w.Features = []string{"kvm", "big"} }
	only := func(w *Worker) { w.Mandatory = []string{"gpu"} }
	small := func(w *Worker) { w.Memory, w.Slots = 4<<30, 4 }
	for _, tt := range []struct {
		name   string
		worker Worker
		build  Build
		want   bool
	}{
		{"its system", host("w"), build("b"), true},
		{"another system", host("w"), build("b", system(arm)), false},
		{"a feature it lacks", host("w"), build("b", features("kvm")), false},
		{"features it has", host("w", kvm), build("b", features("big", "kvm")), true},
		{"a feature that nothing asks for", host("w", kvm), build("b"), true},
		{"a mandatory one that is not asked for", host("w", only), build("b"), false},
		{"a mandatory one that is", host("w", only), build("b", features("gpu")), true},
		{"memory", host("w", small), build("b", memory(4)), true},
		{"too much memory", host("w", small), build("b", memory(5)), false},
		{"no slots", host("w", func(w *Worker) { w.Slots = 0 }), build("b"), false},
		{"paused", host("w", func(w *Worker) { w.Paused = true }), build("b"), false},
	} {
		f := newFarm(t, Config{}, tt.worker)
		f.add(tt.build)
		if got := f.next() == "b w"; got != tt.want {
			t.Errorf("%s: it is built: %t", tt.name, got)
		}
		f = newFarm(t, Config{}) // and if the worker comes after the build
		f.add(tt.build)
		if err := f.SetWorker(tt.worker); err != nil {
			t.Fatal(err)
		}
		if got := f.next() == "b w"; got != tt.want {
			t.Errorf("%s, added after it: it is built: %t", tt.name, got)
		}
	}
}

// Memory is shared by what a worker builds, and given back.
func TestMemoryIsShared(t *testing.T) {
	t.Parallel()
	f := newFarm(t, Config{}, host("w", func(w *Worker) { w.Slots, w.Memory = 4, 8<<30 }))
	f.add(build("a", memory(4)), build("b", memory(4)), build("c", memory(1)))
	if got := []string{f.next(), f.next(), f.next()}; !slices.Equal(got, []string{"a w", "b w", ""}) {
		t.Errorf("%v", got)
	}
	f.done("a")
	if got := f.next(); got != "c w" {
		t.Errorf("after a: %q", got)
	}
}

// A build goes where its inputs are, unless that costs more than it saves; of builds that
// are about as urgent that one goes first whose inputs are there.
func TestNearInputs(t *testing.T) {
	t.Parallel()
	f := newFarm(t, Config{Bandwidth: 1 << 20}, host("a"), host("b"))
	f.Has("b", 1)
	f.Has("a", 2)
	f.add(build("x", input(1, 5<<20)))
	if got := f.next(); got != "x b" {
		t.Errorf("%q, want it where its input is", got)
	}
	f.add(build("y", input(3, 5<<20)), build("z", input(2, 5<<20)))
	if got := f.next(); got != "z a" {
		t.Errorf("%q, want the one whose input is there", got)
	}
	f.done("z")
	f.done("x")
	f.done("y")
	f.add(build("long", takes(time.Minute), input(1, 5<<20)), build("short", input(2, 5<<20)))
	f.Remove("none")
	if got := f.next(); got != "long b" {
		t.Errorf("%q, want the longer chain", got)
	}
}

// The fastest worker that is free is taken first.
func TestSpeed(t *testing.T) {
	t.Parallel()
	f := newFarm(t, Config{}, host("slow"), host("fast", func(w *Worker) { w.Speed = 4 }))
	f.add(build("a"), build("b"), build("c"))
	if got := []string{f.next(), f.next(), f.next()}; !slices.Equal(got, []string{"a fast", "b slow", ""}) {
		t.Errorf("%v", got)
	}
}

// Owners take turns by what they use, with their weights, and what was long ago is
// forgotten.
func TestFairShare(t *testing.T) {
	t.Parallel()
	f := newFarm(t, Config{Window: time.Hour, Weights: map[string]float64{"heavy": 3}}, host("w"))
	var builds []Build
	for i := range 400 {
		builds = append(builds, build(fmt.Sprint("h", i), of("heavy")), build(fmt.Sprint("l", i), of("light")))
	}
	f.add(builds...)
	count := map[byte]int{}
	for range 200 {
		l, ok := f.Next(f.now)
		if !ok {
			t.Fatal("nothing is ready")
		}
		count[l.Build[0]]++
		f.done(l.Build)
	}
	if count['h'] < 145 || count['h'] > 155 {
		t.Errorf("of 200 builds the one with weight 3 got %d, want about 150", count['h'])
	}
	if f.owner("heavy").share(f.cfg.Window, f.now) == 0 {
		t.Error("nothing is counted")
	}
	if got := f.owner("heavy").share(f.cfg.Window, f.now.Add(2*time.Hour)); got != 0 {
		t.Errorf("two hours later %g s count", got)
	}
}

// Something that always comes later than others is built all the same.
func TestNothingStarves(t *testing.T) {
	t.Parallel()
	f := newFarm(t, Config{Patience: time.Minute}, host("w"))
	f.add(build("poor", of("poor"), priority(-5)))
	for i := range 200 {
		f.add(build(fmt.Sprint(i), interactive, priority(5)), build(fmt.Sprint("more", i), interactive))
		l, _ := f.Next(f.now)
		if l.Build == "poor" {
			if !l.Reason.Overdue || f.now.Sub(start) <= time.Minute {
				t.Errorf("after %s, because %s", f.now.Sub(start), l.Reason)
			}
			return
		}
		f.done(l.Build)
	}
	t.Error("it is never built")
}

// A large build gets its room where small ones would always be let in before it.
func TestLargeBuildGetsRoom(t *testing.T) {
	t.Parallel()
	f := newFarm(t, Config{Patience: time.Minute}, host("w", func(w *Worker) { w.Slots, w.Memory = 2, 8<<30 }))
	f.add(build("x", memory(2), interactive), build("y", memory(2), interactive))
	running := []string{strings.Fields(f.next())[0], strings.Fields(f.next())[0]}
	f.add(build("large", memory(7)))
	for i := range 400 {
		f.add(build(fmt.Sprint(i), memory(2), interactive))
		f.done(running[0])
		running = running[1:]
		for got := f.next(); got != ""; got = f.next() {
			if got == "large w" {
				return
			}
			running = append(running, strings.Fields(got)[0])
		}
		if len(running) == 0 {
			t.Fatal("its worker is kept for nothing")
		}
	}
	t.Error("it is never built")
}

// Only one worker keeps room for a large build.
func TestOneWorkerKeepsRoom(t *testing.T) {
	t.Parallel()
	two := func(w *Worker) { w.Slots, w.Memory = 2, 8<<30 }
	f := newFarm(t, Config{Patience: time.Minute}, host("a", two), host("b", two))
	f.add(build("large", memory(7), priority(-1)))
	for i := range 400 {
		f.add(build(fmt.Sprint(i), memory(2), takes(time.Hour)))
	}
	var running []string
	for range 100 {
		for l, ok := f.Next(f.now); ok; l, ok = f.Next(f.now) {
			if l.Build == "large" {
				return
			}
			running = append(running, l.Build)
		}
		if len(running) < 3 {
			t.Fatalf("only %v are built while room is kept", running)
		}
		f.done(running[0])
		running = running[1:]
	}
	t.Error("it is never built")
}

// What its worker failed waits for its time, and keeps what depends on it waiting.
func TestPutOff(t *testing.T) {
	t.Parallel()
	f := newFarm(t, Config{}, host("w"))
	f.add(build("a"), build("b", needs("a")))
	f.next()
	f.PutOff("a", f.now.Add(time.Minute))
	if got := f.next(); got != "" || !f.Wake().Equal(f.now.Add(time.Minute)) {
		t.Errorf("at once %q; due at %s", got, f.Wake())
	}
	f.now = f.now.Add(time.Minute)
	if got := f.order(); !slices.Equal(got, []string{"a", "b"}) || !f.Wake().IsZero() {
		t.Errorf("then %v", got)
	}
}

// The builds of a worker that is gone are done by others.
func TestWorkerGone(t *testing.T) {
	t.Parallel()
	f := newFarm(t, Config{}, host("a"))
	f.add(build("x"))
	if got := f.next(); got != "x a" {
		t.Fatalf("%q", got)
	}
	f.RemoveWorker("a", f.now)
	if err := f.SetWorker(host("b")); err != nil {
		t.Fatal(err)
	}
	if got := f.next(); got != "x b" {
		t.Errorf("%q", got)
	}
}

// What is asked why a build stands where it does, and what it says.
func TestWhy(t *testing.T) {
	t.Parallel()
	f := newFarm(t, Config{}, host("w"), host("gpu", func(w *Worker) { w.Mandatory = []string{"gpu"} }))
	f.add(build("first", interactive), build("person", interactive), build("urgent", priority(3)), build("long", takes(time.Hour)),
		build("asked"), build("user", needs("asked")), build("user2", needs("asked")), build("waits", needs("first", "asked")),
		build("arm", system(arm)), build("gpu1", features("gpu"), interactive), build("gpu2", features("gpu"), interactive), build("modest", of("b"), takes(time.Minute)))
	f.Used("a", start, time.Second)
	f.next()
	f.next()
	f.add(build("last", takes(time.Second)))
	for id, want := range map[string]string{
		"first": "building w [] 0; able [w] free 0; 1 kept for builds that require a feature of theirs",
		"waits": "waiting  [first asked] 2; able [w] free 0; 1 kept for builds that require a feature of theirs",
		"arm":   "ready  [] 0; able [] free 0; 2 for other systems",
		"last": "ready  [] 0; able [w] free 0; 1 kept for builds that require a feature of theirs" +
			"; behind 5: 1 that somebody waits for, 1 of a higher priority, 1 of owners who have used less, 2 that begin longer chains",
	} {
		e, ok := f.Why(id, f.now)
		if !ok {
			t.Fatal(id)
		}
		got := fmt.Sprintf("%s %s %v %d; able %v free %d; %s", e.State, e.Worker, e.Needs, e.NeedsOf, e.Able, e.Free, strings.Join(e.Unfit(), ", "))
		if n := e.Before(); n > 0 {
			got += fmt.Sprintf("; behind %d: %s", n, strings.Join(e.Rivals(), ", "))
		}
		if got != want {
			t.Errorf("%s: %q, want %q", id, got, want)
		}
	}
	if _, ok := f.Why("nobody", f.now); ok {
		t.Error("it explains what there is not")
	}
}

func TestRefused(t *testing.T) {
	t.Parallel()
	f := newFarm(t, Config{}, host("w"))
	f.add(build("a"))
	for _, bad := range [][]Build{{build("x"), build("a")}, {build("x"), build("y", needs("z"))}} {
		if err := f.Add(bad); err == nil {
			t.Errorf("%v is taken", bad)
		}
	}
	if builds, ready := f.Len(); builds != 1 || ready != 1 {
		t.Errorf("%d builds, %d ready", builds, ready)
	}
	if got := f.order(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("%v", got)
	}
}
