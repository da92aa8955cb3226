package warden

import (
	"sync"
	"time"
)

const (
	// readPatience is how long a file system may take to say what a link points to.
	readPatience = 2 * time.Second
	// maxStuck bounds the reads that no file system answers, each of which costs a
	// thread until it does, and maxStuckOf those of one owner: nobody is to use
	// them up for others.
	maxStuck, maxStuckOf = 256, 4
	// maxStuckProcesses is maxStuckOf for what a process's memory is asked: one that
	// waits for bytes may have many siblings that do.
	maxStuckProcesses = 32
	// roundPatience is how long one round over all processes waits in all for those
	// that do not answer; from then on each gets leastPatience.
	roundPatience, leastPatience = 4 * time.Second, 50 * time.Millisecond
)

// reads does what may wait for a file system of somebody's that does not answer.
// The zero value is ready.
type reads struct {
	patience time.Duration // 0 = readPatience
	share    int           // of one owner; 0 = maxStuckOf

	mu     sync.Mutex
	stuck  map[string]bool
	owners map[string]int // of stuck
}

// patiently reads what has a name and is of an owner; false: it takes too long,
// or did before and still does, or too much of that owner does. read is then left
// behind, and what it gives is lost.
func patiently[T any](r *reads, name, owner string, read func() T) (T, bool) {
	patience := r.patience
	if patience == 0 {
		patience = readPatience
	}
	return readWithin(r, patience, name, owner, read)
}

// round bounds how long the reads of one round are waited for together.
type round struct{ spent time.Duration }

// inRound is patiently for one of many reads.
func inRound[T any](o *round, r *reads, name, owner string, read func() T) (T, bool) {
	patience := r.patience
	if patience == 0 {
		patience = readPatience
	}
	began := time.Now()
	v, ok := readWithin(r, max(min(patience, roundPatience-o.spent), leastPatience), name, owner, read)
	if !ok {
		o.spent += time.Since(began)
	}
	return v, ok
}

func readWithin[T any](r *reads, patience time.Duration, name, owner string, read func() T) (T, bool) {
	var none T
	if !r.mayRead(name, owner) {
		return none, false
	}
	done := make(chan T, 1)
	given := make(chan bool, 1) // whether it is stuck
	go func() {
		done <- read()
		if <-given {
			r.freed(name, owner)
		}
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case v := <-done:
		given <- false
		return v, true
	case <-timer.C:
		r.stick(name, owner)
		given <- true
		return none, false
	}
}

func (r *reads) mayRead(name, owner string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	share := r.share
	if share == 0 {
		share = maxStuckOf
	}
	return !r.stuck[name] && len(r.stuck) < maxStuck && r.owners[owner] < share
}

func (r *reads) stick(name, owner string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stuck == nil {
		r.stuck, r.owners = make(map[string]bool), make(map[string]int)
	}
	r.stuck[name] = true
	r.owners[owner]++
}

func (r *reads) freed(name, owner string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.stuck, name)
	if r.owners[owner]--; r.owners[owner] == 0 {
		delete(r.owners, owner)
	}
}
