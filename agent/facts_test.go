package agent

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

func openTestFacts(t *testing.T, dir string, anchor flox.CID) *facts {
	t.Helper()
	f, err := openFacts(dir, testStore, anchor, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.close() })
	return f
}

func testInfo(t *testing.T, path, content int) *flox.PathInfo {
	t.Helper()
	return &flox.PathInfo{Path: storePath(t, path), NarSize: 1, NarHash: [32]byte{byte(content)}, Manifest: flox.CID{9, byte(content)}}
}

// Inode numbers stand for a manifest: facts that name another one for a path that
// is served must not come in under them.
func TestTheFirstFactsOfAPathStay(t *testing.T) {
	t.Parallel()
	f := openTestFacts(t, t.TempDir(), flox.CID{})
	first, second := testInfo(t, 1, 1), testInfo(t, 1, 2)
	for _, info := range []*flox.PathInfo{first, second} {
		if err := f.put(info); err != nil {
			t.Fatal(err)
		}
	}
	if got, ok := f.get(first.Path.HashPart()); !ok || got.Manifest != first.Manifest {
		t.Errorf("the path is %v now", got)
	}
	if _, ok := f.byManifest(second.Manifest); ok {
		t.Error("the second manifest is known")
	}
	if f.known() != 1 {
		t.Errorf("%d paths known, want 1", f.known())
	}
}

func TestARemovedPathIsUnknownButItsManifestReadsOn(t *testing.T) {
	t.Parallel()
	f := openTestFacts(t, t.TempDir(), flox.CID{})
	first, second := testInfo(t, 1, 1), testInfo(t, 1, 2)
	user := testInfo(t, 5, 5)
	first.References = []flox.StorePath{user.Path}
	if err := f.put(first, user); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := f.remove(first.Path.HashPart()); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := f.get(first.Path.HashPart()); ok || f.known() != 1 || len(f.referrers(user.Path, 5)) != 0 {
		t.Error("the removed path is still known")
	}
	if err := f.put(second); err != nil { // made again, with another content
		t.Fatal(err)
	}
	for _, want := range []*flox.PathInfo{first, second} {
		if got, ok := f.byManifest(want.Manifest); !ok || got.Manifest != want.Manifest || got.Path != want.Path {
			t.Errorf("manifest %s gives %v", want.Manifest, got)
		}
	}
}

// A process killed right after the kernel was told of a path must not have been
// the only one to know it. The copy of the files is what it leaves behind.
func TestFactsAreOnDiskWhenPutReturns(t *testing.T) {
	t.Parallel()
	dir, copied := t.TempDir(), filepath.Join(t.TempDir(), "facts")
	f := openTestFacts(t, dir, flox.CID{})
	for i := range 20 {
		if err := f.put(testInfo(t, i, i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.remove(hashPart(3)); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	after := openTestFacts(t, copied, flox.CID{})
	if after.known() != 19 {
		t.Errorf("%d paths known after a kill, want 19", after.known())
	}
	for i := range 20 {
		if _, ok := after.byManifest(flox.CID{9, byte(i)}); !ok {
			t.Errorf("manifest %d is unknown after a kill", i)
		}
	}
}

func TestTrustListsMoveForwardOnlyFromTheInvites(t *testing.T) {
	t.Parallel()
	k1, k2, k3, foreign := testKey(t, "a-1"), testKey(t, "b-1"), testKey(t, "c-1"), testKey(t, "a-1")
	l1, b1 := trustList(t, nil, k1, k1)
	l2, b2 := trustList(t, l1, k1, k1, k2)
	l3, b3 := trustList(t, l2, k2, k3)
	_, f1 := trustList(t, nil, foreign, foreign)
	_, f2 := trustList(t, l1, foreign, foreign)
	r2, _ := laterTrustList(t, l1, 2, k3, k1, k3)
	if err := r2.Sign(k1); err != nil {
		t.Fatal(err)
	}
	restored2, err := r2.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	r3, restored3 := laterTrustList(t, r2, 2, k3, k3)
	_, restored4 := trustList(t, r3, k3, k3)
	_, old2 := laterTrustList(t, l1, 2, k1, k1)
	_, forged2 := laterTrustList(t, l1, 2, foreign, foreign)
	fingerprint := func(l *content.TrustList) flox.CID {
		id, err := l.Fingerprint()
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	for _, c := range []struct {
		name    string
		anchor  flox.CID
		lists   [][][]byte // accepted one batch after the other
		want    uint64
		refused bool
	}{
		{"from the first", fingerprint(l1), [][][]byte{{b1, b2, b3}}, 3, false},
		{"step by step", fingerprint(l1), [][][]byte{{b1}, {b1, b2}, {b3}}, 3, false},
		{"joined late, told from the first", fingerprint(l2), [][][]byte{{b1, b2, b3}}, 3, false},
		{"joined late, older ones only", fingerprint(l3), [][][]byte{{b1, b2}}, 0, true},
		{"another storehouse", fingerprint(l1), [][][]byte{{f1}}, 0, true},
		{"another storehouse later", fingerprint(l1), [][][]byte{{b1}, {f1}}, 1, true},
		{"signed by nobody trusted", fingerprint(l1), [][][]byte{{b1}, {f2}}, 1, true},
		{"a gap", fingerprint(l1), [][][]byte{{b1}, {b3}}, 1, true},
		{"going back", fingerprint(l1), [][][]byte{{b1, b2}, {b1}}, 2, true},
		{"the newest again", fingerprint(l1), [][][]byte{{b1, b2}, {b1, b2}}, 2, false},
		{"nothing where there was something", fingerprint(l1), [][][]byte{{b1}, {}}, 1, true},
		{"two rotations while away", fingerprint(l1), [][][]byte{{b1}, {b1, b2, b3}}, 3, false},
		{"restored, ahead of the backup", fingerprint(l1), [][][]byte{{b1, b2, b3}, {b1, restored2}}, 2, false},
		{"restored, asked from where it was", fingerprint(l1), [][][]byte{{b1, b2, b3}, {restored3}, {restored3, restored4}}, 4, false},
		{"restored, where the backup was", fingerprint(l1), [][][]byte{{b1}, {b1, restored2}}, 2, false},
		{"restored from before the rotation", fingerprint(l1), [][][]byte{{b1, b2, b3}, {b1, old2}}, 3, true},
		{"restored by somebody else", fingerprint(l1), [][][]byte{{b1, b2}, {b1, forged2}}, 2, true},
		{"back to the epoch before", fingerprint(l1), [][][]byte{{b1, restored2}, {b1, b2, b3}}, 2, true},
		{"none", fingerprint(l1), [][][]byte{{}}, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			f := openTestFacts(t, dir, c.anchor)
			var err error
			for _, lists := range c.lists {
				err = f.accept(lists)
			}
			if refused := errors.Is(err, flox.ErrUntrusted); refused != c.refused || !refused && err != nil {
				t.Errorf("refused %v: %v", refused, err)
			}
			if f.trustVersion() != c.want {
				t.Errorf("version %d, want %d", f.trustVersion(), c.want)
			}
			if err := f.close(); err != nil {
				t.Fatal(err)
			}
			if again := openTestFacts(t, dir, c.anchor); again.trustVersion() != c.want {
				t.Errorf("after a restart version %d, want %d", again.trustVersion(), c.want)
			}
		})
	}
}
