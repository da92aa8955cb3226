package cache

import (
	"fmt"
	"testing"
)

// BenchmarkReadAt is a warm read, as a READ of the mount makes it; the bytes
// are in the page cache, so that what is left is our own cost and the copy.
func BenchmarkReadAt(b *testing.B) {
	c, err := Open(Config{Dir: b.TempDir(), Budget: 1 << 30, Reserve: 1})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	for _, bench := range []struct {
		name       string
		size, read int
	}{
		{"packed/4KiB", 8 << 10, 4 << 10},
		{"large/4KiB", 16 << 20, 4 << 10},
		{"large/128KiB", 16 << 20, 128 << 10},
		{"large/1MiB", 16 << 20, 1 << 20},
	} {
		s := newSample(uint64(bench.size), bench.size, 64<<10)
		s.putAll(b, c)
		b.Run(bench.name, func(b *testing.B) {
			p := make([]byte, bench.read)
			b.SetBytes(int64(bench.read))
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				if _, st := c.ReadAt(s.File, p, off, 1); st != Hit {
					b.Fatal(st)
				}
				if off += int64(bench.read); off+int64(bench.read) > s.Size {
					off = 0
				}
			}
		})
	}
}

// BenchmarkCold reads each of many small files once: their records come from the index.
func BenchmarkCold(b *testing.B) {
	c, err := Open(Config{Dir: b.TempDir(), Budget: 1 << 30, Reserve: 1, Memory: 1})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	all := make([]*sample, 5000)
	for i := range all {
		all[i] = newSample(uint64(i), 4096, 64<<10)
		all[i].putAll(b, c)
	}
	p := make([]byte, 4096)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, st := c.ReadAt(all[i%len(all)].File, p, 0, 1); st != Hit {
			b.Fatal(st)
		}
	}
}

func BenchmarkPutChunk(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10} {
		b.Run(fmt.Sprint(size>>10, "KiB"), func(b *testing.B) {
			c, err := Open(Config{Dir: b.TempDir(), Budget: 8 << 30, Reserve: 1})
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			b.SetBytes(int64(size))
			data := newSample(1, size, size)
			for i := 0; b.Loop(); i++ {
				f := data.File
				f.ID[0], f.ID[1], f.ID[2], f.ID[3] = byte(i), byte(i>>8), byte(i>>16), byte(i>>24)
				ch := data.chunks[0]
				ch.ID = f.ID
				if err := c.PutChunk(b.Context(), f, 0, ch, data.data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
