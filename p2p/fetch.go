package p2p

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/floxctl/flox"
)

// maxOpen is how many blocks one Fetch has open at once.
const maxOpen = 4096

// call is one Fetch. Its results channel has room for all it has open, so
// whoever finishes a block never waits for a slow deliver.
type call struct {
	ctx        context.Context
	deadline   time.Time // zero = none
	results    chan result
	only       peer.ID // FetchFrom: nobody else
	background bool
	search     *search // the look-up of who holds the path; may be nil
	steps      func(Step)

	// guarded by peerTable.mu
	open map[*flight]int // how often this call waits for it
	// of a background call: what is not open yet, what of it is in a hurry, and
	// who is told of that
	later  map[flox.CID]int
	urgent []int
	rushed map[int]struct{} // opened before their turn
	hurry  chan struct{}
}

type result struct {
	index int
	data  []byte
	from  Source
	err   error
}

// Fetch gets blocks from the nearest holders: peers on the LAN that say they
// hold them, then of the site, then any, at last a storehouse; a slow peer is
// overtaken by the next. It calls deliver with each block's index in wants and
// its verified bytes, one at a time, in the order they arrive, from the
// goroutine that called Fetch; data may be kept and must not be changed.
//
// A block asked for by several callers is fetched once. If some blocks cannot
// be had, the others are still delivered and the error tells of the first:
// ErrNotFound if a storehouse said that there is no such block, ErrUnreachable
// if nobody who might have it answered (by the deadline of ctx), ErrBadInput
// for an impossible want. When ctx is cancelled it returns its error.
func (h *Host) Fetch(ctx context.Context, wants []Want, hints Hints, deliver func(i int, data []byte, from Source)) error {
	c := &call{ctx: ctx, background: hints.Background, search: h.finds.search(hints), steps: hints.Steps}
	if !hints.AnyOrder {
		return h.fetch(ctx, c, wants, deliver)
	}
	order := rand.Perm(len(wants))
	shuffled := make([]Want, len(wants))
	for i, at := range order {
		shuffled[i] = wants[at]
	}
	return h.fetch(ctx, c, shuffled, func(i int, data []byte, from Source) { deliver(order[i], data, from) })
}

// FetchFrom gets blocks from one peer and nobody else. Errors are as with
// Fetch, but here ErrNotFound says only that this peer does not have a block.
func (h *Host) FetchFrom(ctx context.Context, id PeerID, wants []Want, deliver func(i int, data []byte, from Source)) error {
	pid, err := h.member(ctx, id)
	if err != nil {
		return err
	}
	return h.fetch(ctx, &call{ctx: ctx, only: pid}, wants, deliver)
}

// FetchRange gets length bytes at off of one block, without the rest of it.
// They come with a BLAKE3 tree proof and are verified in groups of 16 KiB.
// Errors are as with Fetch; a range beyond the end of the block is ErrBadInput.
func (h *Host) FetchRange(ctx context.Context, want Want, off, length uint32, hints Hints) ([]byte, Source, error) {
	if length == 0 || uint64(off)+uint64(length) > MaxBlock || (want.Size > 0 && uint64(off)+uint64(length) > uint64(want.Size)) {
		return nil, Source{}, fmt.Errorf("range %d+%d of block %s of %d bytes: %w", off, length, want.ID, want.Size, flox.ErrBadInput)
	}
	var data []byte
	var source Source
	c := &call{ctx: ctx, background: hints.Background, search: h.finds.search(hints), steps: hints.Steps}
	err := h.fetchKeys(ctx, c, 1, func(int) (flightKey, sizes) {
		return flightKey{want.ID, off, length}, sizes{want.Size, want.About}
	}, func(_ int, b []byte, from Source) { data, source = b, from })
	return data, source, err
}

func (h *Host) fetch(ctx context.Context, c *call, wants []Want, deliver func(int, []byte, Source)) error {
	for i, w := range wants {
		if w.Size > MaxBlock || w.ID.IsZero() {
			return fmt.Errorf("want %d: block %q of %d bytes, at most %d allowed: %w", i, w.ID, w.Size, MaxBlock, flox.ErrBadInput)
		}
	}
	return h.fetchKeys(ctx, c, len(wants), func(i int) (flightKey, sizes) {
		return flightKey{id: wants[i].ID}, sizes{wants[i].Size, wants[i].About}
	}, deliver)
}

func (h *Host) fetchKeys(ctx context.Context, c *call, n int, want func(int) (flightKey, sizes), deliver func(int, []byte, Source)) error {
	if n == 0 {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return fetchEnded(err, 0, n)
	}
	c.deadline, _ = ctx.Deadline()
	c.results = make(chan result, min(n, maxOpen))
	c.open = make(map[*flight]int)
	defer h.sched.abandon(c)
	h.sched.register(c, n, want)
	var firstErr error
	next, open, openBytes, failed := 0, 0, 0, 0
	for done := 0; done < n; {
		for open < cap(c.results) {
			i, hurry, ok := h.sched.nextOf(c, &next, n)
			if !ok {
				break
			}
			key, size := want(i)
			cost := key.cost(size)
			if !hurry && open > 0 && openBytes+cost > h.cfg.Limits.CallBytes {
				break
			}
			if !hurry {
				next++
			}
			if err := h.sched.join(c, i, key, size, hurry); err != nil {
				return err
			}
			open, openBytes = open+1, openBytes+cost
		}
		h.sched.flush()
		select {
		case <-c.hurry:
		case <-ctx.Done():
			return fetchEnded(ctx.Err(), done-failed, n)
		case r := <-c.results:
			key, size := want(r.index)
			done, open, openBytes = done+1, open-1, openBytes-key.cost(size)
			if r.err == nil {
				deliver(r.index, r.data, r.from)
			} else if failed++; firstErr == nil {
				firstErr = r.err
			}
		}
	}
	if firstErr != nil && n > 1 {
		return fmt.Errorf("%d of %d blocks: %w", failed, n, firstErr)
	}
	return firstErr
}

// fetchEnded says what it means for a fetch that its context ended.
func fetchEnded(err error, have, n int) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("fetch: %d of %d blocks came in time, nobody gave the rest: %w: %w", have, n, flox.ErrUnreachable, err)
	}
	return fmt.Errorf("fetch: %d of %d blocks: %w", have, n, err)
}

// member connects to a peer and waits until it has said who it is.
func (h *Host) member(ctx context.Context, id PeerID) (peer.ID, error) {
	pid, err := id.decode()
	if err != nil {
		return "", err
	}
	if err := h.reach(ctx, pid); err != nil {
		return "", err
	}
	return pid, h.peers.waitReady(ctx, pid)
}

// waitReady waits for a connected peer's hello and filter.
func (t *peerTable) waitReady(ctx context.Context, id peer.ID) error {
	// The table hears of a connection a moment after the dialer: ask the network.
	if t.h.net.Network().Connectedness(id) != network.Connected {
		return fmt.Errorf("peer %s is not connected: %w", id, flox.ErrUnreachable)
	}
	t.mu.Lock()
	ready := t.get(id).ready
	t.mu.Unlock()
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("peer %s did not say who it is: %w: %w", id, flox.ErrUnreachable, ctx.Err())
	case <-t.h.base.Done():
		return fmt.Errorf("peer host: %w", flox.ErrClosed)
	}
}
