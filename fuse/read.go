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
	for err == nil || f.mayWait(r, err) {
		if err = f.wait(r, f.s.cfg.ReadTimeout, true, read); err == nil {
			f.s.counts.readBytes.Add(uint64(n))
			return inPlace(n), fuse.OK
		}
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

// mayWait reports whether a read that failed should go on waiting because an
// error would be a SIGBUS in a running program.
func (f *files) mayWait(r *request, err error) bool {
	if r.ctx.Err() != nil || errors.Is(err, flox.ErrBadInput) || f.s.cfg.Mapped == nil {
		return false
	}
	if !f.s.cfg.Mapped(r.ctx, r.node) {
		return false
	}
	f.s.log.Warn("a mapped file cannot be read, its users wait", "node", r.node, "pid", r.pid,
		"waited", time.Since(r.since).Round(time.Second), "error", err)
	return transient(err) || pause(r.ctx, retryPause)
}
