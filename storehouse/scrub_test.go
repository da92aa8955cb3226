package storehouse

import (
	"bytes"
	"errors"
	iofs "io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// flipIn flips one bit of the first place where needle stands in the pack files.
func flipIn(t *testing.T, dir string, needle []byte) {
	t.Helper()
	flipped := false
	err := filepath.WalkDir(filepath.Join(dir, "packs"), func(name string, e iofs.DirEntry, err error) error {
		if err != nil || e.IsDir() || flipped {
			return err
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if at := bytes.Index(b, needle); at >= 0 {
			flipped = true
			b[at+len(needle)/2] ^= 1
			return os.WriteFile(name, b, 0o600)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !flipped {
		t.Fatal("the bytes stand in no pack")
	}
}

// Scrub names the store path a flipped bit hurts, and no other.
func TestScrubNamesTheStorePath(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	s, stop := start(t, cfg)
	sound, hurt, rootless := makePath(t, "sound", 200_000), makePath(t, "hurt", 200_000), makePath(t, "rootless", 1000)
	for _, p := range []testPath{sound, hurt, rootless} {
		publish(t, s, p)
	}
	scrub := func(s *Server) (map[flox.StorePath]Damage, Scrubbed) {
		t.Helper()
		found := make(map[flox.StorePath]Damage)
		done, err := s.Scrub(within(t), func(d Damage) { found[d.Path] = d })
		if err != nil {
			t.Fatal(err)
		}
		return found, done
	}
	if found, done := scrub(s); len(found) != 0 || done.Paths != 3 || done.BadBlocks != 0 || done.StoredBlocks == 0 {
		t.Fatalf("a sound store: %+v %v", done, found)
	}
	root, err := s.Info(within(t), rootless.info.Path.HashPart())
	if err != nil {
		t.Fatal(err)
	}
	manifest, zstd, err := s.Packs().Stored(within(t), root.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("manifest of %d stored bytes, zstd %v", len(manifest), zstd)
	stop()
	flipIn(t, cfg.StateDir, hurt.nar[100_000:100_064]) // random bytes are stored as they are
	flipIn(t, cfg.StateDir, manifest)

	s, err = New(cfg) // not run: what an operator does with a stopped storehouse
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	found, done := scrub(s)
	if len(found) != 2 || done.Hurt != 2 || done.BadBlocks != 2 {
		t.Fatalf("%+v: %v", done, found)
	}
	d := found[hurt.info.Path]
	if len(d.Blocks) != 1 || !errors.Is(d.Err, flox.ErrCorrupt) {
		t.Errorf("damage of %s: %+v", hurt.info.Path, d)
	}
	if got, ok := found[rootless.info.Path]; !ok || got.Blocks[0] != root.Manifest {
		t.Errorf("damage of a manifest: %+v", got)
	}
	// A block that is gone altogether hurts its path as well.
	info, err := s.Info(within(t), sound.info.Path.HashPart())
	if err != nil {
		t.Fatal(err)
	}
	m, err := content.OpenManifest(within(t), info.Manifest, s.Blocks())
	if err != nil {
		t.Fatal(err)
	}
	var last flox.CID
	if err := m.Blocks(within(t), func(id flox.CID, _ uint32) bool { last = id; return true }); err != nil {
		t.Fatal(err)
	}
	if err := s.Packs().Delete(within(t), last); err != nil {
		t.Fatal(err)
	}
	if found, _ := scrub(s); !errors.Is(found[sound.info.Path].Err, flox.ErrNotFound) {
		t.Errorf("a missing block: %+v", found[sound.info.Path])
	}
}
