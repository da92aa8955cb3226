package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content/cache"
	"github.com/floxctl/flox/p2p"
)

const (
	// fetchLife bounds one attempt to fetch a batch; readers that still wait
	// start another.
	fetchLife = 30 * time.Second
	// maxBatches bounds the fetches under way.
	maxBatches = 256
)

// piece is a block to fetch: a chunk of a file, or a block of a manifest when
// File is zero.
type piece struct {
	file  cache.File
	off   int64 // of the chunk in the file
	chunk flox.Chunk
}

func (p piece) manifest() bool { return p.file.ID.IsZero() }

// swarm is what the fetcher needs of the p2p host.
type swarm interface {
	Fetch(ctx context.Context, wants []p2p.Want, hints p2p.Hints, deliver func(i int, data []byte, from p2p.Source)) error
	Holding(ids ...flox.CID)
}

// fetcher brings blocks from the swarm into the cache. A block is fetched once
// at a time; a fetch belongs to the block, not to the request that started it:
// it goes on while anybody waits for a block of its batch.
type fetcher struct {
	host    swarm
	cache   *cache.Cache
	traffic *traffic
	log     *slog.Logger
	life    context.Context //nolint:containedctx // the agent's Run
	places  chan struct{}

	mu      sync.Mutex
	flights map[flox.CID]*flight
}

// flight is one block under way.
type flight struct {
	piece piece
	batch *batch
	done  chan struct{}
	data  []byte
	from  p2p.Source
	err   error
}

// batch is what one call of p2p.Fetch brings.
type batch struct {
	cancel  context.CancelFunc
	mu      sync.Mutex
	waiters int
}

func (b *batch) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiters--; b.waiters == 0 {
		b.cancel()
	}
}

// join counts a waiter in; false when the batch is being given up.
func (b *batch) join() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiters == 0 {
		return false
	}
	b.waiters++
	return true
}

// fetch gets pieces and calls each with their bytes, in order, as they are there.
// It retries what fails until ctx ends: then the error wraps the last failure.
// A nil watch is allowed.
func (f *fetcher) fetch(ctx context.Context, pieces []piece, hints p2p.Hints, watch *wait, each func(piece, []byte) error) error {
	pause := retryMin
	for len(pieces) > 0 {
		flights, err := f.start(ctx, pieces, hints)
		if err != nil {
			return err
		}
		got, err := f.collect(ctx, flights, watch, each)
		if err == nil {
			return nil
		}
		pieces = pieces[got:]
		if errStop := stop(ctx, err); errStop != nil {
			return errStop
		}
		watch.reason(err)
		select {
		case <-time.After(pause):
			pause = min(2*pause, retryMax)
		case <-ctx.Done():
			return stop(ctx, err)
		}
	}
	return nil
}

// stop says whether trying again is pointless, and then with what error to end.
func stop(ctx context.Context, err error) error {
	var consumer *consumerError
	switch {
	case errors.As(err, &consumer):
		return consumer.err
	case errors.Is(err, flox.ErrClosed):
		return err
	case ctx.Err() != nil:
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("nobody delivered in time: %w", flox.ErrUnreachable)
		}
		return fmt.Errorf("nobody delivered in time: %w", because(err, flox.ErrUnreachable))
	}
	return nil
}

// consumerError marks an error of the caller's own each.
type consumerError struct{ err error }

func (e *consumerError) Error() string { return e.err.Error() }

// collect waits for the flights in order. It returns how many were consumed.
func (f *fetcher) collect(ctx context.Context, flights []*flight, watch *wait, each func(piece, []byte) error) (got int, err error) {
	defer func() {
		for _, fl := range flights {
			fl.batch.leave()
		}
	}()
	for i, fl := range flights {
		select {
		case <-fl.done:
		case <-ctx.Done():
			return i, ctx.Err()
		}
		if fl.err != nil {
			return i, fl.err
		}
		watch.arrived(len(fl.data), fl.from)
		if err := each(fl.piece, fl.data); err != nil {
			return i, &consumerError{err}
		}
	}
	return len(flights), nil
}

