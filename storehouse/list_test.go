package storehouse

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Valid paths are listed in the order of their names, each once, whatever the
// size of a page and wherever it begins; paths that are valid no longer are not.
func TestListPathsInPages(t *testing.T) {
	t.Parallel()
	f := newFactLog(t, paths{})
	var all []testPath
	for i := range 60 {
		all = append(all, makePath(t, fmt.Sprintf("p%d", i), 1))
	}
	if _, err := f.add(all...); err != nil {
		t.Fatal(err)
	}
	if err := f.remove(all[:5]...); err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, p := range all[5:] {
		want = append(want, string(p.info.Path))
	}
	slices.Sort(want)
	for _, limit := range []uint32{0, 1, 7, 55, 56, maxListed} {
		var got []string
		for after, more := "", true; more; {
			page, err := f.listPaths(within(t), &floxv1.ListValidRequest{After: after, Limit: limit})
			if err != nil || len(page.GetPaths()) == 0 || page.GetIndex() == 0 {
				t.Fatalf("page of %d behind %q: %v %v", limit, after, page, err)
			}
			if limit > 0 && len(page.GetPaths()) > int(limit) {
				t.Errorf("%d names, asked for %d", len(page.GetPaths()), limit)
			}
			got = append(got, page.GetPaths()...)
			after, more = got[len(got)-1], page.GetMore()
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("pages of %d (-want +got):\n%s", limit, diff)
		}
	}
	// A beginning of a name is a place too.
	page, err := f.listPaths(within(t), &floxv1.ListValidRequest{After: want[30][:11], Limit: 1})
	if err != nil || len(page.GetPaths()) != 1 || page.GetPaths()[0] != want[30] {
		t.Errorf("behind %q: %v %v, want %s", want[30][:11], page, err, want[30])
	}
	if page, err := f.listPaths(within(t), &floxv1.ListValidRequest{After: want[len(want)-1]}); err != nil || len(page.GetPaths()) != 0 || page.GetMore() {
		t.Errorf("behind the last: %v %v", page, err)
	}
}

func TestListPathsOverTheWire(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	m := join(t, s.Invite())
	a := publish(t, s, makePath(t, "a", 10))
	got, err := m.store.ListPaths(within(t), connect.NewRequest(&floxv1.ListValidRequest{}))
	if err != nil || len(got.Msg.GetPaths()) != 1 || got.Msg.GetPaths()[0] != string(a.Path) || got.Msg.GetMore() {
		t.Fatalf("%v %v", got, err)
	}
	for name, req := range map[string]*floxv1.ListValidRequest{
		"too many": {Limit: maxListed + 1}, "a name too long": {After: strings.Repeat("0", maxName+1)},
	} {
		if _, err := m.store.ListPaths(within(t), connect.NewRequest(req)); !errors.Is(api.FromConnect(err), flox.ErrBadInput) {
			t.Errorf("%s: %v, want ErrBadInput", name, err)
		}
	}
}
