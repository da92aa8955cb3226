package storehouse

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// maxKnocks is how many machines that were not let in one server audits in a
	// refusalPause; the others are counted.
	maxKnocks = 64
	// knockPause is how long a refusal waits before it is audited: a machine that
	// joined a moment ago may be known here by then.
	knockPause = time.Second
)

// knock is a machine that was not let in.
type knock struct {
	p2p.Refusal
	at      time.Time
	unnamed uint64 // refusals since the record before that have none of their own
}

// doorBook hears of the machines that this server's doors do not let in. Each
// peer and each address is audited once per refusalPause.
type doorBook struct {
	queue chan knock

	mu      sync.Mutex
	last    map[string]time.Time // by peer and by address
	unnamed uint64
}

func newDoorBook() *doorBook {
	return &doorBook{queue: make(chan knock, maxKnocks), last: map[string]time.Time{}}
}

// refused is p2p.Config.Refused.
func (b *doorBook) refused(r p2p.Refusal) {
	host, _, err := net.SplitHostPort(r.Addr)
	if err != nil {
		host = r.Addr
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	for k, at := range b.last {
		if now.Sub(at) >= refusalPause {
			delete(b.last, k)
		}
	}
	_, samePeer := b.last[string(r.Peer)]
	_, sameHost := b.last[host]
	if samePeer || sameHost || len(b.last) >= 2*maxKnocks {
		b.unnamed++
		return
	}
	select {
	case b.queue <- knock{r, now, b.unnamed}:
		b.last[string(r.Peer)], b.last[host] = now, now
		b.unnamed = 0
	default: // the log does not take them in
		b.unnamed++
	}
}

// runDoors audits who was not let in until ctx ends.
func (s *Server) runDoors(ctx context.Context) error {
	for {
		var k knock
		select {
		case k = <-s.doors.queue:
		case <-ctx.Done():
			return nil
		}
		select {
		case <-time.After(time.Until(k.at.Add(knockPause))):
		case <-ctx.Done():
			return nil
		}
		if err := s.auditKnock(ctx, k); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("a machine that was not let in could not be audited", "peer", string(k.Peer), "address", k.Addr, "error", err)
		}
	}
}

// auditKnock says who was not let in, why, and what to do about it.
func (s *Server) auditKnock(ctx context.Context, k knock) error {
	if s.vouched(k.Peer) {
		return nil // it joined at another server a moment ago, or comes back with its key
	}
	rev := &floxv1.Revoked{}
	err := s.viewMembers(ctx, cluster.Local, func(r *cluster.Reader) (err error) {
		rev, err = members.Revocation(r, string(k.Peer))
		return err
	})
	why, name := k.Why.Error()+"; to let it in: floxctl invite", ""
	switch {
	case err == nil:
		name = rev.GetName()
		why = fmt.Sprintf("its key was revoked on %s (%s); to let it in again it needs a new key (floxd leave --purge there) and a new invite",
			time.UnixMilli(rev.GetTimeUnixMs()).UTC().Format(time.DateOnly), rev.GetReason())
	case !errors.Is(err, flox.ErrNotFound):
		return err
	}
	detail := fmt.Sprintf("from %s: %s", k.Addr, why)
	if k.unnamed > 0 {
		detail += fmt.Sprintf(" (%d more were refused since the last such record)", k.unnamed)
	}
	_, err = s.proposeMembers(ctx, &floxv1.MembersCommand{
		Actor: &floxv1.Actor{Peer: string(k.Peer), Machine: name},
		Command: &floxv1.MembersCommand_Note{Note: &floxv1.AuditRecord{
			Action: "machine.connect", Subject: nameOr(name, string(k.Peer)), Detail: detail, Refused: true,
		}},
	})
	return err
}
