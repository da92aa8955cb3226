package agent

import (
	"cmp"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	flox "github.com/floxctl/flox"
)

// What the dynamic loader reads of a program or library, whatever the program
// does: its headers, its dynamic section, the tables of symbols, versions and
// relocations, and the pages that relocations change (System V ABI, chapter 5;
// glibc elf/dl-reloc.c). The files are foreign, so nothing here believes a number
// before it was compared with a bound. Little-endian files of 64 bits only: what
// else there is starts without this.
const (
	// elfHeadBytes is how much is read at first. Program headers beyond it are not
	// looked at; linkers put them right behind the file's header.
	elfHeadBytes = 4096
	// maxElfHeaders bounds the program headers, maxElfDynamic the bytes of a
	// dynamic section, maxElfTable those of one table.
	maxElfHeaders = 64
	maxElfDynamic = 64 << 10
	maxElfTable   = 512 << 10
	// maxElfNames bounds the libraries a file names, and the directories where they
	// are looked for; maxElfName the bytes of one name.
	maxElfNames = 256
	maxElfName  = 4096
	// elfPage is in what relocations and code are counted: the loader maps pages.
	elfPage = 4096
)

// part is a run of bytes of a file.
type part struct{ off, end int64 }

// elfHead is what the headers say.
type elfHead struct {
	loads   []elfLoad
	dynamic part
	interp  part
	entry   uint64 // an address
}

// elfLoad is a segment that is mapped.
type elfLoad struct {
	addr, size uint64 // bytes of the file only
	off        int64
}

func badELF(what string) error { return fmt.Errorf("ELF file: %s: %w", what, flox.ErrCorrupt) }

// parseELF reads the headers of a program or library of size bytes, of which b is
// the beginning.
func parseELF(b []byte, size int64) (*elfHead, error) {
	const header, entry = 64, 56
	if len(b) < header || string(b[:4]) != elf.ELFMAG || b[4] != byte(elf.ELFCLASS64) || b[5] != byte(elf.ELFDATA2LSB) {
		return nil, badELF("not one of 64 bits, little-endian")
	}
	le := binary.LittleEndian
	h := &elfHead{entry: le.Uint64(b[24:])}
	at, each, n := le.Uint64(b[32:]), le.Uint16(b[54:]), int(le.Uint16(b[56:]))
	if each != entry || n > maxElfHeaders || at > uint64(len(b)) || uint64(n*entry) > uint64(len(b))-at {
		return nil, badELF(fmt.Sprintf("%d program headers of %d bytes at %d, want at most %d in the first %d bytes", n, each, at, maxElfHeaders, len(b)))
	}
	for i := range n {
		p := b[int(at)+i*entry:] //nolint:gosec // within b
		off, addr, bytes := le.Uint64(p[8:]), le.Uint64(p[16:]), le.Uint64(p[32:])
		if off > uint64(size) || bytes > uint64(size)-off || addr+bytes < addr { //nolint:gosec // sizes are not negative
			return nil, badELF(fmt.Sprintf("program header %d reaches out of the file", i))
		}
		r := part{int64(off), int64(off + bytes)} //nolint:gosec // within the file
		switch elf.ProgType(le.Uint32(p)) {
		case elf.PT_LOAD:
			h.loads = append(h.loads, elfLoad{addr, bytes, r.off})
		case elf.PT_DYNAMIC:
			h.dynamic = part{r.off, min(r.end, r.off+maxElfDynamic)}
		case elf.PT_INTERP:
			h.interp = part{r.off, min(r.end, r.off+maxElfName)}
		default:
		}
	}
	return h, nil
}

// at gives where [addr, addr+n) of the memory lies in the file, as far as one
// segment has it.
func (h *elfHead) at(addr, n uint64) (part, bool) {
	for _, l := range h.loads {
		if addr >= l.addr && addr-l.addr < l.size {
			within := addr - l.addr
			return part{l.off + int64(within), l.off + int64(within+min(n, l.size-within))}, true //nolint:gosec // within the file
		}
	}
	return part{}, false
}

