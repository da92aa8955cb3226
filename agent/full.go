package agent

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/fuse"
)

const (
	// fullAfter is how long the first of those that fill the mount waits before
	// anybody is told: it is full for a moment whenever much is read.
	fullAfter = time.Second
	// holdersNamed is how many processes are named then.
	holdersNamed = 3
)

// mountFull says who takes all places for requests of the mount, "" = there is
// room. Whoever else reads what the kernel does not have waits behind them, also
// for what is here.
func (a *Agent) mountFull() string {
	if a.mount == nil {
		return ""
	}
	limit, full := a.mount.Full()
	if !full {
		return ""
	}
	return fullOf(limit, a.mount.Waiting(), time.Now(), a.cfg.ReadTimeout)
}

func fullOf(limit int, waiting []fuse.Wait, now time.Time, timeout time.Duration) string {
	if len(waiting) == 0 || now.Sub(waiting[0].Since) < fullAfter { // the first is the oldest
		return ""
	}
	holders := make(map[uint32]int)
	for _, w := range waiting {
		holders[askerOf(flox.Reader{PID: w.PID}).process]++
	}
	most := slices.SortedFunc(maps.Keys(holders), func(p, q uint32) int {
		return cmp.Or(holders[q]-holders[p], int(p)-int(q))
	})
	var named []string
	others := len(waiting)
	for _, pid := range most[:min(len(most), holdersNamed)] {
		others -= holders[pid]
		named = append(named, fmt.Sprintf("%d of %s[%d]", holders[pid], cmp.Or(command(pid), "?"), pid))
	}
	if others > 0 {
		named = append(named, fmt.Sprintf("%d of others", others))
	}
	return fmt.Sprintf("the mount is full: %d requests wait (%s), and who else reads what is not in the kernel's memory waits behind them; each ends with its bytes or after %s, of mapped files with its bytes; so do those of a process that is ended",
		limit, strings.Join(named, ", "), timeout)
}
