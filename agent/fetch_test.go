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

func (s *fakeSwarm) Holding(...flox.CID) {}

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
	t.Cleanup(func() {
		end()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	s := &fakeSwarm{blocks: make(map[flox.CID][]byte), asked: make(map[flox.CID]int)}
	r := &rig{swarm: s, fetcher: &fetcher{
		host: s, cache: c, traffic: &traffic{}, log: slog.New(slog.DiscardHandler), life: life,
		places: make(chan struct{}, maxBatches), flights: make(map[flox.CID]*flight),
	}}
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

func TestAFetchGoesOnForTheOthersAndEndsWithTheLast(t *testing.T) {
	r := newRig(t, 1<<30, 2)
	r.swarm.set(func() { r.swarm.gate = make(chan struct{}) })
	first, giveUp := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() { _, err := r.read(first); gone <- err }()
	for len(r.places) == 0 {
		time.Sleep(time.Millisecond)
	}
	second := make(chan []byte, 1)
	go func() { got, _ := r.read(t.Context()); second <- got }()
	time.Sleep(20 * time.Millisecond)
	giveUp()
	if err := <-gone; !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("the reader who gave up got %v, want ErrUnreachable", err)
	}
	if r.swarm.stops() != 0 {
		t.Error("the fetch was stopped although another reader waits")
	}
	close(r.swarm.gate)
	if got := <-second; !bytes.Equal(got, r.whole) {
		t.Error("the reader who stayed did not get the bytes")
	}

	r.swarm.set(func() { r.swarm.gate = make(chan struct{}) })
	alone, stop := context.WithCancel(t.Context())
	go func() { _, err := r.read(alone); gone <- err }()
	for len(r.places) == 0 {
		time.Sleep(time.Millisecond)
	}
	stop()
	<-gone
	for len(r.places) != 0 { // the fetch itself ends
		time.Sleep(time.Millisecond)
	}
	if n := r.swarm.stops(); n != 1 {
		t.Errorf("%d fetches stopped, want the one nobody waits for", n)
	}
}

func TestAReaderOutlivesFailuresUntilItsDeadline(t *testing.T) {
	r := newRig(t, 1<<30, 3)
	r.swarm.set(func() { r.swarm.fail = fmt.Errorf("no route: %w", flox.ErrUnreachable) })
	time.AfterFunc(150*time.Millisecond, func() { r.swarm.set(func() { r.swarm.fail = nil }) })
	got, err := r.read(t.Context())
	if err != nil || !bytes.Equal(got, r.whole) {
		t.Fatalf("read %d bytes after the failure ended: %v", len(got), err)
	}
	r.swarm.set(func() { r.swarm.fail = fmt.Errorf("no route: %w", flox.ErrUnreachable) })
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := r.read(short); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("at the deadline: %v, want ErrUnreachable", err)
	}
}

func TestWhatWasFetchedLiesInTheCacheAndAFullOneStreams(t *testing.T) {
	r := newRig(t, 1<<30, 3)
	if _, err := r.read(t.Context()); err != nil {
		t.Fatal(err)
	}
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
	r := newRig(t, 1<<30, 3)
	broken := errors.New("client went away")
	err := r.fetch(t.Context(), r.pieces, p2p.Hints{}, nil, func(piece, []byte) error { return broken })
	if !errors.Is(err, broken) {
		t.Errorf("got %v, want the consumer's own error", err)
	}
}
