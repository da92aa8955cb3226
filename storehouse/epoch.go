package storehouse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
)

// newEpochName is the file in a state directory that asks for a new epoch.
const newEpochName = "new-epoch"

// AskNewEpoch has the storehouse of a state directory that came from a backup
// begin a new epoch when it starts next, before it answers anybody. It is
// remembered in the directory until that is done.
func AskNewEpoch(stateDir string) error {
	return writeFile(filepath.Join(stateDir, newEpochName), nil, 0o600)
}

// beginEpoch begins a new epoch if AskNewEpoch was called: this server is the
// only one of it, and a trust list says so that agents take though they were
// ahead of the backup. The other servers are members no more: their logs are of
// the epoch before.
func (s *Server) beginEpoch(ctx context.Context) error {
	if asked, err := epochAsked(s.cfg.StateDir); err != nil || !asked {
		return err
	}
	if err := s.roster.refresh(ctx, s); err != nil {
		return err
	}
	for _, m := range s.roster.servers() {
		if m.GetPeer() == string(s.id.peer) {
			continue
		}
		_, err := s.proposeMembers(ctx, &floxv1.MembersCommand{
			Actor:   s.actor(),
			Command: &floxv1.MembersCommand_Remove{Remove: &floxv1.RemoveMachine{Peer: m.GetPeer(), Reason: "the storehouse was restored without it"}},
		})
		if err != nil && !errors.Is(err, flox.ErrNotFound) {
			return fmt.Errorf("new epoch: %w", err)
		}
	}
	if err := s.roster.refresh(ctx, s); err != nil {
		return err
	}
	old, err := s.newestList(ctx)
	if err != nil {
		return fmt.Errorf("new epoch: %w", err)
	}
	next := *old
	// One backup may be restored twice, and the second time must be another epoch
	// than the first: the clock tells them apart.
	next.Epoch = max(old.Epoch+1, uint64(max(time.Now().Unix(), 0)))
	next.Voters = []string{string(s.id.peer)}
	if err := s.putTrust(ctx, old, &next); err != nil {
		return fmt.Errorf("new epoch: %w", err)
	}
	s.cfg.Log.Warn("the storehouse was restored: a new epoch begins", "epoch", next.Epoch, "trust_list", next.Version)
	if err := errors.Join(os.Remove(filepath.Join(s.cfg.StateDir, newEpochName)), syncDir(s.cfg.StateDir)); err != nil {
		return fmt.Errorf("new epoch: %w", err)
	}
	s.servers.alone.Store(false)
	return nil
}

// epochAsked reports whether the next start begins a new epoch.
func epochAsked(stateDir string) (bool, error) {
	_, err := os.Stat(filepath.Join(stateDir, newEpochName))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("new epoch: %w", err)
	}
	return err == nil, nil
}

// newestList gives the trust list in force.
func (s *Server) newestList(ctx context.Context) (*content.TrustList, error) {
	lists, err := s.trustLists(ctx, 0)
	if err != nil || len(lists) == 0 {
		return nil, fmt.Errorf("the storehouse has no trust list yet: %w", orUnreachable(err))
	}
	return content.ParseTrustList(lists[len(lists)-1])
}
