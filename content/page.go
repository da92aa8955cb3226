package content

import (
	"bytes"
	"sort"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// maxDepth is how deep below the store path an entry may lie.
const maxDepth = nix.MaxNarDepth - 1

// maxPath is the longest path of an entry.
const maxPath = maxDepth * (nix.MaxNarName + 1)

// page is a checked page: its bytes, and where in them each entry lies. Indices
// are those within the page, since equal pages may begin at different entries.
type page struct {
	raw    []byte
	p      Params
	parent string   // path of the directory that holds the first entry
	root   bool     // the first entry is entry 0
	offs   []uint32 // of each entry, behind its levels up
	dir    []int32  // each entry's directory within the page, or -1
	depth  []uint8
}

// len is the number of entries.
func (g *page) len() int { return len(g.offs) }

// bytes is roughly what the page takes in memory.
func (g *page) bytes() int64 { return int64(cap(g.raw)) + 9*int64(cap(g.offs)) + 256 }

// openDir is a directory that the entry being checked may lie in.
type openDir struct {
	index int32  // within the page, or -1
	end   uint32 // index behind its last entry, if index >= 0
	dirs  uint32 // directories it claims to hold
	seen  uint32 // directories it was seen to hold
}

// pageCheck follows the directories open at an entry; the one at depth i holds
// entries of depth i+1.
type pageCheck struct {
	open  [maxDepth + 2]openDir
	last  [maxDepth + 2][]byte // name of the latest entry at that depth; nil = none yet
	level int                  // depth of the next entry if it goes no level up
}

// decodePage checks a page and finds its entries. It accepts only what the
// encoder can have written. It keeps raw.
func decodePage(raw []byte, p Params) (*page, error) {
	d := &decoder{b: raw}
	d.magic(magicPage)
	g := &page{raw: raw, p: p, parent: string(d.text("a path", maxPath))}
	var c pageCheck
	for i := 0; d.err == nil && (i == 0 || d.rest() > 0); i++ {
		start := d.off
		up := int(d.uvarint("levels up", maxDepth))
		off := d.off
		var r rec
		name := d.readEntry(&r, p, wantCheck)
		if i == 0 {
			c.start(d, g, name)
		}
		if d.err == nil && (i == 0 && up != 0 || i > 0 && up >= c.level) {
			d.fail("%d levels up from level %d", up, c.level)
		}
		if d.err != nil {
			break
		}
		depth := c.level - up
		g.offs = append(g.offs, uint32(off))
		g.depth = append(g.depth, uint8(depth))
		g.dir = append(g.dir, c.place(d, &r, name, depth, i))
		if d.rest() > 0 && cutsPage(d.off, raw[start:d.off]) {
			d.fail("the page goes on behind its end")
		}
	}
	c.finish(d, uint32(len(g.offs)))
	if d.err != nil {
		return nil, d.err
	}
	return g, nil
}

// start finds the depth of the page's first entry.
func (c *pageCheck) start(d *decoder, g *page, name []byte) {
	for i := range c.open {
		c.open[i].index = -1
	}
	// Only entry 0 has no name.
	if g.root = len(name) == 0; g.root || g.parent == "" {
		if g.root && g.parent != "" {
			d.fail("an entry without a name below %q", g.parent)
		}
		if !g.root {
			c.level = 1
		}
		return
	}
	for comp := range strings.SplitSeq(g.parent, "/") {
		if c.level++; c.level >= maxDepth || !validName([]byte(comp)) {
			d.fail("path %q", g.parent)
			return
		}
		c.last[c.level] = []byte(comp)
	}
	c.level++
}

// place checks an entry against those before it and gives its directory within
// the page, or -1.
func (c *pageCheck) place(d *decoder, r *rec, name []byte, depth, index int) int32 {
	c.close(d, depth, uint32(index), true)
	dir := int32(-1)
	if depth > 0 {
		switch last := c.last[depth]; {
		case !validName(name):
			d.fail("name %q", name)
		case last != nil && bytes.Compare(last, name) >= 0:
			d.fail("name %q behind %q", name, last)
		}
		c.last[depth] = name
		parent := &c.open[depth-1]
		if dir = parent.index; dir >= 0 && uint32(index) >= parent.end {
			d.fail("entry %d behind the end of its directory", index)
		}
		if r.kind == flox.Directory {
			parent.seen++
		}
	}
	c.level = depth
	if r.kind != flox.Directory {
		return dir
	}
	if depth >= maxDepth && r.span > 0 {
		d.fail("a directory deeper than %d levels", maxDepth)
		return dir
	}
	self := openDir{index: int32(index), end: uint32(index) + 1 + r.span, dirs: r.dirs}
	if dir >= 0 && self.end > c.open[depth-1].end || self.end <= uint32(index) {
		d.fail("a directory of %d entries goes beyond its own", r.span)
	}
	c.open[depth], c.last[depth+1] = self, nil
	c.level = depth + 1
	return dir
}

// close checks the directories of depth and deeper, which end before entry index.
func (c *pageCheck) close(d *decoder, depth int, index uint32, whole bool) {
	for i := depth; i < c.level; i++ {
		dir := &c.open[i]
		if dir.index < 0 {
			continue
		}
		ends := dir.end == index
		if whole && !ends || dir.end < index || dir.seen > dir.dirs || ends && dir.seen != dir.dirs {
			d.fail("directory %d: claims %d directories and its end at %d, found %d and %d", dir.index, dir.dirs, dir.end, dir.seen, index)
			return
		}
		if whole {
			dir.index = -1
		}
	}
}

// finish checks the directories still open at the end of the page.
func (c *pageCheck) finish(d *decoder, n uint32) {
	if d.err == nil {
		c.close(d, 0, n, false)
	}
}

// rec decodes entry k.
func (g *page) rec(k int) *rec {
	r := &rec{depth: g.depth[k]}
	(&decoder{b: g.raw, off: int(g.offs[k])}).readEntry(r, g.p, wantAll)
	return r
}

// entry gives entry k as the root package knows it.
func (g *page) entry(k int) flox.Entry {
	var r rec
	(&decoder{b: g.raw, off: int(g.offs[k])}).readEntry(&r, g.p, wantEntry)
	return r.entry()
}

// name gives entry k's name within the page's bytes.
func (g *page) name(k int) []byte {
	d := decoder{b: g.raw, off: int(g.offs[k]) + 1}
	return d.text("a name", nix.MaxNarName)
}

// path gives entry k's path below the store path.
func (g *page) path(k int) string {
	if g.root && k == 0 {
		return ""
	}
	// Collect the names upwards, then write them downwards.
	var names [maxDepth + 1][]byte
	n, size := 0, 0
	for i := int32(k); i >= 0 && !(g.root && i == 0); i = g.dir[i] {
		names[n] = g.name(int(i))
		size += len(names[n]) + 1
		n++
	}
	above := g.above(int(g.depth[k]) - n)
	b := make([]byte, 0, len(above)+size)
	b = append(b, above...)
	for n--; n >= 0; n-- {
		if len(b) > 0 {
			b = append(b, '/')
		}
		b = append(b, names[n]...)
	}
	return string(b)
}

// above gives the first depth components of the path the page begins with: the
// directory of an entry whose own directory lies in an earlier page.
func (g *page) above(depth int) string {
	rest := g.parent
	for i := 0; i < len(rest); i++ {
		if rest[i] == '/' {
			if depth--; depth == 0 {
				return rest[:i]
			}
		}
	}
	if depth <= 0 {
		return ""
	}
	return rest
}

// find gives the entry with the given path.
func (g *page) find(path string) (int, bool) {
	return sort.Find(g.len(), func(k int) int { return comparePaths(path, g.path(k)) })
}

// cut reports whether the page ends where one must end.
func (g *page) cut() bool {
	k := g.len() - 1
	// The last entry's levels up stand in the one byte before it.
	return cutsPage(len(g.raw), g.raw[g.offs[k]-1:])
}
