package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"google.golang.org/protobuf/proto"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/p2p"
)

const (
	// membersFile is the member list in the state directory. It holds the swarm's
	// secrets: mode 0600.
	membersFile = "members"
	// maxListed bounds the machines and the revoked keys of a list: more than a
	// storehouse takes in.
	maxListed = 1 << 18
	// roleServer is the role of a storehouse's servers in the list.
	roleServer = "server"
	// maxHouseAddrs bounds the addresses of one server.
	maxHouseAddrs = 16
)

// memberState is one moment of the member list. It never changes.
type memberState struct {
	known    bool   // a list was received; until then the invite alone speaks
	index    uint64 // of the storehouse's log
	epoch    uint64 // of the trust list when the list began: an index is good within it
	open     bool   // who proves the swarm's secret is a member, unless its key was revoked
	machines map[p2p.PeerID]*floxv1.Member
	revoked  map[p2p.PeerID]bool // if open
	secrets  [][]byte            // of the swarm, newest first
}

// memberList is the member list as this machine knows it: who may connect, by
// which secrets, and where the storehouse's servers are. It is asked for every
// connection.
type memberList struct {
	file    string
	invite  *api.Invite
	log     *slog.Logger
	now     atomic.Pointer[memberState]
	changed chan struct{} // holds one while settle has not looked yet
}

// openMembers reads the list that an earlier run kept. One that is damaged, or
// of another invite, is as good as none: it comes again with the first contact.
func openMembers(dir string, invite *api.Invite, log *slog.Logger) *memberList {
	l := &memberList{file: filepath.Join(dir, membersFile), invite: invite, log: log, changed: make(chan struct{}, 1)}
	s, err := loadMembers(l.file, invite)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("the member list kept here is not used; the storehouse tells it again", "file", l.file, "error", err)
	}
	if s == nil {
		s = &memberState{}
	}
	l.now.Store(s)
	return l
}

// inviteSum is what a list goes with: a machine with another invite may belong
// to another storehouse, or to one that begins anew.
func inviteSum(invite *api.Invite) []byte {
	ids := make([]string, 0, len(invite.Storehouse))
	for _, p := range invite.Storehouse {
		ids = append(ids, p.ID)
	}
	slices.Sort(ids)
	sum := content.Hash(fmt.Appendf(nil, "%x %q", invite.Secret, ids))
	return sum[:]
}

// loadMembers reads a list: the hash of the rest, then floxv1.KeptMembers.
// Errors: that there is none, ErrCorrupt, ErrBadInput for another invite's.
func loadMembers(file string, invite *api.Invite) (*memberState, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if len(b) < flox.CIDSize || flox.CID(b[:flox.CIDSize]) != content.Hash(b[flox.CIDSize:]) {
		return nil, fmt.Errorf("it was written half, or rotted: %w", flox.ErrCorrupt)
	}
	kept := &floxv1.KeptMembers{}
	if err := proto.Unmarshal(b[flox.CIDSize:], kept); err != nil {
		return nil, fmt.Errorf("%w: %w", err, flox.ErrCorrupt)
	}
	if !bytes.Equal(kept.GetInvite(), inviteSum(invite)) {
		return nil, fmt.Errorf("it is of another invite: %w", flox.ErrBadInput)
	}
	set := &memberSet{reset: true}
	if err := set.add(kept.GetList()); err != nil {
		return nil, err
	}
	return set.onto(&memberState{}, kept.GetList(), kept.GetEpoch()), nil
}

// save keeps a list durably, whole or not at all.
func (s *memberState) save(file string, invite *api.Invite) error {
	list := &floxv1.MembersEvent{Index: s.index, Reset_: true, Open: s.open, SwarmSecrets: s.secrets}
	for _, id := range slices.Sorted(maps.Keys(s.machines)) {
		list.Put = append(list.Put, s.machines[id])
	}
	for _, id := range slices.Sorted(maps.Keys(s.revoked)) {
		list.Revoked = append(list.Revoked, string(id))
	}
	b, err := proto.Marshal(&floxv1.KeptMembers{Invite: inviteSum(invite), Epoch: s.epoch, List: list})
	if err != nil {
		return err
	}
	sum := content.Hash(b)
	return replaceFile(file, append(sum[:], b...), 0o600, true)
}

// SaveMembers keeps what a machine was told of the others when it joined, for the
// first start of its agent: stateDir is Config.StateDir, invite the one it joined
// with. Without it the agent hears of them with its first contact, and takes
// whoever knows the invite's secret for a member until then.
func SaveMembers(stateDir string, invite *api.Invite, members []*floxv1.Member) error {
	set := &memberSet{reset: true}
	list := &floxv1.MembersEvent{Put: members, SwarmSecrets: [][]byte{invite.Secret}}
	if err := set.add(list); err != nil {
		return err
	}
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return fmt.Errorf("agent state: %w", err)
	}
	if err := set.onto(&memberState{}, list, 0).save(filepath.Join(stateDir, membersFile), invite); err != nil {
		return fmt.Errorf("member list: %w", err)
	}
	return nil
}

// memberSet is a set of changes that comes in several messages.
type memberSet struct {
	reset         bool
	put           []*floxv1.Member
	gone, revoked []string
}

