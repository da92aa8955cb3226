package storehouse

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

// replaced takes a server that is away out of the member list, before it is taken out
// of the log's servers because another one replaces it: else it would be taken in
// again when it returns, and would go on to open the keys. Its own key is not revoked.
func (s *Server) replaced(ctx context.Context, id, by string) error {
	m, there := s.roster.machine(p2p.PeerID(id))
	if !there {
		m = &floxv1.Machine{Peer: id, Name: id}
	}
	knew := s.keysKnownTo(id)
	remove := &floxv1.RemoveMachine{Peer: id, Reason: fmt.Sprintf("it is away, and %s replaces it", s.nameOf(by))}
	_, err := s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: s.actor(), Command: &floxv1.MembersCommand_Remove{Remove: remove}})
	if errors.Is(err, flox.ErrNotFound) {
		return nil // a leader before this one did so
	}
	if err == nil {
		err = s.keysWereKnown(ctx, s.actor(), m, knew)
	}
	return err
}

const (
	// outcastEvery is how often a server that hears of no leader asks the others
	// whether it is still one of them.
	outcastEvery = 5 * time.Second
	outcastWords = "the other servers do not take it for one of them any more: it was taken out, or was away and replaced; " +
		"let it leave with floxctl leave, and make it a server again, if it shall be one, with floxctl join and a new invite"
)

// errOutcast is what a server that takes no part answers those who ask it for what the
// servers agree on. Another server can answer them.
var errOutcast = fmt.Errorf("this server takes no part: %s: %w", outcastWords, flox.ErrUnreachable)

// takesNoPart reports whether this server was found to be none of the servers any more.
func (s *Server) takesNoPart() bool { return s.outcast.Load() && s.node.Status().Leader == "" }

// runOutcast finds out whether the other servers have taken this one out while it was
// away, and says so, until ctx ends. Without that it would wait for a leader for ever.
func (s *Server) runOutcast(ctx context.Context) error {
	tick := time.NewTicker(outcastEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		out := s.node.Status().Leader == "" && s.isOutcast(ctx)
		if was := s.outcast.Swap(out); out && !was {
			s.cfg.Log.Error("this server takes no part", "why", outcastWords)
		}
	}
}

// isOutcast reports whether servers say that this one is none, and no server takes
// it for one.
func (s *Server) isOutcast(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, stateWait)
	defer cancel()
	denied := false
	for _, m := range s.roster.servers() {
		if m.GetPeer() == string(s.id.peer) {
			continue
		}
		_, err := s.stateOf(ctx, p2p.PeerID(m.GetPeer()))
		if err == nil {
			return false
		}
		denied = denied || errors.Is(err, flox.ErrDenied)
	}
	return denied
}
