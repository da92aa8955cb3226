package worker

import (
	"io"
	"sync"
	"time"
)

const (
	// Sizes of the buffers a connection reads into. Most requests are shorter than
	// the small one; who fills it gets the large one while that lasts.
	smallRead = 4 << 10
	largeRead = 64 << 10
	// lookAfter is how long an operation may do something else than read before
	// somebody reads ahead for it.
	lookAfter = 10 * time.Millisecond
)

// input is what a connection's operations read from. Who reads waits for the
// client itself: a goroutine in between costs a short question more than its
// answer. Only while an operation is at something else for longer, one buffer is
// read ahead, so that a client that hangs up is noticed.
type input struct {
	r    io.Reader
	over func(error) // called once, when r ends
	look *time.Timer // calls readAhead
	buf  []byte
	cur  []byte // what is left in buf
	err  error  // why r ended

	mu      sync.Mutex
	turn    uint64 // how often fill has read
	armed   bool   // look goes off, for the turn that since is
	since   uint64
	reading bool          // by fill
	closed  bool          // nobody begins to read
	ahead   chan struct{} // closed when readAhead has read; nil = it does not
	next    []byte        // what it has read
	failed  error         // what it met
}

func newInput(r io.Reader, over func(error)) *input {
	in := &input{r: r, over: over, buf: make([]byte, smallRead)}
	in.armed = true
	in.look = time.AfterFunc(lookAfter, in.readAhead)
	return in
}

// close waits until nobody reads ahead; r must have been closed.
func (in *input) close() {
	in.mu.Lock()
	in.closed = true
	ahead := in.ahead
	in.mu.Unlock()
	in.look.Stop()
	if ahead != nil {
		<-ahead
	}
}

// readAhead reads for an operation that is at something else. The timer is not set
// anew for each read, which costs a short question a good part of its answer: it goes
// off now and then while the client asks, and looks whether that is still the same
// operation.
func (in *input) readAhead() {
	in.mu.Lock()
	in.armed = false
	if in.reading || in.closed || in.ahead != nil {
		in.mu.Unlock()
		return
	}
	if in.since != in.turn {
		in.arm()
		in.mu.Unlock()
		return
	}
	done := make(chan struct{})
	in.ahead = done
	in.mu.Unlock()
	defer close(done)
	buf := make([]byte, smallRead)
	n, err := in.r.Read(buf)
	in.next, in.failed = buf[:n], err
	if err != nil {
		in.over(err)
	}
}

// arm sets the timer, unless it is; in.mu is held.
func (in *input) arm() {
	if !in.armed && !in.closed {
		in.armed, in.since = true, in.turn
		in.look.Reset(lookAfter)
	}
}

// Read gives what is here, else waits for the client.
func (in *input) Read(p []byte) (int, error) {
	for len(in.cur) == 0 && len(p) > 0 {
		if in.err != nil {
			return 0, in.err
		}
		in.fill()
	}
	n := copy(p, in.cur)
	in.cur = in.cur[n:]
	return n, nil
}

// fill takes what was read ahead, else reads.
func (in *input) fill() {
	in.mu.Lock()
	ahead := in.ahead
	in.reading = ahead == nil
	in.mu.Unlock()
	if ahead != nil {
		<-ahead
		in.cur, in.err = in.next, in.failed
		in.next = nil
	} else {
		n, err := in.r.Read(in.buf)
		in.cur, in.err = in.buf[:n], err
		if err != nil {
			in.over(err)
		}
		switch { // cur keeps the one it is in
		case n == smallRead:
			in.buf = make([]byte, largeRead)
		case n < smallRead && len(in.buf) == largeRead:
			in.buf = make([]byte, smallRead)
		}
	}
	in.mu.Lock()
	in.ahead, in.reading = nil, false
	in.turn++
	if in.err == nil {
		in.arm()
	}
	in.mu.Unlock()
}
