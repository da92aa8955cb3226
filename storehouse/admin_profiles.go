package storehouse

import (
	"cmp"
	"context"
	"fmt"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	"github.com/floxctl/flox/profile"
	cluster "github.com/floxctl/flox/raft"
)

// What people do with profiles, as a refusal names it.
const actionProfile = "profile"

const (
	memberOnly      = 1 // members.Rights of a person for whom a machine may speak
	defaultProfiles = 1000
	maxListedOnce   = 10_000
	defaultEvents   = 100
)

// person says for whom something is asked of profiles. What that person may do with one
// is said in it. In an open storehouse every machine speaks for whom it says.
func (a *admin) person(ctx context.Context, call connect.AnyRequest) (person, error) {
	need := memberOnly
	if a.s.cfg.OpenMembership {
		need = anyMember
	}
	who, err := a.may(ctx, call, need, actionProfile)
	if err != nil {
		return person{}, err
	}
	return person{Actor: who, admin: a.rights(ctx, call, who) >= adminOnly}, nil
}

// rights are members.Rights of whom a call is for.
func (a *admin) rights(ctx context.Context, call connect.AnyRequest, who *floxv1.Actor) int {
	_, local := ctx.Value(socketKey{}).(int)
	// A server that acts on its own behalf, and on no person's.
	itself := call.Header().Get(actorHeader) != "" && who.GetUser() == "" && who.GetPeer() == call.Peer().Addr
	if local || itself {
		return adminOnly
	}
	m, _ := a.s.roster.machine(p2p.PeerID(who.GetPeer()))
	return members.Rights(members.UserRole(m, who.GetUser()))
}

// reader is person for what changes nothing: somebody for whom the machine may not speak
// is nobody, who reads what everybody may and what is assigned to the machine.
func (a *admin) reader(ctx context.Context, call connect.AnyRequest) (person, error) {
	who, err := a.may(ctx, call, anyMember, actionProfile)
	if err != nil {
		return person{}, err
	}
	rights := a.rights(ctx, call, who)
	if rights < memberOnly && !a.s.cfg.OpenMembership {
		who = &floxv1.Actor{Peer: who.GetPeer(), Machine: who.GetMachine()}
	}
	return person{who, rights >= adminOnly, a.s.sightOf(p2p.PeerID(who.GetPeer()))}, nil
}

// CreateProfile is floxv1connect.AdminHandler.
func (a *admin) CreateProfile(ctx context.Context, req *connect.Request[floxv1.CreateProfileRequest]) (*connect.Response[floxv1.CreateProfileResponse], error) {
	who, err := a.person(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	if err := a.s.takesFacts(Essential(ctx)); err != nil {
		return nil, api.ToConnect(fmt.Errorf("profile %s: %w", req.Msg.GetName(), err))
	}
	reply, err := a.s.profiles.propose(ctx, who, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Create{Create: &floxv1.NewProfile{
		Name: req.Msg.GetName(), Systems: req.Msg.GetSystems(),
	}}})
	return answer(&floxv1.CreateProfileResponse{Profile: reply.GetProfile()}, err)
}

// DeleteProfile is floxv1connect.AdminHandler.
func (a *admin) DeleteProfile(ctx context.Context, req *connect.Request[floxv1.DeleteProfileRequest]) (*connect.Response[floxv1.DeleteProfileResponse], error) {
	who, err := a.person(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	_, err = a.s.profiles.propose(freeing(ctx), who, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Delete{Delete: req.Msg.GetName()}})
	return answer(&floxv1.DeleteProfileResponse{}, err)
}

// RenameProfile is floxv1connect.AdminHandler.
func (a *admin) RenameProfile(ctx context.Context, req *connect.Request[floxv1.RenameProfileRequest]) (*connect.Response[floxv1.RenameProfileResponse], error) {
	who, err := a.person(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	reply, err := a.s.profiles.propose(ctx, who, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Rename{Rename: &floxv1.RenameProfile{
		Profile: req.Msg.GetName(), To: req.Msg.GetTo(),
	}}})
	return answer(&floxv1.RenameProfileResponse{Profile: reply.GetProfile()}, err)
}

