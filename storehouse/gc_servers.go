package storehouse

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"connectrpc.com/connect"

	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

// Sweep is floxv1connect.ServersHandler: it frees here what is removed from the
// facts up to an index.
func (h *houses) Sweep(ctx context.Context, req *connect.Request[floxv1.SweepRequest], stream *connect.ServerStream[floxv1.CollectProgress]) error {
	if err := h.caller(req.Peer().Addr); err != nil {
		return api.ToConnect(err)
	}
	if _, err := h.node.Wait(ctx, req.Msg.GetIndex()); err != nil {
		return api.ToConnect(err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	freed, err := h.sweep(ctx, func(done, total uint64) {
		if err := stream.Send(&floxv1.CollectProgress{Phase: phaseSweep, Done: done, Total: total}); err != nil {
			cancel(err) // nobody waits for it
		}
	})
	if err == nil {
		err = stream.Send(&floxv1.CollectProgress{Phase: phaseSweep, FreedBytes: uint64(max(freed, 0)), Finished: true}) //nolint:gosec // not negative
	}
	return api.ToConnect(err)
}

// sweepAll sweeps this server and the others, at once, and gives the bytes that
// were freed everywhere. What another cannot do now it does with the next
// collection: the facts say what is dead.
func (s *Server) sweepAll(ctx context.Context, progress func(done, total uint64)) (freed int64, err error) {
	var peers []p2p.PeerID
	if s.servers != nil { // with a bucket too: a server frees what it has put there itself
		peers, _, _ = s.servers.others()
	}
	index := s.node.Applied()
	var group sync.WaitGroup
	bytes := make([]int64, len(peers))
	for i, peer := range peers {
		group.Go(func() {
			var err error
			if bytes[i], err = s.sweepOn(ctx, peer, index); err != nil {
				s.cfg.Log.Warn("a server frees its content later: not swept now", "server", string(peer), "error", err)
			}
		})
	}
	freed, err = s.sweep(ctx, progress)
	group.Wait()
	for _, n := range bytes {
		freed += n
	}
	return freed, err
}

// sweepOn sweeps another server.
func (s *Server) sweepOn(ctx context.Context, peer p2p.PeerID, index uint64) (freed int64, err error) {
	stream, err := s.servers.client(peer).Sweep(ctx, connect.NewRequest(&floxv1.SweepRequest{Index: index}))
	if err != nil {
		return 0, api.FromConnect(err)
	}
	finished := false
	for stream.Receive() {
		finished = stream.Msg().GetFinished()
		freed = int64(stream.Msg().GetFreedBytes()) //nolint:gosec // of a disk
	}
	err = stream.Err()
	if err == nil && !finished {
		err = errors.New("it ended early")
	}
	if err = errors.Join(err, stream.Close()); err != nil {
		return 0, fmt.Errorf("sweep on %s: %w", peer, api.FromConnect(err))
	}
	return freed, nil
}
