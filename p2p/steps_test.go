package p2p

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// heard are the steps of a fetch as its caller hears them.
type heard struct {
	mu  sync.Mutex
	all []Step
}

func (h *heard) step(s Step) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all = append(h.all, s)
}

// words gives "kind peer" of each, in order.
func (h *heard) words(names map[PeerID]string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for _, s := range h.all {
		out = append(out, strings.TrimSpace(s.Kind.String()+" "+names[s.Peer]))
	}
	return strings.Join(out, ", ")
}

// of gives the first step of a kind.
func (h *heard) of(t *testing.T, kind StepKind) Step {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	i := slices.IndexFunc(h.all, func(s Step) bool { return s.Kind == kind })
	if i < 0 {
		t.Fatalf("nobody told of %q: %+v", kind, h.all)
	}
	return h.all[i]
}

// Who fetches hears who was asked, who was late, who failed and who gave.
func TestStepsOfAFetch(t *testing.T) {
	t.Parallel()
	block := randomBlocks(71, 1, 10_000)
	origin := newMemory(block...)
	store := start(t, 710, func(c *Config) { c.Role = Storehouse; c.Blocks = origin })
	lost, stuck := newMemory(block...), newMemory(block...)
	lost.get = func(context.Context, flox.CID, []byte) ([]byte, error) { return nil, flox.ErrNotFound }
	stuck.get = func(ctx context.Context, _ flox.CID, _ []byte) ([]byte, error) { <-ctx.Done(); return nil, ctx.Err() }
	ids := map[PeerID]Tier{idOf(t, 711): TierLAN, idOf(t, 712): TierSite}
	gone := start(t, 711, func(c *Config) { c.Blocks = lost })
	slow := start(t, 712, func(c *Config) { c.Blocks = stuck })
	me := start(t, 713, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)}; tiers(ids)(c) })
	join(t, me, gone)
	join(t, me, slow)
	eventually(t, "storehouse known", func() bool { return me.knows(store) })

	var g got
	var h heard
	if err := me.Fetch(within(t, time.Minute), wantsOf(block), Hints{Steps: h.step}, g.take); err != nil {
		t.Fatal(err)
	}
	g.check(t, block)
	names := map[PeerID]string{gone.ID(): "gone", slow.ID(): "slow", store.ID(): "store"}
	for _, order := range [][]string{{"asked gone", "failed gone"}, {"asked slow", "gave store"}, {"late"}, {"asked store", "gave store"}, {"search"}} {
		rest := h.words(names)
		for _, step := range order {
			_, after, ok := strings.Cut(rest, step)
			if !ok {
				t.Errorf("want %q in this order, told of: %s", order, h.words(names))
				break
			}
			rest = after
		}
	}
	gave := h.of(t, StepGave)
	if gave.Bytes != 10_000 || gave.Took <= 0 || gave.Tier != TierStorehouse || gave.Block != wantsOf(block)[0].ID || gave.At.IsZero() {
		t.Errorf("gave: %+v", gave)
	}
	if failed := h.of(t, StepFailed); failed.Why == "" || failed.Tier != TierLAN {
		t.Errorf("failed: %+v", failed)
	}
	if late := h.of(t, StepLate); late.Took <= 0 {
		t.Errorf("late: %+v", late)
	}
}

// All who wait for a block hear of it, and each once.
func TestStepsReachEveryWaiter(t *testing.T) {
	t.Parallel()
	block := randomBlocks(72, 1, 10_000)
	held := newMemory(block...)
	asked, release := make(chan struct{}, 1), make(chan struct{})
	held.get = func(_ context.Context, _ flox.CID, data []byte) ([]byte, error) {
		asked <- struct{}{}
		<-release
		return data, nil
	}
	store := start(t, 720, func(c *Config) { c.Role = Storehouse; c.Blocks = held })
	me := start(t, 721, func(c *Config) { c.Bootstrap = []PeerAddr{addrOf(store)}; c.patience = time.Minute })
	twice := append(wantsOf(block), wantsOf(block)...)
	var first, second heard
	done := make(chan error, 2)
	go func() {
		done <- me.Fetch(within(t, time.Minute), twice, Hints{Steps: first.step}, func(int, []byte, Source) {})
	}()
	<-asked
	go func() {
		done <- me.Fetch(within(t, time.Minute), wantsOf(block), Hints{Steps: second.step}, func(int, []byte, Source) {})
	}()
	eventually(t, "both wait", func() bool {
		me.peers.mu.Lock()
		defer me.peers.mu.Unlock()
		for f := range me.sched.all {
			return len(f.waiters) == 3
		}
		return false
	})
	close(release)
	for range 2 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range []*heard{&first, &second} {
		if got := strings.Count(h.words(nil), "gave"); got != 1 {
			t.Errorf("told %d times that the block was given: %s", got, h.words(nil))
		}
	}
}
