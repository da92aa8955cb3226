package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/fetchlog"
	"github.com/floxctl/flox/content/cache"
	"github.com/floxctl/flox/p2p"
)

const (
	// fetchLife bounds one attempt to fetch a batch; readers that still wait
	// start another. It is long enough for the largest chunk over a slow line.
	fetchLife = time.Minute
	// maxBatches bounds the fetches under way: more than the mount has requests,
	// so that its readers never wait for each other.
	maxBatches = 1280
	// maxLeft bounds the fetches that go on although all their readers left.
	maxLeft = 64
	// lastMoment is how long a reader waits for its own end when the agent stops.
	lastMoment = 2 * time.Second
)

// piece is a block to fetch: a chunk of a file, or a block of a manifest when
// File is zero, or something that only hearsay tells of.
type piece struct {
	file  cache.File
	off   int64 // of the chunk in the file
	chunk flox.Chunk
	loose *loose // nil = the signed manifest says so
}

func (p piece) manifest() bool { return p.file.ID.IsZero() && (p.loose == nil || p.loose.manifest) }

// size is how many bytes are expected.
func (p piece) size() uint64 {
	if p.loose != nil {
		return uint64(p.loose.about)
	}
	return uint64(p.chunk.Size)
}

// loose is a block that no manifest here vouches for yet. Nobody is held to the
// size it is said to have, and it goes into the cache only as keep finds right.
type loose struct {
	about    uint32
	manifest bool // is a block of a manifest
	keep     func(ctx context.Context, id flox.CID, data []byte)
}

// swarm is what the fetcher needs of the p2p host.
type swarm interface {
	Fetch(ctx context.Context, wants []p2p.Want, hints p2p.Hints, deliver func(i int, data []byte, from p2p.Source)) error
	Hurry(ids []flox.CID)
	Holding(ids ...flox.CID)
}

// fetcher brings blocks from the swarm into the cache. A block is fetched once
// at a time; a fetch belongs to the block, not to the request that started it:
// it goes on when its readers leave, so that they find the bytes when they come
// back. Only a download's, which may be large, ends with the download.
type fetcher struct {
	host    swarm
	cache   *cache.Cache
	traffic *traffic
	near    func(p piece) ([]byte, error) // from another store of this machine; nil = there is none
	history *fetchlog.Log
	log     *slog.Logger
	life    context.Context //nolint:containedctx // ends with the agent
	places  chan struct{}
	left    chan struct{}
	work    sync.WaitGroup // fetches under way; Run waits for them

	mu      sync.Mutex
	flights map[flox.CID]*flight
}

func newFetcher(life context.Context, host swarm, c *cache.Cache, t *traffic, log *slog.Logger) *fetcher {
	return &fetcher{
		host: host, cache: c, traffic: t, log: log, life: life,
		places: make(chan struct{}, maxBatches), left: make(chan struct{}, maxLeft),
		flights: make(map[flox.CID]*flight),
	}
}

// flight is one block under way.
type flight struct {
	piece piece // of who started it; others may want the same block elsewhere
	batch *batch
	trip  uint64
	done  chan struct{} // its bytes are there: a reader waits for no more
	kept  chan struct{} // and so are they in the cache, if that takes them
	data  []byte
	from  p2p.Source
	local bool // it lay in the cache, as part of another file
	hurry bool // a reader waits for it, whoever asked first; guarded by fetcher.mu
	err   error
}

// batch is what one call of p2p.Fetch brings.
type batch struct {
	cancel context.CancelFunc
	left   chan struct{} // a place in it lets the batch go on without waiters; nil = never
	// background says that it was asked for by nobody who waits; arrived, if set,
	// counts its bytes as they come from elsewhere.
	background bool
	arrived    *atomic.Uint64

	mu      sync.Mutex
	waiters int
	goesOn  bool // has a place in left
	over    bool // given up, or through
}

// leave counts a waiter out. The last one ends the batch, unless it may go on.
func (b *batch) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiters--; b.waiters > 0 || b.over || b.goesOn {
		return
	}
	select {
	case b.left <- struct{}{}:
		b.goesOn = true
	default:
		b.over = true
		b.cancel()
	}
}

// join counts a waiter in; false when the batch is being given up.
func (b *batch) join() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.over {
		return false
	}
	b.waiters++
	return true
}

// end frees what the batch holds when its fetch is through.
func (b *batch) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	b.cancel()
	if b.goesOn {
		<-b.left
	}
}

// fetch gets pieces and calls each with their bytes as they are there, in no
// order to rely on. It retries what fails until ctx ends: then the error wraps
// ErrUnreachable and tells the last failure. A nil watch is allowed.
func (f *fetcher) fetch(ctx context.Context, pieces []piece, hints p2p.Hints, watch *wait, each func(piece, []byte) error) error {
	for pause := retryMin; ; pause = min(2*pause, retryMax) {
		flights, err := f.start(ctx, pieces, hints, nil)
		if err != nil {
			return err
		}
		if pieces, err = f.collect(ctx, pieces, flights, hints.Background, watch, each); err == nil {
			return nil
		}
		var consumer *consumerError
		if errors.As(err, &consumer) {
			return consumer.err
		}
		if f.life.Err() != nil {
			return stopping(ctx)
		}
		watch.reason(err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
				err = nil
			}
			return fmt.Errorf("nobody delivered in time: %w", &unreachable{err})
		}
	}
}

