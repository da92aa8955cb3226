package storehouse

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	cluster "github.com/floxctl/flox/raft"
)

const (
	defaultInviteTTL = time.Hour
	maxInviteTTL     = 30 * 24 * time.Hour
	lanUses          = 256 // machines that join inside one window, unless told otherwise
	inviteIDLen      = 10  // of base32
	inviteSecretLen  = 20  // bytes
	auditPage        = 256 // records of one message
	maxAuditLimit    = 10_000
)

// answer makes a reply of what a call gave.
func answer[T any](m *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(m), nil
}

// MakeInvite is floxv1connect.AdminHandler. The secret is in the answer alone.
func (a *admin) MakeInvite(ctx context.Context, req *connect.Request[floxv1.MakeInviteRequest]) (*connect.Response[floxv1.MakeInviteResponse], error) {
	who, err := a.may(ctx, req, adminOnly, "invite.make")
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.makeInvite(ctx, who, req.Msg))
}

func (a *admin) makeInvite(ctx context.Context, who *floxv1.Actor, m *floxv1.MakeInviteRequest) (*floxv1.MakeInviteResponse, error) {
	if m.GetTtlSeconds() > uint64(maxInviteTTL/time.Second) {
		return nil, fmt.Errorf("an invite of %d s, want at most %v: %w", m.GetTtlSeconds(), maxInviteTTL, flox.ErrBadInput)
	}
	if m.GetEphemeral() && m.GetRole() != members.Agent {
		return nil, fmt.Errorf("an ephemeral %s: what is forgotten an hour after it left cannot be counted on for work of others; want the role %s, or none that is ephemeral: %w",
			m.GetRole(), members.Agent, flox.ErrBadInput)
	}
	if err := members.CheckLabelText(m.GetLabels()); err != nil {
		return nil, fmt.Errorf("invite: %w", err)
	}
	if err := members.CheckVoterLabel(m.GetLabels()); m.GetRole() == members.Server && err != nil {
		return nil, fmt.Errorf("invite: %w", err)
	}
	if m.GetRole() == members.Server && a.s.line == nil {
		return nil, fmt.Errorf("this server listens for no other servers: set storehouse.consensus in its configuration and start it again: %w", flox.ErrBadInput)
	}
	if err := a.s.takesMachines(ctx, m.GetRole()); err != nil {
		return nil, fmt.Errorf("invite: %w", err)
	}
	ttl := time.Duration(m.GetTtlSeconds()) * time.Second //nolint:gosec // bounded above
	setDefault(&ttl, defaultInviteTTL)
	uses := m.GetUses()
	if m.GetLan() {
		setDefault(&uses, lanUses)
	}
	setDefault(&uses, 1)
	trust, err := a.s.newestTrust(ctx)
	if err != nil {
		return nil, err
	}
	text := &api.JoinInvite{
		ID: rand.Text()[:inviteIDLen], Role: m.GetRole(), Name: a.s.cfg.Name, Storehouse: a.s.whereServersAre(), TrustList: trust,
		StoreDir: a.s.cfg.StoreDir, Expires: time.Now().Add(ttl).Truncate(time.Second).UTC(), LAN: m.GetLan(),
	}
	record := &floxv1.InviteRecord{
		Id: text.ID, Role: m.GetRole(), Uses: uses, ExpiresUnixMs: text.Expires.UnixMilli(),
		Labels: m.GetLabels(), Ephemeral: m.GetEphemeral(), User: m.GetUser(), Lan: m.GetLan(),
	}
	if !m.GetLan() {
		text.Secret = make([]byte, inviteSecretLen)
		_, _ = rand.Read(text.Secret) // never fails
		if record.Verifier, err = text.Proof(); err != nil {
			return nil, err
		}
	}
	line, err := text.Encode()
	if err != nil {
		return nil, err
	}
	_, err = a.s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: who, Command: &floxv1.MembersCommand_MakeInvite{MakeInvite: record}})
	record.Verifier, record.By = nil, who
	return &floxv1.MakeInviteResponse{Invite: line, Record: record}, err
}

// newestTrust is the fingerprint of the trust list in force.
func (s *Server) newestTrust(ctx context.Context) (flox.CID, error) {
	newest, err := s.newestList(ctx)
	if err != nil {
		return flox.CID{}, err
	}
	return newest.Fingerprint()
}

func orUnreachable(err error) error {
	if err == nil {
		return flox.ErrUnreachable
	}
	return err
}

