package p2p

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// What somebody waits for overtakes what the same background fetch has not opened
// yet, and also when the fetch begins a moment later; every block comes once.
func TestHurryReachesWhatIsNotOpenYet(t *testing.T) {
	t.Parallel()
	for n, early := range []bool{false, true} {
		t.Run(fmt.Sprintf("before the fetch %v", early), func(t *testing.T) {
			blocks := randomBlocks(15, 200, 20_000)
			held := newMemory(blocks...)
			gate := make(chan struct{})
			held.get = func(_ context.Context, _ flox.CID, data []byte) ([]byte, error) {
				<-gate
				return data, nil
			}
			store := start(t, 720+2*n, func(c *Config) { c.Role = Storehouse; c.Blocks = held })
			me := start(t, 721+2*n, func(c *Config) {
				c.Bootstrap = []PeerAddr{addrOf(store)}
				c.Limits.CallBytes = 64 << 10 // three blocks are open at once
				c.patience = time.Minute
			})
			const urgent = 180
			wants := wantsOf(blocks)
			wants = append(wants, wants[3]) // twice in one call
			if early {
				me.Hurry([]flox.CID{wants[urgent].ID})
			}
			var order []int
			done := make(chan error, 1)
			go func() {
				done <- me.Fetch(within(t, time.Minute), wants, Hints{Background: true}, func(i int, _ []byte, _ Source) { order = append(order, i) })
			}()
			eventually(t, "the first blocks are asked for", func() bool { return held.gets.Load() > 0 })
			if !early {
				me.Hurry([]flox.CID{wants[urgent].ID})
			}
			close(gate)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			at, seen := -1, map[int]bool{}
			for n, i := range order {
				seen[i] = true
				if i == urgent {
					at = n
				}
			}
			if len(order) != len(wants) || len(seen) != len(wants) {
				t.Errorf("%d deliveries of %d wants, %d different", len(order), len(wants), len(seen))
			}
			if at < 0 || at > 20 {
				t.Errorf("the block in a hurry came as number %d of %d", at, len(order))
			}
			me.peers.mu.Lock()
			defer me.peers.mu.Unlock()
			if len(me.sched.calls) != 0 {
				t.Errorf("%d calls are remembered that are over", len(me.sched.calls))
			}
		})
	}
}
