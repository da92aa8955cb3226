package raftsim

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// stretch is how long one cluster lives, so that histories stay in memory.
const stretch = 2 * time.Hour

// Stretches calls run for each cluster of a simulation that takes so long; briefly
// with -short, as under the race detector; and as many hours as HOURS says. SEED
// repeats a run's faults.
func Stretches(t *testing.T, length, briefly time.Duration, run func(cfg Config, length time.Duration)) {
	t.Helper()
	if testing.Short() {
		length = briefly
	}
	if h, err := strconv.ParseFloat(os.Getenv("HOURS"), 64); err == nil {
		length = time.Duration(h * float64(time.Hour))
	}
	seed := uint64(time.Now().UnixNano()) //nolint:gosec // any number will do
	if n, err := strconv.ParseUint(os.Getenv("SEED"), 10, 64); err == nil {
		seed = n
	}
	t.Logf("SEED=%d", seed)
	root := Dir(t)
	for done := time.Duration(0); done < length && !t.Failed(); done += stretch {
		dir := filepath.Join(root, fmt.Sprint(done.Hours()))
		run(Config{Dir: dir, Seed: seed + uint64(done)}, min(stretch, length-done)) //nolint:gosec // not negative
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}
}
