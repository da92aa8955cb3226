package probe

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func tree(t *testing.T) (string, *Tree) {
	t.Helper()
	top := t.TempDir()
	if err := os.MkdirAll(filepath.Join(top, "p", "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, size := range map[string]int{"p/small": 5, "p/d/large": 3 << 20, "p/empty": 0} {
		if err := os.WriteFile(filepath.Join(top, name), []byte(strings.Repeat("x", size)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("small", filepath.Join(top, "p", "link")); err != nil {
		t.Fatal(err)
	}
	got, err := Walk(top, "p")
	if err != nil {
		t.Fatal(err)
	}
	return top, got
}

func TestEveryCallReachesEveryName(t *testing.T) {
	_, tr := tree(t)
	if len(tr.All) != 6 || len(tr.Files) != 3 || len(tr.Small) != 2 || len(tr.Large) != 1 || len(tr.Links) != 1 || len(tr.Dirs) != 2 || tr.Bytes != 3<<20+5 {
		t.Fatalf("walked %+v", tr)
	}
	for name, do := range map[string]func() error{
		"lstat": func() error { return tr.Lstat(tr.All) }, "missing": func() error { return tr.NotThere(tr.Missing) },
		"readlink": func() error { return tr.Readlink(tr.Links) }, "readdir": func() error { return tr.ReadDir(tr.Dirs) },
		"read": func() error { return tr.Read(tr.Files) },
		"map":  func() error { _, err := tr.Map(tr.Files); return err },
	} {
		if err := do(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWhatIsNotAsItShouldBeIsNoticed(t *testing.T) {
	top, tr := tree(t)
	elsewhere := tr.At(top, filepath.Join(top, "nowhere"))
	for name, err := range map[string]error{
		"lstat of missing names": tr.Lstat(tr.Missing), "missing names that are there": tr.NotThere(tr.All),
		"readlink of a file": tr.Readlink(tr.Files), "list of a file": tr.ReadDir(tr.Files),
		"another top": elsewhere.Read(elsewhere.Files),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if got := Thin(tr.All, 3); len(got) != 3 {
		t.Errorf("thinned to %d", len(got))
	}
}
