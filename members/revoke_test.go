package members

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// at gives a command the level of the cluster.
func at(level uint32, c *floxv1.MembersCommand) *floxv1.MembersCommand {
	c.Level = level
	return c
}

// strange is the peer ID of a machine that is no member.
func strange(n int) string { return fmt.Sprintf("%s%044d", keyPrefix, n) }

// The newest revocations are kept, and the audit log says which is forgotten.
func TestOldestRevocationMakesRoom(t *testing.T) {
	l := newLogOf(t, Processor{maxRevoked: 3})
	for i := range 5 {
		peer := strange(i)
		l.must(add(peer, fmt.Sprint("m", i), Agent))
		l.must(at(2, remove(peer, true)))
	}
	l.view(func(r *raft.Reader) {
		var kept []string
		if err := Revocations(r, func(rev *floxv1.Revoked) bool { kept = append(kept, rev.GetName()); return true }); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(kept, " "); got != "m2 m3 m4" {
			t.Errorf("kept are %q, want the newest three", got)
		}
		said := 0
		err := Audit(r, 0, func(a *floxv1.AuditRecord) bool {
			if a.GetSubject() == "m4" && strings.Contains(a.GetDetail(), "lost (only 3 revocations are kept: that of m1, "+strange(1)) {
				said++
			}
			return true
		})
		if err != nil || said != 1 {
			t.Errorf("the audit log says %d times that the revocation of m1 is forgotten, %v", said, err)
		}
	})
	l.must(invite("invite-1", nil))
	l.must(redeem("invite-1", strange(0), "back"))
	// Before every server knows of it, nothing is forgotten.
	l.must(add(strange(9), "m9", Agent))
	l.must(remove(strange(9), true))
	l.view(func(r *raft.Reader) {
		if _, err := Revocation(r, strange(2)); err != nil {
			t.Errorf("at level 1 the oldest is gone: %v", err)
		}
	})
}

// With open membership machines come that are no members: their keys can be
// revoked, too, and watchers hear of it.
func TestKeyThatIsNoMembersIsRevoked(t *testing.T) {
	l := newLog(t)
	began := l.must(add(strange(1), "one", Agent)).GetIndex()
	if _, err := l.apply(remove(strange(2), true)); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("at level 1: %v, want ErrNotFound", err)
	}
	l.must(at(2, remove(strange(2), true)))
	l.must(at(2, remove(strange(2), true))) // told twice
	for _, c := range []*floxv1.MembersCommand{at(2, remove("nobody", true)), at(2, remove(strange(3), false))} {
		if _, err := l.apply(c); !errors.Is(err, flox.ErrNotFound) {
			t.Errorf("%v: %v, want ErrNotFound", c, err)
		}
	}
	l.view(func(r *raft.Reader) {
		if rev, err := Revocation(r, strange(2)); err != nil || rev.GetReason() != "lost" {
			t.Errorf("revocation %v, %v", rev, err)
		}
		if peers, ok, err := Changes(r, began); err != nil || !ok || len(peers) != 1 || peers[0] != strange(2) {
			t.Errorf("watchers hear of %v, %v, %v", peers, ok, err)
		}
	})
	if lines := l.audit(); strings.Join(lines, ";") != "machine.add one;machine.revoke "+strange(2) {
		t.Errorf("audit %q", lines)
	}
	l.must(invite("invite-1", nil))
	if r, err := l.apply(redeem("invite-1", strange(2), "two")); err != nil || !strings.Contains(r.GetRefused(), "revoked") {
		t.Errorf("it joined: %q, %v", r.GetRefused(), err)
	}
}

// An invite that is used up stays for those whose answer was lost, lets nobody
// else in, and goes when it expires or room is needed.
func TestUsedUpInviteAnswersAgain(t *testing.T) {
	l := newLog(t)
	l.must(at(2, invite("invite-1", nil)))
	first := l.must(at(2, redeem("invite-1", "peer-1", "one")))
	l.view(func(r *raft.Reader) {
		if inv, err := Invite(r, "invite-1"); err != nil || inv.GetUses() != 0 {
			t.Errorf("the invite is %v, %v, want it with no uses", inv, err)
		}
	})
	if again := l.must(at(2, redeem("invite-1", "peer-1", "one"))); !proto.Equal(again.GetMachine(), first.GetMachine()) {
		t.Errorf("asked again it is %v", again.GetMachine())
	}
	if r, err := l.apply(at(2, redeem("invite-1", "peer-2", "two"))); err != nil || !strings.Contains(r.GetRefused(), "used up") {
		t.Errorf("somebody else got in: %q, %v", r.GetRefused(), err)
	}
	// One that left is somebody else.
	l.must(at(2, remove("peer-1", false)))
	if r, err := l.apply(at(2, redeem("invite-1", "peer-1", "one"))); err != nil || !strings.Contains(r.GetRefused(), "used up") {
		t.Errorf("who left got in again: %q, %v", r.GetRefused(), err)
	}
	l.must(at(2, &floxv1.MembersCommand{Command: &floxv1.MembersCommand_CancelInvite{CancelInvite: "invite-1"}}))
	// What an older server does not know does not happen before all know it.
	l.must(invite("invite-2", nil))
	l.must(redeem("invite-2", "peer-3", "three"))
	l.view(func(r *raft.Reader) {
		if _, err := Invite(r, "invite-2"); !errors.Is(err, flox.ErrNotFound) {
			t.Errorf("at level 1 the used invite stays: %v", err)
		}
		if c, err := loadCounts(r); err != nil || c.invites != 0 {
			t.Errorf("%d invites are counted, %v", c.invites, err)
		}
	})
}
