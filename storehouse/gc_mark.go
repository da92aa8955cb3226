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

// marking finds what the roots reach, in little more than eight bytes of memory a
// valid path. A path is known by the first 64 bits of its hash part; should two
// share them, either keeps both.
type marking struct {
	keys   []uint64 // of all valid paths, in the order of their names
	live   []uint64 // a bit each: reached
	looked []uint64 // a bit each: its references are reached as well
	asOf   uint64   // log index
	count  uint64   // bits in live
	// derivers says that the derivation of what is live is, too.
	derivers bool

	// Of what is live and not looked at, all that stands before at in the order of
	// names is in work, unless overflow.
	work     []string // hash parts
	at       int
	overflow bool
}

// Reading all facts in order is quicker than one path's at a time as soon as it
// finds one in so many of them; maxWork bounds the memory of the other way.
const (
	scanWorth = 16
	maxWork   = 1 << 18
)

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

// find gives the position of a path; false if it was not valid. Hash parts are
// spread evenly, so that the key says about where it is.
func (m *marking) find(hashPart string) (int, bool) {
	if len(hashPart) != flox.HashPartLen || len(m.keys) == 0 {
		return 0, false
	}
	key := markKey(hashPart)
	guess, _ := bits.Mul64(key, uint64(len(m.keys)))
	low, high := int(guess), int(guess) //nolint:gosec // below the length
	for step := 16; low > 0 && m.keys[low] >= key; step *= 2 {
		low = max(low-step, 0)
	}
	for step := 16; high < len(m.keys) && m.keys[high] < key; step *= 2 {
		high = min(high+step, len(m.keys))
	}
	i, ok := slices.BinarySearch(m.keys[low:high], key)
	if i += low; !ok && i < len(m.keys) {
		ok = m.keys[i] == key
	}
	return i, ok
}

func bit(set []uint64, i int) bool { return set[i/64]&(1<<(i%64)) != 0 }

// reach marks a path, if it is valid.
func (m *marking) reach(hashPart string) {
	i, ok := m.find(hashPart)
	if !ok || bit(m.live, i) {
		return
	}
	m.live[i/64] |= 1 << (i % 64)
	m.count++
	if i >= m.at {
		return // it comes
	}
	if m.overflow = m.overflow || len(m.work) == maxWork; !m.overflow {
		m.work = append(m.work, hashPart)
	}
}

// mark finds what is live in the newest state: what sources give and what was
// registered or used after since (Unix milliseconds), with everything they refer to.
// For one machine (nil = the storehouse) its roots count as it gives them.
func (s *Server) mark(ctx context.Context, since int64, machine *MachineCollection, progress func(done, total uint64)) (*marking, error) {
	m := &marking{derivers: machine != nil}
	err := s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		m.asOf = r.Index()
		if err := m.load(ctx, r, since); err != nil {
			return err
		}
		err := s.eachRootOf(ctx, r, machine, func(at root) error {
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
	m.keys = make([]uint64, 0, counts.paths)
	m.live, m.looked = make([]uint64, (counts.paths+63)/64), make([]uint64, (counts.paths+63)/64)
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
		if i := m.first(); (info.GetRegisteredUnix()+1)*1000-1 > since && !bit(m.live, i) {
			m.live[i/64] |= 1 << (i % 64)
			m.count++
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

// follow marks what is reached, until there is nothing left to look at: all facts
// in order as long as that finds much, and what is left one by one.
func (m *marking) follow(ctx context.Context, r *cluster.Reader, progress func(done, total uint64)) error {
	for again := true; again; {
		if err := m.scan(ctx, r, progress); err != nil {
			return err
		}
		var err error
		if again, err = m.chase(ctx, r); err != nil {
			return err
		}
	}
	progress(uint64(len(m.keys)), uint64(len(m.keys)))
	return nil
}

// scan looks at all paths in order. What is reached before the one it is at is left
// as work.
func (m *marking) scan(ctx context.Context, r *cluster.Reader, progress func(done, total uint64)) error {
	m.work, m.overflow, m.at = m.work[:0], false, 0
	info := &floxv1.PathInfo{}
	var failed error
	seen := 0
	err := r.Iterate([]byte{infoKey}, nil, func(key, value []byte) bool {
		if seen%(1<<16) == 0 {
			progress(uint64(seen), uint64(len(m.keys))) //nolint:gosec // not negative
			failed = ctx.Err()
		}
		seen++
		i, ok := m.find(string(key[1:]))
		m.at = i + 1
		if failed == nil && ok && bit(m.live, i) && !bit(m.looked, i) {
			m.looked[i/64] |= 1 << (i % 64)
			failed = m.look(value, info)
		}
		return failed == nil
	})
	m.at = len(m.keys)
	return errors.Join(err, failed)
}

// chase looks at what is left, one by one, and says whether it was better to scan again.
func (m *marking) chase(ctx context.Context, r *cluster.Reader) (scan bool, err error) {
	info := &floxv1.PathInfo{}
	for most := len(m.keys)/scanWorth + 1000; len(m.work) > 0 && !m.overflow; most-- {
		if most == 0 || len(m.work) > most {
			return true, nil
		}
		hashPart := m.work[len(m.work)-1]
		m.work = m.work[:len(m.work)-1]
		i, _ := m.find(hashPart)
		m.looked[i/64] |= 1 << (i % 64)
		value, err := r.Get(hashKey(infoKey, hashPart))
		if err == nil {
			err = m.look(value, info)
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return false, fmt.Errorf("facts of %s: %w", hashPart, err)
		}
	}
	return m.overflow, nil
}

// look reaches the references in the facts of a path.
func (m *marking) look(value []byte, info *floxv1.PathInfo) error {
	if err := proto.Unmarshal(value, info); err != nil {
		return fmt.Errorf("facts: %w: %w", err, flox.ErrCorrupt)
	}
	for _, ref := range info.GetReferences() {
		m.reach(flox.StorePath(ref).HashPart())
	}
	if drv := flox.StorePath(info.GetDeriver()); m.derivers && drv != "" {
		m.reach(drv.HashPart())
	}
	return nil
}

// dead says whether a path was valid and is not reached. Of paths that share a key
// the first one's bit counts.
func (m *marking) dead(hashPart string) bool {
	i, ok := m.find(hashPart)
	return ok && !bit(m.live, i)
}

// deadCount is how many paths are not reached, with those that share a key as one.
func (m *marking) deadCount() uint64 {
	reached := 0
	for _, w := range m.live {
		reached += bits.OnesCount64(w)
	}
	return uint64(len(m.keys) - reached) //nolint:gosec // never negative
}
