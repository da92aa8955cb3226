package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/cache"
	"github.com/floxctl/flox/p2p"
)

// fakeSwarm holds blocks and answers when it is told to.
type fakeSwarm struct {
	mu      sync.Mutex
	blocks  map[flox.CID][]byte
	asked   map[flox.CID]int
	gate    chan struct{} // closed = answer at once; nil = same
	fail    error
	stopped int // fetches whose context ended
	hurried []flox.CID
	keeping chan struct{} // closed = what is kept is noted at once; nil = same
}

func (s *fakeSwarm) Fetch(ctx context.Context, wants []p2p.Want, _ p2p.Hints, deliver func(int, []byte, p2p.Source)) error {
	s.mu.Lock()
	gate, fail := s.gate, s.fail
	for _, w := range wants {
		s.asked[w.ID]++
	}
	s.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			s.mu.Lock()
			s.stopped++
			s.mu.Unlock()
			return ctx.Err()
		}
	}
	if fail != nil {
		return fail
	}
	for i, w := range wants {
		s.mu.Lock()
		data, ok := s.blocks[w.ID]
		s.mu.Unlock()
		if !ok {
			return fmt.Errorf("block %s: %w", w.ID, flox.ErrUnreachable)
		}
		deliver(i, data, p2p.Source{Tier: p2p.TierFar, Wire: len(data)})
	}
	return nil
}

func (s *fakeSwarm) Holding(...flox.CID) {
	s.mu.Lock()
	keeping := s.keeping
	s.mu.Unlock()
	if keeping != nil {
		<-keeping
	}
}

func (s *fakeSwarm) Hurry(ids []flox.CID) { s.set(func() { s.hurried = append(s.hurried, ids...) }) }

func (s *fakeSwarm) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *fakeSwarm) stops() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopped
}

// rig is a fetcher over a fake swarm and a real cache, and a file of chunks.
type rig struct {
	*fetcher
	swarm  *fakeSwarm
	pieces []piece
	whole  []byte
}

func newRig(t *testing.T, budget int64, chunks int) *rig {
	t.Helper()
	c, err := cache.Open(cache.Config{Dir: t.TempDir(), Budget: budget, Reserve: 1})
	if err != nil {
		t.Fatal(err)
	}
	life, end := context.WithCancel(context.Background())
	var r *rig
	t.Cleanup(func() {
		end()
		r.work.Wait()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	s := &fakeSwarm{blocks: make(map[flox.CID][]byte), asked: make(map[flox.CID]int)}
	r = &rig{swarm: s, fetcher: newFetcher(life, s, c, &traffic{}, slog.New(slog.DiscardHandler))}
	random := rand.NewChaCha8([32]byte{1})
	for range chunks {
		data := make([]byte, 20_000)
		_, _ = random.Read(data)
		id := content.Hash(data)
		s.blocks[id] = data
		r.pieces = append(r.pieces, piece{off: int64(len(r.whole)), chunk: flox.Chunk{ID: id, Size: uint32(len(data))}})
		r.whole = append(r.whole, data...)
	}
	for i := range r.pieces {
		r.pieces[i].file = cache.File{ID: content.Hash(r.whole), Size: int64(len(r.whole))}
	}
	return r
}

func (r *rig) read(ctx context.Context) ([]byte, error) {
	var out []byte
	err := r.fetch(ctx, r.pieces, p2p.Hints{}, nil, func(_ piece, data []byte) error {
		out = append(out, data...)
		return nil
	})
	return out, err
}

func TestManyReadersOfOneBlockFetchItOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 4)
	r.swarm.set(func() { r.swarm.gate = make(chan struct{}) })
	var group sync.WaitGroup
	for range 32 {
		group.Go(func() {
			got, err := r.read(t.Context())
			if err != nil || !bytes.Equal(got, r.whole) {
				t.Errorf("read %d bytes: %v", len(got), err)
			}
		})
	}
	for joined := 0; joined < 32; { // until all wait
		r.mu.Lock()
		joined = 0
		for _, fl := range r.flights {
			fl.batch.mu.Lock()
			joined = fl.batch.waiters / len(r.pieces)
			fl.batch.mu.Unlock()
		}
		r.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	close(r.swarm.gate)
	group.Wait()
	for id, n := range r.swarm.asked {
		if n != 1 {
			t.Errorf("block %s was asked for %d times", id, n)
		}
	}
}

func TestAFetchGoesOnWhenItsReadersLeave(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 2)
	gate := make(chan struct{})
	r.swarm.set(func() { r.swarm.gate = gate })
	reader, giveUp := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() { _, err := r.read(reader); gone <- err }()
	for len(r.places) == 0 {
		time.Sleep(time.Millisecond)
	}
	giveUp()
	if err := <-gone; !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("the reader who gave up got %v, want ErrUnreachable", err)
	}
	again := make(chan []byte, 1)
	go func() { got, _ := r.read(t.Context()); again <- got }()
	close(gate)
	if got := <-again; !bytes.Equal(got, r.whole) {
		t.Error("the reader who came back did not get the bytes")
	}
	r.work.Wait()
	if n := r.swarm.stops(); n != 0 {
		t.Errorf("%d fetches were stopped, want none", n)
	}
	for id, n := range r.swarm.asked {
		if n != 1 {
			t.Errorf("block %s was asked for %d times", id, n)
		}
	}
	if len(r.left) != 0 || len(r.places) != 0 || len(r.flights) != 0 {
		t.Errorf("left behind: %d left, %d places, %d flights", len(r.left), len(r.places), len(r.flights))
	}
}