// once is fetch in the background without another try: what nobody gives is left
// out, which an error tells. What comes from elsewhere for it is counted.
func (f *fetcher) once(ctx context.Context, pieces []piece, hints p2p.Hints, arrived *atomic.Uint64) error {
	hints.Background = true
	flights, err := f.start(ctx, pieces, hints, arrived)
	if err != nil {
		return err
	}
	_, err = f.collect(ctx, pieces, flights, true, nil, func(piece, []byte) error { return nil })
	return err
}

// stopping waits for a reader's own end when the agent ends: the mount leaves
// what was not answered to the next agent, an error would be an answer.
func stopping(ctx context.Context) error {
	select {
	case <-ctx.Done():
	case <-time.After(lastMoment):
	}
	return fmt.Errorf("the agent stops: %w", flox.ErrClosed)
}

// consumerError marks an error that no second try would change.
type consumerError struct{ err error }

func (e *consumerError) Error() string { return e.err.Error() }

// collect waits for the flights of pieces: for their bytes, in the background
// until they are kept. It returns the pieces not consumed, and why the first of
// them was not.
func (f *fetcher) collect(ctx context.Context, pieces []piece, flights []*flight, background bool, watch *wait, each func(piece, []byte) error) (left []piece, err error) {
	defer func() {
		for _, fl := range flights {
			fl.batch.leave()
		}
	}()
	for i, fl := range flights {
		there := fl.done
		if background {
			there = fl.kept
		}
		select {
		case <-there:
		case <-ctx.Done():
			if err == nil {
				err = ctx.Err()
			}
			return append(left, pieces[i:]...), err
		}
		if fl.err != nil {
			left = append(left, pieces[i])
			if err == nil {
				err = fl.err
			}
			continue
		}
		watch.arrived(fl)
		if !background && !fl.local {
			f.traffic.trips.waited(fl.trip)
		}
		if err := f.consume(ctx, pieces[i], fl, each); err != nil {
			return nil, &consumerError{err}
		}
	}
	return left, err
}

// consume hands a block to who wants it as piece p. Whoever fetched it may have
// wanted it at another place, or in another file.
func (f *fetcher) consume(ctx context.Context, p piece, fl *flight, each func(piece, []byte) error) error {
	if p.chunk.Size != 0 && int(p.chunk.Size) != len(fl.data) {
		return fmt.Errorf("chunk %s has %d bytes, its manifest says %d: %w", p.chunk.ID, len(fl.data), p.chunk.Size, flox.ErrCorrupt)
	}
	if p != fl.piece {
		f.store(ctx, p, fl.data)
	}
	return each(p, fl.data)
}

// start returns a joined flight for each piece, starting one batch for those
// that are not under way.
func (f *fetcher) start(ctx context.Context, pieces []piece, hints p2p.Hints, arrived *atomic.Uint64) ([]*flight, error) {
	if flights := f.joinAll(pieces); flights != nil {
		f.hurryUp(flights, hints)
		return flights, nil
	}
	select {
	case f.places <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("%d other fetches wait already: %w", maxBatches, flox.ErrUnreachable)
	}
	life, cancel := context.WithTimeout(f.life, fetchLife)
	mine := &batch{cancel: cancel, background: hints.Background, arrived: arrived}
	if !hints.Background {
		mine.left = f.left
	}
	flights := make([]*flight, len(pieces))
	var fresh []*flight
	f.mu.Lock()
	for i, p := range pieces {
		fl, ok := f.flights[p.chunk.ID]
		if !ok || !fl.batch.join() {
			fl = &flight{piece: p, batch: mine, trip: f.traffic.trips.next(), done: make(chan struct{}), kept: make(chan struct{})}
			mine.waiters++
			f.flights[p.chunk.ID] = fl
			fresh = append(fresh, fl)
		}
		flights[i] = fl
	}
	f.mu.Unlock()
	f.hurryUp(flights, hints)
	if len(fresh) == 0 {
		cancel()
		<-f.places
		return flights, nil
	}
	f.work.Go(func() { // bounded by f.places
		defer func() { mine.end(); <-f.places }()
		f.run(life, fresh, hints)
	})
	return flights, nil
}

// hurryUp puts blocks that are fetched for nobody in front, now that a reader
// waits for them.
func (f *fetcher) hurryUp(flights []*flight, hints p2p.Hints) {
	if hints.Background {
		return
	}
	var ids []flox.CID
	f.mu.Lock()
	for _, fl := range flights {
		if fl.batch.background && !fl.hurry {
			fl.hurry = true
			ids = append(ids, fl.piece.chunk.ID)
		}
	}
	f.mu.Unlock()
	if len(ids) > 0 {
		f.host.Hurry(ids)
	}
}

