package storehouse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// quickGC is a storehouse whose collections wait shortly, and notice every use.
func quickGC(dir string) Config {
	cfg := testConfig(dir)
	cfg.CollectGrace, cfg.touchEvery = 20*time.Millisecond, time.Millisecond
	return cfg
}

// aged waits until what was published before is older than the collections of
// these tests keep: registration is kept in whole seconds.
func aged() { time.Sleep(1100 * time.Millisecond) }

// soon keeps what was published within a millisecond.
var soon = CollectOptions{KeepRecent: time.Millisecond}

func collect(t *testing.T, s *Server, opts CollectOptions) *floxv1.CollectProgress {
	t.Helper()
	var last *floxv1.CollectProgress
	if err := s.Collect(within(t), opts, func(p *floxv1.CollectProgress) { last = p }); err != nil {
		t.Fatal(err)
	}
	if !last.GetFinished() {
		t.Fatalf("the last progress is %v", last)
	}
	return last
}

func stillValid(t *testing.T, s *Server, p testPath) bool {
	t.Helper()
	_, err := s.Info(within(t), p.info.Path.HashPart())
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		t.Fatal(err)
	}
	return err == nil
}

func setRoots(t *testing.T, s *Server, peer string, paths ...testPath) {
	t.Helper()
	var list []flox.StorePath
	for _, p := range paths {
		list = append(list, p.info.Path)
	}
	set, err := content.MakeRootSet(list)
	if err == nil {
		_, err = s.setRoots(within(t), peer, set)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// zoo is a few closures: what every kind of root holds, and what none does.
type zoo struct {
	base, kept, held, machine, staged testPath // base is referred to by kept
	dead                              []testPath
}

func fillZoo(t *testing.T, s *Server) (z zoo) {
	t.Helper()
	z.base = makePath(t, "base", 40_000)
	z.kept = makePath(t, "kept", 40_000, z.base.info.Path)
	z.held = makePath(t, "held", 40_000)
	z.machine = makePath(t, "machine", 40_000)
	for _, p := range []testPath{z.base, z.kept, z.held, z.machine} {
		publish(t, s, p)
	}
	for i := range 5 {
		refs := []flox.StorePath{z.base.info.Path}
		for _, d := range z.dead {
			refs = append(refs, d.info.Path)
		}
		p := makePath(t, fmt.Sprint("dead", i), 300_000, refs...)
		publish(t, s, p)
		z.dead = append(z.dead, p)
	}
	z.staged = makePath(t, "staged", 90_000)
	if _, err := s.Stage(within(t), "tester", "k", z.staged.reader()); err != nil {
		t.Fatal(err)
	}
	if err := s.KeepPath(within(t), z.kept.info.Path, false, "for the test", "tester"); err != nil {
		t.Fatal(err)
	}
	setRoots(t, s, "peer", z.machine)
	return z
}

func (z zoo) live() []testPath { return []testPath{z.base, z.kept, z.machine} }

// A collection frees exactly what no root reaches; a dry run says so before and
// changes nothing.
func TestCollectFreesWhatNoRootReaches(t *testing.T) {
	t.Parallel()
	s, _ := start(t, quickGC(t.TempDir()))
	z := fillZoo(t, s)
	release, err := s.Hold(within(t), z.held.info.Path)
	if err != nil {
		t.Fatal(err)
	}
	if got := collect(t, s, CollectOptions{}); got.GetDeadPaths() != 0 {
		t.Fatalf("%v of what was published just now", got)
	}
	aged()
	var listed, want []string
	size := uint64(0)
	for _, d := range z.dead {
		want = append(want, string(d.info.Path))
		size += d.info.NarSize
	}
	var dry *floxv1.CollectProgress
	opts := soon
	opts.DryRun = true
	if err := s.Collect(within(t), opts, func(p *floxv1.CollectProgress) { dry, listed = p, append(listed, p.GetPaths()...) }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(want)
	if !slices.Equal(listed, want) || dry.GetDeadBytes() != size || dry.GetDeadPaths() != 5 || dry.GetLivePaths() != 4 {
		t.Errorf("dry run lists %q and says %v, want %q", listed, dry, want)
	}
	before := s.packs.Stat().Blocks
	if got := collect(t, s, soon); got.GetDeadPaths() != 5 || got.GetDeadBytes() != size {
		t.Errorf("%v, want 5 paths of %d bytes", got, size)
	}
	for _, d := range z.dead {
		if stillValid(t, s, d) {
			t.Errorf("%s is still valid", d.info.Path)
		}
	}
	if after := s.packs.Stat().Blocks; after >= before {
		t.Errorf("%d blocks, %d before", after, before)
	}
	for _, p := range append(z.live(), z.held) {
		checkWhole(t, s, p)
	}
	if _, _, err := s.Commit(within(t), "k", z.staged.info, "tester"); err != nil {
		t.Errorf("what waited for its path info: %v", err)
	}
	checkWhole(t, s, z.staged)
	release()
	aged()
	if collect(t, s, soon); stillValid(t, s, z.held) || !stillValid(t, s, z.kept) {
		t.Error("want held gone and kept there")
	}
	// They can come back.
	for _, d := range z.dead {
		publish(t, s, d)
		checkWhole(t, s, d)
	}
}

// Who uses a condemned path keeps it.
func TestCondemnedPathsComeBackWhenTheyAreUsed(t *testing.T) {
	t.Parallel()
	cfg := quickGC(t.TempDir())
	cfg.CollectGrace = time.Hour // until it is shortened below
	s, _ := start(t, cfg)
	dead := make(map[string]testPath)
	for _, name := range []string{"republished", "referred", "kept", "rooted", "narinfo", "facts", "held", "left"} {
		dead[name] = makePath(t, name, 30_000)
		publish(t, s, dead[name])
	}
	aged()
	ctx, cancel := context.WithCancel(within(t))
	err := s.Collect(ctx, soon, func(p *floxv1.CollectProgress) {
		if p.GetPhase() == phaseWait {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if u, err := s.Usage(within(t)); err != nil || u.GetCondemnedPaths() != uint64(len(dead)) {
		t.Fatalf("%v, %v: want %d condemned", u, err, len(dead))
	}
	for _, p := range dead { // condemned and as good as ever
		checkWhole(t, s, p)
	}
	if _, was, err := s.Publish(within(t), dead["republished"].info, dead["republished"].reader(), "tester"); !was || err != nil {
		t.Fatal(was, err)
	}
	publish(t, s, makePath(t, "user", 10, dead["referred"].info.Path))
	if err := s.KeepPath(within(t), dead["kept"].info.Path, false, "", ""); err != nil {
		t.Fatal(err)
	}
	setRoots(t, s, "p", dead["rooted"])
	ask(t, "GET", cacheURL(s)+"/"+dead["narinfo"].info.Path.HashPart()+".narinfo", "", nil, nil).check(t, 200)
	if _, err := s.answerPaths(within(t), &floxv1.PathsRequest{HashParts: []string{dead["facts"].info.Path.HashPart()}}); err != nil {
		t.Fatal(err)
	}
	release, err := s.Hold(within(t), dead["held"].info.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	s.cfg.CollectGrace = time.Millisecond
	if got := collect(t, s, CollectOptions{Resume: true}); got.GetDeadPaths() != 1 {
		t.Errorf("%v, want 1 path gone", got)
	}
	for name, p := range dead {
		if stillValid(t, s, p) != (name != "left") {
			t.Errorf("%s: valid %v", name, name == "left")
		}
	}
}

// One collection at a time.
func TestCollectOneAtATime(t *testing.T) {
	t.Parallel()
	s, _ := start(t, quickGC(t.TempDir()))
	err := s.Collect(within(t), soon, func(p *floxv1.CollectProgress) {
		if err := s.Collect(within(t), soon, nil); !errors.Is(err, flox.ErrBusy) {
			t.Errorf("a second one: %v", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Collect(within(t), CollectOptions{KeepRecent: -1}, nil); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("negative: %v", err)
	}
}

// Collections, uploads, uploads of what is there, and readers at once: whatever was
// acknowledged is whole for as long as it was promised.
func TestCollectRacesNothing(t *testing.T) {
	t.Parallel()
	s, _ := start(t, quickGC(t.TempDir()))
	const keep = 1500 * time.Millisecond
	ctx, cancel := context.WithTimeout(within(t), 8*time.Second)
	defer cancel()
	var group sync.WaitGroup
	collected := uint64(0)
	group.Go(func() {
		for ctx.Err() == nil {
			err := s.Collect(ctx, CollectOptions{KeepRecent: keep}, func(p *floxv1.CollectProgress) {
				if p.GetFinished() {
					collected += p.GetDeadPaths()
				}
			})
			if err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	})
	for p := range 3 {
		group.Go(func() {
			rounds := 0
			for ; ctx.Err() == nil; rounds++ {
				churn(ctx, t, s, p, rounds, keep)
			}
		})
	}
	group.Wait()
	if collected == 0 {
		t.Error("nothing was ever collected: the test shows nothing")
	}
	if err := s.packs.Scrub(within(t), func(id flox.CID, err error) { t.Errorf("scrub: %s: %v", id, err) }); err != nil {
		t.Error(err)
	}
}

// churn publishes a chain, some of it again and again, and reads it back for as
// long as it has to be there.
func churn(ctx context.Context, t *testing.T, s *Server, p, round int, keep time.Duration) {
	var before []flox.StorePath
	for i := range 4 {
		// Every third round brings the same paths, collected or condemned meanwhile.
		path := makePath(t, fmt.Sprintf("c%d-%d-%d", p, round%3, i), 20_000+7000*i, before...)
		for range 2 {
			at := time.Now()
			if _, _, err := s.Publish(within(t), path.info, path.reader(), "tester"); err != nil {
				t.Errorf("publish: %v", err)
				return
			}
			if _, err := s.Info(within(t), path.info.Path.HashPart()); time.Since(at) < keep && err != nil {
				t.Errorf("%s was just published: %v", path.info.Path, err)
			}
		}
		at := time.Now()
		info, err := s.Info(within(t), path.info.Path.HashPart())
		if err != nil {
			if time.Since(at) < keep {
				t.Error(err)
			}
			return
		}
		nar := ask(t, "GET", cacheURL(s)+"/nar/"+info.Path.HashPart()+"-"+nix.EncodeBase32(info.NarHash[:])+".nar", "", nil, nil)
		if nar.status != 200 && nar.status != 404 || nar.status == 200 && nar.body != string(path.nar) {
			t.Errorf("%s: status %d and another NAR", path.info.Path, nar.status)
		}
		before = []flox.StorePath{path.info.Path}
	}
	if round%2 == 1 { // now and then long enough for all of it to go
		select {
		case <-time.After(keep + time.Second):
		case <-ctx.Done():
		}
	}
}

// collectAndDie is what a child process does: it collects, and is killed when a
// phase begins, or in its middle.
func collectAndDie(s *Server, phase string) {
	phase, middle := strings.CutSuffix(phase, "+")
	err := s.Collect(context.Background(), soon, func(p *floxv1.CollectProgress) {
		if p.GetPhase() == phase && (!middle || p.GetDone() > 0) {
			syscall.Kill(os.Getpid(), syscall.SIGKILL) //nolint:errcheck // ends the process
			select {}
		}
	})
	fmt.Fprintln(os.Stderr, "collected without being killed:", err)
	os.Exit(1)
}

// kill -9 anywhere in a collection leaves everything that is wanted whole, and the
// next collection ends what it began.
func TestCollectKilled(t *testing.T) {
	for _, phase := range []string{phaseMark, phaseCondemn, phaseCondemn + "+", phaseWait, phaseRemove, phaseRemove + "+", phaseSweep, phaseSweep + "+"} {
		t.Run(phase, func(t *testing.T) {
			dir := t.TempDir()
			s, stop := start(t, quickGC(dir))
			z := fillZoo(t, s)
			aged()
			stop()
			t.Setenv("STOREHOUSE_TEST_COLLECT", phase)
			cmd := startChild(t, dir)
			cmd.Wait() //nolint:errcheck // it is looked at next
			if got := cmd.ProcessState.Sys().(syscall.WaitStatus); got.Signal() != syscall.SIGKILL {
				t.Fatalf("the storehouse was not killed: %v", cmd.ProcessState)
			}
			s, _ = start(t, quickGC(dir))
			for _, p := range z.live() {
				checkWhole(t, s, p)
			}
			for _, d := range z.dead {
				if stillValid(t, s, d) {
					checkWhole(t, s, d)
				}
			}
			collect(t, s, soon)
			for _, p := range z.live() {
				checkWhole(t, s, p)
			}
			for _, d := range append(z.dead, z.held) {
				if stillValid(t, s, d) {
					t.Errorf("%s is still valid", d.info.Path)
				}
			}
			if _, _, err := s.Commit(within(t), "k", z.staged.info, "tester"); err != nil {
				t.Errorf("what waited for its path info: %v", err)
			}
			if u, err := s.Usage(within(t)); err != nil || u.GetCondemnedPaths() != 0 || u.GetPaths() != 4 {
				t.Errorf("%v, %v; want 4 paths, none condemned", u, err)
			}
			if err := s.packs.Scrub(within(t), func(id flox.CID, err error) { t.Errorf("scrub: %s: %v", id, err) }); err != nil {
				t.Error(err)
			}
		})
	}
}
