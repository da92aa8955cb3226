package queue

import (
	"fmt"
	"slices"
	"testing"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// BenchmarkQueue reports how fast a server that is alone takes in a hundred thousand
// builds, a thousand with a command, and what a lease and the end of one take then, each
// a command of its own.
func BenchmarkQueue(b *testing.B) {
	const many, batch, leases = 100_000, 1000, 1000
	var spent time.Duration
	var took []time.Duration
	for b.Loop() {
		l := newLog(b, Processor{})
		l.register("w")
		var commands []*floxv1.QueueCommand
		for w := range many / batch {
			var names []string
			for i := range batch {
				name := fmt.Sprintf("%d0%d", w+1, i)
				if i%10 > 0 {
					name += fmt.Sprintf(":%d0%d", w+1, i-1)
				}
				names = append(names, name)
			}
			commands = append(commands, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: enqueue(fmt.Sprint("want", w), names...)}})
		}
		began := time.Now()
		for _, c := range commands {
			l.must(c)
		}
		spent += time.Since(began)
		timed := func(do func()) {
			began := time.Now()
			do()
			took = append(took, time.Since(began))
		}
		for i := range leases {
			name, token := fmt.Sprintf("%d0%d", i%(many/batch)+1, i/(many/batch)*10), uint64(0)
			timed(func() { token = l.lease(name, "w") })
			timed(func() {
				if token == 0 || l.finish(name, token, 0) {
					b.Fatal(name)
				}
			})
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(many*b.N)/spent.Seconds(), "enqueued/s")
	b.ReportMetric(took[len(took)/2].Seconds()*1e3, "command-p50-ms")
	b.ReportMetric(took[len(took)*99/100].Seconds()*1e3, "command-p99-ms")
}
