package agent

import (
	"context"
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p"
)

// underWay is how many look-ups have a place.
func (r *resolver) underWay() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.places.held
}

// Users and processes whose names all hang keep nobody else from names that can
// be found, also where they have taken all the places there are.
func TestHungNamesOfSomeLeaveRoomForOthers(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	w.houses["house"] = nil // takes the question, and says nothing
	for i, peer := range []p2p.PeerID{"a", "b", "c"} {
		w.houses[peer] = knowing{info: w.fact(i + 1)}
		w.connected = append(w.connected, peer)
	}
	r := w.resolver()
	r.places = newPlaces(32, 8)
	ctx, giveUp := context.WithCancel(t.Context())
	var hung sync.WaitGroup
	defer hung.Wait()
	defer giveUp()
	name := 100
	hang := func(who asker, names int) {
		for range names {
			name++
			p := storePath(t, name)
			hung.Go(func() {
				if _, err := r.lookupFor(ctx, p, who, nil); !errors.Is(err, flox.ErrUnreachable) {
					t.Errorf("a name that hangs: %v", err)
				}
			})
		}
	}
	held := func(n int) { until(t, "the places are taken", func() bool { return r.underWay() == n }) }
	hang(asker{1000, 1}, 60)
	held(8) // a quarter
	hang(asker{1000, 2}, 60)
	held(16) // a half
	hang(asker{1001, 3}, 60)
	held(24)
	hang(asker{1001, 4}, 60)
	held(32)
	for i, who := range []asker{{1002, 5}, {1000, 6}, elsewhere} {
		if _, err := r.lookupFor(within(t, 2*lookupLife/3), w.fact(i+1).Path, who, nil); err != nil {
			t.Errorf("%+v while others hang: %v", who, err)
		}
	}
}

// A look-up that nobody waits for any more makes room for one that somebody does.
func TestAbandonedLookupsMakeRoom(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	info := w.fact(1)
	w.houses["house"], w.houses["a"], w.connected = nil, knowing{info: info}, []p2p.PeerID{"a"}
	r := w.resolver()
	r.places = newPlaces(2*fewLookups, 0)
	ctx, giveUp := context.WithCancel(t.Context())
	var hung sync.WaitGroup
	for i := range fewLookups {
		hung.Go(func() { _, _ = r.lookup(ctx, storePath(t, 100+i)) })
	}
	until(t, "all hang", func() bool { return r.underWay() == fewLookups })
	kept := within(t, 2*lookupLife/3) // by then they end anyway
	late, cancel := context.WithTimeout(kept, 100*time.Millisecond)
	defer cancel()
	if _, err := r.lookup(late, info.Path); !errors.Is(err, flox.ErrUnreachable) {
		t.Fatalf("a place was there: %v", err)
	}
	giveUp()
	hung.Wait()
	if _, err := r.lookup(kept, info.Path); err != nil {
		t.Errorf("while nobody waits for the others: %v", err)
	}
}

// The kernel names a thread; its process is what is counted.
func TestAskersAreProcesses(t *testing.T) {
	t.Parallel()
	pid := uint32(os.Getpid())
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil || len(tasks) < 2 {
		t.Fatal(tasks, err)
	}
	for _, task := range tasks {
		var tid uint32
		for _, digit := range task.Name() {
			tid = 10*tid + uint32(digit-'0')
		}
		if got := askerOf(flox.Reader{PID: tid, UID: 7}); got != (asker{7, pid}) {
			t.Errorf("thread %d is of %+v", tid, got)
		}
	}
	if got := askerOf(flox.Reader{PID: 1<<22 - 1, UID: 7}); got != (asker{7, 1<<22 - 1}) {
		t.Errorf("a thread that is gone is of %+v", got)
	}
}
