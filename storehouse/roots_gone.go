package storehouse

import (
	"context"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

// rootlessEvery is how often the leader looks for roots of machines that are
// gone, beside every change of the member list: one may have set them in the
// moment in which it was shut out.
const rootlessEvery = 30 * time.Second

// runRootless has the roots of machines that were forgotten or revoked go with
// them, on the leader, until ctx ends.
func (s *Server) runRootless(ctx context.Context) error {
	tick := time.NewTicker(rootlessEvery)
	defer tick.Stop()
	for {
		news := s.news.wait()
		if s.node.Status().State == "leader" {
			limited, cancel := context.WithTimeout(ctx, 10*time.Second)
			err := s.dropRootless(limited)
			cancel()
			if err != nil && ctx.Err() == nil {
				s.cfg.Log.Debug("the roots of machines that are gone are still there", "error", err)
			}
		}
		select {
		case <-news:
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// dropRootless forgets the sets of roots whose machines are gone.
func (s *Server) dropRootless(ctx context.Context) error {
	var have []string
	// Read as of now, so that the member list read next is no older: a machine is a
	// member before it has roots.
	err := s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		return eachMachine(r, func(m *floxv1.MachineRoots) bool {
			have = append(have, m.GetPeer())
			return true
		})
	})
	if err == nil {
		err = s.roster.refresh(ctx, s)
	}
	for _, peer := range have {
		if err != nil || s.allowed(p2p.PeerID(peer)) {
			continue
		}
		s.cfg.Log.Info("the roots of a machine that is gone are forgotten", "peer", peer)
		_, err = s.proposeRoots(ctx, &floxv1.SetRootSet{Peer: peer})
	}
	return err
}
