package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/floxctl/flox"
)

// fetchTries is how often an upstream is asked for a NAR that it fails to send.
const fetchTries = 2

// flight is the fetch of one path, for everybody who waits for it.
type flight struct {
	done    chan struct{}
	err     error
	cancel  context.CancelFunc
	waiters int           // under upstreams.mu
	read    atomic.Uint64 // bytes of the NAR that came
}

// bring makes a path valid whose references are. Who asks for it meanwhile waits for
// the same fetch, which ends when nobody waits any more. joined is told of it.
func (u *upstreams) bring(ctx context.Context, o *offer, joined func(*flight)) error {
	hashPart := o.Info.Path.HashPart()
	u.mu.Lock()
	f := u.flights[hashPart]
	if f == nil {
		life, cancel := context.WithCancel(u.life)
		f = &flight{done: make(chan struct{}), cancel: cancel}
		err := u.work(func() {
			f.err = u.fetch(life, f, o)
			u.mu.Lock()
			u.left(hashPart, f)
			u.mu.Unlock()
			cancel()
			close(f.done)
		})
		if err != nil {
			u.mu.Unlock()
			cancel()
			return err
		}
		u.flights[hashPart] = f
	}
	f.waiters++
	u.mu.Unlock()
	joined(f)
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if f.waiters--; f.waiters == 0 {
		f.cancel()
		u.left(hashPart, f)
	}
	return ctx.Err()
}

// left has the next who wants a path begin a fetch of his own. u.mu is held.
func (u *upstreams) left(hashPart string, f *flight) {
	if u.flights[hashPart] == f {
		delete(u.flights, hashPart)
	}
}

// fetch makes a path valid, from whichever upstream gives it.
func (u *upstreams) fetch(ctx context.Context, f *flight, o *offer) error {
	select {
	case u.slots <- struct{}{}:
		defer func() { <-u.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	hashPart := o.Info.Path.HashPart()
	failed := map[string]error{} // by URL
	for {
		o, err := u.find(ctx, hashPart, failed)
		if errors.Is(err, flox.ErrNotFound) && len(failed) > 0 {
			err = fmt.Errorf("%s: %w", err.Error(), flox.ErrUnreachable) // it is there
		}
		if err != nil {
			return err
		}
		err, theirs := u.fetchFrom(ctx, f, o)
		if err == nil || !theirs || ctx.Err() != nil {
			return err
		}
		failed[o.from] = err
		u.log.Warn("a path cannot be had from an upstream", "path", string(o.Info.Path), "upstream", o.from, "error", err)
	}
}

// fetchFrom makes a path valid from one upstream; theirs says that a failure is that
// upstream's, and another one may give what it does not.
func (u *upstreams) fetchFrom(ctx context.Context, f *flight, o *offer) (err error, theirs bool) { //nolint:revive,staticcheck // theirs is of the error
	u.mu.Lock()
	up := u.known[o.from]
	u.mu.Unlock()
	if up == nil {
		return notAdded(o.from), true // removed a moment ago
	}
	source, done, err := up.use(u.limits)
	if err != nil {
		return err, true
	}
	defer done()
	for try := 1; ; try++ {
		f.read.Store(0)
		err, theirs = u.fetchOnce(ctx, f, up, source, o)
		if err == nil || !theirs || ctx.Err() != nil || slow(err) || blame(err) == nil || try == fetchTries {
			break
		}
	}
	hashPart := o.Info.Path.HashPart()
	switch {
	case err == nil:
		up.breaker.leave(nil)
	case !theirs || ctx.Err() != nil:
	case blame(err) != nil:
		up.breaker.leave(err)
	default: // it is not what it was said to be, or not there: also the next time
		up.answers.put(hashPart, cacheAnswer{err: err}, u.limits.negative)
	}
	return err, theirs
}

// fetchOnce is one try of fetchFrom.
func (u *upstreams) fetchOnce(ctx context.Context, f *flight, up *upstream, source cacheSource, o *offer) (err error, theirs bool) { //nolint:revive,staticcheck // as above
	r, err := source.open(ctx, o.URL)
	if err != nil {
		return err, true
	}
	defer r.Close()
	in := &cacheReader{r: r, total: &up.bytes}
	nar, err := o.open(in)
	if err != nil {
		return err, true
	}
	defer nar.Close()
	_, _, err = u.s.Publish(ctx, &o.Info, io.TeeReader(nar, counter{&f.read}), "upstream "+up.url())
	if err == nil {
		up.fetched.Add(1)
		return nil, false
	}
	if in.err != nil {
		return in.err, true
	}
	err = fmt.Errorf("from %s: %w", up.url(), err)
	return err, errors.Is(err, flox.ErrBadInput) || errors.Is(err, flox.ErrCorrupt)
}

// cacheReader counts what a cache sends, and keeps how that failed.
type cacheReader struct {
	r     io.Reader
	total *atomic.Uint64
	err   error
}

// Read is io.Reader.
func (c *cacheReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.total.Add(uint64(n)) //nolint:gosec // not negative
	if err != nil && !errors.Is(err, io.EOF) {
		c.err = err
	}
	return n, err
}

// counter counts what is written.
type counter struct{ n *atomic.Uint64 }

// Write is io.Writer.
func (c counter) Write(p []byte) (int, error) {
	c.n.Add(uint64(len(p)))
	return len(p), nil
}
