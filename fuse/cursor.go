package fuse

import "math"

const (
	// prefixLen is how many characters of the hash part, 5 bits each, an offset holds.
	prefixLen = 11
	// rankBits count names that begin with the same prefixLen characters, which
	// takes somebody who looks for such hashes. Of more than 32 such names, a
	// listing may leave out some.
	rankBits = 5
	maxRank  = 1<<rankBits - 1
)

// base32 is Nix's alphabet, in the order of its bytes.
const base32 = "0123456789abcdfghijklmnpqrsvwxyz"

// rootCursor is a place in the sorted names of the store directory. The offset
// behind a name holds the beginning of its hash part and its rank among names
// with the same beginning: it stays right when other names come and go, in
// another process too, and needs no memory.
type rootCursor struct {
	after  string // names up to here are done with
	prefix uint64 // of the last name
	count  uint64 // how many names with that prefix were passed
	skip   uint64 // how many names with that prefix were listed by earlier requests
}

// newRootCursor continues behind the name that has the offset off.
func newRootCursor(off uint64) rootCursor {
	if off <= firstChild {
		return rootCursor{}
	}
	off -= firstChild + 1
	c := rootCursor{prefix: off >> rankBits, skip: off&maxRank + 1}
	if c.skip > maxRank {
		c.skip = math.MaxUint64
	}
	c.after = prefixString(c.prefix) // sorts before every name that begins with it
	return c
}

// next gives the offset behind name, the one to come, and whether an earlier
// request listed it. It changes nothing: the answer may have no room for name.
func (c *rootCursor) next(name string) (off uint64, listed bool) {
	p, rank := prefixOf(name), uint64(0)
	if p == c.prefix {
		rank = c.count
		listed = rank < c.skip
	}
	return (p<<rankBits | min(rank, maxRank)) + firstChild + 1, listed
}

// pass moves behind name.
func (c *rootCursor) pass(name string) {
	if p := prefixOf(name); p != c.prefix {
		c.prefix, c.count, c.skip = p, 0, 0
	}
	c.count++
	c.after = name
}

// prefixOf reads the first characters of a name as a number that sorts as they do.
func prefixOf(name string) uint64 {
	p := uint64(0)
	for i := range prefixLen {
		p <<= 5
		if i < len(name) {
			p |= digit(name[i])
		}
	}
	return p
}

func prefixString(p uint64) string {
	var b [prefixLen]byte
	for i := prefixLen - 1; i >= 0; i-- {
		b[i] = base32[p&31]
		p >>= 5
	}
	return string(b[:])
}

func digit(c byte) uint64 {
	for i := range len(base32) {
		if base32[i] >= c {
			return uint64(i)
		}
	}
	return uint64(len(base32) - 1)
}
