package agent

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"os"
	"strconv"

	flox "github.com/floxctl/flox"
)

const (
	// maxLookups bounds the look-ups under way; more wait for a place.
	maxLookups = 512
	// spareLookups are places beside those, of which nobody has more than
	// fewLookups: who has next to nothing comes in, whatever others wait for.
	spareLookups = 128
	fewLookups   = 4
)

// asker is whose look-up one is: of a user and, of those, a process. Who asks
// from elsewhere than the mount is all one.
type asker struct{ uid, process uint32 }

// nobodysUID is not one of a user.
const nobodysUID = math.MaxUint32

var elsewhere = asker{uid: nobodysUID}

// askerOf says who a reader is. The kernel names the thread.
func askerOf(who flox.Reader) asker {
	if who.PID == 0 {
		return asker{uid: who.UID}
	}
	a := asker{who.UID, who.PID}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", who.PID))
	if err != nil {
		return a
	}
	_, rest, _ := bytes.Cut(status, []byte("\nTgid:"))
	rest, _, _ = bytes.Cut(rest, []byte("\n"))
	if process, err := strconv.ParseUint(string(bytes.TrimSpace(rest)), 10, 32); err == nil {
		a.process = uint32(process)
	}
	return a
}

// places are those of the look-ups under way, so shared that a user or a process
// whose names all hang keeps nobody else from looking up theirs. The resolver's
// mutex guards it.
type places struct {
	most, spare int
	held        int
	users       map[uint32]int
	processes   map[asker]int
	freed       chan struct{} // closed when one was given back
}

func newPlaces(most, spare int) *places {
	return &places{most: most, spare: spare, users: make(map[uint32]int), processes: make(map[asker]int), freed: make(chan struct{})}
}

// take takes a place if there is one for a. Of the usual ones a process has at
// most a quarter and a user half; one that has few gets one of the spare, and a
// user no more of those for ever new processes.
func (p *places) take(a asker) bool {
	user, process := p.users[a.uid], p.processes[a]
	usual := p.held < p.most && user < p.most/2 && (process < p.most/4 || a == elsewhere)
	few := p.held < p.most+p.spare && (user < fewLookups || process < fewLookups && user < p.most/2+p.spare)
	if !usual && !few {
		return false
	}
	p.held++
	p.users[a.uid]++
	p.processes[a]++
	return true
}

func (p *places) give(a asker) {
	p.held--
	if p.users[a.uid]--; p.users[a.uid] == 0 {
		delete(p.users, a.uid)
	}
	if p.processes[a]--; p.processes[a] == 0 {
		delete(p.processes, a)
	}
	close(p.freed)
	p.freed = make(chan struct{})
}

// join starts the look-up of p or finds the one under way; leave it again.
func (r *resolver) join(ctx context.Context, p flox.StorePath, who asker) (*lookupFlight, error) {
	hash := p.HashPart()
	for {
		r.mu.Lock()
		if f, ok := r.flights[hash]; ok {
			f.waiting++
			r.mu.Unlock()
			return f, nil
		}
		if r.places.take(who) {
			f := r.fly(p, who)
			r.mu.Unlock()
			return f, nil
		}
		freed := r.places.freed
		r.dropOne(who)
		r.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: too many other look-ups wait already: %w", p, flox.ErrUnreachable)
		}
	}
}

// leave says that one who waited for f does no more. The look-up goes on, for
// when they ask again, unless its place is needed.
func (r *resolver) leave(f *lookupFlight) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f.waiting--
}

// fly begins a look-up that has a place; r.mu is held.
func (r *resolver) fly(p flox.StorePath, who asker) *lookupFlight {
	hash := p.HashPart()
	life, cancel := context.WithTimeout(r.life, lookupLife)
	r.began++
	f := &lookupFlight{done: make(chan struct{}), who: who, waiting: 1, number: r.began, drop: cancel}
	r.flights[hash] = f
	r.work.Go(func() { // bounded by r.places
		defer cancel()
		f.info, f.err = r.search(life, p, f)
		r.mu.Lock()
		if r.flights[hash] == f {
			delete(r.flights, hash)
		}
		r.places.give(who)
		r.mu.Unlock()
		close(f.done)
	})
	return f
}

// dropOne ends the oldest look-up nobody waits for any more, of the same user or,
// where all places are taken, of anybody; r.mu is held.
func (r *resolver) dropOne(who asker) {
	var oldest *lookupFlight
	var of string
	for hash, f := range r.flights {
		mine := f.who.uid == who.uid || r.places.held >= r.places.most
		if f.waiting == 0 && mine && (oldest == nil || f.number < oldest.number) {
			oldest, of = f, hash
		}
	}
	if oldest != nil {
		delete(r.flights, of)
		oldest.drop()
	}
}
