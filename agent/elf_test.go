package agent

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
)

// Where madeELF puts things, in the file. Between them lie random bytes, so that
// each is in chunks of its own.
const (
	madeTables  = 0x40000
	madeText    = 0xc0000
	madeData    = 0x140000
	madeSize    = 0x200000
	madeShift   = 0x1000   // addresses of the data behind its places in the file
	madeChanged = 0x30000  // behind madeData: changed by a relocation
	madeRelr    = 0x50000  // the same, by a relative one
	madeInit    = 0x20000  // behind madeText: a constructor
	madeFini    = 0x68000  // the same: called at the end
	madeEntry   = 0x10000  // the same: the first instruction
	madeCold    = 0x1e0000 // in the file: touched by nobody
)

// madeELF is a library or, with an interpreter, a program.
func madeELF(seed byte, interp string, needed []string, runpath string) []byte {
	b := randomBytes(seed, madeSize)
	le := binary.LittleEndian
	clear(b[:0x1000])
	copy(b, elf.ELFMAG)
	b[4], b[5], b[6] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	le.PutUint64(b[24:], madeText+madeEntry)
	le.PutUint64(b[32:], 64)
	le.PutUint16(b[54:], 56)
	headers := 0
	header := func(kind elf.ProgType, off, addr, size uint64) {
		p := b[64+56*headers:]
		le.PutUint32(p, uint32(kind))
		le.PutUint64(p[8:], off)
		le.PutUint64(p[16:], addr)
		le.PutUint64(p[32:], size)
		le.PutUint64(p[40:], size)
		headers++
		le.PutUint16(b[56:], uint16(headers))
	}
	if interp != "" {
		copy(b[0x800:], interp+"\x00")
		header(elf.PT_INTERP, 0x800, 0x800, uint64(len(interp)+1))
	}
	header(elf.PT_LOAD, 0, 0, madeData)
	header(elf.PT_LOAD, madeData, madeData+madeShift, madeSize-madeData)
	table := b[madeTables:]
	strings := []byte{0}
	dynamic := b[madeData:]
	tag := func(t elf.DynTag, v uint64) {
		le.PutUint64(dynamic, uint64(t))
		le.PutUint64(dynamic[8:], v)
		dynamic = dynamic[16:]
	}
	str := func(s string) uint64 {
		at := len(strings)
		strings = append(append(strings, s...), 0)
		return uint64(at)
	}
	for _, name := range needed {
		tag(elf.DT_NEEDED, str(name))
	}
	if runpath != "" {
		tag(elf.DT_RUNPATH, str(runpath))
	}
	tag(elf.DT_SYMTAB, madeTables)
	tag(elf.DT_STRTAB, madeTables+0x1000)
	tag(elf.DT_STRSZ, uint64(len(strings)))
	copy(table[0x1000:], strings)
	const initArray = madeData + madeShift + 0x800
	tag(elf.DT_INIT_ARRAY, initArray)
	tag(elf.DT_INIT_ARRAYSZ, 8)
	tag(elf.DT_FINI, madeText+madeFini)
	tag(elf.DT_RELA, madeTables+0x2000)
	tag(elf.DT_RELASZ, 2*24)
	for i, r := range [][2]uint64{{madeData + madeShift + madeChanged, 7}, {initArray, madeText + madeInit}} {
		le.PutUint64(table[0x2000+24*i:], r[0])
		le.PutUint64(table[0x2000+24*i+16:], r[1])
	}
	tag(elfRelr, madeTables+0x3000)
	tag(elfRelrSize, 16)
	le.PutUint64(table[0x3000:], madeData+madeShift+madeRelr-0x1000)
	le.PutUint64(table[0x3008:], 1|1<<1|1<<63) // the next word, and the 63rd
	tag(elf.DT_NULL, 0)
	header(elf.PT_DYNAMIC, madeData, madeData+madeShift, uint64(len(b)-madeData-len(dynamic)))
	return b
}

