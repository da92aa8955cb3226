package raft

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// serve answers the calls on one connection of another server until either ends.
func (n *Node) serve(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	queue := make(chan frame, queuedFrames)
	written := make(chan struct{})
	go func() {
		defer close(written)
		if err := writeFrames(conn, queue, ctx.Done()); err != nil {
			conn.Close() //nolint:errcheck // ends the reading below
		}
	}()
	err := n.serveFrames(ctx, conn, queue)
	if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
		n.cfg.Log.Debug("calls of another server ended", "error", err)
	}
	cancel()
	conn.Close() //nolint:errcheck // read to its end, or broken
	<-written
}

// serveFrames reads calls until the connection breaks or ends, and has each answered on its own. What would be too
// much at once is answered with ErrFull without being kept.
func (n *Node) serveFrames(ctx context.Context, conn net.Conn, queue chan<- frame) error {
	in := bufio.NewReaderSize(conn, 64<<10)
	answer := func(id uint64, a *floxv1.ClusterAnswer) {
		f, err := newFrame(id, a)
		if err != nil {
			f, _ = newFrame(id, &floxv1.ClusterAnswer{Failure: encodeFailure(fmt.Errorf("answer: %w", err))}) // small
		}
		select {
		case queue <- f:
		case <-ctx.Done():
		}
	}
	for {
		id, size, err := readHead(in)
		if err != nil {
			return err
		}
		if err := conn.SetReadDeadline(time.Now().Add(writeTimeout)); err != nil {
			return err
		}
		free, why := n.admit(size)
		if why != nil {
			if _, err := in.Discard(size); err != nil {
				return err
			}
			answer(id, &floxv1.ClusterAnswer{Failure: encodeFailure(why)})
		} else {
			q, err := readCall(in, size)
			if err != nil {
				free()
				return err
			}
			n.work.Go(func() {
				defer free()
				answer(id, n.answer(ctx, q))
			})
		}
		if err := conn.SetReadDeadline(time.Time{}); err != nil {
			return err
		}
	}
}

// readCall reads the body of a frame.
func readCall(in io.Reader, size int) (*floxv1.ClusterCall, error) {
	body := make([]byte, size)
	if _, err := io.ReadFull(in, body); err != nil {
		return nil, err
	}
	q := &floxv1.ClusterCall{}
	if err := proto.Unmarshal(body, q); err != nil {
		return nil, fmt.Errorf("call of another server: %w: %w", err, flox.ErrBadInput)
	}
	return q, nil
}

// admit takes room for a call of size bytes, or says why there is none.
func (n *Node) admit(size int) (free func(), err error) {
	select {
	case n.served <- struct{}{}:
	default:
		return nil, fmt.Errorf("the leader is answering %d calls already: try again later: %w", cap(n.served), flox.ErrFull)
	}
	if !n.servedBytes.TryAcquire(int64(size)) {
		<-n.served
		return nil, fmt.Errorf("the leader holds %d MiB of commands already: try again later: %w", maxBytesInFlight>>20, flox.ErrFull)
	}
	return func() { n.servedBytes.Release(int64(size)); <-n.served }, nil
}

// answer carries out a call of another server here; it is never sent on.
func (n *Node) answer(ctx context.Context, q *floxv1.ClusterCall) *floxv1.ClusterAnswer {
	ctx, cancel := context.WithTimeout(ctx, min(time.Duration(q.TimeoutMs)*time.Millisecond, callTimeout))
	defer cancel()
	a, err := n.carryOut(ctx, q)
	if err != nil {
		return &floxv1.ClusterAnswer{Failure: encodeFailure(err), Index: a.GetIndex()}
	}
	return a
}

// carryOut does on this server what a call asks for.
func (n *Node) carryOut(ctx context.Context, q *floxv1.ClusterCall) (*floxv1.ClusterAnswer, error) {
	switch c := q.Call.(type) {
	case *floxv1.ClusterCall_Propose:
		return n.proposeHere(ctx, c.Propose)
	case *floxv1.ClusterCall_ReadIndex:
		index, err := n.readIndexHere(ctx)
		return &floxv1.ClusterAnswer{Index: index}, err
	case *floxv1.ClusterCall_Hello:
		return &floxv1.ClusterAnswer{Hello: n.hello()}, nil
	case *floxv1.ClusterCall_AddServer:
		return &floxv1.ClusterAnswer{}, n.addHere(ctx, c.AddServer)
	case *floxv1.ClusterCall_RemoveServer:
		return &floxv1.ClusterAnswer{}, n.removeHere(ctx, c.RemoveServer)
	case *floxv1.ClusterCall_Transfer:
		return &floxv1.ClusterAnswer{}, n.transferAlone(ctx, c.Transfer.To)
	case *floxv1.ClusterCall_Drain:
		return &floxv1.ClusterAnswer{}, n.drainHere(ctx, c.Drain)
	case *floxv1.ClusterCall_Rejoin:
		return n.rejoinHere(ctx, c.Rejoin)
	case *floxv1.ClusterCall_Servers:
		return n.serversHere()
	}
	return nil, fmt.Errorf("a call this program does not know: upgrade this server: %w", flox.ErrBadInput)
}
