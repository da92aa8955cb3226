package schedule

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// The graph and the farm of the simulation.
const (
	simBuilds  = 10_000
	simWorkers = 200
	simNoise   = 0.3 // by so much, about, the times expected are wrong
)

// simGraph is a graph like those of packages: a few builds that everything needs, chains
// through compilers and libraries, and many small ones at the end. Times are mostly short;
// a few are long. real is how long each takes in truth.
func simGraph(seed uint64) (builds []Build, real []time.Duration) {
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range simBuilds {
		b := Build{ID: fmt.Sprint(i), Owner: "a", System: "x86_64-linux", Queued: start}
		for range min(i, 1+r.IntN(5)) {
			// Mostly something near, sometimes one of the first.
			in := i - 1 - int(math.Abs(r.NormFloat64())*4000)
			if in < 0 || r.IntN(4) == 0 {
				in = r.IntN(min(i, 60))
			}
			if id := fmt.Sprint(in); !slices.Contains(b.Needs, id) {
				b.Needs = append(b.Needs, id)
			}
		}
		took := time.Duration(math.Exp(3.0+1.2*r.NormFloat64()) * float64(time.Second)) // 25 s in the middle
		took = min(took, 15*time.Minute)
		b.Expect = time.Duration(float64(took) * math.Exp(simNoise*r.NormFloat64()))
		builds, real = append(builds, b), append(real, took)
	}
	return builds, real
}

// bound is a time that no order of builds can beat: that of the longest chain, or of all
// work on all slots.
func bound(builds []Build, real []time.Duration) time.Duration {
	ends := map[string]time.Duration{}
	longest, all := time.Duration(0), time.Duration(0)
	for i, b := range builds {
		for _, in := range b.Needs {
			ends[b.ID] = max(ends[b.ID], ends[in])
		}
		ends[b.ID] += real[i]
		longest, all = max(longest, ends[b.ID]), all+real[i]
	}
	return max(longest, all/simWorkers)
}

// ending is a build that runs.
type ending struct {
	i  int
	at time.Duration
}

// simulate builds everything with those that next names when a worker is free, -1 = none
// now; done is told of the end of each. It gives how long all of it took.
func simulate(t testing.TB, real []time.Duration, next func(now time.Duration) int, done func(i int, now time.Duration)) time.Duration {
	t.Helper()
	var running []ending // soonest last
	now, built := time.Duration(0), 0
	for built < len(real) {
		for len(running) < simWorkers {
			i := next(now)
			if i < 0 {
				break
			}
			e := ending{i, now + real[i]}
			at, _ := slices.BinarySearchFunc(running, e, func(a, b ending) int { return int(b.at - a.at) })
			running = slices.Insert(running, at, e)
		}
		if len(running) == 0 {
			t.Fatalf("after %d of %d builds nothing is ready", built, len(real))
		}
		e := running[len(running)-1]
		running = running[:len(running)-1]
		now = e.at
		done(e.i, now)
		built++
	}
	return now
}

// scheduled is how long a graph takes in the order of a Scheduler.
func scheduled(t testing.TB, builds []Build, real []time.Duration) time.Duration {
	t.Helper()
	s := New(Config{})
	if err := s.Add(builds); err != nil {
		t.Fatal(err)
	}
	for i := range simWorkers {
		if err := s.SetWorker(Worker{ID: fmt.Sprint("w", i), Systems: []string{"x86_64-linux"}, Slots: 1}); err != nil {
			t.Fatal(err)
		}
	}
	began := map[string]time.Duration{}
	return simulate(t, real, func(now time.Duration) int {
		l, ok := s.Next(start.Add(now))
		if !ok {
			return -1
		}
		began[l.Build] = now
		i := 0
		if _, err := fmt.Sscan(l.Build, &i); err != nil {
			t.Fatal(err)
		}
		return i
	}, func(i int, now time.Duration) { s.Done(builds[i].ID, start.Add(now), now-began[builds[i].ID]) })
}

// firstIn is how long a graph takes when what was ready first is built first, and of
// that what was added first.
func firstIn(t testing.TB, builds []Build, real []time.Duration) time.Duration {
	t.Helper()
	unmet, users := make([]int, len(builds)), make([][]int, len(builds))
	var ready []int
	for i, b := range builds {
		unmet[i] = len(b.Needs)
		for _, id := range b.Needs {
			in := 0
			if _, err := fmt.Sscan(id, &in); err != nil {
				t.Fatal(err)
			}
			users[in] = append(users[in], i)
		}
		if unmet[i] == 0 {
			ready = append(ready, i)
		}
	}
	return simulate(t, real, func(time.Duration) int {
		if len(ready) == 0 {
			return -1
		}
		i := ready[0]
		ready = ready[1:]
		return i
	}, func(i int, _ time.Duration) {
		for _, u := range users[i] {
			if unmet[u]--; unmet[u] == 0 {
				ready = append(ready, u)
			}
		}
	})
}

// Ten thousand builds on two hundred workers end, on average of some graphs, within a tenth
// of the time that no order can beat, and well before they do first in, first out, though
// no time is known exactly.
func TestMakespan(t *testing.T) {
	t.Parallel()
	const graphs = 4
	sum := 0.0
	for seed := range uint64(graphs) {
		ratio, against := makespans(t, seed)
		sum += ratio
		if against > 0.95 {
			t.Errorf("graph %d: %.3f times first in, first out, want at most 0.95", seed, against)
		}
	}
	if sum/graphs > 1.10 {
		t.Errorf("%.3f times the least that there can be, want at most 1.10", sum/graphs)
	}
}

// makespans gives how long a graph takes, against the least there can be, and against
// first in, first out.
func makespans(t testing.TB, seed uint64) (ratio, against float64) {
	t.Helper()
	builds, real := simGraph(seed)
	least, ours, fifo := bound(builds, real), scheduled(t, builds, real), firstIn(t, builds, real)
	ratio, against = ours.Seconds()/least.Seconds(), ours.Seconds()/fifo.Seconds()
	t.Logf("graph %d: %s, at least %s (%.3fx), first in, first out %s (%.3fx)", seed, ours.Round(time.Second), least.Round(time.Second), ratio, fifo.Round(time.Second), against)
	return ratio, against
}