// SetProfileRetention is floxv1connect.AdminHandler.
func (a *admin) SetProfileRetention(ctx context.Context, req *connect.Request[floxv1.SetProfileRetentionRequest]) (*connect.Response[floxv1.SetProfileRetentionResponse], error) {
	who, err := a.person(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.s.profiles.retain(ctx, who, req.Msg))
}

// SetProfileSchedule is floxv1connect.AdminHandler.
func (a *admin) SetProfileSchedule(ctx context.Context, req *connect.Request[floxv1.SetProfileScheduleRequest]) (*connect.Response[floxv1.SetProfileScheduleResponse], error) {
	who, err := a.person(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.s.profiles.setSchedule(ctx, who, req.Msg))
}

// TagProfile is floxv1connect.AdminHandler.
func (a *admin) TagProfile(ctx context.Context, req *connect.Request[floxv1.TagProfileRequest]) (*connect.Response[floxv1.TagProfileResponse], error) {
	who, err := a.person(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	reply, err := a.s.profiles.propose(ctx, who, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Tag{Tag: &floxv1.TagGeneration{
		Profile: req.Msg.GetName(), Name: req.Msg.GetTag(), Generation: req.Msg.GetGeneration(),
	}}})
	return answer(&floxv1.TagProfileResponse{Profile: reply.GetProfile()}, err)
}

// GrantProfile is floxv1connect.AdminHandler.
func (a *admin) GrantProfile(ctx context.Context, req *connect.Request[floxv1.GrantProfileRequest]) (*connect.Response[floxv1.GrantProfileResponse], error) {
	who, err := a.person(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	reply, err := a.s.profiles.propose(ctx, who, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Grants{Grants: &floxv1.SetGrants{
		Profile: req.Msg.GetName(), Grants: req.Msg.GetGrants(),
	}}})
	return answer(&floxv1.GrantProfileResponse{Profile: reply.GetProfile()}, err)
}

// ListProfiles is floxv1connect.AdminHandler.
func (a *admin) ListProfiles(ctx context.Context, req *connect.Request[floxv1.ListProfilesRequest]) (*connect.Response[floxv1.ListProfilesResponse], error) {
	who, err := a.reader(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	limit := int(req.Msg.GetLimit())
	if setDefault(&limit, defaultProfiles); limit > maxListedOnce {
		return nil, api.ToConnect(fmt.Errorf("list %d profiles, want at most %d at once: %w", limit, maxListedOnce, flox.ErrBadInput))
	}
	out := &floxv1.ListProfilesResponse{}
	err = a.s.profiles.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		return profile.List(r, req.Msg.GetOwner(), req.Msg.GetAfter(), func(p *floxv1.Profile) bool {
			if !who.sees(p) {
				return true
			}
			if out.More = len(out.Profiles) == limit; !out.More {
				out.Profiles = append(out.Profiles, p)
			}
			return !out.More
		})
	})
	return answer(out, err)
}

// ShowProfile is floxv1connect.AdminHandler.
func (a *admin) ShowProfile(ctx context.Context, req *connect.Request[floxv1.ShowProfileRequest]) (*connect.Response[floxv1.ShowProfileResponse], error) {
	out := &floxv1.ShowProfileResponse{}
	err := a.readProfile(ctx, req, req.Msg.GetName(), func(r *cluster.Reader, p *floxv1.Profile) (err error) {
		if out.Profile = p; req.Msg.GetGeneration() == 0 {
			out.Generation, err = live(r, p)
		} else {
			out.Generation, err = profile.ReadGeneration(r, p.GetName(), req.Msg.GetGeneration())
		}
		if err == nil {
			out.LastRun, out.NextRunUnixMs, err = runsOf(r, p)
		}
		return err
	})
	return answer(out, err)
}

