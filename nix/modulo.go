package nix

import (
	"bytes"
	"fmt"
	"hash"
	"strconv"

	"github.com/floxctl/flox"
)

// maxMentions bounds ModuloHash.found in bytes.
const maxMentions = 16 << 20

// ModuloHash hashes a NAR with every mention of its own path's hash part left
// out, which cannot be known before: zeros stand there, and where they stand
// is hashed behind the rest (Nix 2.8 src/libstore/references.cc
// HashModuloSink). It is an io.Writer.
type ModuloHash struct {
	algo HashAlgo
	hash hash.Hash
	self []byte
	held []byte // the end of what was written, where a mention may have begun
	at   int64  // bytes hashed
	// found is the text hashed behind the rest, at most 20 bytes for each mention.
	found []byte
}

// NewModuloHash hashes with algo, which must be known, what is written by a path
// with the given hash part; "" leaves nothing out.
func NewModuloHash(algo HashAlgo, hashPart string) *ModuloHash {
	return &ModuloHash{algo: algo, hash: algo.New(), self: []byte(hashPart)}
}

// Write is io.Writer. ErrBadInput: there are too many mentions.
func (m *ModuloHash) Write(p []byte) (int, error) {
	if len(m.self) == 0 {
		return m.hash.Write(p)
	}
	m.held = append(m.held, p...)
	for i := 0; ; i += len(m.self) {
		n := bytes.Index(m.held[i:], m.self)
		if n < 0 {
			break
		}
		i += n
		clear(m.held[i : i+len(m.self)])
		m.found = strconv.AppendInt(append(m.found, '|'), m.at+int64(i), 10)
	}
	if len(m.found) > maxMentions {
		return 0, fmt.Errorf("a path mentions itself more often than some %d times: %w", maxMentions/20, flox.ErrBadInput)
	}
	m.flush(len(m.held) - len(m.self) + 1)
	return len(p), nil
}

// flush hashes the first n bytes held.
func (m *ModuloHash) flush(n int) {
	if n <= 0 {
		return
	}
	m.hash.Write(m.held[:n])
	m.at += int64(n)
	m.held = m.held[:copy(m.held, m.held[n:])]
}

// Sum ends the hash.
func (m *ModuloHash) Sum() Hash {
	m.flush(len(m.held))
	m.hash.Write(m.found)
	return Hash{Algo: m.algo, Sum: m.hash.Sum(nil)}
}
