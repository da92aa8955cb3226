package agent

import (
	"context"
	"fmt"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p"
)

// maxHousesAsked bounds the servers that one round of a look-up asks.
const maxHousesAsked = 3

// askStorehouse asks the servers of the storehouse: the best one, and the next
// when that one says that it cannot answer or takes too long. The first that
// knows decides.
func (r *resolver) askStorehouse(ctx context.Context, p flox.StorePath) (*flox.PathInfo, error) {
	type answer struct {
		from p2p.PeerID
		info *flox.PathInfo
		err  error
	}
	order := r.houses.order()
	order = order[:min(len(order), maxHousesAsked)]
	answers := make(chan answer, maxHousesAsked)
	next := time.NewTimer(0)
	defer next.Stop()
	waiting := make(map[p2p.PeerID]bool, len(order))
	var failed []error
	for len(order) > 0 || len(waiting) > 0 {
		var now <-chan time.Time
		if len(order) > 0 {
			now = next.C
		}
		select {
		case <-now:
			house := order[0]
			order, waiting[house] = order[1:], true
			r.work.Go(func() {
				info, err := r.askHouse(ctx, house, p)
				answers <- answer{house, info, err}
			})
			next.Reset(houseHedge)
		case a := <-answers:
			delete(waiting, a.from)
			if final(a.err) {
				for slow := range waiting { // it was asked first
					r.houses.failed(slow)
				}
				r.houses.answered(a.from)
				return a.info, a.err
			}
			r.houses.failed(a.from)
			failed = append(failed, a.err)
			next.Reset(0)
		case <-ctx.Done():
			failed = append(failed, fmt.Errorf("storehouse: no answer about %s: %w", p, flox.ErrUnreachable))
			return nil, because(failed...)
		}
	}
	return nil, because(append(failed, flox.ErrUnreachable)...)
}

// overtake lets a question to the storehouse go on that a peer was faster with: peers
// tell of one path, and its answer brings all that path refers to, each of which would
// else be asked for in turn. untie takes it from whoever asked.
func (r *resolver) overtake(question context.Context, untie func() bool) {
	if r.overtaken.Add(1) > maxOvertaken || !untie() {
		r.overtaken.Add(-1)
		return
	}
	context.AfterFunc(question, func() { r.overtaken.Add(-1) })
}

// farthestHouse bounds what is taken for the way to the storehouse.
const farthestHouse = 500 * time.Millisecond

// distance is how long the way to the server that is asked is and back, 0 = not known.
func (h *houses) distance() time.Duration {
	rtt, connected := h.reach(h.first())
	if !connected {
		return 0
	}
	return min(rtt, farthestHouse)
}
