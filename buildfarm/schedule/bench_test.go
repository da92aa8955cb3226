package schedule

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// BenchmarkMakespan reports how long graphs take on a simulated farm, against the least
// that there can be and against first in, first out.
func BenchmarkMakespan(b *testing.B) {
	var ratios, against []float64
	for i := 0; b.Loop(); i++ {
		r, a := makespans(b, uint64(i)) //nolint:gosec // small
		ratios, against = append(ratios, r), append(against, a)
	}
	mean := func(all []float64) (sum float64) {
		for _, v := range all {
			sum += v / float64(len(all))
		}
		return sum
	}
	b.ReportMetric(mean(ratios), "of-least")
	b.ReportMetric(slices.Max(ratios), "of-least-worst")
	b.ReportMetric(mean(against), "of-fifo")
	b.ReportMetric(slices.Max(against), "of-fifo-worst")
}

// manyBuilds makes a queue: graphs of a hundred builds each, of many owners.
func manyBuilds(n int) (graphs [][]Build) {
	r := rand.New(rand.NewPCG(1, 2))
	features := [][]string{nil, nil, nil, {"kvm"}, {"big-parallel"}, {"big-parallel", "kvm"}}
	for g := range n / 100 {
		var graph []Build
		for i := range 100 {
			b := Build{
				ID: fmt.Sprintf("%d-%d", g, i), Owner: fmt.Sprint("owner", g%500), System: []string{linux, linux, arm}[r.IntN(3)], Features: features[r.IntN(len(features))],
				Memory: uint64(r.IntN(4)) << 30, Expect: time.Duration(1+r.IntN(300)) * time.Second, Interactive: g%20 == 0, Priority: g % 3, Queued: start.Add(time.Duration(g) * time.Second),
			}
			for range min(i, r.IntN(4)) {
				if in := fmt.Sprintf("%d-%d", g, r.IntN(i)); !slices.Contains(b.Needs, in) {
					b.Needs = append(b.Needs, in)
				}
			}
			for range 20 {
				b.Inputs = append(b.Inputs, Input{r.Uint64N(5000), r.Uint64N(50 << 20)})
			}
			graph = append(graph, b)
		}
		graphs = append(graphs, graph)
	}
	return graphs
}

// BenchmarkQueue reports what enqueuing and deciding cost with a hundred thousand builds
// in the queue and two hundred workers.
func BenchmarkQueue(b *testing.B) {
	const many = 100_000
	graphs := manyBuilds(many)
	var enqueue time.Duration
	var took []time.Duration
	for b.Loop() {
		s, now := New(Config{}), start.Add(time.Hour)
		for i := range 200 {
			w := Worker{ID: fmt.Sprint("w", i), Systems: []string{[]string{linux, arm}[i%2]}, Features: []string{"kvm", "big-parallel"}[:i%3], Slots: 4, Memory: 16 << 30, Speed: float64(1 + i%3)}
			if err := s.SetWorker(w); err != nil {
				b.Fatal(err)
			}
		}
		began := time.Now()
		for _, g := range graphs {
			if err := s.Add(g); err != nil {
				b.Fatal(err)
			}
		}
		enqueue += time.Since(began)
		var running []string
		for range 20_000 {
			if len(running) >= 700 {
				now = now.Add(time.Second)
				s.Done(running[0], now, time.Minute)
				running = running[1:]
			}
			began := time.Now()
			l, ok := s.Next(now)
			took = append(took, time.Since(began))
			if ok {
				running = append(running, l.Build)
			}
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(many*b.N)/enqueue.Seconds(), "enqueued/s")
	b.ReportMetric(took[len(took)/2].Seconds()*1e3, "decision-p50-ms")
	b.ReportMetric(took[len(took)*99/100].Seconds()*1e3, "decision-p99-ms")
	b.ReportMetric(took[len(took)-1].Seconds()*1e3, "decision-max-ms")
}
