package storehouse

import (
	"context"
	"errors"
	"strings"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/profile"
	cluster "github.com/floxctl/flox/raft"
)

// actionAssign is what admins do when they have machines show a profile, as a refusal and
// the audit log name it.
const actionAssign = "profile.assign"

// AssignProfile is floxv1connect.AdminHandler.
func (a *admin) AssignProfile(ctx context.Context, req *connect.Request[floxv1.AssignProfileRequest]) (*connect.Response[floxv1.AssignProfileResponse], error) {
	who, err := a.may(ctx, req, adminOnly, actionAssign)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	c := &floxv1.AssignProfile{Profile: req.Msg.GetName()}
	for _, word := range req.Msg.GetAdd() {
		to, err := a.assignment(ctx, word)
		if err != nil {
			return nil, api.ToConnect(err)
		}
		c.Add = append(c.Add, to)
	}
	for _, word := range req.Msg.GetDrop() {
		to, err := a.assigned(ctx, req.Msg.GetName(), word)
		if err != nil {
			return nil, api.ToConnect(err)
		}
		c.Drop = append(c.Drop, to...)
	}
	reply, err := a.s.profiles.propose(ctx, person{Actor: who, admin: true}, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Assign{Assign: c}})
	if err == nil {
		words := append(prefixed("+", req.Msg.GetAdd()), prefixed("-", req.Msg.GetDrop())...)
		err = a.s.note(ctx, who, actionAssign, reply.GetProfile().GetName(), strings.Join(words, ", "))
	}
	return answer(&floxv1.AssignProfileResponse{Profile: reply.GetProfile()}, err)
}

func prefixed(by string, words []string) (out []string) {
	for _, word := range words {
		out = append(out, by+word)
	}
	return out
}

// assignment reads LABEL=VALUE, or a machine's name or peer ID.
func (a *admin) assignment(ctx context.Context, word string) (*floxv1.ProfileAssignment, error) {
	if label, value, ok := strings.Cut(word, "="); ok {
		return &floxv1.ProfileAssignment{Label: label, Value: value}, nil
	}
	m, err := a.find(ctx, word)
	return &floxv1.ProfileAssignment{Peer: m.GetPeer(), Machine: m.GetName()}, err
}

// assigned reads what assignment does, but of a machine as a profile is assigned to it: it
// may be no member any more, or have another name now, or another machine may have its name.
func (a *admin) assigned(ctx context.Context, name, word string) (all []*floxv1.ProfileAssignment, err error) {
	to, lacks := a.assignment(ctx, word)
	if lacks != nil && !errors.Is(lacks, flox.ErrNotFound) || to.GetLabel() != "" {
		return []*floxv1.ProfileAssignment{to}, lacks
	}
	err = a.s.profiles.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		p, err := profile.Find(r, name)
		for _, is := range p.GetAssigned() {
			if is.GetLabel() == "" && (is.GetPeer() == word || strings.EqualFold(is.GetMachine(), word) || lacks == nil && is.GetPeer() == to.GetPeer()) {
				all = append(all, is)
			}
		}
		return err
	})
	if err == nil && len(all) == 0 {
		return []*floxv1.ProfileAssignment{to}, lacks
	}
	return all, err
}
