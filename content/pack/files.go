package pack

import (
	"os"
	"sync"
)

// maxFiles is how many packs are kept open for reading.
const maxFiles = 256

// files keeps packs open for reading. A file is closed when nobody reads it and
// it had to leave.
type files struct {
	path func(uint32) string

	mu   sync.Mutex
	open map[uint32]*packFile
	tick uint64
}

type packFile struct {
	*os.File
	refs int
	used uint64 // tick of the last use
	gone bool   // no longer in open
}

func newFiles(path func(uint32) string) *files {
	return &files{path: path, open: make(map[uint32]*packFile)}
}

// acquire opens a pack; release must follow.
func (c *files) acquire(id uint32) (*packFile, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.open[id]
	if p == nil {
		f, err := os.Open(c.path(id))
		if err != nil {
			return nil, err
		}
		c.makeRoom()
		p = &packFile{File: f}
		c.open[id] = p
	}
	c.tick++
	p.refs, p.used = p.refs+1, c.tick
	return p, nil
}

// makeRoom lets the file go that was not used for longest.
func (c *files) makeRoom() {
	if len(c.open) < maxFiles {
		return
	}
	var oldest uint32
	var least *packFile
	for id, p := range c.open {
		if least == nil || p.used < least.used {
			oldest, least = id, p
		}
	}
	c.drop(oldest, least)
}

// drop takes a file out; mu is held.
func (c *files) drop(id uint32, p *packFile) {
	delete(c.open, id)
	if p.gone = true; p.refs == 0 {
		p.Close()
	}
}

func (c *files) release(p *packFile) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.refs--; p.gone && p.refs == 0 {
		p.Close()
	}
}

// forget closes a pack that is about to be removed.
func (c *files) forget(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.open[id]; p != nil {
		c.drop(id, p)
	}
}

func (c *files) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, p := range c.open {
		c.drop(id, p)
	}
}
