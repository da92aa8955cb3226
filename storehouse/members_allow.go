package storehouse

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

// allowed reports whether a machine may connect: who is in the member list, and
// the servers. With Config.OpenMembership everybody who proves the swarm's secret
// may, but for revoked keys.
func (s *Server) allowed(peer p2p.PeerID) bool {
	if _, ok := s.roster.machine(peer); ok || peer == s.id.peer || s.servers.allowed(peer) {
		return true
	}
	return s.cfg.OpenMembership && !s.revoked(peer)
}

// vouched reports whether a machine's key alone is proof enough: it is in the
// member list. So one that was away while the swarm's secret changed comes back,
// and hears of the new one.
func (s *Server) vouched(peer p2p.PeerID) bool {
	_, ok := s.roster.machine(peer)
	return ok
}

// revoked reports whether a key was revoked. It reads the state here and waits
// for nobody; what cannot be read counts as revoked.
func (s *Server) revoked(peer p2p.PeerID) bool {
	err := s.viewMembers(context.Background(), cluster.Local, func(r *cluster.Reader) error {
		_, err := members.Revocation(r, string(peer))
		return err
	})
	return !errors.Is(err, flox.ErrNotFound)
}

// inviteProof gives what a guest with an invite has to prove, if the invite may
// still be used as far as this server knows. The log decides when it is redeemed.
func (s *Server) inviteProof(id string) ([]byte, bool) {
	inv := &floxv1.InviteRecord{}
	err := s.viewMembers(context.Background(), cluster.Local, func(r *cluster.Reader) (err error) {
		inv, err = members.Invite(r, id)
		return err
	})
	return inv.GetVerifier(), err == nil && !inv.GetLan() && time.Now().UnixMilli() < inv.GetExpiresUnixMs()
}

// window gives the invite by which machines join from the LAN without a secret
// now; ErrNotFound if there is none.
func (s *Server) window(ctx context.Context) (open *floxv1.InviteRecord, err error) {
	err = s.viewMembers(ctx, cluster.Local, func(r *cluster.Reader) error {
		return members.Invites(r, func(inv *floxv1.InviteRecord) bool {
			if inv.GetLan() && inv.GetUses() > 0 && time.Now().UnixMilli() < inv.GetExpiresUnixMs() {
				open = inv
			}
			return open == nil
		})
	})
	if err == nil && open == nil {
		err = flox.ErrNotFound
	}
	return open, err
}

// windowOpen is p2p.Config.Window.
func (s *Server) windowOpen() bool {
	_, err := s.window(context.Background())
	return err == nil
}

// runMembers runs what concerns the members until ctx ends.
func (s *Server) runMembers(ctx context.Context, operators *admin) error {
	group, parts := errgroup.WithContext(ctx)
	group.Go(func() error { return s.serveJoin(parts) })
	group.Go(func() error { return s.serveSocket(parts, operators) })
	group.Go(func() error { return s.runKick(parts) })
	group.Go(func() error { return s.runDoors(parts) })
	group.Go(func() error { return s.runRootless(parts) })
	group.Go(func() error { return s.runSeen(parts) })
	err := group.Wait()
	if ctx.Err() != nil {
		return nil // the swarm may have closed before parts heard of the end
	}
	return err
}

// kickEvery is how often connections are looked at for machines that are no
// members any more, beside every change of the member list.
const kickEvery = 5 * time.Second

// runKick cuts the connections of machines that are no members any more, until
// ctx ends.
func (s *Server) runKick(ctx context.Context) error {
	tick := time.NewTicker(kickEvery)
	defer tick.Stop()
	for {
		news := s.news.wait()
		s.swarm.Kick()
		select {
		case <-news:
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// bell wakes everybody who waits for something to change.
type bell struct {
	mu sync.Mutex
	ch chan struct{} // nil = nobody waits
}

// wait gives a channel that is closed when the bell rings next.
func (b *bell) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}
