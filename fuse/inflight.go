package fuse

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/floxctl/flox"
)

const (
	// killPoll is how often a request whose caller got a signal is looked at
	// again: the kernel tells of the first signal only, and the one that kills
	// may come later.
	killPoll = 100 * time.Millisecond
	// earlyMax bounds the memory of interrupts that overtook their request.
	earlyMax = 64
)

// request is one request of the kernel from when it is read until it is
// answered. It carries a context because that is what the request is: go-fuse
// hands its file system the request's number only.
type request struct {
	header
	name   string // LOOKUP
	since  time.Time
	ctx    context.Context
	cancel context.CancelCauseFunc

	interrupted bool // guarded by requests.mu
}

// reader says who waits, to the store.
func (r *request) reader() flox.Reader { return flox.Reader{PID: r.pid, UID: r.uid, Node: r.node} }

// requests knows the requests being worked on.
type requests struct {
	// kick wakes the watcher; a pending kick is as good as many.
	kick chan struct{}

	mu    sync.Mutex
	byID  map[uint64]*request
	early []uint64 // interrupts of requests that were not here yet
	full  bool     // nothing is read from the kernel, not even interrupts
}

func newRequests() *requests {
	return &requests{kick: make(chan struct{}, 1), byID: make(map[uint64]*request)}
}

// add begins a request; the caller must call done. One that an earlier server
// was sent may have been interrupted there.
func (t *requests) add(ctx context.Context, h header, name string, again bool) *request {
	r := &request{header: h, name: name, since: time.Now(), interrupted: again}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.byID[h.unique] = r
	if i := slices.Index(t.early, h.unique); i >= 0 {
		t.early = slices.Delete(t.early, i, i+1)
		r.interrupted = true
	}
	if r.interrupted {
		t.wake()
	}
	return r
}

// done ends a request.
func (t *requests) done(r *request) {
	r.cancel(nil)
	t.mu.Lock()
	defer t.mu.Unlock()
	// A request that was sent again has another number, so this is r itself.
	delete(t.byID, r.unique)
}

// get finds a request by its number.
func (t *requests) get(unique uint64) *request {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byID[unique]
}

// interrupt notes that the caller of a request got a signal.
func (t *requests) interrupt(unique uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r := t.byID[unique]; r != nil {
		r.interrupted = true
		t.wake()
		return
	}
	// The request was answered meanwhile, or another reader of the device has it
	// in hand and adds it in a moment.
	if len(t.early) == earlyMax {
		t.early = slices.Delete(t.early, 0, 1)
	}
	t.early = append(t.early, unique)
}

// setFull notes whether the device is being read.
func (t *requests) setFull(full bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.full = full
	if full {
		t.wake()
	}
}

func (t *requests) isFull(limit int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.full || len(t.byID) >= limit
}

func (t *requests) wake() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// watch frees killed callers until ctx is done. A signal as such ends nothing:
// the kernel sends an INTERRUPT for any signal, and EINTR would make open(2)
// fail in a living program, and a page fault that is interrupted again and
// again never end.
func (t *requests) watch(ctx context.Context) {
	timer := time.NewTimer(killPoll)
	defer timer.Stop()
	for {
		if t.freeKilled() {
			timer.Reset(killPoll)
		} else {
			timer.Stop()
		}
		select {
		case <-ctx.Done():
			return
		case <-t.kick:
		case <-timer.C:
		}
	}
}

// freeKilled cancels the requests of callers with SIGKILL pending and reports
// whether some are left to look at.
func (t *requests) freeKilled() bool {
	t.mu.Lock()
	var suspects []*request
	for _, r := range t.byID {
		if r.pid != 0 && (r.interrupted || t.full) {
			suspects = append(suspects, r)
		}
	}
	t.mu.Unlock()
	left := false
	for _, r := range suspects {
		if Killed(r.pid) {
			r.cancel(errKilled)
		} else {
			left = true
		}
	}
	return left
}

// reading reports whether a READ of the node is being worked on.
func (t *requests) reading(node uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range t.byID {
		if r.node == node && r.op == opRead {
			return true
		}
	}
	return false
}

func (t *requests) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.byID)
}

func (t *requests) waiting() []Wait {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]Wait, 0, len(t.byID))
	for _, r := range t.byID {
		list = append(list, Wait{PID: r.pid, Node: r.node, Op: opNames[slot(r.op)], Name: r.name, Since: r.since})
	}
	slices.SortFunc(list, func(a, b Wait) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Node, b.Node)) })
	return list
}

// Killed reports whether SIGKILL is pending for a thread. The kernel makes it
// pending for every thread of a process that dies of any signal.
func Killed(tid uint32) bool {
	// A status is about 1.5 KiB; the masks are in its last third.
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return false // not a thread of our PID namespace: let it wait
	}
	return killPending(b)
}

// killPending looks for signal 9 in the pending masks of a /proc/PID/status.
func killPending(status []byte) bool {
	const sigkill = 1 << (9 - 1)
	for _, key := range [][]byte{[]byte("\nSigPnd:"), []byte("\nShdPnd:")} {
		_, rest, ok := bytes.Cut(status, key)
		if !ok {
			continue
		}
		line, _, _ := bytes.Cut(rest, []byte("\n"))
		mask, err := strconv.ParseUint(string(bytes.TrimSpace(line)), 16, 64)
		if err == nil && mask&sigkill != 0 {
			return true
		}
	}
	return false
}
