package members

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

const (
	verifierBytes = 32 // of what both ends of a join prove to know
	sealKeyBytes  = 32 // of an X25519 public key
)

// makeInvite keeps a new invite, and forgets those that are over.
func (a *applying) makeInvite(inv *floxv1.InviteRecord) error {
	if err := a.expireInvites(); err != nil {
		return err
	}
	// The last resort: who joined with one and lost the answer needs a new one.
	if a.level >= 2 && a.counts.invites >= maxInvites {
		if err := a.dropInvites(func(old *floxv1.InviteRecord) bool { return old.GetUses() == 0 }); err != nil {
			return err
		}
	}
	bad := func(format string, args ...any) error {
		return fmt.Errorf("invite: "+format+": %w", append(args, flox.ErrBadInput)...)
	}
	switch {
	case len(inv.GetId()) < 8 || len(inv.GetId()) > 64:
		return bad("ID of %d characters, want 8 to 64", len(inv.GetId()))
	case inv.GetLan() == (len(inv.GetVerifier()) == verifierBytes):
		return bad("verifier of %d bytes, want %d, and none of one that is open to the LAN", len(inv.GetVerifier()), verifierBytes)
	case inv.GetUses() == 0 || inv.GetUses() > 1<<16:
		return bad("%d uses, want 1 to 65536", inv.GetUses())
	case inv.GetExpiresUnixMs() <= a.at.UnixMilli():
		return bad("it expires at once")
	case inv.GetEphemeral() && inv.GetRole() == Server:
		return bad("a server cannot be ephemeral")
	case inv.GetLan() && inv.GetRole() != Agent:
		return bad("one that is open to the LAN makes agents, not a %s", inv.GetRole())
	case a.counts.invites >= maxInvites:
		return fmt.Errorf("%d invites are open already; cancel some: %w", a.counts.invites, flox.ErrFull)
	}
	trial := &floxv1.Machine{Peer: "x", Name: "x", Role: inv.GetRole(), Labels: inv.GetLabels(), SealKey: make([]byte, sealKeyBytes)}
	if inv.GetUser() != nil {
		trial.Users = []*floxv1.UserGrant{inv.GetUser()}
	}
	normalize(trial)
	if err := check(trial); err != nil {
		return err
	}
	key := textKey(inviteKey, inv.GetId())
	if _, err := a.tx.Get(key); !errors.Is(err, flox.ErrNotFound) {
		return errors.Join(bad("there is one with ID %s already", inv.GetId()), err)
	}
	inv.By, inv.MadeUnixMs = a.actor, a.at.UnixMilli()
	a.counts.invites++
	detail := fmt.Sprintf("%s, %d uses, until %s", inv.GetRole(), inv.GetUses(), time.UnixMilli(inv.GetExpiresUnixMs()).UTC().Format(time.RFC3339))
	return errors.Join(a.put(key, inv), a.note("invite.make", inv.GetId(), detail, false))
}

// expireInvites forgets invites whose time is over.
func (a *applying) expireInvites() error {
	return a.dropInvites(func(inv *floxv1.InviteRecord) bool { return inv.GetExpiresUnixMs() <= a.at.UnixMilli() })
}

func (a *applying) dropInvites(drop func(*floxv1.InviteRecord) bool) error {
	var over []string
	err := each(a.tx, []byte{inviteKey}, nil, func(inv *floxv1.InviteRecord) bool {
		if drop(inv) {
			over = append(over, inv.GetId())
		}
		return true
	})
	for _, id := range over {
		err = errors.Join(err, a.tx.Delete(textKey(inviteKey, id)))
		a.counts.invites--
	}
	return err
}

func (a *applying) cancelInvite(id string) error {
	if _, err := load(a.tx, textKey(inviteKey, id), &floxv1.InviteRecord{}); err != nil {
		return fmt.Errorf("invite %s: %w", id[:min(len(id), 64)], err)
	}
	a.counts.invites--
	return errors.Join(a.tx.Delete(textKey(inviteKey, id)), a.note("invite.cancel", id, "", false))
}

