package content

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

func newKey(t testing.TB, name string) nix.SecretKey {
	t.Helper()
	k, err := nix.GenerateKey(name)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func firstList(keys ...nix.SecretKey) *TrustList {
	t := &TrustList{Version: 1, Voters: []string{"12D3KooWa", "12D3KooWb"}}
	for _, k := range keys {
		t.NixKeys = append(t.NixKeys, k.Public().String())
		t.ManifestKeys = append(t.ManifestKeys, k.Public().String())
	}
	return t
}

func follow(t *testing.T, old *TrustList, signer nix.SecretKey, change func(*TrustList)) *TrustList {
	t.Helper()
	next := *old
	next.Signatures = nil
	var err error
	if next.Prev, err = old.Fingerprint(); err != nil {
		t.Fatal(err)
	}
	next.Version++
	if change != nil {
		change(&next)
	}
	if err := next.Sign(signer); err != nil {
		t.Fatal(err)
	}
	return &next
}

// Lists only move forward, one at a time, signed by a key of the one before.
func TestTrustChain(t *testing.T) {
	a, b := newKey(t, "a-1"), newKey(t, "b-1")
	first := firstList(a)
	second := follow(t, first, a, func(n *TrustList) { // b takes over from a
		n.ManifestKeys = []string{b.Public().String()}
		n.Epoch = 4
	})
	third := follow(t, second, b, nil)
	for _, step := range [][2]*TrustList{{first, second}, {second, third}} {
		if err := Newer(step[0], step[1]); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct{ old, next *TrustList }{
		"same again":       {second, second},
		"backwards":        {second, first},
		"one left out":     {first, third},
		"signed by nobody": {first, follow(t, first, b, nil)},
		"retired key":      {second, follow(t, second, a, nil)},
		"lower epoch":      {second, follow(t, second, b, func(n *TrustList) { n.Epoch = 3 })},
		"another past":     {second, follow(t, follow(t, first, a, nil), b, nil)},
		"changed later": {first, func() *TrustList {
			n := *second
			n.Voters = []string{"12D3KooWevil"}
			return &n
		}()},
	} {
		if err := Newer(c.old, c.next); !errors.Is(err, flox.ErrUntrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
	print, err := first.Fingerprint()
	if err != nil {
		t.Fatal(err)
	}
	if err := first.CheckFirst(print); err != nil {
		t.Error(err)
	}
	if err := second.CheckFirst(print); !errors.Is(err, flox.ErrUntrusted) {
		t.Errorf("another list than the invite's: %v", err)
	}
}

// A malformed list has no fingerprint, is not saved and not parsed.
func TestTrustListRules(t *testing.T) {
	a, b := newKey(t, "a-1"), newKey(t, "b-1")
	for name, change := range map[string]func(*TrustList){
		"no version":        func(l *TrustList) { l.Version = 0 },
		"first with a past": func(l *TrustList) { l.Prev = flox.CID{1} },
		"no keys":           func(l *TrustList) { l.ManifestKeys = nil },
		"bad key":           func(l *TrustList) { l.NixKeys = []string{"a:b"} },
		"not sorted":        func(l *TrustList) { l.Voters = []string{"b", "a"} },
		"voter twice":       func(l *TrustList) { l.Voters = []string{"a", "a"} },
		"line in a voter":   func(l *TrustList) { l.Voters = []string{"a\nmanifest-key " + b.Public().String()} },
		"too many":          func(l *TrustList) { l.Signatures = make([]string, 1000) },
	} {
		l := firstList(a)
		change(l)
		if _, err := l.Fingerprint(); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := l.Marshal(); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: marshal: %v", name, err)
		}
	}
	for name, s := range map[string]string{
		"empty": "", "unknown field": `{"version":1,"extra":1}`, "more": `{} {}`, "long": strings.Repeat(" ", maxTrustList+1),
	} {
		if _, err := ParseTrustList([]byte(s)); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A list comes back from its file as it was, and a file that is not there or not
// whole says so.
func TestTrustListFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "trust.json")
	if _, err := LoadTrustList(path); !errors.Is(err, flox.ErrNotFound) {
		t.Fatal(err)
	}
	a := newKey(t, "a-1")
	first := firstList(a)
	second := follow(t, first, a, nil)
	for _, want := range []*TrustList{first, second} {
		if err := want.Save(path); err != nil {
			t.Fatal(err)
		}
		got, err := LoadTrustList(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
	}
	if names, err := os.ReadDir(filepath.Dir(path)); err != nil || len(names) != 1 {
		t.Fatalf("left behind: %v, %v", names, err)
	}
	if err := os.WriteFile(path, []byte(`{"version":1`), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadTrustList(path); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), path) {
		t.Fatal(err)
	}
}

// A manifest signature holds for exactly the path info it was made for, and only
// by a manifest key.
func TestVerifyInfo(t *testing.T) {
	dir := flox.DefaultStoreDir
	key, nixOnly := newKey(t, "m-1"), newKey(t, "n-1")
	list := firstList(key)
	list.NixKeys = []string{nixOnly.Public().String()}
	info := flox.PathInfo{Path: pathB, NarHash: [32]byte{1}, NarSize: 5, References: []flox.StorePath{pathA, pathB}, Manifest: flox.CID{7}}
	want := "flox-manifest-1;/nix/store/" + string(pathB) + ";" + nix.SHA256Hash(info.NarHash).String() + ";5;/nix/store/" + string(pathA) +
		",/nix/store/" + string(pathB) + ";" + info.Manifest.String()
	if got := Statement(dir, &info); got != want {
		t.Fatalf("statement %q, want %q", got, want)
	}
	info.ManifestSignatures = []string{"rubbish", nixOnly.Sign([]byte(want)), key.Sign([]byte(want))}
	if err := list.VerifyInfo(dir, &info); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*flox.PathInfo){
		"path":       func(i *flox.PathInfo) { i.Path = pathC },
		"hash":       func(i *flox.PathInfo) { i.NarHash[31]++ },
		"size":       func(i *flox.PathInfo) { i.NarSize++ },
		"references": func(i *flox.PathInfo) { i.References = i.References[:1] },
		"manifest":   func(i *flox.PathInfo) { i.Manifest[0]++ },
		"none":       func(i *flox.PathInfo) { i.Manifest = flox.CID{} },
		"nix key":    func(i *flox.PathInfo) { i.ManifestSignatures = i.ManifestSignatures[:2] },
		"unsigned":   func(i *flox.PathInfo) { i.ManifestSignatures = nil },
	} {
		bad := info
		change(&bad)
		if err := list.VerifyInfo(dir, &bad); !errors.Is(err, flox.ErrUntrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := list.VerifyInfo("/other/store", &info); !errors.Is(err, flox.ErrUntrusted) {
		t.Errorf("another store directory: %v", err)
	}
}

// Whatever is parsed is well-formed and survives being written again.
func FuzzTrustList(f *testing.F) {
	a := newKey(f, "a-1")
	l := firstList(a)
	if err := l.Sign(a); err != nil {
		f.Fatal(err)
	}
	b, err := l.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":2,"epoch":1,"nixKeys":[],"manifestKeys":[],"voters":["x"],"prev":"","signatures":[]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := ParseTrustList(b)
		if err != nil {
			return
		}
		canonical, err := l.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		again, err := l.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		l2, err := ParseTrustList(again)
		if err != nil {
			t.Fatal(err)
		}
		if c, err := l2.Canonical(); err != nil || string(c) != string(canonical) {
			t.Fatalf("written again it is another list: %v", err)
		}
	})
}
