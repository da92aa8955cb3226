package content

import (
	"slices"

	"github.com/floxctl/flox"
)

// refScanner finds the hash parts of candidate store paths in a stream, as Nix
// finds the references of an output (Nix 2.8 src/libstore/references.cc).
type refScanner struct {
	byHash map[string][]flox.StorePath
	found  map[string]bool
	starts [1 << 16]bool // first two bytes of a candidate
	tail   []byte        // end of what was written before, shorter than a hash part
}

// isBase32 holds the characters of a hash part.
var isBase32 = func() (t [256]bool) {
	for _, c := range []byte("0123456789abcdfghijklmnpqrsvwxyz") {
		t[c] = true
	}
	return t
}()

func newRefScanner(candidates []flox.StorePath) *refScanner {
	s := &refScanner{byHash: make(map[string][]flox.StorePath), found: make(map[string]bool)}
	for _, p := range candidates {
		hash := p.HashPart()
		if hash == "" {
			continue
		}
		s.byHash[hash] = append(s.byHash[hash], p)
		s.starts[uint16(hash[0])<<8|uint16(hash[1])] = true
	}
	return s
}

// Write looks through the next bytes of the stream.
func (s *refScanner) Write(b []byte) {
	const n = flox.HashPartLen
	if len(s.tail) > 0 {
		// A hash part may begin in what came before and end in b.
		joined := append(s.tail, b[:min(len(b), n-1)]...)
		s.scan(joined)
		s.tail = joined
	}
	s.scan(b)
	if len(b) >= n-1 {
		s.tail = append(s.tail[:0], b[len(b)-(n-1):]...)
		return
	}
	if len(s.tail) == 0 {
		s.tail = append(s.tail, b...)
	}
	if len(s.tail) > n-1 {
		s.tail = append(s.tail[:0], s.tail[len(s.tail)-(n-1):]...)
	}
}

func (s *refScanner) scan(b []byte) {
	const n = flox.HashPartLen
	for i := 0; i+n <= len(b); {
		// From the back: a byte no hash part can hold rules out all starts before it.
		j := n - 1
		for j >= 0 && isBase32[b[i+j]] {
			j--
		}
		if j >= 0 {
			i += j + 1
			continue
		}
		if s.starts[uint16(b[i])<<8|uint16(b[i+1])] {
			if _, ok := s.byHash[string(b[i:i+n])]; ok {
				s.found[string(b[i:i+n])] = true
			}
		}
		i++
	}
}

// References are the candidates found, sorted.
func (s *refScanner) References() []flox.StorePath {
	refs := []flox.StorePath{}
	for hash := range s.found {
		refs = append(refs, s.byHash[hash]...)
	}
	slices.Sort(refs)
	return slices.Compact(refs)
}
