package cache

import (
	"errors"
	"hash/maphash"
	"sync"

	"github.com/floxctl/flox"
)

// memory holds the records of warm segments, and what is known not to be here,
// bounded by bytes.
type memory struct {
	index  *index
	shards [32]shard
	limit  int64 // bytes per shard
}

type shard struct {
	mu    sync.RWMutex
	byKey map[key]*record
	bytes int64
}

func newMemory(ix *index, limit int64) *memory {
	m := &memory{index: ix, limit: limit / 32}
	for i := range m.shards {
		m.shards[i].byKey = map[key]*record{}
	}
	return m
}

var seed = maphash.MakeSeed()

// shard spreads by id; ids are digests, but they come from outside.
func (m *memory) shard(k key) *shard {
	return &m.shards[(maphash.Bytes(seed, k.id[:8])+uint64(k.seg))%uint64(len(m.shards))]
}

// peek gives a record that is loaded, or nil. It is not pinned: it may leave the
// memory, then what is noted on it is lost, and its content is the last it had.
func (m *memory) peek(k key) *record {
	s := m.shard(k)
	s.mu.RLock()
	r := s.byKey[k]
	s.mu.RUnlock()
	if r == nil || r.cur.Load() == nil {
		return nil
	}
	return r
}

// acquire gives the one record of k, loaded. It stays the one until release.
func (m *memory) acquire(k key) (*record, error) {
	s := m.shard(k)
	s.mu.Lock()
	r := s.byKey[k]
	if r == nil {
		r = &record{key: k, cost: 256}
		s.byKey[k] = r
		s.bytes += r.cost
	}
	r.pins++
	s.mu.Unlock()
	if r.cur.Load() != nil {
		return r, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cur.Load() == nil {
		if err := m.load(r); err != nil {
			m.release(r)
			return nil, err
		}
	}
	return r, nil
}

func (m *memory) load(r *record) error {
	raw, err := m.index.get(segmentKey(r.key))
	if errors.Is(err, flox.ErrNotFound) {
		r.cur.Store(&content{})
		return nil
	}
	if err != nil {
		return err
	}
	ct, ref, readers, err := decode(raw)
	if err != nil {
		ct = &content{} // it is fetched again and replaces the bad record
	}
	r.ref.Store(ref)
	n := nodes(readers)
	r.nodes.Store(&n)
	r.cur.Store(ct)
	return nil
}

// release ends acquire, and lets records go if there are too many.
func (m *memory) release(r *record) {
	s := m.shard(r.key)
	s.mu.Lock()
	defer s.mu.Unlock()
	r.pins--
	cost := r.memory()
	s.bytes += cost - r.cost
	r.cost = cost
	// A few looks are enough: each release brings one record at most.
	for range 4 {
		if s.bytes <= m.limit || !m.trim(s) {
			return
		}
	}
}

// trim lets one record of s go that was not read lately, s.mu being held. What is
// only noted in memory is written first.
func (m *memory) trim(s *shard) bool {
	for k, r := range s.byKey { // the order of a map is random
		if r.pins > 0 || r.warm.Swap(false) {
			continue
		}
		if r.dirty.Load() {
			if !r.mu.TryLock() {
				continue
			}
			r.pins++
			s.mu.Unlock()
			err := m.save(r)
			r.mu.Unlock()
			s.mu.Lock()
			r.pins--
			if err != nil || r.pins > 0 || r.dirty.Load() {
				return false
			}
		}
		delete(s.byKey, k)
		s.bytes -= r.cost
		return true
	}
	return false
}

// save writes what was noted of reads, r.mu being held.
func (m *memory) save(r *record) error {
	r.dirty.Store(false)
	ct := r.cur.Load()
	if ct == nil || ct.object == 0 {
		return nil
	}
	b := m.index.batch()
	b.set(segmentKey(r.key), encode(ct, r.ref.Load(), r.readers()))
	return b.commit(lazy)
}

// flush writes what was noted of reads since the last flush.
func (m *memory) flush() error {
	for i := range m.shards {
		s := &m.shards[i]
		var list []*record
		s.mu.Lock()
		for _, r := range s.byKey {
			if r.dirty.Load() {
				r.pins++
				list = append(list, r)
			}
		}
		s.mu.Unlock()
		var err error
		for _, r := range list {
			r.mu.Lock()
			err = errors.Join(err, m.save(r))
			r.mu.Unlock()
			m.release(r)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
