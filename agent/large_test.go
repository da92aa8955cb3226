package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// fresh is a sink that puts no block twice: the large file below repeats itself.
type fresh struct{ *house }

// Put implements flox.BlockSink.
func (f fresh) Put(ctx context.Context, id flox.CID, data []byte) error {
	if f.Has([]flox.CID{id})[0] {
		return nil
	}
	return f.house.Put(ctx, id, data)
}

// ingestNAR makes a path from a NAR that write writes.
func (h *house) ingestNAR(t *testing.T, name string, write func(*nix.NarWriter) error) *flox.PathInfo {
	t.Helper()
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		nar := nix.NewNarWriter(w)
		err := write(nar)
		if err == nil {
			err = nar.Close()
		}
		w.CloseWithError(err)
	}()
	got, err := content.Ingest(t.Context(), r, fresh{h}, content.IngestOptions{})
	r.CloseWithError(err) // ends a writer that is not through
	<-written
	if err != nil {
		t.Fatal(err)
	}
	return h.info(t, name, nil, got)
}

// heapNow is the heap in use.
func heapNow() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// manySmall is how many files the large store path has, in directories of manyInDir.
const manySmall, manyInDir = 100_000, 500

func manyFileSize(i int) []byte {
	return fmt.Appendf(nil, "file %d\n%s", i, bytes.Repeat([]byte{byte(i)}, i%400))
}

