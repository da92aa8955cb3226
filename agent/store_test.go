package agent

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
)

func TestTheStoreDirectoryListsWhatIsKnownInOrderAndInPages(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var infos []*flox.PathInfo
	var refs []flox.StorePath
	for i := range 7 {
		info := h.make(t, "p"+string(rune('a'+i)), slices.Clone(refs), testFile{name: "f", data: []byte{byte(i)}})
		infos, refs = append(infos, info), append(refs, info.Path)
	}
	h.publish(infos...)
	a, _ := runAgent(t, h, nil, nil)
	ctx := within(t, time.Minute)
	treeOf(ctx, t, a, infos[6].Path) // its closure comes with it
	slices.SortFunc(infos, func(x, y *flox.PathInfo) int { return cmpString(x.Path, y.Path) })
	var got []flox.Named
	for after := ""; ; {
		page, err := a.store.Names(ctx, after, 3)
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, page...); len(page) < 3 {
			break
		}
		after = page[2].Name
	}
	var want []flox.Named
	for _, info := range infos {
		n := flox.Named{Name: string(info.Path), Manifest: info.Manifest}
		if info.Path == refs[6] {
			n.Kind = flox.Directory
		}
		want = append(want, n)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("listed (-want +got):\n%s", diff)
	}
	if a.store.Usage().Files != 7 {
		t.Errorf("%d files, want 7", a.store.Usage().Files)
	}
}

func cmpString(a, b flox.StorePath) int {
	if a < b {
		return -1
	}
	return 1
}

func TestNamesThatCanNeverBeStorePathsAreAnsweredForEver(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.set(func() { h.broken = errors.New("out of order") })
	info := h.make(t, "real", nil, testFile{name: "f", data: []byte("x")})
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	if err := a.facts.put(info); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"lib", ".Trash", "zz", hashPart(1), hashPart(1) + "-", "E" + hashPart(1)[1:] + "-x"} {
		_, forever, err := a.store.Lookup(t.Context(), name, flox.Reader{})
		if !forever || !errors.Is(err, flox.ErrNotFound) {
			t.Errorf("%q: forever %v, %v", name, forever, err)
		}
	}
	// The hash is valid, under another name.
	_, forever, err := a.store.Lookup(t.Context(), info.Path.HashPart()+"-unreal", flox.Reader{})
	if forever || !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("another name: forever %v, %v", forever, err)
	}
	_, forever, err = a.store.Lookup(within(t, 200*time.Millisecond), string(storePath(t, 9)), flox.Reader{})
	if forever || !errors.Is(err, flox.ErrUnreachable) || errors.Is(err, flox.ErrNotFound) {
		t.Errorf("nobody to ask: forever %v, %v", forever, err)
	}
}

// A name beside a valid one, such as Nix's HASH-name.lock, is missing at once,
// also where nothing is known of the valid one yet.
func TestANameBesideAValidOneIsMissingAtOnce(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	info := h.make(t, "valid", nil, testFile{name: "f", data: []byte("x")})
	h.publish(info)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	beside, err := flox.ParseStorePath(string(info.Path) + ".lock")
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	_, forever, err := a.store.Lookup(within(t, time.Minute), string(beside), flox.Reader{})
	if !errors.Is(err, flox.ErrNotFound) || forever {
		t.Errorf("%v after %s (for ever: %v), want ErrNotFound", err, time.Since(began), forever)
	}
	if _, _, err := a.store.Lookup(within(t, time.Minute), string(info.Path), flox.Reader{}); err != nil {
		t.Errorf("the valid one: %v", err)
	}
}
