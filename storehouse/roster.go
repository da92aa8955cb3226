package storehouse

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

// rosterPause is how long changes of the member list are gathered, at most.
const rosterPause = 50 * time.Millisecond

// roster is the member list as this server's state has it: doors ask it for
// every connection, so it is in memory. It takes about 300 bytes a machine.
type roster struct {
	now atomic.Pointer[rosterState]
	// one at a time: of two refreshes the one that read less could end last
	refreshing sync.Mutex

	mu      sync.Mutex
	changed []func() // called after each refresh, in order
}

// rosterState is one moment of it.
type rosterState struct {
	index    uint64 // of the log
	machines map[p2p.PeerID]*floxv1.Machine
	secrets  *floxv1.SealedSecrets // nil before there are any
}

func newRoster() *roster {
	r := &roster{}
	r.now.Store(&rosterState{machines: map[p2p.PeerID]*floxv1.Machine{}})
	return r
}

// machine gives a member; it must not be changed.
func (r *roster) machine(peer p2p.PeerID) (*floxv1.Machine, bool) {
	m, ok := r.now.Load().machines[peer]
	return m, ok
}

// is reports whether a machine is a member with a role.
func (r *roster) is(peer p2p.PeerID, role string) bool {
	m, ok := r.machine(peer)
	return ok && m.GetRole() == role
}

// servers lists the machines that are servers, sorted by peer ID.
func (r *roster) servers() (list []*floxv1.Machine) {
	all := r.now.Load().machines
	for _, peer := range slices.Sorted(maps.Keys(all)) {
		if m := all[peer]; m.GetRole() == members.Server {
			list = append(list, m)
		}
	}
	return list
}

// notify has f called after each refresh. It must not block.
func (r *roster) notify(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changed = append(r.changed, f)
}

// view gives the members' state as this server has it, or as of now.
func (s *Server) viewMembers(ctx context.Context, c cluster.Consistency, f func(*cluster.Reader) error) error {
	return s.viewing(ctx, members.Kind, c, f)
}

// refresh brings the roster up to date with the state here.
func (r *roster) refresh(ctx context.Context, s *Server) error {
	r.refreshing.Lock()
	defer r.refreshing.Unlock()
	was := r.now.Load()
	next := &rosterState{secrets: was.secrets}
	err := s.viewMembers(ctx, cluster.Local, func(view *cluster.Reader) error {
		next.index = view.Index()
		secrets, err := members.Secrets(view)
		if err == nil {
			next.secrets = secrets
		} else if !errors.Is(err, flox.ErrNotFound) {
			return err
		}
		next.machines, err = readRoster(view, was)
		return err
	})
	if err != nil {
		return fmt.Errorf("member list: %w", err)
	}
	if next.secrets.GetVersion() == was.secrets.GetVersion() && maps.EqualFunc(next.machines, was.machines, func(a, b *floxv1.Machine) bool { return a.GetChangedIndex() == b.GetChangedIndex() }) {
		was = &rosterState{index: next.index, machines: was.machines, secrets: was.secrets}
		r.now.Store(was)
		return nil
	}
	r.now.Store(next)
	r.mu.Lock()
	call := slices.Clone(r.changed)
	r.mu.Unlock()
	for _, f := range call {
		f()
	}
	return nil
}

// readRoster reads who is a member now, from what is known and what changed since.
func readRoster(view *cluster.Reader, was *rosterState) (map[p2p.PeerID]*floxv1.Machine, error) {
	peers, ok, err := members.Changes(view, was.index)
	if err != nil {
		return nil, err
	}
	if !ok {
		all := map[p2p.PeerID]*floxv1.Machine{}
		err := members.Machines(view, func(m *floxv1.Machine) bool {
			all[p2p.PeerID(m.GetPeer())] = m
			return true
		})
		return all, err
	}
	if len(peers) == 0 {
		return was.machines, nil
	}
	all := maps.Clone(was.machines)
	for _, peer := range peers {
		m, err := members.Machine(view, peer)
		if errors.Is(err, flox.ErrNotFound) {
			delete(all, p2p.PeerID(peer))
			continue
		}
		if err != nil {
			return nil, err
		}
		all[p2p.PeerID(peer)] = m
	}
	return all, nil
}

// run keeps the roster up to date until ctx ends.
func (r *roster) run(ctx context.Context, s *Server) error {
	at := uint64(0)
	for {
		next, err := s.node.Follow(ctx, at)
		if err == nil {
			at = next
			err = r.refresh(ctx, s)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-time.After(rosterPause):
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *Server) enterMembers(ctx context.Context, c *floxv1.MembersCommand) ([]byte, error) {
	if s.takesNoPart() {
		return nil, errOutcast
	}
	b, err := proto.Marshal(c)
	if err != nil {
		return nil, err
	}
	limited, done := s.agreeing(ctx, proposeWait)
	defer done()
	answer, err := enterAt(limited, s.memberLog, c.GetLevel(), members.Kind, b)
	return answer, s.disagreed(ctx, limited, proposeWait, err)
}

// proposeMembers puts a members command into the log. Refused redemptions are
// answers.
func (s *Server) proposeMembers(ctx context.Context, c *floxv1.MembersCommand) (*floxv1.MembersReply, error) {
	if c.GetMakeInvite() == nil && c.GetRedeem() == nil {
		ctx = freeing(ctx)
	}
	var answer []byte
	err := error(cluster.ErrLevel)
	for _, level := range membersLevels { // older ones until the last server is upgraded
		if !errors.Is(err, cluster.ErrLevel) {
			break
		}
		c.Level = level
		answer, err = s.enterMembers(ctx, c)
	}
	if err != nil {
		return nil, err
	}
	reply := &floxv1.MembersReply{}
	return reply, proto.Unmarshal(answer, reply)
}