// add takes one message in. ErrFull if it becomes more than a storehouse has.
func (c *memberSet) add(e *floxv1.MembersEvent) error {
	if e.GetReset_() {
		*c = memberSet{reset: true}
	}
	c.put = append(c.put, e.GetPut()...)
	c.gone, c.revoked = append(c.gone, e.GetGone()...), append(c.revoked, e.GetRevoked()...)
	if n := len(c.put) + len(c.gone) + len(c.revoked); n > 2*maxListed {
		return fmt.Errorf("member list: %d changes at once, want at most %d: %w", n, 2*maxListed, flox.ErrFull)
	}
	return nil
}

// empty reports whether nothing but the index changes.
func (c *memberSet) empty() bool {
	return !c.reset && len(c.put)+len(c.gone)+len(c.revoked) == 0
}

// onto gives the list after the changes; last is the message that completes them.
func (c *memberSet) onto(was *memberState, last *floxv1.MembersEvent, epoch uint64) *memberState {
	next := &memberState{
		known: true, index: max(was.index, last.GetIndex()), epoch: epoch, open: last.GetOpen(), secrets: was.secrets,
		machines: was.machines, revoked: was.revoked,
	}
	if len(last.GetSwarmSecrets()) > 0 {
		next.secrets = last.GetSwarmSecrets()
	}
	if c.reset {
		next.index = last.GetIndex() // it may be lower: a log begins anew when it is restored
		next.machines, next.revoked = map[p2p.PeerID]*floxv1.Member{}, map[p2p.PeerID]bool{}
	} else if !c.empty() {
		next.machines, next.revoked = maps.Clone(was.machines), maps.Clone(was.revoked)
	}
	if next.machines == nil || next.revoked == nil { // changes of a list that never came
		next.machines, next.revoked = map[p2p.PeerID]*floxv1.Member{}, map[p2p.PeerID]bool{}
	}
	for _, m := range c.put {
		next.machines[p2p.PeerID(m.GetPeer())] = m
		delete(next.revoked, p2p.PeerID(m.GetPeer()))
	}
	for _, id := range c.gone {
		delete(next.machines, p2p.PeerID(id))
	}
	for _, id := range c.revoked {
		next.revoked[p2p.PeerID(id)] = true
	}
	return next
}

// apply puts a complete set of changes in force.
func (l *memberList) apply(c *memberSet, last *floxv1.MembersEvent, epoch uint64) {
	was := l.now.Load()
	next := c.onto(was, last, epoch)
	l.now.Store(next)
	same := was.known && c.empty() && next.open == was.open && slices.EqualFunc(next.secrets, was.secrets, bytes.Equal)
	if !same {
		poke(l.changed)
	}
}

// allowed reports whether a machine may connect, as p2p.Config.Allowed. Before
// there is a list, the invite's secret makes members.
func (l *memberList) allowed(id p2p.PeerID) bool {
	s := l.now.Load()
	if !s.known {
		return true
	}
	if _, member := s.machines[id]; member {
		return true
	}
	return s.open && !s.revoked[id]
}

// isHouse reports whether a machine is a server of the storehouse: one of the
// list, or before there is one, of the invite. Its key alone proves it.
func (l *memberList) isHouse(id p2p.PeerID) bool {
	s := l.now.Load()
	if s.known {
		return s.machines[id].GetRole() == roleServer
	}
	return slices.ContainsFunc(l.invite.Storehouse, func(p api.InvitePeer) bool { return p.ID == string(id) })
}

// secrets gives those of the swarm, newest first.
func (l *memberList) secrets() [][]byte {
	if s := l.now.Load(); len(s.secrets) > 0 {
		return s.secrets
	}
	return [][]byte{l.invite.Secret}
}

// member gives what is known of a machine; nil if it is not in the list.
func (l *memberList) member(id p2p.PeerID) *floxv1.Member { return l.now.Load().machines[id] }

// houses lists the servers of the storehouse and where they are: as the list
// says, and besides as the invite does, whose addresses may be those from here. An
// address that cannot be used does not keep the others from being.
func (l *memberList) houses() (list []p2p.PeerAddr) {
	s := l.now.Load()
	for _, p := range l.invite.Storehouse {
		if id := p2p.PeerID(p.ID); !s.known || s.machines[id].GetRole() == roleServer {
			list = append(list, p2p.PeerAddr{ID: id, Addrs: slices.Clone(p.Addrs)})
		}
	}
	for _, id := range slices.Sorted(maps.Keys(s.machines)) {
		m := s.machines[id]
		if m.GetRole() != roleServer {
			continue
		}
		at := slices.IndexFunc(list, func(p p2p.PeerAddr) bool { return p.ID == id })
		if at < 0 {
			list, at = append(list, p2p.PeerAddr{ID: id}), len(list)
		}
		for _, addr := range m.GetAddrs() {
			if p2p.CheckAddr(addr) == nil && !slices.Contains(list[at].Addrs, addr) && len(list[at].Addrs) < maxHouseAddrs {
				list[at].Addrs = append(list[at].Addrs, addr)
			}
		}
	}
	return list
}