func TestADownloadsFetchEndsWithIt(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 2)
	r.swarm.set(func() { r.swarm.gate = make(chan struct{}) })
	ctx, stop := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		gone <- r.fetch(ctx, r.pieces, p2p.Hints{Background: true}, nil, func(piece, []byte) error { return nil })
	}()
	for len(r.places) == 0 {
		time.Sleep(time.Millisecond)
	}
	stop()
	<-gone
	r.work.Wait()
	if n := r.swarm.stops(); n != 1 {
		t.Errorf("%d fetches stopped, want the one nobody waits for", n)
	}
}

func TestFetchesWithoutReadersAreBounded(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, maxLeft+6)
	r.swarm.set(func() { r.swarm.gate = make(chan struct{}) })
	ctx, stop := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	for _, p := range r.pieces {
		readers.Go(func() {
			_ = r.fetch(ctx, []piece{p}, p2p.Hints{}, nil, func(piece, []byte) error { return nil })
		})
	}
	for len(r.places) < len(r.pieces) {
		time.Sleep(time.Millisecond)
	}
	stop()
	readers.Wait()
	for r.swarm.stops() < 6 {
		time.Sleep(time.Millisecond)
	}
	if len(r.left) != maxLeft {
		t.Errorf("%d fetches go on without readers, want %d", len(r.left), maxLeft)
	}
	close(r.swarm.gate)
	r.work.Wait()
	if len(r.left) != 0 {
		t.Errorf("%d places are still taken at the end", len(r.left))
	}
}

// Two files share a chunk, and one file holds it twice: whoever fetches it, each
// reader wants it at its own place.
func TestASharedChunkLandsWhereEachReaderWantsIt(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 3)
	gate := make(chan struct{})
	r.swarm.set(func() { r.swarm.gate = gate })
	z := r.pieces[0]
	other := cache.File{ID: content.Hash([]byte("other")), Size: 2*20_000 + 5}
	twice := []piece{{file: other, off: 0, chunk: z.chunk}, {file: other, off: 20_000, chunk: z.chunk}}
	first := make(chan error, 1)
	go func() { _, err := r.read(t.Context()); first <- err }()
	for len(r.places) == 0 {
		time.Sleep(time.Millisecond)
	}
	time.AfterFunc(20*time.Millisecond, func() { close(gate) })
	p := make([]byte, 2*20_000)
	err := r.fetch(t.Context(), twice, p2p.Hints{}, nil, func(one piece, data []byte) error {
		if one.file != other {
			t.Errorf("got a piece of another file at %d", one.off)
		}
		overlay(p, 0, data, one.off)
		return nil
	})
	chunk := r.whole[:20_000]
	if err != nil || !bytes.Equal(p, append(bytes.Clone(chunk), chunk...)) {
		t.Errorf("the file that holds the chunk twice: wrong bytes, %v", err)
	}
	if err := <-first; err != nil {
		t.Error(err)
	}
	clear(p)
	if n, st := r.cache.ReadAt(other, p, 0, 0); st != cache.Hit || !bytes.Equal(p[:n], append(bytes.Clone(chunk), chunk...)) {
		t.Errorf("the cache says %v of the second file", st)
	}
}