// whereServersAre lists the servers, this one first.
func (s *Server) whereServersAre() []api.InvitePeer {
	list := []api.InvitePeer{{ID: string(s.id.peer), Addrs: s.swarm.Addrs()}}
	for _, m := range s.roster.servers() {
		if m.GetPeer() != string(s.id.peer) && len(m.GetAddrs()) > 0 && len(list) < maxInvitedTo {
			list = append(list, api.InvitePeer{ID: m.GetPeer(), Addrs: m.GetAddrs()})
		}
	}
	return list
}

// maxInvitedTo is how many servers an invite names: it has to be pasted.
const maxInvitedTo = 5

// ListInvites is floxv1connect.AdminHandler.
func (a *admin) ListInvites(ctx context.Context, req *connect.Request[floxv1.ListInvitesRequest]) (*connect.Response[floxv1.ListInvitesResponse], error) {
	out := &floxv1.ListInvitesResponse{}
	_, err := a.may(ctx, req, adminOnly, "invite.list")
	if err == nil {
		err = a.s.viewMembers(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
			now := time.Now().UnixMilli()
			return members.Invites(r, func(inv *floxv1.InviteRecord) bool {
				if inv.Verifier = nil; inv.GetExpiresUnixMs() > now && inv.GetUses() > 0 {
					out.Invites = append(out.Invites, inv)
				}
				return true
			})
		})
	}
	return answer(out, err)
}

// CancelInvite is floxv1connect.AdminHandler.
func (a *admin) CancelInvite(ctx context.Context, req *connect.Request[floxv1.CancelInviteRequest]) (*connect.Response[floxv1.CancelInviteResponse], error) {
	who, err := a.may(ctx, req, adminOnly, "invite.cancel")
	if err == nil {
		_, err = a.s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: who, Command: &floxv1.MembersCommand_CancelInvite{CancelInvite: req.Msg.GetId()}})
	}
	if errors.Is(err, flox.ErrNotFound) {
		err = fmt.Errorf("no invite has the ID %q; see: floxctl invite list: %w", req.Msg.GetId(), flox.ErrNotFound)
	}
	return answer(&floxv1.CancelInviteResponse{}, err)
}

// ListMachines is floxv1connect.AdminHandler. Every member may ask.
func (a *admin) ListMachines(ctx context.Context, req *connect.Request[floxv1.ListMachinesRequest]) (*connect.Response[floxv1.ListMachinesResponse], error) {
	if _, err := a.may(ctx, req, anyMember, "machine.list"); err != nil {
		return nil, api.ToConnect(err)
	}
	out := &floxv1.ListMachinesResponse{}
	elsewhere := map[string]*floxv1.MachineState{}
	if req.Header().Get(actorHeader) == "" {
		elsewhere = a.s.seenElsewhere(ctx, req.Msg.GetMachine())
	}
	add := func(m *floxv1.Machine) bool {
		state := &floxv1.MachineState{Machine: m}
		state.Connected, state.SeenUnixMs = a.s.seen.look(m.GetPeer())
		if m.GetPeer() == string(a.s.id.peer) {
			state.Connected, state.SeenUnixMs = true, time.Now().UnixMilli()
		}
		if there := elsewhere[m.GetPeer()]; there != nil {
			state.Connected, state.SeenUnixMs = state.Connected || there.GetConnected(), max(state.GetSeenUnixMs(), there.GetSeenUnixMs())
		}
		out.Machines = append(out.Machines, state)
		return true
	}
	return answer(out, a.s.viewMembers(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		if req.Msg.GetMachine() == "" {
			return members.Machines(r, add)
		}
		m, err := members.Find(r, req.Msg.GetMachine())
		if err == nil {
			add(m)
		}
		return err
	}))
}

// find gives the machine that is meant.
func (a *admin) find(ctx context.Context, what string) (m *floxv1.Machine, err error) {
	err = a.s.viewMembers(ctx, cluster.Linearizable, func(r *cluster.Reader) (err error) {
		m, err = members.Find(r, what)
		return err
	})
	return m, err
}

// ChangeMachine is floxv1connect.AdminHandler.
func (a *admin) ChangeMachine(ctx context.Context, req *connect.Request[floxv1.ChangeMachineRequest]) (*connect.Response[floxv1.ChangeMachineResponse], error) {
	who, err := a.may(ctx, req, adminOnly, "machine.change")
	var m *floxv1.Machine
	if err == nil {
		m, err = a.find(ctx, req.Msg.GetMachine())
	}
	if err != nil {
		return nil, api.ToConnect(err)
	}
	change := req.Msg.GetChange()
	if change == nil {
		change = &floxv1.ChangeMachine{}
	}
	change.Peer = m.GetPeer()
	if err := a.mayChange(ctx, m, change); err != nil {
		return nil, api.ToConnect(err)
	}
	reply, err := a.s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: who, Command: &floxv1.MembersCommand_Change{Change: change}})
	return answer(&floxv1.ChangeMachineResponse{Machine: reply.GetMachine()}, err)
}

