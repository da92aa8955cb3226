package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

// openKeys puts the secrets that the log holds in force, if they are newer than
// those in force and sealed to this server.
func (s *Server) openKeys() {
	sealed := s.roster.now.Load().secrets
	if sealed == nil || sealed.GetVersion() <= s.sealed.Load() {
		return
	}
	secrets, err := openSecrets(sealed, s.id.peer, s.id.machine)
	var next *keys
	if err == nil {
		next, err = parseKeys(secrets)
	}
	if err != nil {
		// A server that joins is in the list before they are sealed to it.
		s.cfg.Log.Info("the storehouse's keys are not open here yet", "error", err)
		return
	}
	s.id.ring.set(next)
	s.sealed.Store(sealed.GetVersion())
}

// tendServers is the leader's part in keeping three lists the same: the machines
// that are members as servers, the servers that agree on the log, and those the
// cluster's secrets are sealed to.
func (s *Server) tendServers(ctx context.Context) error {
	if s.node.Status().State != "leader" {
		return nil
	}
	// Only what everybody agreed on counts here.
	if err := s.viewMembers(ctx, cluster.Linearizable, func(*cluster.Reader) error { return nil }); err != nil {
		return err
	}
	if err := s.roster.refresh(ctx, s); err != nil {
		return err
	}
	machines := s.roster.servers()
	if !slices.ContainsFunc(machines, func(m *floxv1.Machine) bool { return m.GetPeer() == string(s.id.peer) }) {
		return s.standDown(ctx, machines)
	}
	err := errors.Join(s.sealTo(ctx, machines), s.admitServers(ctx, machines), s.dropServers(ctx, machines))
	if _, _, none := s.keysInForce(); none != nil {
		return err // sealed a moment ago, or another server has to lead
	}
	if _, failed := s.settleTrust(ctx); failed != nil {
		return errors.Join(err, failed)
	}
	return errors.Join(err, s.retireKeys(ctx))
}

// standDown hands leadership over when the member list has servers and this one is
// none of them any more: what a leader does for the others is for one of them to do,
// and first to take this one out of the log's servers.
func (s *Server) standDown(ctx context.Context, machines []*floxv1.Machine) error {
	if len(machines) == 0 || s.servers.alone.Load() {
		return nil // it has not said yet who it is
	}
	if err := s.node.Transfer(ctx, ""); err != nil {
		return fmt.Errorf("this server leads and is no member of the storehouse any more: %w", err)
	}
	s.cfg.Log.Warn("this server is no member of the storehouse any more and handed leadership over")
	return nil
}

// sealTo seals the cluster's secrets anew, under a new cluster key, when they are
// not sealed to exactly the servers there are.
func (s *Server) sealTo(ctx context.Context, machines []*floxv1.Machine) error {
	sealed := s.roster.now.Load().secrets
	want := make([]string, 0, len(machines))
	to := map[p2p.PeerID][]byte{}
	for _, m := range machines {
		want = append(want, m.GetPeer())
		to[p2p.PeerID(m.GetPeer())] = m.GetSealKey()
	}
	if slices.EqualFunc(sealed.GetSeals(), want, func(have *floxv1.Seal, peer string) bool { return have.GetPeer() == peer }) {
		return nil
	}
	if sealed != nil && sealed.GetVersion() != s.sealed.Load() {
		return fmt.Errorf("the storehouse's keys, version %d, are not open on the leader; another server has to lead: %w", sealed.GetVersion(), flox.ErrDenied)
	}
	have, err := s.id.ring.get()
	if err != nil {
		return err
	}
	return s.putSecrets(ctx, s.actor(), have.message(), to, sealed.GetVersion())
}

// putSecrets seals secrets and puts them into the log in place of a version.
func (s *Server) putSecrets(ctx context.Context, who *floxv1.Actor, secrets *floxv1.ClusterSecrets, to map[p2p.PeerID][]byte, after uint64) error {
	next, err := sealSecrets(after+1, secrets, to)
	if err != nil {
		return err
	}
	_, err = s.proposeMembers(ctx, &floxv1.MembersCommand{
		Actor:   who,
		Command: &floxv1.MembersCommand_Secrets{Secrets: &floxv1.SetSecrets{After: after, Secrets: next}},
	})
	if err != nil {
		return fmt.Errorf("seal the storehouse's keys: %w", err)
	}
	return nil
}

// actor is this server itself, for what it does unasked.
func (s *Server) actor() *floxv1.Actor {
	return &floxv1.Actor{Peer: string(s.id.peer), Machine: s.machineName()}
}

// admitServers takes machines into the log's servers that run and are none yet, and
// makes those vote that shall, and no others.
func (s *Server) admitServers(ctx context.Context, machines []*floxv1.Machine) (err error) {
	have, old, wanted := map[string]string{}, map[string]string{}, map[string]*floxv1.Machine{}
	for _, m := range machines {
		wanted[m.GetPeer()] = m
	}
	defer s.servers.old.Store(&old)
	before := s.servers.tooOld()
	now, err := s.node.Servers(ctx)
	if err != nil {
		return err
	}
	for _, o := range now {
		have[o.ID] = o.Address
		if no := members.NoVote(wanted[o.ID]); o.WantsVote == no || o.Voter && no {
			have[o.ID] = "" // its vote is another one than its label says
		}
	}
	for _, m := range machines {
		address, there := have[m.GetPeer()]
		if m.GetRaftAddress() == "" || there && address == m.GetRaftAddress() {
			continue
		}
		if m.GetPeer() == string(s.id.peer) && members.NoVote(m) {
			return s.node.Transfer(ctx, "") // the next leader takes its vote away
		}
		if err := s.node.AddServer(ctx, m.GetPeer(), m.GetRaftAddress(), !members.NoVote(m)); err != nil {
			if errors.Is(err, cluster.ErrLevel) {
				old[m.GetPeer()] = err.Error()
				if _, told := before[m.GetPeer()]; !told {
					s.cfg.Log.Warn("a server is not taken in: its program is too old", "server", m.GetName(), "address", m.GetRaftAddress(), "error", err)
				}
				continue
			}
			s.cfg.Log.Debug("a server is not there yet", "server", m.GetName(), "address", m.GetRaftAddress(), "error", err)
			continue
		}
		s.cfg.Log.Info("server takes part", "server", m.GetName(), "address", m.GetRaftAddress())
	}
	return err
}

