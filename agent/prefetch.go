package agent

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

// ahead says why something is fetched that nobody waits for.
type ahead uint8

const (
	aheadSequential ahead = iota // behind what a reader of a large file reads
	aheadDirectory               // small files beside one that was read
	aheadTrace                   // what a program reads when it starts
	aheadLink                    // what the dynamic loader reads of programs and libraries
	aheadComplete                // the rest of what was used
	aheadKinds
)

const (
	// quietFor is how long no reader may have waited before completion goes on.
	quietFor = 200 * time.Millisecond
	// quietPoll is how often that is looked at.
	quietPoll = 50 * time.Millisecond
	// quietMost is how long completion yields to readers who never stop: then it
	// takes one step all the same, so that it gets somewhere over a slow line.
	quietMost = 20 * time.Second
	// completeLife bounds one step of completion; it begins when it may.
	completeLife = 20 * time.Second
	// roomPercent of its limit is how full the cache may get by what nobody waits
	// for; it begins to evict at 95.
	roomPercent = 94
	// aheadBurst is how much a capped prefetch may take at once.
	aheadBurst = 1 << 20
)

// prefetcher fetches what nobody waits for yet: within a cap, behind those who
// wait, and not at all if it is switched off.
type prefetcher struct {
	fetcher *fetcher
	waits   *waits
	off     bool
	rate    int64         // bytes per second, 0 = no limit
	life    time.Duration // of one step of completion
	bytes   [aheadKinds]atomic.Uint64
	asked   atomic.Int64 // bytes of fetches under way

	mu  sync.Mutex
	due time.Time // when the cap allows the next byte
}

// fetch brings pieces into the cache, as background work. It waits for the cap,
// and completion also until readers are quiet; what then does not come within
// completeLife is ErrUnreachable. each, of completion only, may be nil. ErrFull: the cache has no room
// for them, and what cannot be kept need not come ahead.
func (p *prefetcher) fetch(ctx context.Context, why ahead, pieces []piece, hints p2p.Hints, each func(piece, []byte) error) error {
	if p.off || len(pieces) == 0 {
		return nil
	}
	size := sizeOf(pieces)
	asked := p.asked.Add(int64(size)) //nolint:gosec // some MiB
	defer p.asked.Add(-int64(size))   //nolint:gosec // some MiB
	if u := p.fetcher.cache.Usage(); u.Bytes+asked > u.Limit/100*roomPercent {
		return fmt.Errorf("%d bytes ahead of readers would push out others: the cache holds %d of %d bytes: %w", size, u.Bytes, u.Limit, flox.ErrFull)
	}
	if why == aheadComplete {
		if err := p.quiet(ctx); err != nil {
			return err
		}
	}
	for len(pieces) > 0 {
		step := p.step(pieces)
		if err := p.capped(ctx, sizeOf(pieces[:step])); err != nil {
			return err
		}
		if err := p.bring(ctx, why, pieces[:step], hints, each); err != nil {
			return err
		}
		pieces = pieces[step:]
	}
	return nil
}

// step is how many of pieces are asked for at once: all, or a burst where there
// is a cap.
func (p *prefetcher) step(pieces []piece) int {
	if p.rate <= 0 {
		return len(pieces)
	}
	n, size := 1, pieces[0].size()
	for n < len(pieces) && size+pieces[n].size() <= aheadBurst {
		size += pieces[n].size()
		n++
	}
	return n
}

// bring fetches one step. What is ahead of a reader, or hearsay, is not worth a
// second try; what completes is tried for a while.
func (p *prefetcher) bring(ctx context.Context, why ahead, pieces []piece, hints p2p.Hints, each func(piece, []byte) error) error {
	if why != aheadComplete {
		return p.fetcher.once(ctx, pieces, hints, &p.bytes[why])
	}
	ctx, cancel := context.WithTimeout(ctx, p.life)
	defer cancel()
	hints.Background, hints.AnyOrder = true, true
	return p.fetcher.fetch(ctx, pieces, hints, nil, func(one piece, data []byte) error {
		p.bytes[why].Add(uint64(len(data)))
		if each == nil {
			return nil
		}
		return each(one, data)
	})
}

// quiet waits until no reader waited for a moment, but not for ever.
func (p *prefetcher) quiet(ctx context.Context) error {
	for since := time.Now(); p.waits.quiet() < quietFor && time.Since(since) < quietMost; {
		select {
		case <-time.After(quietPoll):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// capped waits until n more bytes are within the rate.
func (p *prefetcher) capped(ctx context.Context, n uint64) error {
	if p.rate <= 0 {
		return nil
	}
	p.mu.Lock()
	now := time.Now()
	// What was not used for a while may be used at once, up to a burst.
	if earliest := now.Add(-p.takes(aheadBurst)); p.due.Before(earliest) {
		p.due = earliest
	}
	p.due = p.due.Add(p.takes(n))
	wait := p.due.Sub(now)
	p.mu.Unlock()
	if wait <= 0 {
		return nil
	}
	select {
	case <-time.After(wait):
		return nil
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		p.due = p.due.Add(-p.takes(n)) // not used
		return context.Cause(ctx)
	}
}

// takes is how long n bytes take at the cap.
func (p *prefetcher) takes(n uint64) time.Duration {
	return time.Duration(float64(n) / float64(p.rate) * float64(time.Second))
}

// message gives the counters.
func (p *prefetcher) message() *floxv1.Prefetch {
	return &floxv1.Prefetch{
		On: !p.off, RateBytes: uint64(max(p.rate, 0)),
		SequentialBytes: p.bytes[aheadSequential].Load(), DirectoryBytes: p.bytes[aheadDirectory].Load(),
		TraceBytes: p.bytes[aheadTrace].Load(), LoaderBytes: p.bytes[aheadLink].Load(), CompleteBytes: p.bytes[aheadComplete].Load(),
	}
}
