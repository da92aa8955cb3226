package agent

import (
	"sync/atomic"

	"google.golang.org/protobuf/proto"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

// traffic counts what came in and where from, since the agent started.
type traffic struct {
	tiers     [p2p.TierStorehouse + 1]atomic.Uint64 // plain bytes by tier
	wire      atomic.Uint64
	factBytes atomic.Uint64
	manifests atomic.Uint64 // plain bytes of manifest blocks, part of tiers
	trips     trips
}

// trips counts the round trips that readers waited for one after the other: a
// question asked while the answer to another is awaited is part of the same trip.
type trips struct{ done atomic.Uint64 }

// next is the number of a trip that begins now: one more than what was waited for so far.
func (t *trips) next() uint64 { return t.done.Load() + 1 }

// waited says that a reader waited for a trip to its end.
func (t *trips) waited(n uint64) {
	for {
		done := t.done.Load()
		if n <= done || t.done.CompareAndSwap(done, n) {
			return
		}
	}
}

// block counts a delivered block of size plain bytes.
func (t *traffic) block(size int, from p2p.Source, manifest bool) {
	if int(from.Tier) < len(t.tiers) {
		t.tiers[from.Tier].Add(uint64(size))
	}
	t.wire.Add(uint64(max(from.Wire, 0)))
	if manifest {
		t.manifests.Add(uint64(size))
	}
}

// facts counts a path info as it came over the wire.
func (t *traffic) facts(m *floxv1.PathInfo) {
	n := uint64(proto.Size(m))
	t.factBytes.Add(n)
	t.wire.Add(n)
}

// trace counts a start trace as it came over the wire.
func (t *traffic) trace(m *floxv1.StartTrace) {
	n := uint64(proto.Size(m)) //nolint:gosec // a size
	t.factBytes.Add(n)
	t.wire.Add(n)
}

func (t *traffic) total() uint64 {
	var n uint64
	for i := range t.tiers {
		n += t.tiers[i].Load()
	}
	return n
}

// message gives the counters; served is what peers got from this machine.
func (t *traffic) message(served uint64) *floxv1.Traffic {
	return &floxv1.Traffic{
		LanBytes:        t.tiers[p2p.TierLAN].Load(),
		SiteBytes:       t.tiers[p2p.TierSite].Load(),
		FarBytes:        t.tiers[p2p.TierFar].Load(),
		StorehouseBytes: t.tiers[p2p.TierStorehouse].Load(),
		WireBytes:       t.wire.Load(),
		FactBytes:       t.factBytes.Load(),
		ManifestBytes:   t.manifests.Load(),
		ServedBytes:     served,
		RoundTrips:      t.trips.done.Load(),
	}
}
