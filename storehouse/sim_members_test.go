package storehouse

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	cluster "github.com/floxctl/flox/raft"
)

// simMembers are two invites, the second of which makes machines that are forgotten,
// and the machines that join with them. The last two of those want one name.
type simMembers struct{}

const (
	simInvites  = 2
	simMachines = 5
)

// membersAsk is a command about an invite, a machine, or both.
type membersAsk struct {
	what            string
	invite, machine int
	uses            uint8
}

// membersSaid is what is answered: who is a member now with which invite (from 1),
// or is none any more.
type membersSaid struct {
	with    uint8
	gone    bool
	refused bool
}

// membersState is what is known of them.
type membersState struct {
	made [simInvites]bool
	uses [simInvites]uint8 // left
	with [simMachines]uint8
	// revoked never join again.
	revoked [simMachines]bool
}

func (simMembers) invite(subject simSubject, i int) string {
	return fmt.Sprintf("invite-%06d-%d", subject.serial, i)
}

func (simMembers) peer(subject simSubject, i int) string {
	return fmt.Sprintf("12D3KooW%043d%d", subject.serial, i)
}

// called is a machine's name, which is one whatever its case.
func (simMembers) called(subject simSubject, i int) string {
	return fmt.Sprintf("%s-%d-%d", []string{"box", "Box"}[i%2], subject.serial, min(i, simMachines-2))
}

func (p simMembers) ask(rng *rand.Rand, subject simSubject, _ uint64) (any, simCommand) {
	a := membersAsk{invite: rng.IntN(simInvites), machine: rng.IntN(simMachines)}
	invite, peer := p.invite(subject, a.invite), p.peer(subject, a.machine)
	c := &floxv1.MembersCommand{Level: membersLevel}
	level := uint32(membersLevel)
	switch what := rng.IntN(20); {
	case what < 3:
		a.what, a.uses = "make", uint8(1+rng.IntN(3))
		c.Command = &floxv1.MembersCommand_MakeInvite{MakeInvite: &floxv1.InviteRecord{
			Id: invite, Verifier: make([]byte, 32), Role: members.Agent, Uses: uint32(a.uses), Ephemeral: a.invite == 1,
			ExpiresUnixMs: time.Now().Add(1000 * time.Hour).UnixMilli(),
		}}
	case what < 12:
		a.what = "redeem"
		m := &floxv1.Machine{Peer: peer, Name: p.called(subject, a.machine)}
		c.Command = &floxv1.MembersCommand_Redeem{Redeem: &floxv1.Redeem{Invite: invite, Machine: m}}
	case what < 13:
		a.what = "cancel"
		c.Command = &floxv1.MembersCommand_CancelInvite{CancelInvite: invite}
	case what < 15:
		a.what = "revoke"
		c.Command = &floxv1.MembersCommand_Remove{Remove: &floxv1.RemoveMachine{Peer: peer, Revoked: true, Reason: "lost"}}
	case what < 16:
		a.what = "leave"
		c.Command = &floxv1.MembersCommand_Remove{Remove: &floxv1.RemoveMachine{Peer: peer}}
	case what < 18:
		a.what = "forget"
		c.Command = &floxv1.MembersCommand_Forget{Forget: &floxv1.ForgetMachines{Peers: []string{peer}}}
	default:
		a.what, level = "seen", seenLevel
		at := time.Now().UnixMilli()
		c.Command = &floxv1.MembersCommand_Seen{Seen: &floxv1.NoteSeen{Machines: []*floxv1.SeenMachine{{Peer: peer, AtUnixMs: at}}}}
	}
	return a, simCommand{members.Kind, level, c}
}

func (p simMembers) heard(subject simSubject, _ any, reply []byte) (any, uint64, error) {
	r := &floxv1.MembersReply{}
	if err := proto.Unmarshal(reply, r); err != nil {
		return nil, 0, err
	}
	said := membersSaid{with: p.with(subject, r.GetMachine()), gone: len(r.GetRemoved()) > 0, refused: r.GetRefused() != ""}
	return said, r.GetIndex(), nil
}

// with says with which invite a machine joined, from 1.
func (p simMembers) with(subject simSubject, m *floxv1.Machine) uint8 {
	for i := range simInvites {
		if m.GetInvite() == p.invite(subject, i) {
			return uint8(i + 1)
		}
	}
	return 0
}

