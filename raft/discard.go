package raft

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Files in a directory whose content was given up.
const (
	discardingFile = "discarding" // and is being put aside
	rejoinFile     = "rejoin"     // and has not come back from the others yet
	asideDir       = "damaged"    // what it was, until then
)

// Discard gives up what a server keeps in dir, for example after Open or Run
// ended with ErrCorrupt. Run then gets everything from the others, under the
// same ID: it does not begin a cluster of its own, neither votes nor stands for
// election, and has the leader take its vote away, before it may get it again.
// What there was is kept in dir/damaged until then. Not for the only server of a
// cluster: restore a backup there. Errors: ErrBusy when a process uses dir. It may
// be called again after a crash.
func Discard(dir string) error {
	unlock, err := lockDir(dir)
	if err != nil {
		return err
	}
	err = writeFile(filepath.Join(dir, discardingFile), []byte(time.Now().UTC().Format(time.RFC3339)+"\n"))
	if err == nil {
		err = finishDiscard(dir)
	}
	if err = errors.Join(err, unlock()); err != nil {
		return fmt.Errorf("discard %s: %w", dir, err)
	}
	return nil
}

// finishDiscard puts aside what was given up, if something was. What must not be
// lost is that it was: a server that forgot its votes must not vote.
func finishDiscard(dir string) error {
	mark := filepath.Join(dir, discardingFile)
	if _, err := os.Stat(mark); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	err := writeFile(filepath.Join(dir, rejoinFile), []byte("see DESIGN.md\n"))
	if err == nil {
		err = makeDir(filepath.Join(dir, asideDir))
	}
	for _, part := range []string{"log", "state", "snapshots"} {
		if err == nil {
			err = putAside(dir, part)
		}
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err == nil {
		err = os.Remove(mark)
	}
	if err == nil {
		err = syncDir(dir)
	}
	return err
}

// putAside moves a part of dir to what is kept of it. What is there already, from a
// discard before that did not end well, holds more: then the part is removed.
func putAside(dir, part string) error {
	from, to := filepath.Join(dir, part), filepath.Join(dir, asideDir, part)
	if _, err := os.Stat(to); err == nil {
		return os.RemoveAll(from)
	}
	err := os.Rename(from, to)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return errors.Join(err, syncDir(filepath.Dir(to)))
}

// findRejoin notes whether this server lost its memory and is not back yet.
func (n *Node) findRejoin() error {
	if err := finishDiscard(n.cfg.Dir); err != nil {
		return fmt.Errorf("discard %s: %w", n.cfg.Dir, err)
	}
	_, err := os.Stat(filepath.Join(n.cfg.Dir, rejoinFile))
	n.rejoining.Store(err == nil)
	if errors.Is(err, os.ErrNotExist) {
		return os.RemoveAll(filepath.Join(n.cfg.Dir, asideDir))
	}
	return err
}

// rejoin has the leader take this server's vote away, waits until it has that
// in its own log, and may vote again when somebody gives it a vote. It tries
// until ctx ends.
func (n *Node) rejoin(ctx context.Context) {
	tick := time.NewTicker(n.cfg.probeEvery)
	defer tick.Stop()
	for n.rejoining.Load() {
		a, _, err := n.atLeader(ctx, &floxv1.ClusterCall{Call: &floxv1.ClusterCall_Rejoin{Rejoin: &floxv1.RejoinCall{Id: n.cfg.ID}}}, true)
		if err == nil {
			_, err = n.Wait(ctx, a.Index)
		}
		if err == nil {
			err = errors.Join(os.Remove(filepath.Join(n.cfg.Dir, rejoinFile)), syncDir(n.cfg.Dir))
		}
		if err == nil {
			n.rejoining.Store(false)
			n.cfg.Log.Info("the state is back from the others")
			if err := os.RemoveAll(filepath.Join(n.cfg.Dir, asideDir)); err != nil {
				n.cfg.Log.Warn("the damaged state is not removed", "error", err) // the next start does
			}
			return
		}
		n.cfg.Log.Warn("this server lost its state and is not back yet", "error", err)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// rejoinHere takes the vote of a server that lost its memory away, on the
// leader. The index answered is of an entry behind that change.
func (n *Node) rejoinHere(ctx context.Context, q *floxv1.RejoinCall) (*floxv1.ClusterAnswer, error) {
	leave, err := n.alone(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	r, c, err := n.leading()
	if err != nil {
		return nil, err
	}
	s, ok := c.find(q.Id)
	switch {
	case !ok:
		return nil, fmt.Errorf("%s is no member: add it: %w", q.Id, flox.ErrNotFound)
	case q.Id == n.cfg.ID:
		return nil, fmt.Errorf("%s leads, so it has not lost its state: %w", q.Id, flox.ErrBadInput)
	case s.Suffrage == raft.Voter && !c.safe(q.Id, ""):
		return nil, fmt.Errorf("the voters that stay would have no healthy majority: %w", flox.ErrBusy)
	case s.Suffrage == raft.Voter:
		if err := changeError(n.change(ctx, r, r.DemoteVoter(s.ID, 0, enqueueTimeout))); err != nil {
			return nil, err
		}
	}
	return n.proposeHere(ctx, n.decide(&floxv1.ServersCommand{Command: &floxv1.ServersCommand_Add{
		Add: &floxv1.ServerAdd{Id: q.Id, Voter: known(c.state, q.Id, s.Suffrage == raft.Voter).WantsVote},
	}}))
}

// forgetful is the transport of a server that lost its memory: it gives no
// vote, since it may have given another one in the same term.
type forgetful struct {
	standing
	rpcs chan raft.RPC
}

var errForgetful = fmt.Errorf("this server lost its state and does not vote until it is back: %w", flox.ErrDenied)

// newForgetful answers requests for votes until done is closed, and hands the rest on.
func newForgetful(s standing, done <-chan struct{}) *forgetful {
	f := &forgetful{s, make(chan raft.RPC)}
	s.node.work.Go(func() {
		for {
			select {
			case rpc := <-s.NetworkTransport.Consumer():
				switch q := rpc.Command.(type) {
				case *raft.RequestVoteRequest:
					if s.node.rejoining.Load() {
						rpc.Respond(&raft.RequestVoteResponse{Term: q.Term}, errForgetful)
						continue
					}
				case *raft.RequestPreVoteRequest:
					if s.node.rejoining.Load() {
						rpc.Respond(&raft.RequestPreVoteResponse{Term: q.Term}, errForgetful)
						continue
					}
				}
				select {
				case f.rpcs <- rpc:
				case <-done:
					return
				}
			case <-done:
				return
			}
		}
	})
	return f
}

// Consumer is raft.Transport.
func (f *forgetful) Consumer() <-chan raft.RPC { return f.rpcs }
