package fuse

import (
	"context"
	"errors"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/floxctl/flox"
)

// Read fills buf from a file.
func (f *files) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	manifest, index, ok := f.s.nodes.resolve(in.NodeId)
	if !ok {
		return nil, stale
	}
	r := f.request(&in.InHeader)
	off := int64(in.Offset)
	if off < 0 {
		return nil, fuse.EINVAL
	}
	who := flox.Reader{PID: in.Pid, Node: in.NodeId}
	n := 0
	read := func(ctx context.Context) error {
		tree, err := f.s.cfg.Store.Tree(ctx, manifest, who)
		if err != nil {
			return err
		}
		if n, err = tree.ReadAt(ctx, index, buf, off, who); err != nil {
			return err
		}
		return checkShort(ctx, tree, index, off, n, len(buf))
	}
	err := f.s.gaveUp.check(r, off)
	if err == nil {
		err = f.wait(r.ctx, f.s.cfg.ReadTimeout, true, read)
	}
	for again := true; err != nil && again; {
		err, again = f.whileMapped(r, err, read)
	}
	if err == nil {
		f.s.counts.readBytes.Add(uint64(n))
		return inPlace(n), fuse.OK
	}
	if transient(err) {
		f.s.gaveUp.note(r, off, len(buf))
	}
	status := f.failed(r, err)
	if status != fuse.EINTR && status != fuse.EACCES {
		status = fuse.EIO
	}
	return nil, status
}

// whileMapped goes on with a read that failed because of err, if an error would
// be a SIGBUS in a running program. Whether it would be takes a while to find out
// on a busy machine, and what is read for may come meanwhile: so the read goes
// on until it is known that nobody has the file mapped. It gives how the read
// went, or err, and whether to call it again.
func (f *files) whileMapped(r *request, err error, read func(context.Context) error) (error, bool) {
	if r.ctx.Err() != nil || errors.Is(err, flox.ErrBadInput) || f.s.cfg.Mapped == nil {
		return err, false
	}
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	answer := make(chan bool, 1)
	go func() { // until ctx is done at the latest, soon after
		mapped := f.s.cfg.Mapped(ctx, r.node, r.pid)
		if !mapped {
			cancel()
		}
		answer <- mapped
	}()
	for {
		retried := f.wait(ctx, f.s.cfg.ReadTimeout, true, read)
		if retried == nil {
			return nil, false
		}
		if again := transient(retried) || pause(ctx, retryPause); again && len(answer) == 0 {
			continue
		}
		mapped := false
		select {
		case mapped = <-answer:
		case <-r.ctx.Done(): // the answer may take longer than the caller lives
		}
		if r.ctx.Err() != nil {
			return context.Cause(r.ctx), false
		}
		if mapped {
			f.s.log.Warn("a mapped file cannot be read, its users wait", "node", r.node, "pid", r.pid,
				"waited", time.Since(r.since).Round(time.Second), "error", retried)
			return retried, true
		}
		return err, false
	}
}
