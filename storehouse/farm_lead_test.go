package storehouse

import (
	"strings"
	"testing"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/dispatch"
	"github.com/floxctl/flox/buildfarm/schedule"
)

// A leader that stood still has not heard the others, and gives them time.
func TestLeaderStoodStill(t *testing.T) {
	t.Parallel()
	f := lonelyFarm()
	began := time.Now()
	there := func(now time.Time) bool { return f.there(f.beats, "other", now, f.patience()) }
	f.begins(1, began)
	f.here["self"], f.beats["other"] = began, began
	late := began.Add(workerLost + time.Second)
	f.here["self"] = late.Add(-beatEvery)
	f.awake(late)
	if there(late) {
		t.Error("a worker that was silent is there")
	}
	f.here["self"] = began
	f.awake(late)
	if !there(late) {
		t.Error("a worker is lost that nobody listened to")
	}

	// Its own beat may come before it looks at the others.
	f = lonelyFarm()
	past := time.Now().Add(-10 * workerLost)
	f.begins(1, past)
	f.here["self"], f.beats["other"] = past, past
	f.heard("third", true) // the first that it hears drops what is very old
	f.heard("self", true)
	if !there(time.Now()) {
		t.Error("a worker is lost that nobody listened to, after a beat")
	}
}

// Builds of lost workers are given to others with the name of their own worker.
func TestTakenBackByWorker(t *testing.T) {
	t.Parallel()
	var got []string
	for _, c := range lostCommands(dispatch.New(schedule.Config{}), []*floxv1.BuildLease{{Key: "x", Worker: "b"}, {Key: "y", Worker: "a"}, {Key: "z", Worker: "b"}}, workerLost) {
		text := c.GetRelease().GetFault() + ":"
		for _, l := range c.GetRelease().GetLeases() {
			text += " " + l.GetKey()
		}
		got = append(got, text)
	}
	want := "worker a does not build for the storehouse any more: y, worker b does not build for the storehouse any more: x z"
	if strings.Join(got, ", ") != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// Who waits hears once that there is no leader, of a build that waits.
func TestCallersHearThatNobodyLeads(t *testing.T) {
	t.Parallel()
	f := lonelyFarm()
	over, begun, waits := &node{path: "over"}, &node{path: "begun"}, &node{path: "waits"}
	q := &queueing{
		realising: &realising{graph: &graph{order: []*node{over, begun, waits}}, to: newSink(), outcome: map[*node]*floxv1.BuildOutcome{over: {}}},
		ending:    map[*node]bool{}, views: map[*node]*viewing{begun: {}}, whys: map[*node]string{},
	}
	w := &want{id: "w", wake: make(chan struct{}, 1)}
	f.wants["w"] = w
	for range 3 {
		f.cutOff()
		_, standings := w.take()
		q.why(standings)
	}
	if len(q.to.queue) != 1 {
		t.Fatalf("it heard %v", q.to.queue)
	}
	said := q.to.queue[0].GetWait()
	if said.GetDrv() != "waits" || !said.GetStuck() || !strings.Contains(said.GetWhy(), "floxctl storehouse servers") {
		t.Errorf("it heard %v", said)
	}
}
