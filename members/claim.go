package members

import (
	"fmt"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// rootUser is the user that is another one on every machine.
const rootUser = "root"

// claim gives a machine that joins the user it says, where its invite names none, or says
// why not. What a machine says of itself takes nothing from anybody: it gets a user that no
// other machine speaks for, and never root.
func (a *applying) claim(m *floxv1.Machine, inv *floxv1.InviteRecord, user string, was *floxv1.Machine) error {
	if user == "" || inv.GetUser() != nil {
		return nil
	}
	m.Users = []*floxv1.UserGrant{{Name: user, Role: Member}}
	if a.level < 6 || UserRole(was, user) != "" {
		return nil
	}
	why := ""
	if folded(user) == rootUser {
		why = "root is somebody else on every machine"
	}
	err := each(a.tx, []byte{machineKey}, nil, func(o *floxv1.Machine) bool {
		for _, u := range o.GetUsers() {
			if why == "" && o.GetPeer() != m.GetPeer() && folded(u.GetName()) == folded(user) {
				why = fmt.Sprintf("the machine %s speaks for %s already", o.GetName(), u.GetName())
			}
		}
		return why == ""
	})
	if a.reply.Unclaimed = why; why != "" {
		m.Users = nil
	}
	return err
}

// notClaimed says in the audit log for whom a machine that joined does not speak.
func (a *applying) notClaimed(user string) string {
	if a.reply.GetUnclaimed() == "" {
		return ""
	}
	return ", not for " + user + ": " + a.reply.GetUnclaimed()
}