func TestAChunkOfAnotherFileInTheCacheIsNotFetched(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 3)
	if _, err := r.read(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.swarm.set(func() { r.swarm.fail = fmt.Errorf("unplugged: %w", flox.ErrUnreachable) })
	other := piece{file: cache.File{ID: content.Hash([]byte("other")), Size: 70_000}, off: 50_000, chunk: r.pieces[2].chunk}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	var got []byte
	err := r.fetch(ctx, []piece{other}, p2p.Hints{}, nil, func(_ piece, data []byte) error { got = data; return nil })
	if err != nil || !bytes.Equal(got, r.whole[40_000:]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// What arrived is not fetched again because of what did not.
func TestAFailureCostsOnlyWhatFailed(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 4)
	lost := r.pieces[1].chunk.ID
	data := r.swarm.blocks[lost]
	r.swarm.set(func() { delete(r.swarm.blocks, lost) })
	time.AfterFunc(150*time.Millisecond, func() { r.swarm.set(func() { r.swarm.blocks[lost] = data }) })
	p := make([]byte, len(r.whole))
	err := r.fetch(t.Context(), r.pieces, p2p.Hints{}, nil, func(one piece, data []byte) error {
		overlay(p, 0, data, one.off)
		return nil
	})
	if err != nil || !bytes.Equal(p, r.whole) {
		t.Fatalf("wrong bytes or %v", err)
	}
	if n := r.swarm.asked[r.pieces[0].chunk.ID]; n != 1 {
		t.Errorf("a block that came at once was asked for %d times", n)
	}
}

// The kernel believes for ever that a name does not exist: a block nobody has
// must not look like one.
func TestABlockNobodyHasIsUnreachableAndNotMissing(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 1)
	r.swarm.set(func() { r.swarm.fail = fmt.Errorf("no such block, says the storehouse: %w", flox.ErrNotFound) })
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := r.read(ctx)
	if !errors.Is(err, flox.ErrUnreachable) || errors.Is(err, flox.ErrNotFound) {
		t.Errorf("got %v, want ErrUnreachable and not ErrNotFound", err)
	}
}

func TestAReaderOutlivesFailuresUntilItsDeadline(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 3)
	r.swarm.set(func() { r.swarm.fail = fmt.Errorf("no route: %w", flox.ErrUnreachable) })
	time.AfterFunc(150*time.Millisecond, func() { r.swarm.set(func() { r.swarm.fail = nil }) })
	got, err := r.read(t.Context())
	if err != nil || !bytes.Equal(got, r.whole) {
		t.Fatalf("read %d bytes after the failure ended: %v", len(got), err)
	}
	r = newRig(t, 1<<30, 3) // with nothing in its cache
	r.swarm.set(func() { r.swarm.fail = fmt.Errorf("no route: %w", flox.ErrUnreachable) })
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := r.read(short); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("at the deadline: %v, want ErrUnreachable", err)
	}
}

func TestWhatWasFetchedLiesInTheCacheAndAFullOneStreams(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 3)
	if _, err := r.read(t.Context()); err != nil {
		t.Fatal(err)
	}
	kept(t, r.fetcher)
	p := make([]byte, len(r.whole))
	if n, st := r.cache.ReadAt(r.pieces[0].file, p, 0, 0); st != cache.Hit || !bytes.Equal(p[:n], r.whole) {
		t.Errorf("after the fetch the cache says %v", st)
	}

	full := newRig(t, 1, 3) // a budget of one byte
	got, err := full.read(t.Context())
	if err != nil || !bytes.Equal(got, full.whole) {
		t.Errorf("with no room for the cache: %d bytes, %v", len(got), err)
	}
}

func TestAnErrorOfTheConsumerEndsTheFetch(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 3)
	broken := errors.New("client went away")
	err := r.fetch(t.Context(), r.pieces, p2p.Hints{}, nil, func(piece, []byte) error { return broken })
	if !errors.Is(err, broken) {
		t.Errorf("got %v, want the consumer's own error", err)
	}
}

// kept waits until all that was fetched lies in the cache.
func kept(t *testing.T, f *fetcher) {
	t.Helper()
	until(t, "all that was fetched kept", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return len(f.flights) == 0
	})
}

// A reader has its bytes before they are written into the cache, and so has who
// wants the same block meanwhile; what is fetched for nobody is kept when it is said
// to be there.
func TestReadersDoNotWaitForTheCache(t *testing.T) {
	t.Parallel()
	r := newRig(t, 1<<30, 2)
	keeping := make(chan struct{})
	keep := sync.OnceFunc(func() { close(keeping) })
	t.Cleanup(keep) // what is fetched ends with it
	r.swarm.set(func() { r.swarm.keeping = keeping })
	for range 2 {
		if err := r.fetch(within(t, 20*time.Second), r.pieces[:1], p2p.Hints{}, nil, func(_ piece, data []byte) error {
			if !bytes.Equal(data, r.whole[:len(data)]) {
				t.Error("other bytes")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.swarm.asked[r.pieces[0].chunk.ID]; n != 1 {
		t.Errorf("fetched %d times", n)
	}
	ahead := make(chan error, 1)
	go func() { ahead <- r.once(within(t, time.Minute), r.pieces, p2p.Hints{}, nil) }()
	select {
	case err := <-ahead:
		t.Fatalf("what is fetched ahead is said to be there before it is kept: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	keep()
	if err := <-ahead; err != nil {
		t.Error(err)
	}
}
