package nix

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/floxctl/flox"
)

// raw builds a NAR by hand: strings are encoded, byte slices go in as they are.
func raw(parts ...any) []byte {
	out := []byte(narMagic)
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			for _, w := range strings.Fields(p) {
				out = appendNarString(out, strings.ReplaceAll(w, "EMPTY", ""))
			}
		case []byte:
			out = append(out, p...)
		}
	}
	return out
}

func length(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }

func str(s string) []byte { return appendNarString(nil, s) }

func inDir(name string) []byte {
	return raw("( type directory entry ( name", str(name), "node ( type regular contents x ) ) )")
}

func twoInDir(a, b string) []byte {
	const n = "node ( type regular contents x ) )"
	return raw("( type directory entry ( name", str(a), n, "entry ( name", str(b), n, ")")
}

func deepNar(n int) []byte {
	return raw(strings.Repeat("( type directory entry ( name d node ", n-1), "( type directory ) ", strings.Repeat(") ) ", n-1))
}

// badPad sets the byte behind the last at.
func badPad(b []byte, at string) []byte {
	b = slices.Clone(b)
	b[bytes.LastIndex(b, []byte(at))+len(at)] = 1
	return b
}

// malformedNars break one rule each.
var malformedNars = map[string][]byte{
	"other magic":               bytes.Replace(inDir("a"), []byte("nix-archive-1"), []byte("nix-archive-2"), 1),
	"magic padding":             badPad(inDir("a"), "nix-archive-1"),
	"no node":                   raw("type regular contents x )"),
	"no type":                   raw("( regular contents x )"),
	"type twice":                raw("( type type regular contents x )"),
	"unknown type":              raw("( type socket ) ", length(0), length(0), length(0)),
	"type of wrong case":        raw("( type Regular contents x )"),
	"regular without contents":  raw("( type regular )", length(0), length(0)),
	"executable after contents": raw("( type regular contents x executable EMPTY )"),
	"executable twice":          raw("( type regular executable EMPTY executable EMPTY contents x )"),
	"executable with a value":   raw("( type regular executable yes contents x )"),
	"contents twice":            raw("( type regular contents x contents y )"),
	"content padding":           badPad(raw("( type regular contents xyz )"), "xyz"),
	"file not closed":           raw("( type regular contents x entry"),
	"target on a file":          raw("( type regular target x )"),
	"contents on a symlink":     raw("( type symlink contents x )"),
	"symlink without target":    raw("( type symlink )", length(0), length(0), length(0)),
	"empty target":              raw("( type symlink target", length(0), ")", length(0)),
	"target with NUL":           raw("( type symlink target", str("a\x00b"), ")"),
	"target padding":            badPad(raw("( type symlink target xyz )"), "xyz"),
	"target too long":           raw("( type symlink target", str(strings.Repeat("t", MaxNarTarget+1)), ")"),
	"name empty":                inDir(""),
	"name .":                    inDir("."),
	"name ..":                   inDir(".."),
	"name with slash":           inDir("a/b"),
	"name only a slash":         inDir("/"),
	"name with NUL":             inDir("a\x00"),
	"name too long":             inDir(strings.Repeat("n", MaxNarName+1)),
	"name padding":              badPad(inDir("abc"), "abc"),
	"names unsorted":            twoInDir("b", "a"),
	"names equal":               twoInDir("a", "a"),
	"names unsorted by byte":    twoInDir("\xc3\xa4", "z"),
	"names unsorted by prefix":  twoInDir("ab", "a"),
	"name after subdirectory":   raw("( type directory entry ( name b node ( type directory entry ( name zz node ( type directory ) ) ) ) entry ( name a node ( type directory ) ) )"),
	"entry without name":        raw("( type directory entry ( node ( type directory ) ) )"),
	"entry without node":        raw("( type directory entry ( name x ) )", length(0), length(0), length(0), length(0), length(0), length(0)),
	"entry with two nodes":      raw("( type directory entry ( name x node ( type directory ) node ( type directory ) ) )"),
	"entry not closed":          raw("( type directory entry ( name x node ( type directory ) entry"),
	"unknown tag in directory":  raw("( type directory file ( name x node ( type directory ) ) )"),
	"depth 65":                  deepNar(65),
	"depth 100000":              deepNar(100000),
	"file of 2^64-1":            raw("( type regular contents", length(1<<64-1), "x )"),
	"file of 2^64-8":            raw("( type regular contents", length(1<<64-8), "x )"),
	"file of 2^63":              raw("( type regular contents", length(1<<63), "x )"),
	"file of 2^63-200":          raw("( type regular contents", length(1<<63-200), "x )"),
	"name of 2^64-8":            raw("( type directory entry ( name", length(1<<64-8), "node ( type directory ) ) )", make([]byte, 64)),
	"target of 2^64-8":          raw("( type symlink target", length(1<<64-8), "x )", make([]byte, 64)),
	"tag of 2^64-8":             append([]byte(narMagic), length(1<<64-8)...),
}

func TestNarReaderRefuses(t *testing.T) {
	for name, nar := range malformedNars {
		t.Run(name, func(t *testing.T) {
			// Bytes behind a short one must not turn "malformed" into "truncated".
			_, _, err := decode(io.MultiReader(bytes.NewReader(nar), bytes.NewReader(make([]byte, 256))))
			if !errors.Is(err, flox.ErrBadInput) || errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("got %v", err)
			}
		})
	}
	for name, nar := range map[string][]byte{
		"depth 64":           deepNar(64),
		"name of 255":        inDir(strings.Repeat("n", MaxNarName)),
		"target of 4095":     raw("( type symlink target", str(strings.Repeat("t", MaxNarTarget)), ")"),
		"case collision":     twoInDir("A", "a"),
		"name of three dots": inDir("..."),
		"name not UTF-8":     inDir("\xff\xfe"),
	} {
		if _, _, err := decode(bytes.NewReader(nar)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
