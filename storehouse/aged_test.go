package storehouse

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
)

// A server that does not vote answers from its own facts while its line to the others
// is cut, if an answer may be as old as they are, and says so if it may not. While it
// hears of a leader nothing that is valid elsewhere is not valid there.
func TestServerThatDoesNotVoteAnswersWhileItsLineIsCut(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 2)
	_, err := h.servers[0].proposeMembers(within(t), &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Change{Change: &floxv1.ChangeMachine{
		Peer: string(h.servers[1].id.peer), SetLabels: []*floxv1.Label{{Key: members.VoterLabel, Value: "false"}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	far := h.servers[1]
	eventually(t, "it does not vote", func() bool { _, _, votes := far.servers.others(); return !votes && !h.votes(1) })
	ask := func(p testPath, maxAge time.Duration) (*floxv1.PathsResponse, error) {
		return far.answerPaths(within(t), &floxv1.PathsRequest{HashParts: []string{p.info.Path.HashPart()}, MaxAgeMs: uint32(maxAge.Milliseconds())})
	}
	var known testPath
	for i := range 20 {
		known = makePath(t, fmt.Sprint("known-", i), 1000)
		publish(t, h.servers[0], known)
		if out, err := ask(known, time.Hour); err != nil || len(out.GetFound()) != 1 {
			t.Fatalf("what was published elsewhere a moment ago: %v, %v", out, err)
		}
	}
	unknown := makePath(t, "unknown", 1000)
	h.stops[0]()
	eventually(t, "it hears of no leader", func() bool { return far.node.Status().Leader == "" })
	if out, err := ask(known, time.Hour); err != nil || len(out.GetFound()) != 1 {
		t.Errorf("a valid path: %v, %v", out, err)
	}
	if out, err := ask(unknown, time.Hour); err != nil || len(out.GetInvalid()) != 1 {
		t.Errorf("one that is not valid: %v, %v", out, err)
	}
	if out, err := far.listPaths(within(t), &floxv1.ListValidRequest{MaxAgeMs: 3_600_000}); err != nil || !slices.Contains(out.GetPaths(), string(known.info.Path)) {
		t.Errorf("the list of what is valid: %v, %v", out, err)
	}
	for _, maxAge := range []time.Duration{time.Millisecond, 0} {
		if out, err := ask(known, maxAge); !errors.Is(err, flox.ErrUnreachable) {
			t.Errorf("an answer of %v ago at most: %v, %v, want ErrUnreachable", maxAge, out, err)
		}
	}
}