// redeem makes a machine a member with an invite. A refusal is an answer, not an
// error: the audit log must hold it.
func (a *applying) redeem(c *floxv1.Redeem) error {
	refuse := func(err error) error {
		a.reply.Refused = err.Error()
		m := c.GetMachine()
		return a.note("machine.join", m.GetName(), fmt.Sprintf("%s with invite %s: %v", m.GetPeer(), c.GetInvite(), err), true)
	}
	was, err := a.machine(c.GetMachine().GetPeer())
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if err != nil {
		was = nil
	}
	if was != nil && was.GetInvite() == c.GetInvite() {
		a.reply.Machine = was // the answer to its first try was lost
		return nil
	}
	// From here on another machine is made a member, or this one anew.
	inv, err := load(a.tx, textKey(inviteKey, c.GetInvite()), &floxv1.InviteRecord{})
	if errors.Is(err, flox.ErrNotFound) {
		return refuse(fmt.Errorf("the invite %s was used up, cancelled, or never made: ask for a new one: %w", c.GetInvite(), flox.ErrDenied))
	}
	if err != nil {
		return err
	}
	if inv.GetUses() == 0 {
		return refuse(fmt.Errorf("the invite %s was used up: ask for a new one: %w", inv.GetId(), flox.ErrDenied))
	}
	if inv.GetExpiresUnixMs() <= a.at.UnixMilli() {
		return refuse(fmt.Errorf("the invite %s expired at %s: ask for a new one: %w", inv.GetId(),
			time.UnixMilli(inv.GetExpiresUnixMs()).UTC().Format(time.RFC3339), flox.ErrDenied))
	}
	if err := a.notRevoked(c.GetMachine().GetPeer()); err != nil {
		if !errors.Is(err, flox.ErrDenied) {
			return err
		}
		return refuse(err)
	}
	if was != nil && (was.GetRole() == Server) != (inv.GetRole() == Server) {
		return refuse(fmt.Errorf("this machine is a member as %s; take it out with floxctl leave before it becomes %s: %w", was.GetRole(), inv.GetRole(), flox.ErrDenied))
	}
	m := a.joining(c, inv)
	if err := a.claim(m, inv, c.GetUser(), was); err != nil {
		return err
	}
	if err := a.store(m, was); err != nil {
		if errors.Is(err, flox.ErrBadInput) || errors.Is(err, flox.ErrBusy) || errors.Is(err, flox.ErrFull) {
			return refuse(err)
		}
		return err
	}
	// One that is used up stays for those whose answer was lost: to ask again they
	// have to prove that they hold it.
	if inv.Uses--; inv.Uses == 0 && a.level < 2 {
		a.counts.invites--
		err = a.tx.Delete(textKey(inviteKey, inv.GetId()))
	} else {
		err = a.put(textKey(inviteKey, inv.GetId()), inv)
	}
	return errors.Join(err, a.note("machine.join", m.GetName(), m.GetRole()+" "+m.GetPeer()+" with invite "+inv.GetId()+a.notClaimed(c.GetUser()), false))
}

// joining is the record of a machine that joins: what it may be comes from the
// invite, where it is and what it is called from itself.
func (a *applying) joining(c *floxv1.Redeem, inv *floxv1.InviteRecord) *floxv1.Machine {
	asked := c.GetMachine()
	m := &floxv1.Machine{
		Peer: asked.GetPeer(), Name: asked.GetName(), Role: inv.GetRole(), Labels: inv.GetLabels(), Ephemeral: inv.GetEphemeral(),
		Invite: inv.GetId(), JoinedUnixMs: a.at.UnixMilli(), JoinedBy: "invite " + inv.GetId(),
	}
	if by := inv.GetBy(); by.GetUser() != "" {
		m.JoinedBy += " of " + by.GetUser()
	}
	if inv.GetUser() != nil {
		m.Users = []*floxv1.UserGrant{inv.GetUser()}
	}
	if m.Role == Server {
		m.Addrs, m.RaftAddress, m.SealKey, m.HttpUrl = asked.GetAddrs(), asked.GetRaftAddress(), asked.GetSealKey(), asked.GetHttpUrl()
	}
	m = proto.CloneOf(m)
	normalize(m)
	return m
}

// normalize sorts what is kept sorted.
func normalize(m *floxv1.Machine) {
	slices.SortFunc(m.Labels, func(a, b *floxv1.Label) int { return strings.Compare(a.GetKey(), b.GetKey()) })
	slices.SortFunc(m.Users, func(a, b *floxv1.UserGrant) int { return strings.Compare(a.GetName(), b.GetName()) })
}

// check refuses a record that is not well-formed.
func check(m *floxv1.Machine) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("machine %s: "+format+": %w", append(append([]any{m.GetName()}, args...), flox.ErrBadInput)...)
	}
	if err := CheckName(m.GetName()); err != nil {
		return err
	}
	if err := CheckRole(m.GetRole()); err != nil {
		return err
	}
	if m.GetPeer() == "" || len(m.GetPeer()) > maxText {
		return bad("peer ID of %d characters", len(m.GetPeer()))
	}
	if len(m.GetLabels()) > maxLabels || len(m.GetUsers()) > maxUsers || len(m.GetAddrs()) > maxAddrs {
		return bad("%d labels, %d users and %d addresses, want at most %d, %d and %d",
			len(m.GetLabels()), len(m.GetUsers()), len(m.GetAddrs()), maxLabels, maxUsers, maxAddrs)
	}
	for i, l := range m.GetLabels() {
		if err := CheckName(l.GetKey()); err != nil || len(l.GetValue()) > maxText || i > 0 && m.GetLabels()[i-1].GetKey() == l.GetKey() {
			return bad("label %q: want a short key of letters and digits, once, and at most %d bytes behind '='", l.GetKey(), maxText)
		}
	}
	for i, u := range m.GetUsers() {
		if u.GetName() == "" || len(u.GetName()) > maxText || Rights(u.GetRole()) == 0 || i > 0 && m.GetUsers()[i-1].GetName() == u.GetName() {
			return bad("user %q as %q: want a name, once, as %s, %s or %s", u.GetName(), u.GetRole(), Member, Publisher, Admin)
		}
	}
	for _, text := range append(slices.Clone(m.GetAddrs()), m.GetRaftAddress(), m.GetHttpUrl(), m.GetJoinedBy()) {
		if len(text) > maxText {
			return bad("%q has more than %d bytes", text[:64]+"…", maxText)
		}
	}
	if m.GetRole() == Server && len(m.GetSealKey()) != sealKeyBytes {
		return bad("a server's seal key has %d bytes, want %d", len(m.GetSealKey()), sealKeyBytes)
	}
	return nil
}