// elfDynamic is what the dynamic section says.
type elfDynamic struct {
	head    *elfHead
	tags    map[elf.DynTag]uint64
	needed  []uint64 // offsets in the strings
	strings part
	// relocations are tables of Elf64_Rela; relative of DT_RELR.
	relocations []part
	relative    part
}

// elfTables are those tags whose value is the address of something the loader reads.
var elfTables = []elf.DynTag{
	elf.DT_HASH, elf.DT_GNU_HASH, elf.DT_SYMTAB, elf.DT_STRTAB, elf.DT_VERSYM, elf.DT_VERNEED, elf.DT_VERDEF,
	elf.DT_RELA, elf.DT_JMPREL, elfRelr, elf.DT_INIT_ARRAY, elf.DT_FINI_ARRAY, elf.DT_PREINIT_ARRAY,
}

// Tags of relative relocations (gABI since 2022), which debug/elf does not name.
const elfRelrSize, elfRelr elf.DynTag = 35, 36

// elfSizes are the tags that say how long a table is.
var elfSizes = map[elf.DynTag]elf.DynTag{
	elf.DT_STRTAB: elf.DT_STRSZ, elf.DT_RELA: elf.DT_RELASZ, elf.DT_JMPREL: elf.DT_PLTRELSZ, elfRelr: elfRelrSize,
	elf.DT_INIT_ARRAY: elf.DT_INIT_ARRAYSZ, elf.DT_FINI_ARRAY: elf.DT_FINI_ARRAYSZ, elf.DT_PREINIT_ARRAY: elf.DT_PREINIT_ARRAYSZ,
}

// parseDynamic reads the bytes of h.dynamic.
func (h *elfHead) parseDynamic(b []byte) *elfDynamic {
	d := &elfDynamic{head: h, tags: make(map[elf.DynTag]uint64)}
	for ; len(b) >= 16; b = b[16:] {
		tag, value := elf.DynTag(binary.LittleEndian.Uint64(b)), binary.LittleEndian.Uint64(b[8:]) //nolint:gosec // any number is a tag
		if tag == elf.DT_NULL {
			break
		}
		if tag == elf.DT_NEEDED && len(d.needed) < maxElfNames {
			d.needed = append(d.needed, value)
		}
		d.tags[tag] = value
	}
	table := func(tag elf.DynTag) part {
		if addr, ok := d.tags[tag]; ok {
			p, _ := h.at(addr, min(d.tags[elfSizes[tag]], maxElfTable))
			return p
		}
		return part{}
	}
	d.strings = table(elf.DT_STRTAB)
	d.relative = table(elfRelr)
	d.relocations = []part{table(elf.DT_RELA)}
	if d.tags[elf.DT_PLTREL] == uint64(elf.DT_RELA) {
		d.relocations = append(d.relocations, table(elf.DT_JMPREL))
	}
	return d
}

// tables lists what the loader reads before it knows any symbol. Of tables that
// do not say how long they are, what is up to the next one belongs to them: so
// linkers lay them out.
func (d *elfDynamic) tables() []part {
	var starts []uint64
	for _, tag := range elfTables {
		if addr, ok := d.tags[tag]; ok {
			starts = append(starts, addr)
		}
	}
	slices.Sort(starts)
	var out []part
	for _, tag := range elfTables {
		addr, ok := d.tags[tag]
		if !ok {
			continue
		}
		size, sized := d.tags[elfSizes[tag]]
		if _, known := elfSizes[tag]; !known || !sized {
			size = elfPage
			if next, _ := slices.BinarySearch(starts, addr+1); next < len(starts) {
				size = starts[next] - addr
			}
		}
		if p, ok := d.head.at(addr, min(size, maxElfTable)); ok {
			out = append(out, p)
		}
	}
	return merged(out)
}

