package storehouse

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/floxctl/flox"
)

// softFailures is how many quick failures in a row have a cache left alone. One
// that took its whole time to fail is left alone at once.
const softFailures = 3

// breaker leaves a cache alone for a while that does not answer, so that it costs
// those who wait its timeout once. Then one request finds out whether it is back.
type breaker struct {
	pause, longest time.Duration // the first pause; each is twice the one before

	mu       sync.Mutex
	failures int           // in a row
	next     time.Duration // the next pause
	until    time.Time     // left alone before; zero = it is asked
	probing  bool
	last     error // what failed last; nil = nothing since it last answered
}

// enter says whether the cache may be asked; who was let in says with leave how
// that went.
func (b *breaker) enter() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.until.IsZero():
		return nil
	case b.probing || time.Now().Before(b.until):
		return fmt.Errorf("it is not asked until %s: %w", b.until.UTC().Format(time.RFC3339), b.last)
	}
	b.probing = true
	return nil
}

// leave is told what came of asking; that the cache answered with a refusal is nil.
func (b *breaker) leave(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	probe := b.probing
	b.probing = false
	if err == nil {
		b.failures, b.next, b.until, b.last = 0, 0, time.Time{}, nil
		return
	}
	if errors.Is(err, context.Canceled) { // nobody knows
		return
	}
	b.failures++
	b.last = err
	if open := !b.until.IsZero(); open && !probe {
		return // others that were under way
	}
	if !probe && b.failures < softFailures && !slow(err) {
		return
	}
	b.next = min(max(2*b.next, b.pause), b.longest)
	b.until = time.Now().Add(b.next)
}

// slow reports whether somebody waited long for a failure.
func slow(err error) bool {
	return errors.Is(err, errStalled) || errors.Is(err, context.DeadlineExceeded)
}

// forget has the cache asked again at once.
func (b *breaker) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failures, b.next, b.until, b.last = 0, 0, time.Time{}, nil
}

// state gives until when the cache is left alone, and what failed last.
func (b *breaker) state() (until time.Time, last error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.until, b.last
}

// blame is what a failure says of the cache: nil if it answered.
func blame(err error) error {
	if errors.Is(err, flox.ErrUnreachable) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