// joinAll joins the flights of pieces if all of them are under way, else none.
func (f *fetcher) joinAll(pieces []piece) []*flight {
	flights := make([]*flight, 0, len(pieces))
	f.mu.Lock()
	for _, p := range pieces {
		fl, ok := f.flights[p.chunk.ID]
		if !ok || !fl.batch.join() {
			break
		}
		flights = append(flights, fl)
	}
	f.mu.Unlock()
	if len(flights) == len(pieces) {
		return flights
	}
	for _, fl := range flights {
		fl.batch.leave()
	}
	return nil
}

// run fetches a batch, stores what arrives and ends every flight.
func (f *fetcher) run(ctx context.Context, flights []*flight, hints p2p.Hints) {
	var p flox.StorePath // "" = of none in particular
	if len(hints.Paths) > 0 {
		p = hints.Paths[0]
	}
	flights = f.fromCache(ctx, p, flights)
	if len(flights) == 0 {
		return
	}
	f.mu.Lock() // who joined since may be in a hurry
	slices.SortStableFunc(flights, func(a, b *flight) int { return btoi(b.hurry) - btoi(a.hurry) })
	f.mu.Unlock()
	wants := make([]p2p.Want, len(flights))
	var bytes, came uint64
	blocks := 0
	for i, fl := range flights {
		bytes += fl.piece.size()
		wants[i] = p2p.Want{ID: fl.piece.chunk.ID, Size: fl.piece.chunk.Size}
		if fl.piece.loose != nil {
			wants[i].About = fl.piece.loose.about
		}
	}
	ended := make([]bool, len(flights))
	over := f.history.Begin(p, len(flights), bytes, hints.Background)
	hints.Steps = f.history.Steps(p)
	err := f.host.Fetch(ctx, wants, hints, func(i int, data []byte, from p2p.Source) {
		if ended[i] {
			return
		}
		ended[i] = true
		fl := flights[i]
		fl.data, fl.from = data, from
		blocks, came = blocks+1, came+uint64(len(data))
		f.traffic.block(len(data), from, fl.piece.manifest())
		if fl.batch.arrived != nil {
			fl.batch.arrived.Add(uint64(len(data)))
		}
		close(fl.done)
		f.store(ctx, fl.piece, data)
		f.end(fl)
	})
	if err == nil && blocks < len(flights) {
		err = fmt.Errorf("fetch ended without all blocks: %w", flox.ErrUnreachable)
	}
	over(blocks, came, err)
	for i, fl := range flights {
		if !ended[i] {
			fl.err = err
			close(fl.done)
			f.end(fl)
		}
	}
}

// fromCache ends the flights of chunks that are here as part of another file, or in
// another store, or came since they were missed, and returns the others.
func (f *fetcher) fromCache(ctx context.Context, of flox.StorePath, flights []*flight) []*flight {
	rest := make([]*flight, 0, len(flights))
	for _, fl := range flights {
		p := fl.piece
		data, err := []byte(nil), error(flox.ErrNotFound)
		if !p.manifest() { // those are looked for before they are fetched
			data, err = f.cache.Get(ctx, p.chunk.ID)
		}
		if err != nil && f.near != nil {
			data, err = f.near(p)
		}
		if err != nil {
			rest = append(rest, fl)
			continue
		}
		fl.data, fl.local = data, true
		f.history.Local(of)
		close(fl.done)
		if p.loose != nil || f.cache.State(p.file, p.off, int64(p.chunk.Size)) != cache.Hit {
			f.store(ctx, p, data)
		}
		f.end(fl)
	}
	return rest
}

// store puts verified bytes into the cache. A cache that cannot take them costs
// a second fetch later, never the read.
func (f *fetcher) store(ctx context.Context, p piece, data []byte) {
	ctx = context.WithoutCancel(ctx)
	if p.loose != nil {
		p.loose.keep(ctx, p.chunk.ID, data)
		return
	}
	var err error
	if p.manifest() {
		err = f.cache.PutBlock(ctx, p.chunk.ID, data)
	} else {
		err = f.cache.PutChunk(ctx, p.file, p.off, p.chunk, data)
	}
	switch {
	case err == nil:
		f.host.Holding(p.chunk.ID)
	case errors.Is(err, flox.ErrClosed): // the agent stops
	case errors.Is(err, flox.ErrFull):
		f.log.Debug("cache is full, streaming", "error", err)
	default:
		f.log.Warn("cache did not take a block", "block", p.chunk.ID.String(), "error", err)
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// end is after the last thing done for fl: who wants its block now looks into
// the cache.
func (f *fetcher) end(fl *flight) {
	f.mu.Lock()
	if f.flights[fl.piece.chunk.ID] == fl {
		delete(f.flights, fl.piece.chunk.ID)
	}
	f.mu.Unlock()
	close(fl.kept)
}
