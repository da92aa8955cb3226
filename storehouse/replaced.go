package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
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
	// whether it is still one of them, and outcastAgain how often it does once it
	// knows that it is not.
	outcastEvery = 500 * time.Millisecond
	outcastAgain = 5 * time.Second
	outcastWords = "the other servers do not take it for one of them any more: it was taken out, or was away and replaced; " +
		"let it leave with floxctl leave, and make it a server again, if it shall be one, with floxctl join and a new invite"
)

// errOutcast is what a server that takes no part answers those who ask it for what the
// servers agree on. Another server can answer them.
var errOutcast = fmt.Errorf("this server takes no part: %s: %w", outcastWords, flox.ErrUnreachable)

// takesNoPart reports whether this server was found to be none of the servers any more.
func (s *Server) takesNoPart() bool { return s.outcast.lost() && s.node.Status().Leader == "" }

// runOutcast finds out whether the other servers have taken this one out while it was
// away, and says so, until ctx ends. Without that it would wait for a leader for ever.
func (s *Server) runOutcast(ctx context.Context) error {
	every := outcastEvery
	for {
		select {
		case <-time.After(every):
		case <-ctx.Done():
			return nil
		}
		out := s.node.Status().Leader == "" && s.isOutcast(ctx)
		s.foundOutcast(out)
		if every = outcastEvery; out {
			every = outcastAgain
		}
	}
}

// foundOutcast notes whether this server is one of the servers no more.
func (s *Server) foundOutcast(out bool) {
	if s.outcast.found(out) {
		s.cfg.Log.Error("this server takes no part", "why", outcastWords)
	}
}

// membership is whether this server is one of the servers, as far as it knows. Those
// who wait for the servers to agree hear of it when it is not. The zero value is ready.
type membership struct {
	mu   sync.Mutex
	over context.Context //nolint:containedctx // ends when this server is found to be none of them
	end  context.CancelCauseFunc
	out  bool
}

// lasting gives a context that ends with the cause errOutcast.
func (m *membership) lasting() context.Context {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over == nil {
		m.over, m.end = context.WithCancelCause(context.Background())
	}
	return m.over
}

// found notes whether this server is one of the servers no more, and says whether
// that is news.
func (m *membership) found(out bool) (cast bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	was := m.out
	m.out = out
	if out && m.end != nil {
		m.end(errOutcast)
	}
	if out != was {
		m.over, m.end = nil, nil
	}
	return out && !was
}

func (m *membership) lost() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.out
}

// agreeing is ctx for so long as the servers may take to agree. It ends early, with
// the cause errOutcast, when this server is found to be none of them any more.
func (s *Server) agreeing(ctx context.Context, patience time.Duration) (context.Context, func()) {
	limited, cancel := context.WithCancelCause(ctx)
	timed, end := context.WithTimeout(limited, patience)
	stop := context.AfterFunc(s.outcast.lasting(), func() { cancel(errOutcast) })
	return timed, func() {
		stop()
		end()
		cancel(nil)
	}
}

// disagreed is noMajority of what waited with agreeing.
func (s *Server) disagreed(caller, waited context.Context, patience time.Duration, err error) error {
	if err != nil && caller.Err() == nil && (errors.Is(context.Cause(waited), errOutcast) || s.takesNoPart()) {
		return errOutcast
	}
	return noMajority(caller, patience, err)
}

// isOutcast reports whether servers say that this one is none, and no server takes
// it for one.
func (s *Server) isOutcast(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, stateWait)
	defer cancel()
	var errs []error
	for _, m := range s.roster.servers() {
		if m.GetPeer() == string(s.id.peer) {
			continue
		}
		_, err := s.stateOf(ctx, p2p.PeerID(m.GetPeer()))
		if errs = append(errs, err); err == nil {
			break
		}
	}
	if s.outcast.lost() { // who was refused a moment ago may not get to ask again yet
		return !slices.Contains(errs, nil)
	}
	return castOut(errs)
}

// castOut reports whether servers that were asked take this one for a server no more:
// none answered, and one said so at least.
func castOut(answers []error) bool {
	return !slices.Contains(answers, nil) && slices.ContainsFunc(answers, func(err error) bool { return errors.Is(err, flox.ErrDenied) })
}
