package fuse

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// dropQueue bounds the DropPages calls that wait for the notifier.
const dropQueue = 16

// drop is one call of DropPages.
type drop struct {
	ctx   context.Context
	nodes []uint64
	done  chan error
}

// DropPages makes the kernel forget the cached pages of nodes, so that the
// next use of one is seen as a READ. Nodes that are none of this mount (one that
// an earlier mount gave out, say), that the kernel does not know, or is reading
// right now, are left alone. It returns when that is done or ctx is. ErrClosed
// when the server does not run.
func (s *Server) DropPages(ctx context.Context, nodes []uint64) error {
	var ours []uint64
	for _, node := range nodes {
		// Never the root directory: a notification about it can wait for a lock
		// that a hung look-up holds, and with it everything behind.
		if _, _, ok := s.nodes.resolve(node); ok {
			ours = append(ours, node)
		}
	}
	return s.drop(ctx, ours)
}

// drop has the notifier invalidate nodes.
func (s *Server) drop(ctx context.Context, nodes []uint64) error {
	d := drop{ctx: ctx, nodes: nodes, done: make(chan error, 1)}
	select {
	case s.drops <- d:
	case <-s.stopped:
		return fmt.Errorf("drop pages: the server does not run: %w", flox.ErrClosed)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-d.done:
		return err
	case <-s.stopped:
		return fmt.Errorf("drop pages: the server does not run: %w", flox.ErrClosed)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// notify sends notifications until ctx is done. It is the only goroutine that
// does: one may wait inside the kernel for a page that a READ holds, and a
// goroutine that answers READs must not.
func (s *Server) notify(ctx context.Context, dev *device) {
	if s.links != nil {
		s.dropLinks(ctx, dev)
	}
	for {
		select {
		case <-ctx.Done():
			return
		case d := <-s.drops:
			d.done <- s.dropAll(ctx, dev, d)
		}
	}
}

func (s *Server) dropAll(ctx context.Context, dev *device, d drop) error {
	for _, node := range d.nodes {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := context.Cause(d.ctx); err != nil {
			return err
		}
		if s.requests.reading(node) {
			continue // in use, and its pages are locked until the READ ends
		}
		switch err := dev.write(invalInode(node)); {
		case err == nil:
			s.counts.dropped.Add(1)
		case errors.Is(err, unix.ENOENT): // not in the kernel's cache
		default:
			return fmt.Errorf("drop pages of node %d: %w", node, err)
		}
	}
	return nil
}
