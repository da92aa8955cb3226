package pack

import (
	"context"
	"encoding/binary"
	"sync/atomic"

	"github.com/floxctl/flox"
)

// Session is a flox.BlockSink whose blocks stay while it is open, also those
// that were there before. Close must be called. It takes 1 MiB, however many
// blocks it counts on: it remembers them in a Bloom filter, and a block wrongly
// taken for one of them just stays until a later sweep.
type Session struct {
	store *Store
	bits  []atomic.Uint64
}

const (
	sessionBits   = 1 << 23
	sessionHashes = 4 // 300,000 blocks: 1 in 5,000 others stays too
)

// Session begins one.
func (s *Store) Session() *Session {
	n := &Session{store: s, bits: make([]atomic.Uint64, sessionBits/64)}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions[n] = struct{}{}
	return n
}

// each calls f with the bits of a block. A CID is a hash: parts of it will do.
func (n *Session) each(id flox.CID, f func(word *atomic.Uint64, bit uint64) bool) bool {
	for i := range sessionHashes {
		at := binary.LittleEndian.Uint32(id[4*i:]) % sessionBits
		if !f(&n.bits[at/64], 1<<(at%64)) {
			return false
		}
	}
	return true
}

func (n *Session) pin(id flox.CID) {
	n.each(id, func(word *atomic.Uint64, bit uint64) bool {
		word.Or(bit)
		return true
	})
}

func (n *Session) pins(id flox.CID) bool {
	return n.each(id, func(word *atomic.Uint64, bit uint64) bool { return word.Load()&bit != 0 })
}

// Put is Store.Put; a Sweep leaves the block alone until Close.
func (n *Session) Put(ctx context.Context, id flox.CID, data []byte) error {
	// First: a sweep looks at the pins under the lock that Put looks under.
	n.pin(id)
	return n.store.Put(ctx, id, data)
}

// Pin keeps blocks that are there already, and says which are.
func (n *Session) Pin(ctx context.Context, ids []flox.CID) ([]bool, error) {
	for _, id := range ids {
		n.pin(id)
	}
	s := n.store
	there := make([]bool, len(ids))
	for i, id := range ids {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		s.mu.RLock()
		var err error
		there[i], err = s.has(id)
		s.mu.RUnlock()
		if err != nil {
			return nil, err
		}
	}
	return there, nil
}

// Sync is Store.Sync.
func (n *Session) Sync(ctx context.Context) error { return n.store.Sync(ctx) }

// Close ends the session: a Sweep that begins later may take its blocks. One that
// is under way may have decided before what is live.
func (n *Session) Close() {
	s := n.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, open := s.sessions[n]; !open {
		return
	}
	delete(s.sessions, n)
	for l := range s.lingering {
		for i := range l.bits {
			l.bits[i].Or(n.bits[i].Load())
		}
	}
}

// linger collects what sessions that are closed from here on count on, until the
// function it returns is called.
func (s *Store) linger() (done func()) {
	l := &Session{bits: make([]atomic.Uint64, sessionBits/64)}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lingering[l] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.lingering, l)
	}
}

// pinned says whether a session counts on a block; mu is held.
func (s *Store) pinned(id flox.CID) bool {
	for n := range s.lingering {
		if n.pins(id) {
			return true
		}
	}
	for n := range s.sessions {
		if n.pins(id) {
			return true
		}
	}
	return false
}