// touched gathers the pages of a file that the loader changes or jumps to, by their offset.
type touched struct {
	d     *elfDynamic
	ends  bool // also what is called when the program ends
	pages map[int64]struct{}
}

// touched begins with the first instructions: of the program, and what the loader
// calls in it at the start and, if that is wanted, at the end.
func (d *elfDynamic) touched(ends bool) *touched {
	t := &touched{d, ends, make(map[int64]struct{})}
	addrs := []uint64{d.head.entry, d.tags[elf.DT_INIT]}
	if ends {
		addrs = append(addrs, d.tags[elf.DT_FINI])
	}
	for _, addr := range addrs {
		if addr != 0 {
			t.page(addr)
		}
	}
	return t
}

// page adds the page of an address; what is not in the file is nobody's.
func (t *touched) page(addr uint64) {
	if p, ok := t.d.head.at(addr, 1); ok {
		t.pages[p.off&^(elfPage-1)] = struct{}{}
	}
}

// relocations adds the pages that a table of Elf64_Rela changes, and those of the
// constructors and destructors it makes pointers to.
func (t *touched) relocations(table []byte) {
	for ; len(table) >= 24; table = table[24:] {
		addr, value := binary.LittleEndian.Uint64(table), binary.LittleEndian.Uint64(table[16:])
		t.page(addr)
		for _, tag := range []elf.DynTag{elf.DT_INIT_ARRAY, elf.DT_PREINIT_ARRAY, elf.DT_FINI_ARRAY} {
			if from, ok := t.d.tags[tag]; ok && (t.ends || tag != elf.DT_FINI_ARRAY) && addr >= from && addr-from < t.d.tags[elfSizes[tag]] {
				t.page(value)
			}
		}
	}
}

// relative is relocations for a table of DT_RELR: addresses (even), and bitmaps of
// the 63 words behind (odd).
func (t *touched) relative(table []byte) {
	next := uint64(0)
	for ; len(table) >= 8; table = table[8:] {
		v := binary.LittleEndian.Uint64(table)
		if v&1 == 0 {
			t.page(v)
			next = v + 8
			continue
		}
		for bit := range uint64(63) {
			if v>>(bit+1)&1 != 0 {
				t.page(next + 8*bit)
			}
		}
		next += 8 * 63
	}
}

// parts are the pages, in order.
func (t *touched) parts() []part {
	out := make([]part, 0, len(t.pages))
	for off := range t.pages {
		out = append(out, part{off, off + elfPage})
	}
	return merged(out)
}

// names gives the libraries a file needs and where they are looked for; table is
// the bytes of d.strings.
func (d *elfDynamic) names(table []byte) (needed, dirs []string) {
	text := func(off uint64) string {
		if off >= uint64(len(table)) {
			return ""
		}
		b := table[off:]
		b = b[:min(len(b), maxElfName)]
		if end := slices.Index(b, 0); end >= 0 {
			return string(b[:end])
		}
		return "" // it is cut off
	}
	for _, off := range d.needed {
		if name := text(off); name != "" {
			needed = append(needed, name)
		}
	}
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		if off, ok := d.tags[tag]; ok {
			for dir := range strings.SplitSeq(text(off), ":") {
				if dir != "" && len(dirs) < maxElfNames {
					dirs = append(dirs, dir)
				}
			}
			break // DT_RPATH does not count beside DT_RUNPATH
		}
	}
	return needed, dirs
}

// merged sorts parts and joins those that meet.
func merged(parts []part) []part {
	slices.SortFunc(parts, func(a, b part) int { return cmp.Compare(a.off, b.off) })
	out := parts[:0]
	for _, p := range parts {
		switch n := len(out); {
		case p.end <= p.off:
		case n > 0 && p.off <= out[n-1].end:
			out[n-1].end = max(out[n-1].end, p.end)
		default:
			out = append(out, p)
		}
	}
	return out
}