// ProfileHistory is floxv1connect.AdminHandler.
func (a *admin) ProfileHistory(ctx context.Context, req *connect.Request[floxv1.ProfileHistoryRequest]) (*connect.Response[floxv1.ProfileHistoryResponse], error) {
	limit := int(req.Msg.GetLimit())
	if setDefault(&limit, defaultEvents); limit > maxListedOnce {
		return nil, api.ToConnect(fmt.Errorf("history of %d events, want at most %d at once: %w", limit, maxListedOnce, flox.ErrBadInput))
	}
	out := &floxv1.ProfileHistoryResponse{}
	err := a.readProfile(ctx, req, req.Msg.GetName(), func(r *cluster.Reader, p *floxv1.Profile) (err error) {
		out.Profile = p
		out.Events, out.More, err = profile.Events(r, p.GetName(), req.Msg.GetBefore(), limit)
		return err
	})
	return answer(out, err)
}

// readProfile calls f with a profile that the caller may read.
func (a *admin) readProfile(ctx context.Context, call connect.AnyRequest, name string, f func(r *cluster.Reader, p *floxv1.Profile) error) error {
	who, err := a.reader(ctx, call)
	if err != nil {
		return err
	}
	return a.s.profiles.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		p, err := profile.FindFor(r, name, who.sees)
		if err == nil && !who.sees(p) {
			if who.GetUser() == "" { // it needs a machine that speaks for the caller first
				_, err = a.person(ctx, call)
			}
			err = cmp.Or(err, who.may(p, profile.Reader))
		}
		if err != nil {
			return err
		}
		return f(r, p)
	})
}

// ChangeProfile is floxv1connect.AdminHandler.
func (a *admin) ChangeProfile(ctx context.Context, req *connect.Request[floxv1.ChangeProfileRequest]) (*connect.Response[floxv1.ChangeProfileResponse], error) {
	who, err := a.person(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.s.profiles.change(ctx, who, req.Msg))
}

// RollbackProfile is floxv1connect.AdminHandler.
func (a *admin) RollbackProfile(ctx context.Context, req *connect.Request[floxv1.RollbackProfileRequest]) (*connect.Response[floxv1.RollbackProfileResponse], error) {
	who, err := a.person(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.s.profiles.rollback(ctx, who, req.Msg))
}

// rollback lets an earlier generation live again.
func (p *profiles) rollback(ctx context.Context, who person, q *floxv1.RollbackProfileRequest) (*floxv1.RollbackProfileResponse, error) {
	out := &floxv1.RollbackProfileResponse{}
	to := q.GetTo()
	err := p.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		at, err := profile.FindFor(r, q.GetName(), who.sees)
		if err != nil {
			return err
		}
		if err := who.may(at, profile.Writer); err != nil {
			return err
		}
		g, err := live(r, at)
		if err != nil {
			return err
		}
		if l := q.GetLive(); l != 0 && l != at.GetLive() {
			return fmt.Errorf("profile %s: generation %d lives and not %d any more, on which the rollback was made; nothing was changed: look again: %w", at.GetName(), at.GetLive(), l, flox.ErrBusy)
		}
		if out.Profile, out.From = at, at.GetLive(); to == 0 {
			if to = g.GetParent(); to == 0 {
				return fmt.Errorf("profile %s: nothing lived before generation %d; see: floxctl history -p %s: %w", at.GetName(), at.GetLive(), at.GetName(), flox.ErrNotFound)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	reply, err := p.propose(ctx, who, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Switch{Switch: &floxv1.LiveGeneration{
		Profile: out.GetProfile().GetName(), Live: out.GetFrom(), Created: out.GetProfile().GetCreatedIndex(), To: to, Reason: q.GetReason(),
	}}})
	if err == nil && reply.GetMoved() {
		err = fmt.Errorf("profile %s: somebody changed it this moment, generation %d lives now; nothing was changed: look again: %w",
			out.GetProfile().GetName(), reply.GetProfile().GetLive(), flox.ErrBusy)
	}
	out.Profile = reply.GetProfile()
	return out, err
}
