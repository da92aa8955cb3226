package p2p

import (
	"context"
	"fmt"
	"syscall"
	"testing"
	"time"
)

// BenchmarkPair moves blocks between two hosts of one process over loopback,
// verified: both ends' CPU time is in cpu-s/GiB.
func BenchmarkPair(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10, 256 << 10, MaxBlock} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			blocks := randomBlocks(1, min(64<<20/size, 4096), size)
			held := newMemory(blocks...)
			from := start(b, 500, func(c *Config) { c.Blocks = held })
			me := start(b, 501, func(c *Config) { c.patience = time.Minute })
			join(b, me, from)
			wants := wantsOf(blocks)
			b.SetBytes(int64(len(blocks) * size))
			before := cpuTime(b)
			for b.Loop() {
				n := 0
				if err := me.Fetch(context.Background(), wants, Hints{}, func(int, []byte, Source) { n++ }); err != nil || n != len(wants) {
					b.Fatal(n, err)
				}
			}
			gib := float64(b.N) * float64(len(blocks)*size) / (1 << 30)
			b.ReportMetric((cpuTime(b)-before).Seconds()/gib, "cpu-s/GiB")
		})
	}
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
