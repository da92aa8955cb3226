package raft

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

const (
	// callTimeout bounds one call to another server.
	callTimeout = 30 * time.Second
	// writeTimeout bounds how long a connection may take nothing before it is given up.
	writeTimeout = 10 * time.Second
	// queuedFrames is how many frames wait for a connection; more wait in their callers.
	queuedFrames = 64
	// maxPeers bounds the connections for calls to other servers.
	maxPeers = 64
)

// peers are the connections for calls to other servers: one each, shared by
// all callers, made when it is needed.
type peers struct {
	layer *streamLayer
	log   *slog.Logger
	ctx   context.Context //nolint:containedctx // ends with the node; the connections outlive the calls that make them
	stop  context.CancelFunc
	work  sync.WaitGroup

	mu   sync.Mutex
	open map[string]*peer
}

func newPeers(layer *streamLayer, log *slog.Logger) *peers {
	ctx, stop := context.WithCancel(context.Background())
	return &peers{layer: layer, log: log, ctx: ctx, stop: stop, open: map[string]*peer{}}
}

// close ends every connection and its callers.
func (p *peers) close() {
	p.stop()
	p.mu.Lock()
	for _, c := range p.open {
		c.end(net.ErrClosed)
	}
	p.open = nil
	p.mu.Unlock()
	p.work.Wait()
}

// peer is the connection to one server.
type peer struct {
	address string
	queue   chan frame
	done    chan struct{} // closed with why
	once    sync.Once

	mu      sync.Mutex
	conn    net.Conn // nil while dialling
	why     error
	next    uint64
	waiting map[uint64]chan *floxv1.ClusterAnswer
}

// end gives the connection up. The first reason counts.
func (c *peer) end(why error) {
	c.once.Do(func() {
		c.mu.Lock()
		c.why = why
		if c.conn != nil {
			c.conn.Close() //nolint:errcheck // the other end is told, or gone
		}
		c.mu.Unlock()
		close(c.done)
	})
}

// dialling reports whether there is no connection yet.
func (c *peer) dialling() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn == nil
}

// get gives the connection to address, which may still be dialling.
func (p *peers) get(address string) (*peer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return nil, fmt.Errorf("calls to other servers: %w", flox.ErrClosed)
	}
	if c := p.open[address]; c != nil {
		return c, nil
	}
	if len(p.open) >= maxPeers {
		return nil, fmt.Errorf("connected to %d servers already: %w", maxPeers, flox.ErrFull)
	}
	c := &peer{address: address, queue: make(chan frame, queuedFrames), done: make(chan struct{}), waiting: map[uint64]chan *floxv1.ClusterAnswer{}}
	p.open[address] = c
	p.work.Go(func() {
		c.end(p.run(c))
		p.mu.Lock()
		if p.open[address] == c {
			delete(p.open, address)
		}
		p.mu.Unlock()
	})
	return c, nil
}

// drop gives up the connection to address: something is wrong with it. One that is
// being dialled ends by itself, and takes several round trips.
func (p *peers) drop(address string) {
	p.mu.Lock()
	c := p.open[address]
	if c != nil && c.dialling() {
		c = nil
	} else {
		delete(p.open, address)
	}
	p.mu.Unlock()
	if c != nil {
		c.end(fmt.Errorf("no answer in time: %w", flox.ErrUnreachable))
	}
}

// run dials and then moves frames until the connection ends.
func (p *peers) run(c *peer) error {
	conn, err := p.layer.dial(c.address, tagCalls, dialTimeout)
	if err != nil {
		return err
	}
	defer conn.Close()
	c.mu.Lock()
	c.conn = conn
	ended := c.why
	c.mu.Unlock()
	if ended != nil {
		return ended
	}
	p.work.Go(func() { c.end(writeFrames(conn, c.queue, c.done)) })
	return c.readAnswers(conn)
}

// writeFrames puts frames out as they come, in as few writes as it can.
func writeFrames(conn net.Conn, queue <-chan frame, done <-chan struct{}) error {
	out := bufio.NewWriterSize(conn, 64<<10)
	for {
		var f frame
		select {
		case f = <-queue:
		case <-done:
			return nil
		}
		if err := conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
			return err
		}
		for more := true; more; {
			if err := f.write(out); err != nil {
				return err
			}
			select {
			case f = <-queue:
			default:
				more = false
			}
		}
		if err := out.Flush(); err != nil {
			return err
		}
	}
}

// readAnswers hands answers to those who wait for them.
func (c *peer) readAnswers(conn net.Conn) error {
	in := bufio.NewReaderSize(conn, 64<<10)
	for {
		id, size, err := readHead(in)
		if err != nil {
			return err
		}
		body := make([]byte, size)
		if _, err := io.ReadFull(in, body); err != nil {
			return err
		}
		a := &floxv1.ClusterAnswer{}
		if err := proto.Unmarshal(body, a); err != nil {
			return fmt.Errorf("answer of %s: %w: %w", c.address, err, flox.ErrBadInput)
		}
		c.mu.Lock()
		w := c.waiting[id]
		delete(c.waiting, id)
		c.mu.Unlock()
		if w != nil {
			w <- a // has room for one
		}
	}
}

// begin gives a call its number and where its answer will come.
func (c *peer) begin() (uint64, <-chan *floxv1.ClusterAnswer) {
	w := make(chan *floxv1.ClusterAnswer, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.next++
	c.waiting[c.next] = w
	return c.next, w
}

func (c *peer) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, id)
}

// call asks the server at address and waits for its answer, for ctx, or for
// superseded to say that the server does not lead any more; nil = it need not.
// superseded also gives a channel that is closed when it is to be asked again.
// Errors: what the other answered; ErrNotLeader if it cannot have got the
// question; ErrUnknownOutcome if it can, and no answer came.
func (p *peers) call(ctx context.Context, address string, m *floxv1.ClusterCall, superseded func() (bool, <-chan struct{})) (*floxv1.ClusterAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	until, _ := ctx.Deadline()
	q := &floxv1.ClusterCall{TimeoutMs: encodeTimeout(time.Until(until)), Call: m.Call}
	c, err := p.get(address)
	if err != nil {
		return nil, err
	}
	id, answer := c.begin()
	defer c.forget(id)
	f, err := newFrame(id, q)
	if err != nil {
		return nil, err
	}
	queue, state := c.queue, "ask" // a nil queue takes nothing: the question is on its way
	for {
		var changed <-chan struct{}
		var why error
		if superseded != nil {
			var gone bool
			if gone, changed = superseded(); gone {
				return nil, fmt.Errorf("%s %s: another server leads now: %w", state, address, c.outcome(queue == nil))
			}
		}
		select {
		case queue <- f:
			queue, state = nil, "answer of"
			continue
		case a := <-answer:
			if a.Failure != nil {
				return a, decodeFailure(a.Failure)
			}
			return a, nil
		case <-changed:
			continue
		case <-c.done:
			why = c.why
		case <-ctx.Done():
			why = ctx.Err()
		}
		return nil, fmt.Errorf("%s %s: %w: %w", state, address, why, c.outcome(queue == nil))
	}
}

// outcome says what is known of a question without an answer.
func (c *peer) outcome(queued bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if queued && c.conn != nil {
		return ErrUnknownOutcome
	}
	return ErrNotLeader
}