func TestWhatALoaderReads(t *testing.T) {
	t.Parallel()
	b := madeELF(1, "/nix/store/x/ld.so", []string{"liba.so", "libb.so"}, "/nix/store/x/lib:$ORIGIN/../lib")
	h, err := parseELF(b[:elfHeadBytes], int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if got := string(b[h.interp.off:h.interp.end]); got != "/nix/store/x/ld.so\x00" {
		t.Errorf("interpreter %q", got)
	}
	d := h.parseDynamic(b[h.dynamic.off:h.dynamic.end])
	needed, dirs := d.names(b[d.strings.off:d.strings.end])
	if !slices.Equal(needed, []string{"liba.so", "libb.so"}) || !slices.Equal(dirs, []string{"/nix/store/x/lib", "$ORIGIN/../lib"}) {
		t.Errorf("needs %q of %q", needed, dirs)
	}
	tables := []part{ // symbols up to the strings; strings; relocations of both kinds; the constructors
		{madeTables, madeTables + 0x1000 + d.strings.end - d.strings.off},
		{madeTables + 0x2000, madeTables + 0x2030},
		{madeTables + 0x3000, madeTables + 0x3010},
		{madeData + 0x800, madeData + 0x808},
	}
	if diff := cmp.Diff(tables, d.tables(), cmp.AllowUnexported(part{})); diff != "" {
		t.Errorf("tables (-want +got):\n%s", diff)
	}
	touched := d.touched(true)
	for _, p := range d.relocations {
		touched.relocations(b[p.off:p.end])
	}
	touched.relative(b[d.relative.off:d.relative.end])
	page := func(off int64) part { return part{off, off + elfPage} }
	pages := []part{
		page(madeText + madeEntry), page(madeText + madeInit), page(madeText + madeFini), page(madeData), page(madeData + madeChanged), page(madeData + madeRelr - 0x1000),
	}
	if diff := cmp.Diff(pages, touched.parts(), cmp.AllowUnexported(part{})); diff != "" {
		t.Errorf("pages (-want +got):\n%s", diff)
	}
}

func TestForeignFilesAreRefused(t *testing.T) {
	t.Parallel()
	good := madeELF(1, "", nil, "")
	for name, change := range map[string]func([]byte) []byte{
		"a script":                func([]byte) []byte { return []byte("#!/bin/sh\n" + string(make([]byte, 100))) },
		"short":                   func(b []byte) []byte { return b[:63] },
		"32 bits":                 func(b []byte) []byte { b[4] = 1; return b },
		"big-endian":              func(b []byte) []byte { b[5] = 2; return b },
		"headers outside":         func(b []byte) []byte { binary.LittleEndian.PutUint64(b[32:], 1<<63); return b },
		"too many headers":        func(b []byte) []byte { binary.LittleEndian.PutUint16(b[56:], 65535); return b },
		"odd headers":             func(b []byte) []byte { binary.LittleEndian.PutUint16(b[54:], 0); return b },
		"a segment too large":     func(b []byte) []byte { binary.LittleEndian.PutUint64(b[64+32:], 1<<62); return b },
		"a segment outside":       func(b []byte) []byte { binary.LittleEndian.PutUint64(b[64+8:], 1<<62); return b },
		"a segment over the end":  func(b []byte) []byte { binary.LittleEndian.PutUint64(b[64+16:], ^uint64(0)-1); return b },
		"program headers cut off": func(b []byte) []byte { return b[:64+56] },
	} {
		b := change(slices.Clone(good[:elfHeadBytes]))
		if _, err := parseELF(b, int64(len(good))); !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzELF: whatever a file says, nothing reaches out of it or grows beyond the bounds.
func FuzzELF(f *testing.F) {
	b := madeELF(1, "/nix/store/x/ld.so", []string{"liba.so"}, "/nix/store/x/lib")
	f.Add(b[:elfHeadBytes], b[madeData:madeData+0x1000], b[madeTables:madeTables+0x4000], uint32(len(b)))
	f.Fuzz(func(t *testing.T, head, dynamic, table []byte, size uint32) {
		head, dynamic, table = head[:min(len(head), elfHeadBytes)], dynamic[:min(len(dynamic), maxElfDynamic)], table[:min(len(table), maxElfTable)]
		if int64(size) < int64(len(head)) {
			return
		}
		h, err := parseELF(head, int64(size))
		if err != nil {
			return
		}
		inside := func(p part) {
			if p.off < 0 || p.end < p.off || p.end > int64(size) {
				t.Fatalf("%v of a file of %d bytes", p, size)
			}
		}
		inside(h.interp)
		inside(h.dynamic)
		d := h.parseDynamic(dynamic)
		for _, p := range append(d.tables(), d.strings, d.relative) {
			inside(p)
		}
		pages := d.touched(true)
		for _, p := range d.relocations {
			inside(p)
			pages.relocations(table)
		}
		pages.relative(table)
		for _, p := range pages.parts() {
			if p.off < 0 || p.off >= int64(size) {
				t.Fatalf("a page at %d of a file of %d bytes", p.off, size)
			}
		}
		if needed, dirs := d.names(table); len(needed) > maxElfNames || len(dirs) > maxElfNames {
			t.Fatalf("%d libraries, %d directories", len(needed), len(dirs))
		}
	})
}
