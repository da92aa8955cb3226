package members

import (
	"testing"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// When ephemeral machines were there never goes back nor lies ahead, is kept of
// nobody else, and goes with them.
func TestSeen(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	runner, laptop, stranger := "peer-1", "peer-2", "peer-3"
	l.must(&floxv1.MembersCommand{Command: &floxv1.MembersCommand_Add{Add: &floxv1.Machine{Peer: runner, Name: "runner", Role: Agent, Ephemeral: true}}})
	l.must(&floxv1.MembersCommand{Command: &floxv1.MembersCommand_Add{Add: &floxv1.Machine{Peer: laptop, Name: "laptop", Role: Agent}}})
	begun := time.Now().UnixMilli()
	for _, step := range []struct{ note, want int64 }{{1000, 1000}, {5000, 5000}, {3000, 5000}, {begun + 1e9, -1}} {
		var list []*floxv1.SeenMachine
		for _, p := range []string{runner, laptop, stranger} {
			list = append(list, &floxv1.SeenMachine{Peer: p, AtUnixMs: step.note})
		}
		l.must(&floxv1.MembersCommand{Command: &floxv1.MembersCommand_Seen{Seen: &floxv1.NoteSeen{Machines: list}}})
		got := l.seen()
		at, ok := got[runner]
		if !ok || len(got) != 1 || step.want >= 0 && at != step.want || step.want < 0 && (at < begun || at > time.Now().UnixMilli()) {
			t.Fatalf("after %d: %v", step.note, got)
		}
	}
	l.must(&floxv1.MembersCommand{Command: &floxv1.MembersCommand_Forget{Forget: &floxv1.ForgetMachines{Peers: []string{runner}}}})
	if got := l.seen(); len(got) != 0 {
		t.Errorf("of who is forgotten is still known %v", got)
	}
}

// seen gives what is known of machines.
func (l *log) seen() map[string]int64 {
	l.t.Helper()
	got := map[string]int64{}
	l.view(func(r *raft.Reader) {
		err := Seen(r, func(peer string, at time.Time) bool {
			got[peer] = at.UnixMilli()
			return true
		})
		if err != nil {
			l.t.Fatal(err)
		}
	})
	return got
}