// mayChange refuses labels that nobody could read, and to take the vote of a server
// that the others need.
func (a *admin) mayChange(ctx context.Context, m *floxv1.Machine, change *floxv1.ChangeMachine) error {
	if err := members.CheckLabelText(change.GetSetLabels()); err != nil {
		return fmt.Errorf("machine %s: %w", m.GetName(), err)
	}
	if m.GetRole() != members.Server {
		return nil
	}
	if err := members.CheckVoterLabel(change.GetSetLabels()); err != nil {
		return fmt.Errorf("machine %s: %w", m.GetName(), err)
	}
	if next := (&floxv1.Machine{Labels: change.GetSetLabels()}); !members.NoVote(next) || members.NoVote(m) {
		return nil
	}
	if err := a.s.lookAtServers(ctx).mayGo(m, true); err != nil {
		return fmt.Errorf("%s keeps its vote: %w", m.GetName(), err)
	}
	return nil
}

// RemoveMachine is floxv1connect.AdminHandler: it revokes the machine's key.
// When it answers, this server has cut its connections; the others follow within
// a second. A key that is no member's is named by its whole peer ID. A server is taken
// out like one that is removed by force: ErrBusy, and nothing is done, where no healthy
// majority would be left.
func (a *admin) RemoveMachine(ctx context.Context, req *connect.Request[floxv1.RemoveMachineRequest]) (*connect.Response[floxv1.RemoveMachineResponse], error) {
	who, err := a.may(ctx, req, adminOnly, "machine.revoke")
	var m *floxv1.Machine
	if err == nil {
		m, err = a.find(ctx, req.Msg.GetMachine())
	}
	if peer := req.Msg.GetMachine(); errors.Is(err, flox.ErrNotFound) && members.IsPeer(peer) {
		m, err = &floxv1.Machine{Peer: peer, Name: peer}, nil // with open membership it may come all the same
	}
	if err == nil && m.GetPeer() == string(a.s.id.peer) {
		err = fmt.Errorf("%s is the server that was asked: ask another one to take it out: %w", m.GetName(), flox.ErrBusy)
	}
	switch {
	case err != nil:
	case a.s.isServer(m):
		err = a.revokeServer(ctx, who, m, req.Msg.GetReason())
	default:
		err = a.revoke(ctx, who, m, req.Msg.GetReason())
	}
	return answer(&floxv1.RemoveMachineResponse{Machine: m}, err)
}

// revokeServer takes a server out like one that is removed by force: it need not be
// well for that, and what only it has of the content is not waited for.
func (a *admin) revokeServer(ctx context.Context, who *floxv1.Actor, m *floxv1.Machine, reason string) error {
	house := a.s.lookAtServers(ctx)
	if err := house.mayGo(m, true); err != nil {
		return fmt.Errorf("%s is not revoked, and nothing was changed: %w", m.GetName(), err)
	}
	return a.takeOut(ctx, who, m, house, reason, true)
}

// isServer reports whether a machine is one of the servers, or still of the log's.
func (s *Server) isServer(m *floxv1.Machine) bool {
	return m.GetRole() == members.Server || slices.ContainsFunc(s.servers.members(), func(o cluster.Member) bool { return o.ID == m.GetPeer() })
}

// revoke takes a machine that is no server out of the member list for ever.
func (a *admin) revoke(ctx context.Context, who *floxv1.Actor, m *floxv1.Machine, reason string) error {
	remove := &floxv1.RemoveMachine{Peer: m.GetPeer(), Reason: reason, Revoked: true}
	_, err := a.s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: who, Command: &floxv1.MembersCommand_Remove{Remove: remove}})
	if err == nil {
		err = a.s.roster.refresh(ctx, a.s)
		a.s.swarm.Kick()
	}
	return err
}

