package storehouse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	"github.com/floxctl/flox/profile"
	cluster "github.com/floxctl/flox/raft"
)

// JoinProtocol is what guests speak: machines that are no members yet.
const JoinProtocol = "/flox/join/1"

// maxJoinMessage bounds what a guest sends in bytes, and maxTold how many members
// the answer names; the rest comes through WatchMembers.
const (
	maxJoinMessage = 64 << 10
	maxTold        = 1000
)

// guestKey is the context key of who a guest is.
type guestKey struct{}

// guest is what a guest's connection has proven.
type guest struct {
	invite string // "" = within a window, or a member already
	peer   p2p.PeerID
	addr   string // host:port it comes from
}

// joining answers guests.
type joining struct{ *Server }

// serveJoin answers guests until ctx ends.
func (s *Server) serveJoin(ctx context.Context) error {
	l, err := s.swarm.ListenGuests(JoinProtocol)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle(floxv1connect.NewJoinHandler(joining{s}, connect.WithReadMaxBytes(maxJoinMessage)))
	return serve(ctx, l, &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 20 * time.Second, MaxHeaderBytes: maxWebHeader,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			invite, peer := p2p.GuestInvite(conn)
			return context.WithValue(ctx, guestKey{}, guest{invite, peer, p2p.GuestAddr(conn)})
		},
	})
}

// invited gives the invite a guest came with. Who comes with one that is over is
// audited like those whom the handshake refuses: it lets those pass whose answer
// may have been lost.
func (j joining) invited(ctx context.Context) (g guest, inv *floxv1.InviteRecord, err error) {
	g, inv, err = j.findInvite(ctx)
	if errors.Is(err, flox.ErrDenied) && g.peer != "" {
		j.doors.refused(p2p.Refusal{Peer: g.peer, Addr: g.addr, Why: err})
	}
	return g, inv, err
}

func (j joining) findInvite(ctx context.Context) (g guest, inv *floxv1.InviteRecord, err error) {
	g, ok := ctx.Value(guestKey{}).(guest)
	if !ok || g.peer == "" {
		return g, nil, fmt.Errorf("join: the connection does not say who it is: %w", flox.ErrDenied)
	}
	if g.invite == "" {
		inv, err = j.window(ctx)
	} else {
		err = j.viewMembers(ctx, cluster.Local, func(r *cluster.Reader) error {
			inv, err = members.Invite(r, g.invite)
			return err
		})
	}
	if err == nil && inv.GetUses() == 0 {
		err = j.joinedWith(ctx, g.peer, inv.GetId())
	}
	if errors.Is(err, flox.ErrNotFound) {
		err = fmt.Errorf("join: the invite is not valid any more: ask for a new one: %w", flox.ErrDenied)
	}
	return g, inv, err
}

// member gives the machine of a guest that came without an invite and is a member
// already: the answer to its join was lost, or it joins again.
func (j joining) member(ctx context.Context) (*floxv1.Machine, bool) {
	g, ok := ctx.Value(guestKey{}).(guest)
	if !ok || g.invite != "" {
		return nil, false
	}
	return j.roster.machine(g.peer)
}

// joinedWith refuses everybody an invite that is used up, but for those who joined
// with it: their answer was lost. ErrDenied.
func (j joining) joinedWith(ctx context.Context, peer p2p.PeerID, invite string) error {
	return j.viewMembers(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		m, err := members.Machine(r, string(peer))
		if errors.Is(err, flox.ErrNotFound) || err == nil && m.GetInvite() != invite {
			return fmt.Errorf("join: the invite %s was used up by other machines: ask for a new one: %w", invite, flox.ErrDenied)
		}
		return err
	})
}

// Look is floxv1connect.JoinHandler.
func (j joining) Look(ctx context.Context, _ *connect.Request[floxv1.LookRequest]) (*connect.Response[floxv1.LookResponse], error) {
	role := ""
	if m, ok := j.member(ctx); ok {
		role = m.GetRole()
	} else {
		_, inv, err := j.invited(ctx)
		if err != nil {
			return nil, api.ToConnect(err)
		}
		role = inv.GetRole()
	}
	trust, err := j.newestTrust(ctx)
	return answer(&floxv1.LookResponse{Name: j.cfg.Name, StoreDir: string(j.cfg.StoreDir), TrustList: trust[:], Role: role}, err)
}

