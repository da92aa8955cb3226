package pack

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// A disk that fills up ends in ErrFull; what was there before stays, what was
// acknowledged is there after reopening, and once there is room it goes on.
func TestFullDisk(t *testing.T) {
	ctx := context.Background()
	for name, reserve := range map[string]int64{"reserve": 4 << 20, "no room at all": 1} {
		t.Run(name, func(t *testing.T) {
			dir := smallDisk(t, "16m")
			cfg := Config{Dir: filepath.Join(dir, "store"), PackSize: 1 << 20, Reserve: reserve}
			s, err := Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			put(t, s, 0, 100)
			if name != "reserve" {
				// Somebody else fills the disk; this store noticed only 4 MiB ago.
				filler(t, filepath.Join(dir, "filler"), 2<<20)
			}
			n := 100
			for ; ; n++ {
				id, b := block(n)
				if err = s.Put(ctx, id, b); err != nil {
					break
				}
			}
			if !errors.Is(err, flox.ErrFull) {
				t.Fatalf("after %d blocks: %v", n, err)
			}
			if err := s.Sync(ctx); err != nil {
				t.Fatal(err)
			}
			wantBlocks(t, s, 0, n)
			_ = os.Remove(filepath.Join(dir, "filler"))
			if name == "reserve" {
				// Room comes from a sweep, which must not need any itself.
				live := make(map[flox.CID]bool)
				for i := range n / 2 {
					id, _ := block(i)
					live[id] = true
				}
				if done, err := s.Sweep(ctx, func(id flox.CID) bool { return live[id] }); err != nil || done.Bytes == 0 {
					t.Fatalf("%+v: %v", done, err)
				}
			}
			put(t, s, n, n+20)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t, cfg)
			wantBlocks(t, s, 0, n/2)
			wantBlocks(t, s, n, n+20)
			noBadBlocks(t, s)
		})
	}
}

// A store whose process is killed while its disk has no room at all opens again, twice,
// and can be read; Pebble by itself would try to write its files for ever.
func TestOpenOnADiskThatIsFullToTheLastByte(t *testing.T) {
	dir := smallDisk(t, "64m")
	cfg := Config{Dir: filepath.Join(dir, "store"), PackSize: 1 << 20, Reserve: 16 << 20}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, 0, 400)
	dead := filepath.Join(dir, "dead") // what a kill leaves
	if err := errors.Join(os.CopyFS(dead, os.DirFS(cfg.Dir)), s.Close(), os.RemoveAll(cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	filler(t, filepath.Join(dir, "filler"), 0)
	cfg.Dir = dead
	for range 2 {
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		wantBlocks(t, s, 0, 400)
		if id, b := block(401); !errors.Is(s.Put(t.Context(), id, b), flox.ErrFull) {
			t.Error("a block was taken in")
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
	s = open(t, cfg)
	put(t, s, 400, 500)
	wantBlocks(t, s, 0, 500)
	noBadBlocks(t, s)
}

// smallDisk mounts a file system of its own.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("needs root: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// filler leaves only so many bytes free.
func filler(t *testing.T, path string, leave int64) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(path), &st); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, make([]byte, int64(st.Bavail)*st.Bsize-leave), 0o644); err != nil {
		t.Fatal(err)
	}
}

// A pack that is gone or shorter at Open loses its blocks and no others; they are
// named, and can be put again.
func TestLostPack(t *testing.T) {
	t.Parallel()
	for _, gone := range []bool{true, false} {
		cfg := Config{Dir: t.TempDir(), PackSize: 256 << 10, Reserve: 1}
		s := open(t, cfg)
		put(t, s, 0, 100)
		inPack := make(map[flox.CID]bool)
		for i := range 100 {
			id, _ := block(i)
			if l, err := s.lookup(id); err != nil {
				t.Fatal(err)
			} else if l.pack == 2 && (gone || int64(l.off)+l.frameSize() > 100<<10) {
				inPack[id] = true
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		err := os.Truncate(s.packPath(2), 100<<10)
		if gone {
			err = os.Remove(s.packPath(2))
		}
		if err != nil || len(inPack) == 0 {
			t.Fatal(err)
		}
		lost := make(map[flox.CID]bool)
		cfg.Lost = func(id flox.CID) { lost[id] = true }
		s = open(t, cfg)
		for i := range 100 {
			id, b := block(i)
			got, err := s.Get(context.Background(), id)
			if inPack[id] != lost[id] || lost[id] != errors.Is(err, flox.ErrNotFound) || !lost[id] && !bytes.Equal(got, b) {
				t.Fatalf("gone %v: block %d: was there %v, lost %v: %v", gone, i, inPack[id], lost[id], err)
			}
		}
		put(t, s, 0, 100)
		wantBlocks(t, s, 0, 100)
		noBadBlocks(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Scanning what is no pack, or a damaged one, finds only frames that are whole,
// and ends.
func FuzzScan(f *testing.F) {
	var b []byte
	s := &Store{}
	for i := range 3 {
		var frame []byte
		id, data := block(i)
		s.encode(&frame, id, data[:min(len(data), 100)])
		b = append(b, frame...)
	}
	f.Add(b)
	f.Add(b[30:])
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		last := int64(0)
		end, skipped, err := scan(r, 0, int64(len(b)), func(off int64, h header) error {
			if off < last {
				t.Fatalf("frame at %d behind %d", off, last)
			}
			last = off + headerSize + int64(h.stored)
			if err := h.check(b[off+headerSize : last]); err != nil {
				t.Fatal(err)
			}
			return nil
		}, func(off int64, h header) {
			if other, err := parseHeader(b[off:]); err != nil || other != h {
				t.Fatalf("hurt frame at %d: %v", off, err)
			}
		})
		if err != nil || end != last || skipped < 0 || end > int64(len(b)) {
			t.Fatalf("end %d, last frame's %d, skipped %d: %v", end, last, skipped, err)
		}
	})
}

// checkIngested reads the paths a crashing child acknowledged.
func checkIngested(t *testing.T, s *Store, manifests []flox.CID) {
	t.Helper()
	ctx := context.Background()
	for i, id := range manifests {
		m, err := content.NewPageCache(0).Open(ctx, id, s)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := m.WriteNar(ctx, &b, s, 0, -1); err != nil {
			t.Fatal(err)
		}
		if want := crashNar(i); !bytes.Equal(b.Bytes(), want) {
			t.Fatalf("path %d: the NAR differs", i)
		}
	}
}
