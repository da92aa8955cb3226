package content

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/floxctl/flox"
)

// MaxRootSet is how many paths a machine may hold on to.
const MaxRootSet = 100_000

// rootSize is the size of a path in a set: its hash part, five bits a character.
const rootSize = flox.HashPartLen * 5 / 8

// RootSet is the set of store paths that a machine holds on to, as it is sent and
// kept: their hash parts at five bits a character, most significant first, 20
// bytes a path, sorted as the names are. Equal sets have equal bytes, so the hash
// of the bytes names the set.
type RootSet []byte

// MakeRootSet makes the set of some paths, which may repeat. ErrBadInput when
// there are more than MaxRootSet, or one is no store path.
func MakeRootSet(paths []flox.StorePath) (RootSet, error) {
	hashes := make([][rootSize]byte, 0, len(paths))
	for _, p := range paths {
		if _, err := flox.ParseStorePath(string(p)); err != nil {
			return nil, err
		}
		hashes = append(hashes, packHash(p.HashPart()))
	}
	slices.SortFunc(hashes, func(a, b [rootSize]byte) int { return bytes.Compare(a[:], b[:]) })
	hashes = slices.Compact(hashes)
	if len(hashes) > MaxRootSet {
		return nil, fmt.Errorf("root set of %d paths, want at most %d: %w", len(hashes), MaxRootSet, flox.ErrBadInput)
	}
	set := make(RootSet, 0, len(hashes)*rootSize)
	for _, h := range hashes {
		set = append(set, h[:]...)
	}
	return set, nil
}

// ParseRootSet checks the bytes of a set. ErrBadInput.
func ParseRootSet(b []byte) (RootSet, error) {
	s := RootSet(b)
	if len(b)%rootSize != 0 || s.Len() > MaxRootSet {
		return nil, fmt.Errorf("root set of %d bytes, want %d a path and at most %d paths: %w", len(b), rootSize, MaxRootSet, flox.ErrBadInput)
	}
	for i := 1; i < s.Len(); i++ {
		if bytes.Compare(s.at(i-1), s.at(i)) >= 0 {
			return nil, fmt.Errorf("root set: path %d is out of order or stands twice: %w", i, flox.ErrBadInput)
		}
	}
	return s, nil
}

// ID names the set.
func (s RootSet) ID() flox.CID { return Hash(s) }

// Len is how many paths are in it.
func (s RootSet) Len() int { return len(s) / rootSize }

func (s RootSet) at(i int) []byte { return s[i*rootSize : (i+1)*rootSize] }

// Has says whether the path with a hash part is in it.
func (s RootSet) Has(hashPart string) bool {
	want := packHash(hashPart)
	low, high := 0, s.Len()
	for low < high {
		mid := int(uint(low+high) >> 1)
		switch bytes.Compare(s.at(mid), want[:]) {
		case 0:
			return true
		case -1:
			low = mid + 1
		default:
			high = mid
		}
	}
	return false
}

// Each calls yield with the hash part of every path, sorted, until it returns false.
func (s RootSet) Each(yield func(hashPart string) bool) {
	for i := range s.Len() {
		if !yield(unpackHash(s.at(i))) {
			return
		}
	}
}

// base32 is the alphabet of Nix, in ASCII order: what sorts as text sorts as numbers.
const base32 = "0123456789abcdfghijklmnpqrsvwxyz"

var base32Value = func() (v [256]byte) {
	for i := range len(base32) {
		v[base32[i]] = byte(i)
	}
	return v
}()

// packHash packs a valid hash part.
func packHash(hashPart string) (h [rootSize]byte) {
	for i := range len(hashPart) {
		v, bit := uint16(base32Value[hashPart[i]]), i*5
		v <<= 11 - bit%8
		h[bit/8] |= byte(v >> 8)
		if bit%8 > 3 {
			h[bit/8+1] |= byte(v)
		}
	}
	return h
}

func unpackHash(h []byte) string {
	var text [flox.HashPartLen]byte
	for i := range text {
		bit := i * 5
		v := uint16(h[bit/8]) << 8
		if bit%8 > 3 {
			v |= uint16(h[bit/8+1])
		}
		text[i] = base32[v>>(11-bit%8)&31]
	}
	return string(text[:])
}