// Join is floxv1connect.JoinHandler. The log decides, so that an invite counts
// once however many servers are asked at once.
func (j joining) Join(ctx context.Context, req *connect.Request[floxv1.JoinRequest]) (*connect.Response[floxv1.JoinResponse], error) {
	if m, ok := j.member(ctx); ok {
		return answer(j.again(ctx, m, req.Msg.GetMachine()))
	}
	return answer(j.join(ctx, req.Msg))
}

// again answers a member that joins. A server may say that it will be elsewhere:
// before it was ever reached, it has no other way to.
func (j joining) again(ctx context.Context, m, asked *floxv1.Machine) (*floxv1.JoinResponse, error) {
	if at := asked.GetRaftAddress(); m.GetRole() == members.Server && at != "" && at != m.GetRaftAddress() {
		reply, err := j.proposeMembers(ctx, &floxv1.MembersCommand{
			Actor:   &floxv1.Actor{Peer: m.GetPeer(), Machine: m.GetName()},
			Command: &floxv1.MembersCommand_Change{Change: &floxv1.ChangeMachine{Peer: m.GetPeer(), RaftAddress: at, SealKey: asked.GetSealKey()}},
		})
		if err != nil {
			return nil, err
		}
		m = reply.GetMachine()
	}
	return j.welcome(ctx, m)
}

// welcome is what a machine is told that is a member now.
func (j joining) welcome(ctx context.Context, m *floxv1.Machine) (*floxv1.JoinResponse, error) {
	if err := j.roster.refresh(ctx, j.Server); err != nil { // its first connection may come next
		return nil, err
	}
	keep, err := j.inviteFile(ctx)
	if err != nil {
		return nil, err
	}
	told := j.everybody()
	return &floxv1.JoinResponse{Invite: keep, Machine: m, Members: told[:min(len(told), maxTold)]}, nil
}

func (j joining) join(ctx context.Context, req *floxv1.JoinRequest) (*floxv1.JoinResponse, error) {
	g, inv, err := j.invited(ctx)
	if err != nil {
		return nil, err
	}
	if err := j.takesMachines(ctx, inv.GetRole()); err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	if len(req.GetUser()) > maxUserName {
		return nil, fmt.Errorf("join: a user's name of %d bytes, want at most %d: %w", len(req.GetUser()), maxUserName, flox.ErrBadInput)
	}
	asked := req.GetMachine()
	if asked == nil {
		asked = &floxv1.Machine{}
	}
	if inv.GetRole() != members.Server && (asked.GetRaftAddress() != "" || len(asked.GetSealKey()) > 0) {
		err := fmt.Errorf("join: the invite %s is for the role %s, and this machine asks to be a server: ask for an invite for that: %w", inv.GetId(), inv.GetRole(), flox.ErrDenied)
		j.doors.refused(p2p.Refusal{Peer: g.peer, Addr: g.addr, Why: err})
		return nil, err
	}
	asked.Peer = string(g.peer)
	user, unclaimed := req.GetUser(), ""
	if inv.GetUser() == nil {
		if unclaimed, err = j.profilesOf(ctx, g.peer, user); err != nil {
			return nil, err
		}
		if unclaimed != "" {
			user = ""
		}
	}
	reply, err := j.proposeMembers(ctx, &floxv1.MembersCommand{
		Actor:   &floxv1.Actor{Peer: string(g.peer), Machine: asked.GetName(), User: req.GetUser()},
		Command: &floxv1.MembersCommand_Redeem{Redeem: &floxv1.Redeem{Invite: inv.GetId(), Machine: asked, User: user}},
	})
	if err != nil {
		return nil, err
	}
	if reply.GetRefused() != "" {
		if err := j.revokedJoin(ctx, g.peer, inv.GetRole()); err != nil {
			return nil, err
		}
		return nil, refusedJoin(reply.GetRefused())
	}
	resp, err := j.welcome(ctx, reply.GetMachine())
	if err == nil {
		resp.Unclaimed = nameOr(reply.GetUnclaimed(), unclaimed)
	}
	return resp, err
}