func (p simMembers) read(r *cluster.Reader, subject simSubject) (any, error) {
	seen := membersState{}
	for i := range simInvites {
		inv, err := members.Invite(r, p.invite(subject, i))
		if err == nil {
			seen.made[i], seen.uses[i] = true, uint8(inv.GetUses()) //nolint:gosec // 3 at most
		} else if !errors.Is(err, flox.ErrNotFound) {
			return nil, err
		}
	}
	for i := range simMachines {
		m, err := members.Machine(r, p.peer(subject, i))
		if err == nil {
			seen.with[i] = p.with(subject, m)
			// The name leads to it.
			if found, err := members.Find(r, strings.ToUpper(m.GetName())); err != nil || found.GetPeer() != m.GetPeer() {
				return nil, fmt.Errorf("%s is found as %v, %w", m, found, err)
			}
		} else if !errors.Is(err, flox.ErrNotFound) {
			return nil, err
		}
		_, err = members.Revocation(r, p.peer(subject, i))
		if seen.revoked[i] = err == nil; err != nil && !errors.Is(err, flox.ErrNotFound) {
			return nil, err
		}
	}
	return seen, nil
}

func (simMembers) next(state, ask any, _ uint64) []simNext {
	s := state.(membersState)
	if ask == (simLook{}) {
		return []simNext{{s, s}}
	}
	a, said := ask.(membersAsk), membersSaid{}
	m := a.machine
	switch a.what {
	case "make":
		if s.made[a.invite] {
			return []simNext{{s, flox.ErrBadInput}}
		}
		s.made[a.invite], s.uses[a.invite] = true, a.uses
	case "redeem":
		return []simNext{s.redeem(a)}
	case "cancel":
		if !s.made[a.invite] {
			return []simNext{{s, flox.ErrNotFound}}
		}
		s.made[a.invite], s.uses[a.invite] = false, 0
	case "revoke":
		said.gone = s.with[m] != 0
		s.with[m], s.revoked[m] = 0, true
	case "leave":
		if s.with[m] == 0 {
			return []simNext{{s, flox.ErrNotFound}}
		}
		s.with[m], said.gone = 0, true
	case "forget":
		if s.with[m] == 2 {
			s.with[m], said.gone = 0, true
		}
	}
	return []simNext{{s, said}}
}

// redeem takes a use of an invite if it makes a machine a member, or one with another
// invite than before.
func (s membersState) redeem(a membersAsk) simNext {
	with := uint8(a.invite + 1) //nolint:gosec // 1 or 2
	if s.with[a.machine] == with {
		return simNext{s, membersSaid{with: with}}
	}
	taken := a.machine >= simMachines-2 && s.with[2*simMachines-3-a.machine] != 0
	if s.uses[a.invite] == 0 || s.revoked[a.machine] || taken {
		return simNext{s, membersSaid{refused: true}}
	}
	s.uses[a.invite]--
	s.with[a.machine] = with
	return simNext{s, membersSaid{with: with}}
}

// auditAgrees looks that every change that was answered left its one record in the
// audit log, and that there are no others but of commands whose answer is not known.
func (s *simulation) auditAgrees(n *cluster.Node) error {
	left, unknown := map[uint64]audited{}, 0 // by log index
	must := 0
	for subject, history := range s.history {
		for _, o := range history {
			ask, isAsk := o.Input.(membersAsk)
			a := o.Output.(simAnswer)
			said, isSaid := a.said.(membersSaid)
			switch {
			case subject.part != simMembers{} || !isAsk:
			case a.unknown:
				unknown++
			case isSaid:
				l := ask.leaves(said)
				if left[a.from] = l; l.must {
					must++
				}
			}
		}
	}
	v, err := n.View(context.Background(), members.Kind, cluster.Local)
	if err != nil {
		return err
	}
	var wrong []*floxv1.AuditRecord
	others := 0
	err = members.Audit(v, 0, func(r *floxv1.AuditRecord) bool {
		switch l, ok := left[r.GetIndex()]; {
		case !ok:
			others++
		case !l.must && !l.may || l.refused != r.GetRefused():
			wrong = append(wrong, r)
		case l.must:
			must--
		}
		return true
	})
	if must != 0 || others > unknown || len(wrong) > 0 {
		err = errors.Join(err, fmt.Errorf("audit log: no record of %d changes, %d of commands nobody knows (at most %d were not answered), and wrong ones: %v: %w",
			must, others, unknown, wrong, flox.ErrCorrupt))
	}
	return errors.Join(err, v.Close())
}

// audited is whether a command leaves a record.
type audited struct{ must, may, refused bool }

// leaves says what an answered command leaves. A machine that joined already is
// answered the same as one that joins, and so is one that is revoked twice.
func (a membersAsk) leaves(said membersSaid) audited {
	switch a.what {
	case "make", "cancel", "leave":
		return audited{must: true}
	case "redeem":
		return audited{must: said.refused, may: true, refused: said.refused}
	case "revoke":
		return audited{must: said.gone, may: true}
	case "forget":
		return audited{must: said.gone}
	}
	return audited{}
}
