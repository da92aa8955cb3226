package pack

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/singleflight"

	"github.com/floxctl/flox"
)

// segmentSize is what is fetched of a pack at once.
const segmentSize = 1 << 20

// rangeCache keeps what the bucket has on the local disk, up to a number of bytes:
// segments of packs, each a file, and packs written here, whole. What was not used
// for longest goes. Nothing in it is trusted: who reads a frame checks it.
type rangeCache struct {
	dir   string
	max   int64
	fetch func(ctx context.Context, pack string, off, n int64) ([]byte, error)
	// dropPack removes a whole pack.
	dropPack func(uint32)
	flights  singleflight.Group

	mu      sync.Mutex
	entries map[string]*list.Element // of *cacheEntry
	used    *list.List               // the last used first
	bytes   int64
}

type cacheEntry struct {
	key   string // file name
	size  int64
	pack  uint32
	whole bool // a pack, not a segment
}

func openCache(dir string, limit int64, fetch func(context.Context, string, int64, int64) ([]byte, error), dropPack func(uint32)) (*rangeCache, error) {
	c := &rangeCache{dir: dir, max: limit, fetch: fetch, dropPack: dropPack, entries: make(map[string]*list.Element), used: list.New()}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []os.FileInfo
	for _, n := range names {
		info, err := n.Info()
		if err != nil || strings.HasSuffix(n.Name(), newSuffix) {
			if err := os.RemoveAll(filepath.Join(dir, n.Name())); err != nil {
				return nil, err
			}
			continue
		}
		found = append(found, info)
	}
	slices.SortFunc(found, func(a, b os.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for _, info := range found {
		c.add(&cacheEntry{key: info.Name(), size: info.Size()})
	}
	return c, nil
}

const newSuffix = ".new"

func segmentKey(pack string, segment int64) string {
	return strings.ReplaceAll(pack, "/", "~") + "." + strconv.FormatInt(segment, 10)
}

// add counts an entry in and makes room.
func (c *rangeCache) add(e *cacheEntry) {
	c.mu.Lock()
	if old := c.entries[e.key]; old != nil {
		c.bytes -= old.Value.(*cacheEntry).size
		c.used.Remove(old)
	}
	c.entries[e.key] = c.used.PushFront(e)
	c.bytes += e.size
	var gone []*cacheEntry
	for c.bytes > c.max && c.used.Len() > 0 {
		gone = append(gone, c.take(c.used.Back()))
	}
	c.mu.Unlock()
	for _, e := range gone {
		c.remove(e)
	}
}

// take takes an entry out; mu is held.
func (c *rangeCache) take(at *list.Element) *cacheEntry {
	e := c.used.Remove(at).(*cacheEntry)
	delete(c.entries, e.key)
	c.bytes -= e.size
	return e
}

func (c *rangeCache) remove(e *cacheEntry) {
	if e.whole {
		c.dropPack(e.pack)
		return
	}
	_ = os.Remove(filepath.Join(c.dir, e.key)) // a leftover is found at the next start
}

// use says whether an entry is there, and that it is used.
func (c *rangeCache) use(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := c.entries[key]
	if at != nil {
		c.used.MoveToFront(at)
	}
	return at != nil
}

func packCacheKey(id uint32) string { return "pack " + strconv.FormatUint(uint64(id), 10) }

// addPack counts in a pack that is here whole.
func (c *rangeCache) addPack(id uint32, size int64) {
	c.add(&cacheEntry{key: packCacheKey(id), size: size, pack: id, whole: true})
}

// forgetPack counts it out, without removing it.
func (c *rangeCache) forgetPack(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if at := c.entries[packCacheKey(id)]; at != nil {
		c.take(at)
	}
}

// read fills b from off of a pack on.
func (c *rangeCache) read(ctx context.Context, p remotePack, off int64, b []byte) error {
	if off+int64(len(b)) > p.Size {
		return fmt.Errorf("%d bytes at %d of a pack of %d: %w", len(b), off, p.Size, flox.ErrCorrupt)
	}
	for len(b) > 0 {
		segment, at := off/segmentSize, off%segmentSize
		n := min(int64(len(b)), segmentSize-at)
		if err := c.readSegment(ctx, p, segment, at, b[:n]); err != nil {
			return err
		}
		b, off = b[n:], off+n
	}
	return nil
}

func (c *rangeCache) readSegment(ctx context.Context, p remotePack, segment, at int64, b []byte) error {
	key := segmentKey(p.Name, segment)
	if c.use(key) && readAt(filepath.Join(c.dir, key), at, b) == nil {
		return nil
	}
	// A fetch belongs to the segment, not to who asked first.
	fetched := c.flights.DoChan(key, func() (any, error) {
		start := segment * segmentSize
		data, err := c.fetch(context.WithoutCancel(ctx), p.Name, start, min(segmentSize, p.Size-start))
		if err == nil {
			c.keep(key, data)
		}
		return data, err
	})
	select {
	case <-ctx.Done():
		return ctx.Err()
	case got := <-fetched:
		if got.Err != nil {
			return got.Err
		}
		if data := got.Val.([]byte); at+int64(len(b)) <= int64(len(data)) {
			copy(b, data[at:])
			return nil
		}
		return fmt.Errorf("pack %s in the bucket ends early: %w", p.Name, flox.ErrCorrupt)
	}
}

// keep writes a segment. If the disk is full it is just not kept.
func (c *rangeCache) keep(key string, data []byte) {
	path := filepath.Join(c.dir, key)
	err := os.WriteFile(path+newSuffix, data, 0o644)
	if err == nil {
		err = os.Rename(path+newSuffix, path)
	}
	if err != nil {
		_ = os.Remove(path + newSuffix)
		return
	}
	c.add(&cacheEntry{key: key, size: int64(len(data))})
}

func readAt(path string, off int64, b []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.ReadAt(b, off); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return nil
}

// drop removes the segments of a range.
func (c *rangeCache) drop(pack string, off, n int64) {
	for segment := off / segmentSize; segment*segmentSize < off+n; segment++ {
		c.mu.Lock()
		at := c.entries[segmentKey(pack, segment)]
		var e *cacheEntry
		if at != nil {
			e = c.take(at)
		}
		c.mu.Unlock()
		if e != nil {
			c.remove(e)
		}
	}
}
