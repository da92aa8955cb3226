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
		to, err := a.assignment(ctx, word)
		if errors.Is(err, flox.ErrNotFound) { // a machine that is no member any more
			to, err = a.assignedTo(ctx, req.Msg.GetName(), word, err)
		}
		if err != nil {
			return nil, api.ToConnect(err)
		}
		c.Drop = append(c.Drop, to)
	}
	reply, err := a.s.profiles.propose(ctx, person{who, true}, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Assign{Assign: c}})
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

// assignedTo gives the assignment of a profile to a machine as it was called then; lacks if
// there is none.
func (a *admin) assignedTo(ctx context.Context, name, word string, lacks error) (to *floxv1.ProfileAssignment, err error) {
	err = a.s.profiles.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		p, err := profile.Find(r, name)
		if err != nil {
			return err
		}
		for _, is := range p.GetAssigned() {
			if is.GetLabel() == "" && (is.GetPeer() == word || strings.EqualFold(is.GetMachine(), word)) {
				to = is
			}
		}
		if to == nil {
			return lacks
		}
		return nil
	})
	return to, err
}
