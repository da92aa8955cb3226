package main

import (
	"math/rand/v2"
	"slices"
)

// resamples is how often the bootstrap draws.
const resamples = 10000

// pairs are measurements of us and of the peer, taken one after the other.
type pairs struct{ ours, peer []float64 }

func (p *pairs) add(ours, peer float64) {
	p.ours, p.peer = append(p.ours, ours), append(p.peer, peer)
}

// ratios are ours / peer of each pair.
func (p *pairs) ratios() []float64 {
	r := make([]float64, len(p.ours))
	for i := range r {
		r[i] = p.ours[i] / p.peer[i]
	}
	return r
}

// row gives medians, with the interval of the ratio. The caller says whether the
// target is met.
func (p *pairs) row(name, unit, peerName string) Row {
	ratios := p.ratios()
	row := Row{
		Name: name, Unit: unit, Ours: median(p.ours), Peer: median(p.peer), PeerName: peerName,
		Ratio: median(ratios), Rounds: len(ratios), Target: "publish", Met: true,
	}
	row.Low, row.High = interval(ratios)
	return row
}

// interval is the 95 % interval of the median, by bootstrap: the middle of the
// medians of samples drawn, with replacement, from what was measured. It draws
// the same every time.
func interval(v []float64) (low, high float64) {
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // no secret
	medians := make([]float64, resamples)
	sample := make([]float64, len(v))
	for i := range medians {
		for j := range sample {
			sample[j] = v[random.IntN(len(v))]
		}
		slices.Sort(sample)
		medians[i] = sample[len(sample)/2]
	}
	slices.Sort(medians)
	return medians[resamples*25/1000], medians[resamples*975/1000]
}