// start returns a joined flight for each piece, starting one batch for those
// that are not under way.
func (f *fetcher) start(ctx context.Context, pieces []piece, hints p2p.Hints) ([]*flight, error) {
	select {
	case f.places <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("%d other fetches wait already: %w", maxBatches, flox.ErrUnreachable)
	}
	life, cancel := context.WithTimeout(f.life, fetchLife)
	mine := &batch{cancel: cancel}
	flights := make([]*flight, len(pieces))
	var fresh []*flight
	f.mu.Lock()
	for i, p := range pieces {
		fl, ok := f.flights[p.chunk.ID]
		if !ok || !fl.batch.join() {
			fl = &flight{piece: p, batch: mine, done: make(chan struct{})}
			mine.waiters++
			f.flights[p.chunk.ID] = fl
			fresh = append(fresh, fl)
		}
		flights[i] = fl
	}
	f.mu.Unlock()
	if len(fresh) == 0 {
		cancel()
		<-f.places
		return flights, nil
	}
	go func() { // owned by the agent's Run through f.life, bounded by f.places
		defer func() { cancel(); <-f.places }()
		f.run(life, fresh, hints)
	}()
	return flights, nil
}

// run fetches a batch, stores what arrives and ends every flight.
func (f *fetcher) run(ctx context.Context, flights []*flight, hints p2p.Hints) {
	wants := make([]p2p.Want, len(flights))
	for i, fl := range flights {
		wants[i] = p2p.Want{ID: fl.piece.chunk.ID, Size: fl.piece.chunk.Size}
	}
	var mu sync.Mutex
	ended := make([]bool, len(flights))
	err := f.host.Fetch(ctx, wants, hints, func(i int, data []byte, from p2p.Source) {
		mu.Lock()
		again := ended[i]
		ended[i] = true
		mu.Unlock()
		if again {
			return
		}
		f.traffic.block(len(data), from, flights[i].piece.manifest())
		f.store(ctx, flights[i].piece, data)
		f.end(flights[i], data, from, nil)
	})
	if err == nil {
		err = fmt.Errorf("fetch ended without all blocks: %w", flox.ErrUnreachable)
	}
	mu.Lock()
	defer mu.Unlock()
	for i, fl := range flights {
		if !ended[i] {
			f.end(fl, nil, p2p.Source{}, err)
		}
	}
}

// store puts verified bytes into the cache. A cache that cannot take them costs
// a second fetch later, never the read.
func (f *fetcher) store(ctx context.Context, p piece, data []byte) {
	ctx = context.WithoutCancel(ctx)
	var err error
	if p.manifest() {
		err = f.cache.PutBlock(ctx, p.chunk.ID, data)
	} else {
		err = f.cache.PutChunk(ctx, p.file, p.off, p.chunk, data)
	}
	switch {
	case err == nil:
		f.host.Holding(p.chunk.ID)
	case errors.Is(err, flox.ErrFull):
		f.log.Debug("cache is full, streaming", "error", err)
	default:
		f.log.Warn("cache did not take a block", "block", p.chunk.ID.String(), "error", err)
	}
}

func (f *fetcher) end(fl *flight, data []byte, from p2p.Source, err error) {
	f.mu.Lock()
	if f.flights[fl.piece.chunk.ID] == fl {
		delete(f.flights, fl.piece.chunk.ID)
	}
	f.mu.Unlock()
	fl.data, fl.from, fl.err = data, from, err
	close(fl.done)
}

// blocks serves the blocks of one path's manifest: from the cache, else from
// the swarm.
type blocks struct {
	fetcher  *fetcher
	hints    func() p2p.Hints
	watch    *wait
	patience time.Duration // how long one block may take; 0 = until the caller gives up
}

// Get implements flox.Blocks.
func (b blocks) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	if data, err := b.fetcher.cache.Get(ctx, id); err == nil {
		return data, nil
	}
	if b.patience > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, b.patience)
		defer cancel()
	}
	var out []byte
	err := b.fetcher.fetch(ctx, []piece{{chunk: flox.Chunk{ID: id}}}, b.hints(), b.watch, func(_ piece, data []byte) error {
		out = data
		return nil
	})
	return out, err
}
