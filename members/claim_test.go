package members

import (
	"strings"
	"testing"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// A machine speaks for the user it says when it joins only if that takes nothing from
// anybody: no other machine speaks for that user. Nobody gets root so.
func TestWhomAMachineClaimsToSpeakFor(t *testing.T) {
	l := newLog(t)
	joins := func(level uint32, peer, user string, granted *floxv1.UserGrant) *floxv1.MembersReply {
		t.Helper()
		id := "invite-of-" + peer + "-" + user
		l.must(invite(id, func(i *floxv1.InviteRecord) { i.User = granted }))
		c := redeem(id, peer, "m-"+peer)
		c.GetRedeem().User = user
		return l.must(at(level, c))
	}
	speaks := func(peer, users string) {
		t.Helper()
		l.view(func(r *raft.Reader) {
			m, err := Machine(r, peer)
			var names []string
			for _, u := range m.GetUsers() {
				names = append(names, u.GetName()+":"+u.GetRole())
			}
			if got := strings.Join(names, " "); err != nil || got != users {
				t.Errorf("%s speaks for %q, want %q; %v", peer, got, users, err)
			}
		})
	}
	if got := joins(6, "a", "bob", nil).GetUnclaimed(); got != "" {
		t.Errorf("the first machine of a user: %s", got)
	}
	speaks("a", "bob:member")
	if got := joins(6, "b", "BOB", nil).GetUnclaimed(); !strings.Contains(got, "the machine m-a speaks for bob already") {
		t.Errorf("a second machine says it is bob's: %q", got)
	}
	speaks("b", "")
	for _, root := range []string{"root", "Root"} {
		if got := joins(6, "c", root, nil).GetUnclaimed(); !strings.Contains(got, "root") {
			t.Errorf("a machine says it is %s's: %q", root, got)
		}
	}
	speaks("c", "")
	for peer, grant := range map[string]*floxv1.UserGrant{"d": {Name: "bob", Role: Admin}, "e": {Name: "root", Role: Member}} {
		if got := joins(6, peer, "mallory", grant).GetUnclaimed(); got != "" {
			t.Errorf("its invite says %v: %s", grant, got)
		}
		speaks(peer, grant.GetName()+":"+grant.GetRole())
	}
	// It joins again, with another invite.
	if got := joins(6, "e", "root", nil).GetUnclaimed(); got != "" {
		t.Errorf("what it was given: %s", got)
	}
	speaks("e", "root:member")
	joins(5, "f", "bob", nil) // before every server knows of it
	speaks("f", "bob:member")
	if n := len(l.audit()); n == 0 {
		t.Error("nothing of it in the audit log")
	}
}
