package fetchlog

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p"
)

func pathOf(n int) flox.StorePath {
	return flox.StorePath(fmt.Sprintf("%s-p%d", strings.Repeat("0", 32), n))
}

func kinds(a Account) (out []string) {
	for _, s := range a.Steps {
		out = append(out, s.Kind)
	}
	return out
}

// What was done for a path is told in order, with sums of what each machine gave.
func TestAccount(t *testing.T) {
	l := New()
	p := pathOf(1)
	known := l.LookUp(p)
	l.AskFacts(p, "house", true)(12, false, nil)
	known(nil)
	over := l.Begin(p, 2, 300, false)
	step := l.Steps(p)
	step(p2p.Step{Kind: p2p.StepAsked, Peer: "lan"})
	step(p2p.Step{Kind: p2p.StepLate, Peer: "lan", Took: time.Second})
	step(p2p.Step{Kind: p2p.StepGave, Peer: "lan", Bytes: 100, Took: 10 * time.Millisecond})
	step(p2p.Step{Kind: p2p.StepGave, Peer: "house", Tier: p2p.TierStorehouse, Bytes: 200, Took: 30 * time.Millisecond})
	step(p2p.Step{Kind: p2p.StepFailed, Peer: "far", Tier: p2p.TierFar, Why: "gone"})
	if a, _ := l.Of(p); a.Open != 1 {
		t.Errorf("%d fetches under way, want 1", a.Open)
	}
	over(2, 300, nil)
	l.Local(p)
	a, ok := l.Of(p)
	if !ok {
		t.Fatal("nothing is remembered")
	}
	want := []string{LookUp, FactsAsked, Facts, Known, Fetch, "asked", "late", "gave", "gave", "failed", Fetched}
	if diff := cmp.Diff(want, kinds(a)); diff != "" {
		t.Error(diff)
	}
	if a.Steps[2].Count != 12 || a.Steps[2].Tier != p2p.TierStorehouse || a.Steps[9].Why != "gone" {
		t.Errorf("steps %+v", a.Steps)
	}
	if a.Local != 1 || a.Open != 0 || a.Fetches != 1 || a.Waited <= 0 || a.Slowest != a.Waited {
		t.Errorf("sums %+v", a)
	}
	if len(a.Sources) != 3 || a.Sources[0].Peer != "house" || a.Sources[0].Mean() != 30*time.Millisecond || a.Sources[1].Late != 1 || a.Sources[2].Failed != 1 {
		t.Errorf("sources %+v", a.Sources)
	}
	if _, ok := l.Of(pathOf(2)); ok {
		t.Error("something is told of a path that nothing was done for")
	}
}

// A path has so many steps, however much is fetched; the sums count all of it.
func TestManySteps(t *testing.T) {
	l := New()
	p := pathOf(1)
	step := l.Steps(p)
	for i := range 1000 {
		step(p2p.Step{Kind: p2p.StepAsked, Peer: "lan"})
		step(p2p.Step{Kind: p2p.StepGave, Peer: "lan", Bytes: 1, Took: time.Duration(i%2) * slow})
	}
	a, _ := l.Of(p)
	if len(a.Steps) != maxFirst+maxLast || a.LeftOut == 0 || a.First() != maxFirst {
		t.Errorf("%d steps, %d left out after %d", len(a.Steps), a.LeftOut, a.First())
	}
	if a.Sources[0].Blocks != 1000 {
		t.Errorf("%d blocks counted, want 1000", a.Sources[0].Blocks)
	}
	// What nobody would read twice is one line.
	again := pathOf(2)
	for range 50 {
		l.AskFacts(again, "house", true)(0, false, errors.New("away"))
	}
	b, _ := l.Of(again)
	if len(b.Steps) != maxFirst+maxLast || b.Steps[1].Why != "away" {
		t.Errorf("steps %+v", b.Steps)
	}
	failed := pathOf(3)
	for range 50 {
		l.Steps(failed)(p2p.Step{Kind: p2p.StepFailed, Peer: "far", Why: "busy"})
	}
	if c, _ := l.Of(failed); len(c.Steps) != 1 || c.Steps[0].Times != 50 {
		t.Errorf("steps %+v", c.Steps)
	}
}

// The paths used last are remembered, and machines per path are bounded.
func TestOldPathsAreForgotten(t *testing.T) {
	l := New()
	over := l.Begin(pathOf(0), 1, 1, true)
	for n := 1; n <= maxPaths; n++ {
		l.Local(pathOf(n))
	}
	if _, ok := l.Of(pathOf(0)); ok {
		t.Error("the oldest path is still remembered")
	}
	if _, ok := l.Of(pathOf(1)); !ok || len(l.paths) != maxPaths {
		t.Errorf("%d paths are remembered, the second among them: %v", len(l.paths), ok)
	}
	over(1, 1, nil) // of what was forgotten
	if a, _ := l.Of(pathOf(0)); a.Open != 0 {
		t.Errorf("%d fetches under way, want none", a.Open)
	}
	step := l.Steps(pathOf(5))
	for i := range 10 * maxSources {
		step(p2p.Step{Kind: p2p.StepGave, Peer: p2p.PeerID(fmt.Sprint(i)), Bytes: 1})
	}
	if a, _ := l.Of(pathOf(5)); len(a.Sources) != maxSources {
		t.Errorf("%d machines are told apart, want %d", len(a.Sources), maxSources)
	}
}

// Nothing is remembered of no path, or by no log.
func TestNoLog(t *testing.T) {
	var none *Log
	for _, l := range []*Log{none, New()} {
		l.Note("", Step{})
		l.Local("")
		l.LookUp("")(nil)
		l.Begin("", 1, 1, false)(1, 1, nil)
		if l.Steps("") != nil {
			t.Error("steps of no path are heard")
		}
	}
	if none.Steps(pathOf(1)) != nil {
		t.Error("no log hears steps")
	}
}
