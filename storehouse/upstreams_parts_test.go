package storehouse

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// A cache that fails is left alone, longer each time, with one request to find out
// whether it is back.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &breaker{pause: time.Minute, longest: 3 * time.Minute}
		quick := fmt.Errorf("refused: %w", flox.ErrUnreachable)
		late := fmt.Errorf("late: %w: %w", context.DeadlineExceeded, flox.ErrUnreachable)
		may := func(want bool, when string) {
			t.Helper()
			if err := b.enter(); (err == nil) != want {
				t.Fatalf("%s: %v", when, err)
			}
		}
		for range softFailures - 1 {
			may(true, "before enough quick failures")
			b.leave(quick)
		}
		may(true, "before the last of them")
		b.leave(nil)
		for range softFailures {
			may(true, "after a success they are counted anew")
			b.leave(quick)
		}
		may(false, "after the last")
		time.Sleep(time.Minute)
		may(true, "the probe")
		may(false, "beside the probe")
		b.leave(context.Canceled)
		may(true, "after a probe that nobody waited for")
		b.leave(quick)
		time.Sleep(time.Minute)
		may(false, "the second pause is longer")
		time.Sleep(time.Minute)
		may(true, "and ends")
		b.leave(nil)
		may(true, "when it is back")
		may(true, "and for all")
		b.leave(late)
		b.leave(late)
		if until, _ := b.state(); time.Until(until) != time.Minute {
			t.Errorf("two that were under way: left alone for %v", time.Until(until))
		}
		for range 5 {
			until, _ := b.state()
			time.Sleep(time.Until(until))
			may(true, "a probe")
			b.leave(late)
		}
		if until, _ := b.state(); time.Until(until) != b.longest {
			t.Errorf("left alone for %v, want %v", time.Until(until), b.longest)
		}
	})
}

// Answers are remembered for a time, the newest of them.
func TestAnswersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newAnswers(100 * answerCost)
		for i := range 1000 {
			m.put(fmt.Sprint(i), cacheAnswer{}, time.Minute)
			m.put("same", cacheAnswer{}, time.Duration(i)*time.Second)
		}
		if len(m.known) > 100 || len(m.order) != len(m.known) || m.weight > m.most {
			t.Errorf("%d answers and %d in order, of %d bytes, are remembered", len(m.known), len(m.order), m.weight)
		}
		if _, ok := m.get("999"); !ok {
			t.Error("the newest is forgotten")
		}
		if _, ok := m.get("0"); ok {
			t.Error("the oldest is remembered")
		}
		time.Sleep(time.Minute)
		if _, ok := m.get("999"); ok {
			t.Error("an old answer is believed")
		}
		big := cacheAnswer{offer: &offer{NarInfo: &nix.NarInfo{Info: flox.PathInfo{Signatures: []string{string(make([]byte, 1<<20))}}}}}
		m.put("big", big, time.Minute)
		if m.weight > m.most {
			t.Errorf("%d bytes are remembered", m.weight)
		}
		m.put("small", cacheAnswer{err: errors.New("no")}, time.Minute)
		if a, ok := m.get("small"); !ok || a.err == nil {
			t.Error("nothing is remembered behind something big")
		}
	})
}
