package storehouse

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	cluster "github.com/floxctl/flox/raft"
)

// How long a caller waits for the servers to agree. An election takes less than
// a second; longer than these there is no majority, and who waits shall hear why.
const (
	readWait    = 10 * time.Second
	proposeWait = 30 * time.Second
)

// noMajority says in words what it means that ctx ended before the servers
// agreed, unless it is the caller's own context that ended.
func noMajority(caller context.Context, waited time.Duration, err error) error {
	if err == nil || caller.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("the servers of the storehouse did not agree within %s: no majority of them reaches each other; see: floxctl storehouse servers: %w: %w", waited, err, flox.ErrUnreachable)
}

// view opens the facts of a kind. It waits for a leader only so long.
func (s *Server) view(ctx context.Context, kind uint32, c cluster.Consistency) (*cluster.Reader, error) {
	if c != cluster.Local && s.takesNoPart() {
		return nil, errOutcast
	}
	if c == cluster.Local {
		limited, cancel := context.WithTimeout(ctx, readWait)
		defer cancel()
		r, err := s.node.View(limited, kind, c)
		return r, noMajority(ctx, readWait, err)
	}
	limited, done := s.agreeing(ctx, readWait)
	defer done()
	r, err := s.node.View(limited, kind, c)
	return r, s.disagreed(ctx, limited, readWait, err)
}

// itself is on whose behalf a server changes profiles and channels by itself.
func (s *Server) itself() person { return person{Actor: s.actor(), admin: true} }

// asLeader does something again and again on the leader, every so often and whenever wake
// rings (nil = never), until ctx ends.
func (s *Server) asLeader(ctx context.Context, every time.Duration, wake *bell, what string, do func(ctx context.Context, now time.Time) error) error {
	if wake == nil {
		wake = &bell{}
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for rung := wake.wait(); ; {
		select {
		case <-tick.C:
		case <-rung:
			rung = wake.wait() // before it is done: what comes meanwhile is not missed
		case <-ctx.Done():
			return nil
		}
		if s.node.Status().State != "leader" {
			continue
		}
		if err := do(ctx, time.Now()); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("not all was done that is due, trying again later", "what", what, "error", err)
		}
	}
}

// viewing calls f with the facts of a kind.
func (s *Server) viewing(ctx context.Context, kind uint32, c cluster.Consistency, f func(r *cluster.Reader) error) error {
	r, err := s.view(ctx, kind, c)
	if err != nil {
		return err
	}
	return errors.Join(f(r), r.Close())
}

// proposed puts a command of a level into the log, and reads what is answered.
func (s *Server) proposed(ctx context.Context, level, kind uint32, command, reply proto.Message) error {
	b, err := proto.Marshal(command)
	if err != nil {
		return err
	}
	answer, err := enterAt(ctx, s.node.NewSession(), level, kind, b)
	if err != nil {
		return err
	}
	return proto.Unmarshal(answer, reply)
}

// enter puts a command into the log. It waits for a majority only so long.
func enter(ctx context.Context, session *cluster.Session, kind uint32, command []byte) ([]byte, error) {
	return enterAt(ctx, session, 0, kind, command)
}

// enterAt is enter of a command of a level.
func enterAt(ctx context.Context, session *cluster.Session, level, kind uint32, command []byte) ([]byte, error) {
	limited, cancel := context.WithTimeout(ctx, proposeWait)
	defer cancel()
	answer, _, err := session.ProposeWith(limited, kind, command, cluster.ProposeOptions{Level: level, Freeing: isFreeing(ctx)})
	return answer, noMajority(ctx, proposeWait, err)
}
