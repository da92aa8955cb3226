package local

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/nix/worker"
)

const (
	// maxConns bounds the connections to the daemon, which forks for each.
	maxConns = 4
	// idleTime is how long a connection stays that nobody uses.
	idleTime = 20 * time.Second
	// askTime bounds one question.
	askTime = 3 * time.Second
	// awayTime is how long a daemon that did not answer is left alone.
	awayTime = time.Second
)

// daemon is the local Nix daemon as a client sees it.
type daemon struct {
	socket string
	dir    flox.StoreDir
	places chan struct{}

	mu    sync.Mutex
	idle  []idleConn // the one used last at the end
	err   error      // of the last question; nil = it was answered
	until time.Time  // it is not asked before then
}

type idleConn struct {
	client *worker.Client
	since  time.Time
}

func newDaemon(socket string, dir flox.StoreDir) *daemon {
	return &daemon{socket: socket, dir: dir, places: make(chan struct{}, maxConns)}
}

// ask puts a question, on a connection of before if there is one: if that is over,
// as after the daemon was started anew, on a new one. ErrUnreachable: nobody answers.
func (d *daemon) ask(ctx context.Context, question func(context.Context, *worker.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	if err := d.away(); err != nil {
		return err
	}
	select {
	case d.places <- struct{}{}:
		defer func() { <-d.places }()
	case <-ctx.Done():
		return fmt.Errorf("the local Nix daemon is busy: %w", flox.ErrUnreachable)
	}
	for {
		c, used, err := d.conn(ctx)
		if err == nil {
			err = question(ctx, c)
		}
		_, remote := errors.AsType[*worker.RemoteError](err)
		switch {
		case err == nil, errors.Is(err, flox.ErrNotFound), remote:
			d.done(c)
			return err
		case c != nil:
			_ = c.Close()
		}
		if used && ctx.Err() == nil {
			continue
		}
		return d.failed(fmt.Errorf("the local Nix daemon at %s: %w: %w", d.socket, err, flox.ErrUnreachable))
	}
}

// away says that the daemon did not answer a moment ago.
func (d *daemon) away() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil && time.Now().Before(d.until) {
		return d.err
	}
	return nil
}

func (d *daemon) failed(err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err, d.until = err, time.Now().Add(awayTime)
	return err
}

// conn takes an idle connection, which was used, or makes one.
func (d *daemon) conn(ctx context.Context) (c *worker.Client, used bool, err error) {
	d.mu.Lock()
	if n := len(d.idle); n > 0 {
		c = d.idle[n-1].client
		d.idle = d.idle[:n-1]
		d.mu.Unlock()
		return c, true, nil
	}
	d.mu.Unlock()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", d.socket)
	if err != nil {
		return nil, false, err
	}
	c, err = worker.NewClient(ctx, conn, worker.ClientConfig{Dir: d.dir})
	return c, false, err
}

func (d *daemon) done(c *worker.Client) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err = nil
	d.idle = append(d.idle, idleConn{c, time.Now()}) // at most maxConns, as places are
}

// run closes idle connections, and all when ctx ends.
func (d *daemon) run(ctx context.Context) {
	tick := time.NewTicker(idleTime / 2)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			d.close(now.Add(-idleTime))
		case <-ctx.Done():
			d.close(time.Now().Add(time.Hour))
			return
		}
	}
}

// close closes the connections that are idle since before.
func (d *daemon) close(before time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, c := range d.idle {
		if c.since.Before(before) {
			_ = c.client.Close()
			continue
		}
		d.idle[n] = c
		n++
	}
	d.idle = d.idle[:n]
}

// absent reports whether an error says that there is no daemon at all.
func absent(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}
