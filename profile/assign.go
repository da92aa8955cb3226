package profile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// compareAssignments orders assignments: machines by peer ID, then labels.
func compareAssignments(x, y *floxv1.ProfileAssignment) int {
	return cmp.Or(strings.Compare(x.GetLabel(), y.GetLabel()), strings.Compare(x.GetValue(), y.GetValue()), strings.Compare(x.GetPeer(), y.GetPeer()))
}

// DescribeAssignment says to what it assigns: a machine, or LABEL=VALUE.
func DescribeAssignment(to *floxv1.ProfileAssignment) string {
	if to.GetLabel() != "" {
		return to.GetLabel() + "=" + to.GetValue()
	}
	return nameOr(to.GetMachine(), to.GetPeer())
}

// Assigned reports whether a profile is assigned to a machine with labels, each KEY=VALUE.
func Assigned(p *floxv1.Profile, peer string, labels []string) bool {
	return slices.ContainsFunc(p.GetAssigned(), func(to *floxv1.ProfileAssignment) bool {
		if to.GetLabel() != "" {
			return slices.Contains(labels, to.GetLabel()+"="+to.GetValue())
		}
		return peer != "" && to.GetPeer() == peer
	})
}

// assign has machines show a profile, or no more.
func (a *applying) assign(c *floxv1.AssignProfile) error {
	if !a.admin {
		return fmt.Errorf("profile %s: only an admin of the storehouse assigns profiles to machines: an admin can do it, or make you one with floxctl machine user: %w", short(c.GetProfile()), flox.ErrDenied)
	}
	p, err := Find(a.tx, c.GetProfile())
	if err != nil {
		return err
	}
	var did []string
	for _, to := range c.GetAdd() {
		if (to.GetLabel() == "") == (to.GetPeer() == "") || len(to.GetLabel())+len(to.GetValue())+len(to.GetPeer())+len(to.GetMachine()) > maxText {
			return fmt.Errorf("profile %s: an assignment to %q: want a machine, or LABEL=VALUE, of at most %d bytes: %w", p.GetName(), short(DescribeAssignment(to)), maxText, flox.ErrBadInput)
		}
		at, had := slices.BinarySearchFunc(p.GetAssigned(), to, compareAssignments)
		if !had {
			p.Assigned = slices.Insert(p.GetAssigned(), at, to)
			did = append(did, "+"+DescribeAssignment(to))
		}
	}
	for _, to := range c.GetDrop() {
		at, had := slices.BinarySearchFunc(p.GetAssigned(), to, compareAssignments)
		if !had {
			return fmt.Errorf("profile %s is not assigned to %s: %w", p.GetName(), DescribeAssignment(to), flox.ErrNotFound)
		}
		p.Assigned = slices.Delete(p.GetAssigned(), at, at+1)
		did = append(did, "-"+DescribeAssignment(to))
	}
	if len(p.GetAssigned()) > maxAssigned {
		return fmt.Errorf("profile %s would have %d assignments, at most %d can: assign it to a label that machines have: %w", p.GetName(), len(p.GetAssigned()), maxAssigned, flox.ErrFull)
	}
	if len(did) == 0 {
		a.reply.Profile = p
		return nil
	}
	return a.store(p, &floxv1.ProfileEvent{Kind: "assign", From: p.GetLive(), To: p.GetLive(), Detail: strings.Join(did, ", ")})
}