// dropServers takes servers out of the log's that are members no more.
func (s *Server) dropServers(ctx context.Context, machines []*floxv1.Machine) (err error) {
	for _, m := range s.servers.members() {
		if slices.ContainsFunc(machines, func(o *floxv1.Machine) bool { return o.GetPeer() == m.ID }) {
			continue
		}
		dropErr := s.node.ForceRemoveServer(ctx, m.ID)
		if errors.Is(dropErr, flox.ErrNotFound) {
			continue // whoever took its record out was quicker
		}
		if dropErr != nil {
			err = errors.Join(err, dropErr)
			continue
		}
		s.cfg.Log.Info("server takes part no more", "server", m.ID)
	}
	return err
}

// putTrust signs a list that follows another and puts it in force.
func (s *Server) putTrust(ctx context.Context, old, next *content.TrustList) (err error) {
	have, err := s.id.ring.get()
	if err != nil {
		return err
	}
	next.Version, next.Signatures = old.Version+1, nil
	if next.Prev, err = old.Fingerprint(); err != nil {
		return err
	}
	signed := false
	for _, key := range have.manifest {
		if slices.Contains(old.ManifestKeys, key.Public().String()) {
			signed = true
			if err := next.Sign(key); err != nil {
				return err
			}
		}
	}
	if !signed {
		return fmt.Errorf("none of the keys in force is in trust list version %d: %w", old.Version, flox.ErrUntrusted)
	}
	b, err := next.Marshal()
	if err != nil {
		return err
	}
	_, err = propose(freeing(ctx), s.node.NewSession(), &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Trust{Trust: &floxv1.SetTrustList{List: b}}})
	return err
}

// machineName is what this server is called among the machines.
func (s *Server) machineName() string {
	if m, ok := s.roster.machine(s.id.peer); ok {
		return m.GetName()
	}
	for _, name := range []string{s.cfg.ServerName, s.cfg.Name} {
		if members.CheckName(name) == nil {
			return s.freeName(name)
		}
	}
	return "server"
}

// freeName is a name like one that no other machine has. In a storehouse that was
// restored under another key the server of before still has its own.
func (s *Server) freeName(name string) string {
	if !s.servers.alone.Load() {
		return name // whoever has it may be in use
	}
	taken := map[string]bool{}
	for _, m := range s.roster.now.Load().machines {
		taken[strings.ToLower(m.GetName())] = true
	}
	try := name
	for i := 2; taken[strings.ToLower(try)]; i++ {
		try = fmt.Sprintf("%s-%d", name[:min(len(name), 56)], i)
	}
	return try
}

// introduce makes this server a member if it is the first, and keeps what the
// others know of it up to date.
func (s *Server) introduce(ctx context.Context) error {
	_, public, err := sealKey(s.id.machine)
	if err != nil {
		return err
	}
	if err := s.roster.refresh(ctx, s); err != nil {
		return err
	}
	addrs := s.swarm.Addrs()
	me := &floxv1.Machine{
		Peer: string(s.id.peer), Name: s.machineName(), Role: members.Server, SealKey: public[:],
		Addrs: addrs[:min(len(addrs), 16)], HttpUrl: s.httpURL(addrs), JoinedBy: "the first start",
	}
	if s.line != nil {
		me.RaftAddress = s.line.Addr().String()
	}
	command := &floxv1.MembersCommand{Actor: s.actor()}
	was, there := s.roster.machine(s.id.peer)
	switch {
	case !there && s.id.joined != nil:
		return fmt.Errorf("this server is no member of the storehouse %s any more; make it join again with a new invite: %w", s.cfg.Name, flox.ErrDenied)
	case !there:
		command.Command = &floxv1.MembersCommand_Add{Add: me}
	case slices.Equal(was.GetAddrs(), me.GetAddrs()) && was.GetRaftAddress() == me.GetRaftAddress() && was.GetHttpUrl() == me.GetHttpUrl():
		return nil
	default:
		command.Command = &floxv1.MembersCommand_Change{Change: &floxv1.ChangeMachine{
			Peer: me.GetPeer(), Addrs: me.GetAddrs(), RaftAddress: me.GetRaftAddress(), HttpUrl: me.GetHttpUrl(), SealKey: me.GetSealKey(),
		}}
	}
	if _, err := s.proposeMembers(ctx, command); err != nil {
		return fmt.Errorf("tell the others of this server: %w", err)
	}
	return s.roster.refresh(ctx, s)
}

// meetServers tells the swarm where the other servers are.
func (s *Server) meetServers() {
	for _, m := range s.roster.servers() {
		if m.GetPeer() == string(s.id.peer) || len(m.GetAddrs()) == 0 {
			continue
		}
		if err := s.swarm.AddPeer(p2p.PeerAddr{ID: p2p.PeerID(m.GetPeer()), Addrs: m.GetAddrs()}); err != nil {
			s.cfg.Log.Warn("a server's addresses cannot be used", "server", m.GetName(), "addresses", strings.Join(m.GetAddrs(), " "), "error", err)
		}
	}
}
