package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// library is a tree of everything a store path can be.
func library(t *testing.T, h *house) *flox.PathInfo {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "lib")
	for _, d := range []string{"lib/empty", "share/a/b/c"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"lib/libx.so": "libx.so.1", "dangling": "/nowhere", "up": "..", "share/\xff": "not UTF-8"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	files := map[string][]byte{"lib/libx.so.1": randomBytes(3, 3_000_000), "share/a/empty": nil, "share/\xfe/x": []byte("x"), "share/a/b/c/small": randomBytes(4, 300)}
	for name, data := range files {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return h.ingest(t, dir, "library", nil)
}

// shelf is a storehouse with a program and a library, and an agent.
func shelf(t *testing.T) (h *house, a *Agent, program, lib *flox.PathInfo) {
	t.Helper()
	h = newHouse(t)
	lib = library(t, h)
	program = h.make(t, "program", []flox.StorePath{lib.Path}, manyFiles()...)
	h.publish(lib, program)
	a, _ = runAgent(t, h, nil, nil)
	following(t, a)
	return h, a, program, lib
}

// isWhole checks a path in dir against what Nix would have.
func isWhole(t *testing.T, dir string, info *flox.PathInfo) {
	t.Helper()
	top := filepath.Join(dir, string(info.Path))
	hash := nix.SHA256.New()
	if err := nix.DumpPath(t.Context(), hash, top); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(hash.Sum(nil), info.NarHash[:]) {
		t.Errorf("%s has another NAR hash", top)
	}
	err := filepath.WalkDir(top, func(p string, d iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		if m := st.Mode(); m.Type() != iofs.ModeSymlink && m.Perm() != 0o444 && m.Perm() != 0o555 {
			t.Errorf("%s has mode %o", p, m.Perm())
		}
		if s := st.ModTime().Unix(); s != 1 || st.ModTime().Nanosecond() != 0 {
			t.Errorf("%s has time %d", p, s)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// visible are the names in dir that could be taken for store paths.
func visible(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	return names
}

// drafts are the parts of paths in dir.
func drafts(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, marksDir+"-*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// unsealed lets t.TempDir remove what was sealed.
func unsealed(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		_ = filepath.WalkDir(dir, func(p string, d iofs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				_ = os.Chmod(p, 0o700)
			}
			return nil
		})
	})
	return filepath.Join(dir, "store")
}

func TestMaterializeWritesWhatNixWould(t *testing.T) {
	t.Parallel()
	_, a, program, lib := shelf(t)
	dir := unsealed(t)
	var last Materialized
	got, err := a.Materialize(t.Context(), Materialize{Path: program.Path, Dir: dir, Progress: func(m Materialized) { last = m }})
	if err != nil {
		t.Fatal(err)
	}
	if got.Paths != 2 || got.TotalPaths != 2 || got.Bytes != got.TotalBytes || got.TotalBytes != program.NarSize+lib.NarSize || last != got {
		t.Errorf("it ended with %+v, and said %+v last", got, last)
	}
	if got.Fetched < 5_000_000 {
		t.Errorf("%d bytes were fetched", got.Fetched)
	}
	isWhole(t, dir, program)
	isWhole(t, dir, lib)
	if d := drafts(t, dir); len(d) > 0 {
		t.Errorf("left: %v", d)
	}
	if used := a.cache.Usage().Bytes; used > 200_000 {
		t.Errorf("%d bytes went into the cache: only manifests should", used)
	}
	for _, trust := range []bool{false, true} {
		got, err := a.Materialize(t.Context(), Materialize{Path: program.Path, Dir: dir, Trust: trust})
		if err != nil || got.Fetched != 0 || got.Paths != 2 {
			t.Errorf("again, trusting %v: %+v, %v", trust, got, err)
		}
	}
}

func TestMaterializeGoesOnWhereItStopped(t *testing.T) {
	t.Parallel()
	_, a, program, lib := shelf(t)
	dir := unsealed(t)
	ctx, cancel := context.WithCancel(t.Context())
	first, err := a.materialize(ctx, Materialize{Path: program.Path, Dir: dir, Progress: func(m Materialized) {
		if m.Fetched > 1_000_000 {
			cancel()
		}
	}}, 0)
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("%+v, %v", first, err)
	}
	for _, name := range visible(t, dir) { // whatever has its name is whole
		for _, info := range []*flox.PathInfo{program, lib} {
			if name == string(info.Path) {
				isWhole(t, dir, info)
			}
		}
	}
	begun := drafts(t, dir)
	if len(begun) == 0 {
		t.Fatal("nothing was begun")
	}
	// A part of it rots, and a part of it is something else by now.
	var spoilt bool
	for _, d := range begun {
		_ = filepath.WalkDir(d, func(p string, e iofs.DirEntry, err error) error {
			if err == nil && strings.HasSuffix(p, "/f/255") {
				spoilt = os.Remove(p) == nil && os.Symlink("/etc/passwd", p) == nil
			}
			if err == nil && strings.HasSuffix(p, "/bin/tool") {
				spoilt = os.WriteFile(p, randomBytes(77, 80_000), 0o600) == nil && spoilt
			}
			return nil
		})
	}
	second, err := a.Materialize(t.Context(), Materialize{Path: program.Path, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	isWhole(t, dir, program)
	isWhole(t, dir, lib)
	whole, err := a.Materialize(t.Context(), Materialize{Path: program.Path, Dir: unsealed(t)})
	if err != nil {
		t.Fatal(err)
	}
	if second.Fetched == 0 || second.Fetched > whole.Fetched-500_000 {
		t.Errorf("%d bytes were fetched first, %d then (spoilt: %v); all are %d", first.Fetched, second.Fetched, spoilt, whole.Fetched)
	}
}

func TestMaterializeLeavesAloneWhatDiffers(t *testing.T) {
	t.Parallel()
	_, a, program, lib := shelf(t)
	dir := unsealed(t)
	mine := filepath.Join(dir, string(lib.Path), "mine")
	if err := errors.Join(os.MkdirAll(filepath.Dir(mine), 0o755), os.WriteFile(mine, []byte("mine"), 0o644)); err != nil {
		t.Fatal(err)
	}
	for _, trust := range []bool{false, true} {
		_, err := a.Materialize(t.Context(), Materialize{Path: program.Path, Dir: dir, Trust: trust})
		if !errors.Is(err, flox.ErrCorrupt) || !strings.Contains(err.Error(), string(lib.Path)) {
			t.Errorf("trusting %v: %v", trust, err)
		}
	}
	if b, err := os.ReadFile(mine); err != nil || string(b) != "mine" {
		t.Errorf("it was overwritten: %q, %v", b, err)
	}
}

// A path had its name when the machine crashed, and not all of it was on the disk.
func TestMaterializeMendsWhatACrashLeft(t *testing.T) {
	t.Parallel()
	_, a, program, lib := shelf(t)
	for _, trust := range []bool{false, true} {
		dir := unsealed(t)
		m := Materialize{Path: program.Path, Dir: dir, Trust: trust}
		if _, err := a.Materialize(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		mark, lost := filepath.Join(dir, marksDir, string(lib.Path)), filepath.Join(dir, string(lib.Path), "share/a/b/c/small")
		if err := errors.Join(os.Truncate(mark, 0), os.Chmod(lost, 0o644), os.Truncate(lost, 0)); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Materialize(t.Context(), m); !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("trusting %v, what may be somebody else's: %v", trust, err)
		}
		if err := os.Chmod(mark, modeRisky); err != nil {
			t.Fatal(err)
		}
		got, err := a.Materialize(t.Context(), m)
		if err != nil || got.Fetched > 1_000_000 {
			t.Errorf("trusting %v: %+v, %v", trust, got, err)
		}
		isWhole(t, dir, lib)
		if info, err := os.Stat(mark); err != nil || info.Size() == 0 || info.Mode().Perm() != modeMark {
			t.Errorf("trusting %v, its mark: %v, %v", trust, info, err)
		}
	}
}

// Not every file system can promise not to replace what it renames to.
func TestMaterializeOnAPoorFileSystem(t *testing.T) {
	_, a, program, lib := shelf(t)
	defer func(was func(int, string, int, string, uint) error) { renameat2 = was }(renameat2)
	asked, dir := make(chan struct{}, 2), unsealed(t)
	renameat2 = func(_ int, _ string, _ int, to string, _ uint) error {
		asked <- struct{}{}
		if info, err := os.Stat(filepath.Join(dir, marksDir, to)); err != nil || info.Mode().Perm() != modeRisky {
			t.Errorf("%s is about to get its name, its mark is %v, %v", to, info, err)
		}
		return unix.EINVAL
	}
	if _, err := a.Materialize(t.Context(), Materialize{Path: program.Path, Dir: dir}); err != nil {
		t.Fatal(err)
	}
	if len(asked) != 2 {
		t.Errorf("it was asked %d times", len(asked))
	}
	isWhole(t, dir, program)
	isWhole(t, dir, lib)
}

// A signed NAR hash that the manifest does not lead to: nothing gets its name.
func TestMaterializeChecksTheNARHash(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	info := h.make(t, "wrong", nil, testFile{name: "x", data: randomBytes(1, 100_000)})
	info.NarHash[0] ^= 1
	sign(info, h.key)
	h.publish(info)
	a, _ := runAgent(t, h, nil, nil)
	dir := unsealed(t)
	if _, err := a.Materialize(t.Context(), Materialize{Path: info.Path, Dir: dir}); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("got %v", err)
	}
	if v, d := visible(t, dir), drafts(t, dir); len(v)+len(d) > 0 {
		t.Errorf("left: %v %v", v, d)
	}
}

func TestMaterializeByTwoAtOnce(t *testing.T) {
	t.Parallel()
	h, a, program, lib := shelf(t)
	b, _ := runAgent(t, h, nil, nil)
	dir := unsealed(t)
	var work sync.WaitGroup
	var fetched [4]uint64
	for i := range fetched {
		work.Go(func() {
			got, err := []*Agent{a, b}[i%2].Materialize(t.Context(), Materialize{Path: program.Path, Dir: dir})
			if fetched[i] = got.Fetched; err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	isWhole(t, dir, program)
	isWhole(t, dir, lib)
	alone, err := a.Materialize(t.Context(), Materialize{Path: program.Path, Dir: unsealed(t)})
	if err != nil {
		t.Fatal(err)
	}
	if sum := fetched[0] + fetched[1] + fetched[2] + fetched[3]; sum > alone.Fetched {
		t.Errorf("together they fetched %v, one alone %d", fetched, alone.Fetched)
	}
}

func TestMaterializeOnAFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	_, a, program, lib := shelf(t)
	dir := t.TempDir()
	if err := unix.Mount("small", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	_, err := a.Materialize(t.Context(), Materialize{Path: program.Path, Dir: dir})
	if !errors.Is(err, flox.ErrFull) {
		t.Fatalf("got %v", err)
	}
	if err := unix.Mount("small", dir, "tmpfs", unix.MS_REMOUNT, fmt.Sprintf("size=%dm", 40)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Materialize(t.Context(), Materialize{Path: program.Path, Dir: dir}); err != nil {
		t.Fatal(err)
	}
	isWhole(t, dir, program)
	isWhole(t, dir, lib)
}
