package agent

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
)

// Who waits for a name is told why while it waits, not only when it is over.
func TestALookupThatWaitsSaysWhy(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.set(func() { h.broken = errors.New("out of order") })
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	p := storePath(t, 7)
	ctx, giveUp := context.WithCancel(within(t, 40*time.Second))
	done := make(chan error, 1)
	go func() {
		_, _, err := a.store.Lookup(ctx, string(p), flox.Reader{})
		done <- err
	}()
	var last []waitView
	until(t, "the wait says why", func() bool {
		last = a.waits.snapshot(time.Now())
		return len(last) == 1 && last[0].op == opLookup && last[0].path == testStore.Join(p) && strings.Contains(last[0].why, "out of order")
	})
	giveUp()
	if err := <-done; !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("%v after %v", err, last)
	}
	if n := a.waits.count(); n != 0 {
		t.Errorf("%d still wait in process %d", n, os.Getpid())
	}
}

// While the storehouse is away that is the reason, from the beginning.
func TestAWaitWithoutAStorehouseSaysSo(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, _ := runAgent(t, h, func(cfg *Config) { cfg.Invite = deadInvite(h) }, nil)
	w := a.waits.begin(1, opRead, "/nix/store/x", 10)
	defer w.end()
	var reason string
	until(t, "the wait is shown", func() bool {
		shown := (&control{a: a}).waiting(time.Now())
		if len(shown) == 1 {
			reason = shown[0].GetReason()
		}
		return reason != ""
	})
	if !strings.Contains(reason, "the storehouse is not connected") {
		t.Errorf("the reason is %q", reason)
	}
}
