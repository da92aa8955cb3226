package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/p2p"
)

const (
	// houseHedge is how long a server of the storehouse may take for a question
	// before the next one is asked, too.
	houseHedge = time.Second
	// houseDown is how long a server that did not answer is asked last.
	houseDown = 5 * time.Second
	// sameDistance is a round trip that is as good as any shorter one.
	sameDistance = 8 * time.Millisecond
	// oldAnswer is how old an answer may be of a server that only follows, when its
	// line to the others is cut.
	oldAnswer = time.Minute
)

// houses are the servers of the storehouse. Any of them answers for all; one is
// asked as long as it answers, the others when it does not.
type houses struct {
	reach func(p2p.PeerID) (rtt time.Duration, connected bool)

	mu      sync.Mutex
	list    []p2p.PeerID             // in an order of this machine's own, so that a fleet spreads
	down    map[p2p.PeerID]time.Time // did not answer: asked last until then
	current p2p.PeerID               // answered last
	wroteAt time.Time                // when the storehouse last made something valid for this machine
}

func newHouses(ids []p2p.PeerID, reach func(p2p.PeerID) (time.Duration, bool)) *houses {
	h := &houses{reach: reach, down: map[p2p.PeerID]time.Time{}, wroteAt: time.Now()} // perhaps a moment before the start
	h.set(ids)
	return h
}

// set replaces the servers; those that stay keep their place.
func (h *houses) set(ids []p2p.PeerID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	next := slices.DeleteFunc(slices.Clone(h.list), func(id p2p.PeerID) bool { return !slices.Contains(ids, id) })
	for _, id := range ids {
		if !slices.Contains(next, id) {
			next = slices.Insert(next, rand.N(len(next)+1), id) //nolint:gosec // spreads a load
		}
	}
	h.list = next
	for id := range h.down {
		if !slices.Contains(ids, id) {
			delete(h.down, id)
		}
	}
}

// order lists the servers, the best first: those that answer, those that are
// connected, the nearest, the one that answered last.
func (h *houses) order() []p2p.PeerID {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	rank := make(map[p2p.PeerID][4]int, len(h.list))
	for _, id := range h.list {
		var r [4]int
		if h.down[id].After(now) {
			r[0] = 1
		}
		rtt, connected := h.reach(id)
		if !connected {
			r[1] = 1
		}
		r[2] = bits.Len64(uint64(rtt / sameDistance)) //nolint:gosec // not negative
		if id != h.current {
			r[3] = 1
		}
		rank[id] = r
	}
	out := slices.Clone(h.list)
	slices.SortStableFunc(out, func(a, b p2p.PeerID) int {
		for i := range rank[a] {
			if c := cmp.Compare(rank[a][i], rank[b][i]); c != 0 {
				return c
			}
		}
		return 0
	})
	return out
}

// wrote notes that the storehouse has built, fetched or taken something for this machine.
func (h *houses) wrote() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wroteAt = time.Now()
}

// maxAge is how old an answer about what is valid may be, in milliseconds: not so old
// that it could miss what this machine had the storehouse do.
func (h *houses) maxAge() uint32 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return uint32(min(time.Since(h.wroteAt), oldAnswer).Milliseconds()) //nolint:gosec // within bounds
}

// is reports whether a machine is one of them.
func (h *houses) is(id p2p.PeerID) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Contains(h.list, id)
}

// first is the server to ask.
func (h *houses) first() p2p.PeerID {
	if list := h.order(); len(list) > 0 {
		return list[0]
	}
	return ""
}

// answered notes that a server is there.
func (h *houses) answered(id p2p.PeerID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.current = id
	delete(h.down, id)
}

// failed notes that a server did not answer: for a while the others are asked first.
func (h *houses) failed(id p2p.PeerID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if slices.Contains(h.list, id) {
		h.down[id] = time.Now().Add(houseDown)
	}
}

// idsOf names machines.
func idsOf(list []p2p.PeerAddr) []p2p.PeerID {
	ids := make([]p2p.PeerID, len(list))
	for i, p := range list {
		ids[i] = p.ID
	}
	return ids
}

// call asks one server after the other, best first, until one has answered: with
// an error, too, unless it says that it cannot answer now. One that takes long
// gets half of the time that is left.
func (h *houses) call(ctx context.Context, ask func(ctx context.Context, house p2p.PeerID) error) error {
	var failed []error
	order := h.order()
	for i, id := range order {
		attempt, cancel := patience(ctx, i == len(order)-1)
		err := api.FromConnect(ask(attempt, id))
		cancel()
		switch {
		case ctx.Err() != nil && err != nil:
			return because(append(failed, err)...)
		case !away(err):
			h.answered(id)
			return err
		}
		h.failed(id)
		failed = append(failed, err)
	}
	if len(failed) == 0 {
		return fmt.Errorf("no server of the storehouse is known: %w", flox.ErrUnreachable)
	}
	return because(failed...)
}

// patience bounds one attempt, if others are left.
func patience(ctx context.Context, last bool) (context.Context, context.CancelFunc) {
	if last {
		return context.WithCancel(ctx)
	}
	wait := 2 * houseHedge
	if at, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(at)/2)
	}
	return context.WithTimeout(ctx, wait)
}

// away reports whether an error means that another server may answer.
func away(err error) bool {
	return errors.Is(err, flox.ErrUnreachable) || errors.Is(err, flox.ErrClosed) || errors.Is(err, flox.ErrFull) || errors.Is(err, flox.ErrDenied) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}
