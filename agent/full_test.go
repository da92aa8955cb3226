package agent

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox/fuse"
)

// Threads count as their process, who has most is named first, and nothing is said
// of a moment.
func TestFullMountNamesWhoFillsIt(t *testing.T) {
	t.Parallel()
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil || len(threads) < 2 {
		t.Fatalf("%d threads, %v", len(threads), err)
	}
	now := time.Now()
	var waiting []fuse.Wait
	add := func(pid uint32, n int) {
		for range n {
			waiting = append(waiting, fuse.Wait{PID: pid, Since: now.Add(-2 * time.Second)})
		}
	}
	add(1<<22-1, 2) // gone
	mine := 0
	for _, thread := range threads {
		var tid uint32
		if _, err := fmt.Sscan(thread.Name(), &tid); err != nil {
			t.Fatal(err)
		}
		add(tid, 3)
		mine += 3
	}
	for i := range uint32(3) {
		add(1<<22-2-i, 1)
	}
	said := fullOf(len(waiting), waiting, now, 30*time.Second)
	me, others := fmt.Sprintf("(%d of %s[%d], 2 of ?[", mine, command(uint32(os.Getpid())), os.Getpid()), ", 2 of others)"
	if !strings.Contains(said, me) || !strings.Contains(said, others) || !strings.Contains(said, "30s") {
		t.Errorf("%q has no %q, %q", said, me, others)
	}
	if said := fullOf(len(waiting), waiting, now.Add(-1500*time.Millisecond), 30*time.Second); said != "" {
		t.Errorf("full for a moment: %q", said)
	}
}
