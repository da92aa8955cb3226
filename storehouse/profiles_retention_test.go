package storehouse

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/profile"
	cluster "github.com/floxctl/flox/raft"
)

// What a profile's retention does not keep holds nothing in the store any more, at once,
// and by itself when it got too old.
func TestRetentionLetsGoOfPaths(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, nil)
	newProfile(t, s, "alice/x")
	var tools []testPath
	for i := range 5 {
		tools = append(tools, makeTool(t, fmt.Sprint("tool", i)))
		publish(t, s, tools[i])
		install(t, s, "alice/x", asPackage("tool", fmt.Sprint(i), tools[i]))
	}
	held := func(want ...int) {
		t.Helper()
		var have []int
		for i, tool := range tools {
			why, err := s.Why(within(t), tool.info.Path, true)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(fmt.Sprint(why), "alice/x@") {
				have = append(have, i)
			}
		}
		if !slices.Equal(have, want) {
			t.Errorf("the profile keeps the tools %v, want %v", have, want)
		}
	}
	held(0, 1, 2, 3, 4)
	if _, err := admin.TagProfile(within(t), connect.NewRequest(&floxv1.TagProfileRequest{Name: "alice/x", Tag: "first", Generation: 1})); err != nil {
		t.Fatal(err)
	}
	out, err := admin.SetProfileRetention(within(t), connect.NewRequest(&floxv1.SetProfileRetentionRequest{Name: "alice/x", Keep: 1, Days: 1}))
	if err != nil || out.Msg.GetProfile().GetDays() != 1 {
		t.Fatal(out, err)
	}
	held(0, 1, 2, 3, 4) // all of this day
	if err := s.profiles.pruneAll(within(t), time.Now()); err != nil {
		t.Fatal(err)
	}
	held(0, 1, 2, 3, 4)
	if _, err := admin.SetProfileRetention(within(t), connect.NewRequest(&floxv1.SetProfileRetentionRequest{Name: "alice/x", Keep: 1})); err != nil {
		t.Fatal(err)
	}
	held(0, 3, 4)
	if _, err := admin.ShowProfile(within(t), connect.NewRequest(&floxv1.ShowProfileRequest{Name: "alice/x", Generation: 2})); err == nil || !errors.Is(api.FromConnect(err), flox.ErrNotFound) || !strings.Contains(err.Error(), "generation 2 of profile alice/x was dropped") {
		t.Errorf("a generation that was dropped: %v", err)
	}
	install(t, s, "alice/x", asPackage("tool", "0", tools[0]))
	held(0, 3, 4)
	if err := s.profiles.pruneAll(within(t), time.Now()); err != nil {
		t.Fatal(err)
	}
	held(0, 4)
	history, err := admin.ProfileHistory(within(t), connect.NewRequest(&floxv1.ProfileHistoryRequest{Name: "alice/x", Limit: 1}))
	if err != nil || history.Msg.GetEvents()[0].GetKind() != "dropped" || history.Msg.GetEvents()[0].GetDetail() != "generation 4" {
		t.Errorf("history %v, %v", history, err)
	}
	err = s.profiles.view(within(t), cluster.Local, func(r *cluster.Reader) error {
		p, err := profile.Find(r, "alice/x")
		if err != nil {
			return err
		}
		n, err := newsOf(r, p, sight{})
		if n.GetFirst() != p.GetFirst() || p.GetFirst() != 6 || len(n.GetTags()) != 1 || n.GetTags()[0].GetGeneration() != 1 {
			t.Errorf("machines are told %v of %v", n, p)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