// profilesOf says which profile gives something to a user that a machine says it speaks
// for when it joins: that takes an admin's word. "" = none does, or the machine spoke for
// the user before.
func (j joining) profilesOf(ctx context.Context, peer p2p.PeerID, user string) (unclaimed string, err error) {
	m, _ := j.roster.machine(peer)
	if user == "" || members.UserRole(m, user) != "" {
		return "", nil
	}
	err = j.profiles.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		return profile.List(r, "", "", func(p *floxv1.Profile) bool {
			if owner, _, _ := strings.Cut(p.GetName(), "/"); profile.Folded(owner) == profile.Folded(user) {
				unclaimed = user + " has profiles already"
			}
			for _, g := range p.GetGrants() {
				if profile.Folded(g.GetUser()) == profile.Folded(user) {
					unclaimed = user + " has a role in a profile already"
				}
			}
			return unclaimed == ""
		})
	})
	return unclaimed, err
}

// revokedJoin says of a key that was revoked what happened and what to do on that
// machine; nil of another. ErrDenied.
func (s *Server) revokedJoin(ctx context.Context, peer p2p.PeerID, role string) error {
	rev := &floxv1.Revoked{}
	err := s.viewMembers(ctx, cluster.Linearizable, func(r *cluster.Reader) (err error) {
		rev, err = members.Revocation(r, string(peer))
		return err
	})
	if err != nil {
		return nil //nolint:nilerr // the log's own words say why then
	}
	why := ""
	if rev.GetReason() != "" {
		why = " (" + rev.GetReason() + ")"
	}
	leave := "floxctl leave --purge"
	if role == members.Server {
		leave = "floxctl leave"
	}
	return fmt.Errorf("join: the key of this machine, which was %s, was revoked on %s%s and is let in never again; if it shall come back, give it a new key with %s here, and join with an invite: this one can still be used: %w",
		rev.GetName(), time.UnixMilli(rev.GetTimeUnixMs()).UTC().Format(time.DateOnly), why, leave, flox.ErrDenied)
}

// takesMachines refuses more machines when the disk is read-only, but for servers:
// one with a larger disk is a way out. ErrFull.
func (s *Server) takesMachines(ctx context.Context, role string) error {
	if role == members.Server {
		return nil
	}
	return s.takesFacts(ctx)
}

// inviteFile is what a machine that joined keeps.
func (s *Server) inviteFile(ctx context.Context) ([]byte, error) {
	trust, err := s.newestTrust(ctx)
	if err != nil {
		return nil, err
	}
	secrets := s.id.ring.secrets()
	if len(secrets) == 0 {
		return nil, fmt.Errorf("this server does not have the storehouse's secret yet: %w", flox.ErrUnreachable)
	}
	return json.Marshal(&api.Invite{
		Version: api.InviteVersion, Name: s.cfg.Name, Secret: secrets[0], Storehouse: s.whereServersAre(),
		TrustList: trust, HTTPURL: s.httpURL(s.swarm.Addrs()), StoreDir: s.cfg.StoreDir, NixKey: s.PublicKey(),
	})
}

// refusedJoin gives a refusal that came through the log its kind back: its words
// end with it.
func refusedJoin(words string) error {
	for _, kind := range []error{flox.ErrBusy, flox.ErrBadInput, flox.ErrFull} {
		if rest, ok := strings.CutSuffix(words, ": "+kind.Error()); ok {
			return fmt.Errorf("join: %s: %w", rest, kind)
		}
	}
	return fmt.Errorf("join: %s: %w", strings.TrimSuffix(words, ": "+flox.ErrDenied.Error()), flox.ErrDenied)
}