// Audit is floxv1connect.AdminHandler.
func (a *admin) Audit(ctx context.Context, req *connect.Request[floxv1.AuditRequest], stream *connect.ServerStream[floxv1.AuditResponse]) error {
	_, err := a.mayAs(ctx, req.Peer().Addr, req.Header(), adminOnly, "audit.read")
	if err != nil {
		return api.ToConnect(err)
	}
	select {
	case a.followers <- struct{}{}:
		defer func() { <-a.followers }()
	default:
		return api.ToConnect(fmt.Errorf("%d follow the audit log already: %w", maxFollowers, flox.ErrFull))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(a.stop, cancel)()
	return api.ToConnect(a.audit(ctx, req.Msg, stream.Send))
}

func (a *admin) audit(ctx context.Context, q *floxv1.AuditRequest, send func(*floxv1.AuditResponse) error) error {
	if q.GetLimit() > maxAuditLimit {
		return fmt.Errorf("the newest %d records, want at most %d; 0 = all: %w", q.GetLimit(), maxAuditLimit, flox.ErrBadInput)
	}
	if err := a.audited(ctx, q.GetMachine()); err != nil {
		return err
	}
	at, err := a.auditNewest(ctx, q, send)
	for err == nil {
		var records []*floxv1.AuditRecord
		was := at
		if records, at, err = a.auditBehind(ctx, at, q); err != nil {
			return err
		}
		if len(records) > 0 {
			if err := send(&floxv1.AuditResponse{Records: records}); err != nil {
				return err
			}
		}
		switch {
		case at > was: // there may be more
		case !q.GetFollow():
			return nil
		default:
			if _, err := a.s.node.Follow(ctx, a.s.node.Applied()); err != nil {
				return err
			}
		}
	}
	return err
}

// audited refuses the name of a machine that is none and that no record is about or
// by, as of one that is gone: nothing is to be found there. ErrNotFound.
func (a *admin) audited(ctx context.Context, machine string) error {
	if machine == "" {
		return nil
	}
	err := a.s.viewMembers(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		m, err := members.Find(r, machine)
		if err == nil && (m.GetPeer() == machine || strings.EqualFold(m.GetName(), machine)) {
			return nil
		}
		known, q := false, &floxv1.AuditRequest{Machine: machine}
		err = members.Audit(r, 0, func(rec *floxv1.AuditRecord) bool {
			known = wanted(rec, q)
			return !known && ctx.Err() == nil
		})
		if err != nil || known {
			return err
		}
		return flox.ErrNotFound
	})
	if errors.Is(err, flox.ErrNotFound) {
		return fmt.Errorf("audit: no machine has the name or the peer ID %q, and no record is about one that had; see: floxctl machine list: %w", machine[:min(len(machine), 80)], flox.ErrNotFound)
	}
	return err
}

// auditNewest sends the newest records if only so many are wanted, and says
// behind which index to go on.
func (a *admin) auditNewest(ctx context.Context, q *floxv1.AuditRequest, send func(*floxv1.AuditResponse) error) (uint64, error) {
	limit := int(q.GetLimit())
	if limit == 0 {
		return q.GetAfter(), nil
	}
	var newest []*floxv1.AuditRecord
	at := q.GetAfter()
	err := a.s.viewMembers(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		return members.Audit(r, at, func(rec *floxv1.AuditRecord) bool {
			if at = rec.GetIndex(); wanted(rec, q) {
				if newest = append(newest, rec); len(newest) >= 2*limit {
					newest = append(newest[:0], newest[len(newest)-limit:]...)
				}
			}
			return ctx.Err() == nil
		})
	})
	newest = newest[max(0, len(newest)-limit):]
	for err == nil && len(newest) > 0 {
		n := min(auditPage, len(newest))
		err = send(&floxv1.AuditResponse{Records: newest[:n]})
		newest = newest[n:]
	}
	return at, err
}

// auditBehind reads a page of the audit log, and up to which index it went.
func (a *admin) auditBehind(ctx context.Context, at uint64, q *floxv1.AuditRequest) (page []*floxv1.AuditRecord, upTo uint64, err error) {
	upTo = at
	err = a.s.viewMembers(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		return members.Audit(r, at, func(rec *floxv1.AuditRecord) bool {
			if upTo = rec.GetIndex(); wanted(rec, q) {
				page = append(page, rec)
			}
			return len(page) < auditPage
		})
	})
	return page, upTo, err
}

// wanted reports whether a record is about or by the machine asked for, and of
// the actions asked for.
func wanted(rec *floxv1.AuditRecord, q *floxv1.AuditRequest) bool {
	if !strings.HasPrefix(rec.GetAction(), q.GetAction()) {
		return false
	}
	m := q.GetMachine()
	return m == "" || strings.EqualFold(m, rec.GetSubject()) || strings.EqualFold(m, rec.GetActor().GetMachine()) ||
		m == rec.GetActor().GetPeer() || slices.Contains(strings.Fields(rec.GetDetail()), m)
}
