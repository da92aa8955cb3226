package local

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/nix/worker"
)

const name = "abcdfghijklmnpqrsvwxyz0123456789-tree"

// newTree makes a store with one path in it, and opens that.
func newTree(t *testing.T) (*Store, *Tree, string) {
	t.Helper()
	dir := t.TempDir()
	top := filepath.Join(dir, name)
	for _, err := range []error{
		os.MkdirAll(filepath.Join(top, "bin"), 0o755),
		os.WriteFile(filepath.Join(top, "bin/run"), []byte("#!"), 0o755), //nolint:gosec // a program
		os.WriteFile(filepath.Join(top, "bin.txt"), []byte("text"), 0o600),
		os.Symlink("bin/run", filepath.Join(top, "link")),
		os.Mkdir(filepath.Join(top, "empty"), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s, err := Open(Config{Dir: flox.DefaultStoreDir, Root: dir, Socket: filepath.Join(dir, "none")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	info := &worker.Info{PathInfo: flox.PathInfo{Path: name, NarHash: [32]byte{1, 2, 3}}}
	tree, err := s.Open(&Path{Info: info, ID: idOf(info)})
	if err != nil {
		t.Fatal(err)
	}
	return s, tree, top
}

// TestTree: entries are numbered as in a NAR, whoever asks for which first, and
// files read as they are.
func TestTree(t *testing.T) {
	ctx := context.Background()
	_, tree, _ := newTree(t)
	want := []flox.Entry{
		{Kind: flox.Directory, Dirs: 2, Span: 5},
		{Name: "bin", Kind: flox.Directory, Span: 1},
		{Name: "run", Kind: flox.Regular, Executable: true, Size: 2},
		{Name: "bin.txt", Kind: flox.Regular, Size: 4},
		{Name: "empty", Kind: flox.Directory},
		{Name: "link", Kind: flox.Symlink, Target: "bin/run"},
	}
	if e, err := tree.Entry(ctx, 0); err != nil || e.Dirs != 2 {
		t.Errorf("before it is looked through: %+v (%v)", e, err)
	}
	for i := range want {
		e, err := tree.Entry(ctx, uint32(i)) //nolint:gosec // a few
		if i == 0 {
			e.Span = 5 // is not counted for the path alone
		}
		if diff := cmp.Diff(want[i], e); err != nil || diff != "" {
			t.Errorf("entry %d: %v\n%s", i, err, diff)
		}
	}
	if _, err := tree.Entry(ctx, 6); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("one too many: %v", err)
	}
	var names []string
	if err := tree.Children(ctx, 0, 2, func(_ uint32, e flox.Entry) bool { names = append(names, e.Name); return true }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"bin.txt", "empty", "link"}, names); diff != "" {
		t.Error(diff)
	}
	i, e, err := tree.Child(ctx, 1, "run")
	if err != nil || i != 2 || e.Name != "run" {
		t.Errorf("child: %d %+v %v", i, e, err)
	}
	if _, _, err := tree.Child(ctx, 0, "run"); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a grandchild: %v", err)
	}
	b := make([]byte, 8)
	if n, err := tree.ReadAt(ctx, 3, b, 1, flox.Reader{}); err != nil || string(b[:n]) != "ext" {
		t.Errorf("read %q (%v)", b[:n], err)
	}
}

// TestChangedFilesAreNotRead: what lies there is not what was found.
func TestChangedFilesAreNotRead(t *testing.T) {
	ctx := context.Background()
	s, tree, top := newTree(t)
	if _, err := tree.Entry(ctx, 1); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(filepath.Dir(top), "secret")
	file := filepath.Join(top, "bin.txt")
	b := make([]byte, 4)
	for what, change := range map[string]func() error{
		"longer": func() error { return os.WriteFile(file, []byte("longer"), 0o600) },
		"gone":   func() error { return os.Remove(file) },
		"link": func() error {
			return errors.Join(os.WriteFile(secret, []byte("mine"), 0o600), os.RemoveAll(file), os.Symlink(secret, file))
		},
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if n, err := tree.ReadAt(ctx, 3, b, 0, flox.Reader{}); !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("%s: read %q (%v)", what, b[:n], err)
		}
		_ = os.RemoveAll(file)
		if err := os.WriteFile(file, []byte("text"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Read(name, "link", b[:2], 0); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a symlink is followed: %q (%v)", b, err)
	}
	if err := s.Read(name, "../../"+filepath.Base(filepath.Dir(filepath.Dir(top)))+"/x", b, 0); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("outside of the store: %q (%v)", b, err)
	}
}

// TestWithoutADaemon: what nobody says is valid is not shown.
func TestWithoutADaemon(t *testing.T) {
	ctx := context.Background()
	s, tree, _ := newTree(t)
	if _, err := s.Find(ctx, name); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("found: %v", err)
	}
	if names, err := s.Names(ctx, "", 10); err != nil || len(names) > 0 {
		t.Errorf("listed: %v (%v)", names, err)
	}
	if s.Err() == nil {
		t.Error("nothing is said of the daemon")
	}
	if !IsID(tree.path.ID) || IsID(flox.CID{}) {
		t.Error("an ID is not told from a CID")
	}
}
