package storehouse

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// addAs proposes a path uploaded under names.
func (f *factLog) addAs(p testPath, names ...string) error {
	p.info.Manifest = flox.CID{1}
	c := &floxv1.AddPaths{Publisher: "tester", Paths: []*floxv1.PathInfo{api.FromPathInfo(p.info)}}
	for _, name := range names {
		c.NarFiles = append(c.NarFiles, &floxv1.NarFile{Name: name, Path: string(p.info.Path), NarHash: p.info.NarHash[:]})
	}
	_, err := f.do(&floxv1.PathsCommand{Command: &floxv1.PathsCommand_Add{Add: c}})
	return err
}

func (f *factLog) checkFile(name string, want flox.StorePath) {
	f.t.Helper()
	info, err := f.NarFile(within(f.t), name)
	switch {
	case want == "" && !errors.Is(err, flox.ErrNotFound):
		f.t.Errorf("%s: %v %v, want ErrNotFound", name, info, err)
	case want != "" && (err != nil || info.Path != want):
		f.t.Errorf("%s: %v %v, want %s", name, info, err, want)
	}
}

// A NAR's names lead to its path as long as that is valid, the first one wins,
// and they are bounded.
func TestNarFiles(t *testing.T) {
	t.Parallel()
	f := newFactLog(t, paths{})
	name := func(i int) string { return nix.EncodeBase32(sumOf([]byte(fmt.Sprint(i)))) + ".nar.xz" }
	a, b := makePath(t, "a", 1), makePath(t, "b", 1)
	if err := errors.Join(f.addAs(a, name(1), name(2)), f.addAs(b, name(2), name(3)), f.addAs(a, name(4))); err != nil {
		t.Fatal(err)
	}
	for i, want := range []flox.StorePath{"", a.info.Path, a.info.Path, b.info.Path, a.info.Path} {
		f.checkFile(name(i), want)
	}
	// A path that is valid with another NAR does not get the name of this one.
	other := makePath(t, "other", 1)
	other.info.Path = a.info.Path
	if err := f.addAs(other, name(5)); err != nil {
		t.Fatal(err)
	}
	f.checkFile(name(5), "")

	if err := f.remove(a); err != nil {
		t.Fatal(err)
	}
	for i, want := range []flox.StorePath{"", "", "", b.info.Path, ""} {
		f.checkFile(name(i), want)
	}
	var many []string
	for i := range maxNarFiles + 5 {
		many = append(many, name(100+i))
	}
	if err := f.addAs(a, many...); err != nil {
		t.Fatal(err)
	}
	f.checkFile(many[maxNarFiles-1], a.info.Path)
	f.checkFile(many[maxNarFiles], "")
	for _, bad := range []string{"", "x", "../../etc/passwd", strings.Repeat("0", 52), strings.Repeat("0", 52) + ".nar.", strings.Repeat("0", 52) + ".nar.xz/", strings.Repeat("0", 52) + ".nar.xz\n"} {
		if err := f.addAs(b, bad); !errors.Is(err, cluster.ErrRefused) {
			t.Errorf("name %q: %v, want refused", bad, err)
		}
		f.checkFile(bad, "")
	}
}
