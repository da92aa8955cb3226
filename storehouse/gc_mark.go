package storehouse

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// marking finds what the roots reach, in nine bytes of memory a valid path. A path
// is known by the first 64 bits of its hash part; should two share them, either
// keeps both.
type marking struct {
	keys  []uint64 // of all valid paths, in the order of their names
	live  []uint64 // a bit each
	work  []uint32 // live paths whose references were not looked at
	asOf  uint64   // log index
	count uint64   // bits in live
}

// hashDigits is how nix-base32 writes 0 to 31, in the order of the characters.
const hashDigits = "0123456789abcdfghijklmnpqrsvwxyz"

var hashDigit = func() (v [256]byte) {
	for i := range len(hashDigits) {
		v[hashDigits[i]] = byte(i)
	}
	return v
}()

// Of a hash part's first characters, twelve are whole in a key of five bits each,
// and the thirteenth without its last bit.
const keyChars = 12

// markKey is what marking knows a path by; keys sort as names do.
func markKey[T string | []byte](hashPart T) (key uint64) {
	for i := range keyChars {
		key = key<<5 | uint64(hashDigit[hashPart[i]])
	}
	return key<<4 | uint64(hashDigit[hashPart[keyChars]]>>1)
}

// prefix is what the hash parts of all paths with a key begin with.
func prefix(key uint64) []byte {
	b := []byte{infoKey}
	for i := range keyChars {
		b = append(b, hashDigits[key>>(4+5*(keyChars-1-i))&31])
	}
	return b
}

// find gives the position of a path; false if it was not valid.
func (m *marking) find(hashPart string) (int, bool) {
	if len(hashPart) != flox.HashPartLen {
		return 0, false
	}
	return slices.BinarySearch(m.keys, markKey(hashPart))
}

// isLive says whether the path at a position is reached.
func (m *marking) isLive(i int) bool { return m.live[i/64]&(1<<(i%64)) != 0 }

// reach marks a path, if it is valid.
func (m *marking) reach(hashPart string) {
	if i, ok := m.find(hashPart); ok {
		m.reachAt(i)
	}
}

func (m *marking) reachAt(i int) {
	if !m.isLive(i) {
		m.live[i/64] |= 1 << (i % 64)
		m.work = append(m.work, uint32(i)) //nolint:gosec // checked by load
		m.count++
	}
}

// mark finds what is live in the newest state: what sources give and what was
// registered or used after since (Unix milliseconds), with everything they refer to.
func (s *Server) mark(ctx context.Context, since int64, progress func(done, total uint64)) (*marking, error) {
	m := &marking{}
	err := s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		m.asOf = r.Index()
		if err := m.load(ctx, r, since); err != nil {
			return err
		}
		err := s.eachRoot(ctx, r, func(at root) error {
			m.reach(at.hashPart)
			return nil
		})
		if err != nil {
			return err
		}
		return m.follow(ctx, r, progress)
	})
	if err != nil {
		return nil, fmt.Errorf("mark: %w", err)
	}
	return m, nil
}

// load reads which paths are valid, and marks those registered or used after since.
func (m *marking) load(ctx context.Context, r *cluster.Reader, since int64) error {
	counts, err := readCounts(r)
	if err != nil {
		return err
	}
	if counts.paths > 1<<32-1 {
		return fmt.Errorf("%d valid paths, at most %d can be looked at: %w", counts.paths, uint32(1<<32-1), flox.ErrFull)
	}
	m.keys = make([]uint64, 0, counts.paths)
	m.live = make([]uint64, (counts.paths+63)/64)
	info := &floxv1.PathInfo{}
	var failed error
	err = r.Iterate([]byte{infoKey}, nil, func(key, value []byte) bool {
		if failed = ctx.Err(); failed != nil {
			return false
		}
		if proto.Unmarshal(value, info) != nil || len(key) != 1+flox.HashPartLen || uint64(len(m.keys)) == counts.paths {
			failed = fmt.Errorf("facts of %q, path %d of %d: %w", key[1:], len(m.keys)+1, counts.paths, flox.ErrCorrupt)
			return false
		}
		m.keys = append(m.keys, markKey(key[1:]))
		if (info.GetRegisteredUnix()+1)*1000-1 > since {
			m.reachAt(m.first())
		}
		return true
	})
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	err = r.Iterate([]byte{touchedKey}, nil, func(key, value []byte) bool {
		if len(value) == 8 && int64(binary.BigEndian.Uint64(value)) > since { //nolint:gosec // a time
			m.reach(string(key[1:]))
		}
		return ctx.Err() == nil
	})
	return errors.Join(err, ctx.Err())
}

// first is the first of the positions that share the newest key: find gives that one.
func (m *marking) first() int {
	i := len(m.keys) - 1
	for i > 0 && m.keys[i-1] == m.keys[i] {
		i--
	}
	return i
}

// follow marks what is reached, until there is nothing left to look at.
func (m *marking) follow(ctx context.Context, r *cluster.Reader, progress func(done, total uint64)) error {
	info := &floxv1.PathInfo{}
	for looked := uint64(0); len(m.work) > 0; looked++ {
		if looked%4096 == 0 {
			progress(looked, uint64(len(m.keys)))
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		key := m.keys[m.work[len(m.work)-1]]
		m.work = m.work[:len(m.work)-1]
		var failed error
		err := r.Iterate(prefix(key), nil, func(k, value []byte) bool {
			if markKey(k[1:]) != key {
				return true
			}
			if failed = proto.Unmarshal(value, info); failed != nil {
				failed = fmt.Errorf("facts of %q: %w: %w", k[1:], failed, flox.ErrCorrupt)
				return false
			}
			for _, ref := range info.GetReferences() {
				m.reach(flox.StorePath(ref).HashPart())
			}
			return true
		})
		if err := errors.Join(err, failed); err != nil {
			return err
		}
	}
	progress(uint64(len(m.keys)), uint64(len(m.keys)))
	return nil
}

// dead says whether a path was valid and is not reached. Of paths that share a key
// the first one's bit counts.
func (m *marking) dead(hashPart string) bool {
	i, ok := m.find(hashPart)
	return ok && !m.isLive(i)
}

// deadCount is how many paths are not reached, with those that share a key as one.
func (m *marking) deadCount() uint64 {
	reached := 0
	for _, w := range m.live {
		reached += bits.OnesCount64(w)
	}
	return uint64(len(m.keys) - reached) //nolint:gosec // never negative
}
