package storehouse

import (
	"slices"
	"testing"

	"connectrpc.com/connect"

	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
)

// A check that comes to something else says so, leaves what is valid as it is, and the
// difference is listed; one that comes to the same lists nothing.
func TestCheckRecordsDifferences(t *testing.T) {
	f := newFarm(t, evaluator(t), "", 1)
	admin := operatorOf(t, f.Server)
	check := func(drv string) *floxv1.BuildOutcome {
		t.Helper()
		q := outs(drv)
		q.Mode = floxv1.BuildMode_BUILD_MODE_CHECK
		h, err := f.build(within(t), q, nil)
		if err != nil || len(h.results) != 1 || !slices.Equal(h.started, []string{drv}) {
			t.Fatalf("%v, %v", h, err)
		}
		return h.results[0].GetOutcome()
	}
	differences := func() []*floxv1.Difference {
		t.Helper()
		r, err := admin.Differences(within(t), connect.NewRequest(&floxv1.DifferencesRequest{}))
		if err != nil {
			t.Fatal(api.FromConnect(err))
		}
		return r.Msg.GetDifferences()
	}
	same := f.upload(mk("same", "echo same > $out", ""))
	f.must(same, buildfarm.Built)
	if got := check(same); got.GetStatus() != uint32(buildfarm.Built) || got.GetNonDeterministic() || len(differences()) != 0 {
		t.Errorf("of the same: %v, %v", got, differences())
	}
	other := f.upload(mk("other", "date +%s.%N > $out", ""))
	_, out := f.must(other, buildfarm.Built)
	path := out["out"].GetPath()
	before := f.read(path)
	got := check(other)
	if got.GetStatus() != uint32(buildfarm.NotDeterministic) || !got.GetNonDeterministic() {
		t.Errorf("of another: %v", got)
	}
	list := differences()
	if len(list) != 1 || list[0].GetPath() != path || slices.Equal(list[0].GetOfferedNarHash(), list[0].GetValidNarHash()) {
		t.Errorf("differences: %v", list)
	}
	if after := f.read(path); after != before {
		t.Errorf("it was %q and is %q", before, after)
	}
}