// A store path of 100,000 files is listed, looked into and read within the
// memory that is set aside for manifests, and what it needs is fetched once.
func TestAStorePathOfVeryManyFiles(t *testing.T) {
	h := newHouse(t)
	info := h.ingestNAR(t, "many", func(w *nix.NarWriter) error {
		err := w.Entry(nix.NarEntry{Kind: flox.Directory})
		for i := 0; i < manySmall && err == nil; i++ {
			dir := fmt.Sprintf("d%04d", i/manyInDir)
			if i%manyInDir == 0 {
				err = w.Entry(nix.NarEntry{Path: dir, Kind: flox.Directory})
			}
			data := manyFileSize(i)
			if err == nil {
				err = w.Entry(nix.NarEntry{Path: fmt.Sprintf("%s/f%03d", dir, i%manyInDir), Kind: flox.Regular, Size: uint64(len(data))})
			}
			if err == nil {
				_, err = w.Write(data)
			}
		}
		return err
	})
	h.publish(info)
	a, _ := runAgent(t, h, nil, nil)
	ctx := within(t, 2*time.Minute)
	before, began := heapNow(), time.Now()
	tr := treeOf(ctx, t, a, info.Path)
	seen := 0
	list := func(dir uint32) (sub []uint32) {
		err := tr.Children(ctx, dir, 0, func(i uint32, e flox.Entry) bool {
			if e.Kind == flox.Directory {
				sub = append(sub, i)
			} else {
				seen++
			}
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
		return sub
	}
	for _, dir := range list(0) {
		list(dir)
	}
	if seen != manySmall {
		t.Errorf("listed %d files, want %d", seen, manySmall)
	}
	listed := time.Since(began)
	began = time.Now()
	for range 3000 {
		i := rand.IntN(manySmall)
		d, _, err := tr.Child(ctx, 0, fmt.Sprintf("d%04d", i/manyInDir))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := tr.Child(ctx, d, fmt.Sprintf("f%03d", i%manyInDir)); err != nil {
			t.Fatal(err)
		}
	}
	looked := time.Since(began)
	for range 100 {
		i := rand.IntN(manySmall)
		d, _, err := tr.Child(ctx, 0, fmt.Sprintf("d%04d", i/manyInDir))
		if err != nil {
			t.Fatal(err)
		}
		f, _, err := tr.Child(ctx, d, fmt.Sprintf("f%03d", i%manyInDir))
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 1000)
		if n, err := tr.ReadAt(ctx, f, p, 0, flox.Reader{}); err != nil || !bytes.Equal(p[:n], manyFileSize(i)) {
			t.Fatalf("file %d: %d bytes, %v", i, n, err)
		}
	}
	grew, manifests := heapNow()-before, a.traffic.message(0).GetManifestBytes()
	t.Logf("%d files: listed in %s, 3000 looked up in %s, heap grew by %d KiB, manifest of %d KiB", manySmall, listed, looked, grew>>10, manifests>>10)
	if grew > pageCacheBytes+16<<20 {
		t.Errorf("the heap grew by %d KiB", grew>>10)
	}
	runtime.KeepAlive(tr)
}

// largeFile is content of any size, without memory: a block again and again,
// which makes the same chunks, and a mark in every GiB that is there only.
type largeFile struct {
	block []byte
	size  int64
}

// ReadAt fills p.
func (l largeFile) ReadAt(p []byte, off int64) {
	for n := 0; n < len(p); {
		n += copy(p[n:], l.block[(off+int64(n))%int64(len(l.block)):])
	}
	for g := off >> 30; g <= (off+int64(len(p)))>>30; g++ {
		var mark [16]byte
		binary.LittleEndian.PutUint64(mark[:], uint64(g)*0x9E3779B97F4A7C15+1)
		overlay(p, off, mark[:], g<<30+1<<20)
	}
}

// largeSize is beyond what 32 bits count; 20 GiB in `make soak`.
func largeSize() int64 {
	if os.Getenv("FLOX_SOAK") != "" {
		return 20<<30 + 12345
	}
	return 4<<30 + 80<<20 + 12345
}

// A file of very many gigabytes is read at every kind of offset, beyond 4 GiB,
// across the borders of its chunk lists and at its end, without its size in memory.
func TestAVeryLargeFile(t *testing.T) {
	if testing.Short() {
		t.Skip("gigabytes are cut and hashed, which takes minutes under the race detector")
	}
	h := newHouse(t)
	want := largeFile{block: randomBytes(77, 1<<20+13), size: largeSize()}
	began := time.Now()
	info := h.ingestNAR(t, "large", func(w *nix.NarWriter) error {
		err := w.Entry(nix.NarEntry{Kind: flox.Regular, Size: uint64(want.size)})
		buf := make([]byte, 1<<20)
		for off := int64(0); off < want.size && err == nil; off += int64(len(buf)) {
			n := min(int64(len(buf)), want.size-off)
			want.ReadAt(buf[:n], off)
			_, err = w.Write(buf[:n])
		}
		return err
	})
	t.Logf("%d MiB ingested in %s: %d blocks", want.size>>20, time.Since(began), len(h.blocks))
	h.publish(info)
	a, _ := runAgent(t, h, nil, nil)
	ctx := within(t, 2*time.Minute)
	before := heapNow()
	tr := treeOf(ctx, t, a, info.Path).(*tree)
	if e, err := tr.Entry(ctx, 0); err != nil || int64(e.Size) != want.size {
		t.Fatalf("%+v %v", e, err)
	}
	offsets := []int64{0, 1, want.size - 1, want.size - 300_000, want.size / 2}
	for g := int64(0); g <= want.size>>30; g++ {
		offsets = append(offsets, g<<30-1, g<<30+1<<20-7, g<<30+1<<20+3)
	}
	borders, chunks := 0, 0
	err := tr.Chunks(ctx, 0, 0, -1, func(off int64, _ flox.Chunk) bool {
		if chunks++; chunks%1024 == 1 && off > 0 {
			borders++
			offsets = append(offsets, off-1, off, off-100_000)
		}
		return true
	})
	if err != nil || borders < 3 {
		t.Fatalf("%d chunks, %d borders of chunk lists, %v", chunks, borders, err)
	}
	for range 100 {
		offsets = append(offsets, rand.Int64N(want.size))
	}
	p, q := make([]byte, 200_000), make([]byte, 200_000)
	for _, off := range offsets {
		if off < 0 || off >= want.size {
			continue
		}
		clear(p)
		n, err := tr.ReadAt(ctx, 0, p, off, flox.Reader{})
		if left := min(int64(len(p)), want.size-off); err != nil || int64(n) != left {
			t.Fatalf("%d bytes at %d, want %d: %v", n, off, left, err)
		}
		want.ReadAt(q[:n], off)
		if !bytes.Equal(p[:n], q[:n]) {
			t.Fatalf("wrong bytes at %d", off)
		}
	}
	grew := heapNow() - before
	t.Logf("%d reads of a file of %d chunks in %d lists; heap grew by %d KiB", len(offsets), chunks, borders+1, grew>>10)
	if grew > pageCacheBytes+32<<20 {
		t.Errorf("the heap grew by %d KiB", grew>>10)
	}
	runtime.KeepAlive(tr)
}
