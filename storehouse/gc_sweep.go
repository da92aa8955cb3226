package storehouse

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

// Size of the filter of live blocks: bits for a block, and at most.
const (
	liveBits    = 16
	liveHashes  = 5 // 1 dead block in 700 stays until a later sweep
	minLiveBits = 1 << 20
	maxLiveBits = 1 << 33
)

// liveBlocks is a Bloom filter: what it does not have is dead for sure.
type liveBlocks struct{ words []uint64 }

func newLiveBlocks(blocks uint64) *liveBlocks {
	bits := uint64(minLiveBits)
	for bits < maxLiveBits && bits < blocks*liveBits {
		bits *= 2
	}
	return &liveBlocks{make([]uint64, bits/64)}
}

// each calls f with the bits of a block until it says false. A CID is a hash: two
// numbers of it make as many as it takes.
func (l *liveBlocks) each(id flox.CID, f func(word *uint64, bit uint64) bool) bool {
	a, b := binary.LittleEndian.Uint64(id[:8]), binary.LittleEndian.Uint64(id[8:16])|1
	for i := range uint64(liveHashes) {
		at := (a + i*b) % (uint64(len(l.words)) * 64)
		if !f(&l.words[at/64], 1<<(at%64)) {
			return false
		}
	}
	return true
}

func (l *liveBlocks) add(id flox.CID) {
	l.each(id, func(word *uint64, bit uint64) bool {
		*word |= bit
		return true
	})
}

func (l *liveBlocks) has(id flox.CID) bool {
	return l.each(id, func(word *uint64, bit uint64) bool { return *word&bit != 0 })
}

// sweep frees the blocks that belong to no valid path, to nothing that waits for
// its path info and to nothing that is being read. A path that becomes valid
// meanwhile is safe by the session that its blocks came in with.
func (s *Server) sweep(ctx context.Context, progress func(done, total uint64)) (freed int64, err error) {
	if err := s.lockSweep(ctx, time.Second); err != nil { // a backup holds it for a moment
		return 0, err
	}
	defer s.sweeping.Unlock()
	if err := s.node.Ready(ctx); err != nil { // else the newest paths are not known
		return 0, err
	}
	swept, err := s.packs.SweepMarked(ctx, func(ctx context.Context) (func(flox.CID) bool, error) {
		live, err := s.liveBlocks(ctx, progress)
		if err != nil {
			return nil, err
		}
		return live.has, nil
	})
	if err != nil {
		return 0, err
	}
	s.cfg.Log.Info("packs are swept", "blocks", swept.Blocks, "bytes", swept.Bytes)
	return swept.Bytes, nil
}

// liveBlocks looks at all manifests. One that cannot be read ends the sweep: what
// it holds is not known.
func (s *Server) liveBlocks(ctx context.Context, progress func(done, total uint64)) (*liveBlocks, error) {
	counts, _, err := s.counts(ctx)
	if err != nil {
		return nil, err
	}
	live := newLiveBlocks(s.packs.Stat().Blocks)
	blocks := &sweepBlocks{s, maxOnTheWay}
	add := func(what string, manifest flox.CID) error {
		m, err := content.OpenManifest(ctx, manifest, blocks)
		if err == nil {
			err = m.Blocks(ctx, func(id flox.CID, _ uint32) bool {
				live.add(id)
				return true
			})
		}
		if err != nil {
			return fmt.Errorf("nothing is freed: the manifest of %s cannot be read: %w", what, err)
		}
		return nil
	}
	// What is being read, or waits for its path info. Should it not be whole, whoever
	// counts on it finds out by itself.
	for _, id := range append(s.reading.list(), s.staging.manifests()...) {
		if err := add(id.String(), id); err != nil {
			s.cfg.Log.Warn("damaged content is not kept", "manifest", id.String(), "error", err)
		}
	}
	done := uint64(0)
	err = s.pages(ctx, infoKey, func(page [][2][]byte) error {
		for _, kv := range page {
			name, manifest, ok := api.PeekPathInfo(kv[1])
			if !ok {
				return fmt.Errorf("facts of %q: %w", kv[0], flox.ErrCorrupt)
			}
			if err := add(name, manifest); err != nil {
				return err
			}
		}
		done += uint64(len(page))
		progress(done, max(done, counts.paths))
		return nil
	})
	if err == nil {
		err = s.addFrozen(ctx, add)
	}
	return live, err
}

// maxOnTheWay is how many blocks of manifests a sweep gets from other servers: of
// paths that became valid just now, and are on their way. A server that lacks more
// sweeps when it has caught up.
const maxOnTheWay = 1000

// sweepBlocks reads manifests for a sweep.
type sweepBlocks struct {
	s    *Server
	left int // of maxOnTheWay
}

// Get is flox.Blocks.
func (b *sweepBlocks) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	data, err := b.s.packs.Get(ctx, id)
	if err == nil || b.left == 0 {
		return data, err
	}
	b.left--
	return b.s.instead(ctx, id, err)
}

// readings are the manifests whose content is being sent.
type readings struct {
	mu    sync.Mutex
	count map[flox.CID]int
}

func (r *readings) add(id flox.CID, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.count[id] += n; r.count[id] == 0 {
		delete(r.count, id)
	}
}

func (r *readings) list() []flox.CID {
	r.mu.Lock()
	defer r.mu.Unlock()
	ids := make([]flox.CID, 0, len(r.count))
	for id := range r.count {
		ids = append(ids, id)
	}
	return ids
}

// Reading keeps the content of a valid path here until done is called, also if the
// path is removed meanwhile. ErrNotFound if it was removed already.
func (s *Server) Reading(ctx context.Context, info *flox.PathInfo) (done func(), err error) {
	s.reading.add(info.Manifest, 1)
	done = sync.OnceFunc(func() { s.reading.add(info.Manifest, -1) })
	// A sweep that did not see this one begins to look after the path is gone from
	// the facts here.
	err = s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		m, err := validAs(r, string(info.Path))
		if err == nil && (m == nil || string(m.GetManifest()) != string(info.Manifest[:])) {
			err = fmt.Errorf("%s was removed: %w", info.Path, flox.ErrNotFound)
		}
		return err
	})
	if err != nil {
		done()
		return nil, err
	}
	return done, nil
}

// Used says that somebody asks for paths in order to use them: if they are
// condemned, that is taken back.
func (s *Server) Used(ctx context.Context, hashParts ...string) error {
	return s.reviveUsed(ctx, hashParts)
}
