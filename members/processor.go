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
	"github.com/floxctl/flox/raft"
)

// stable writes messages of the state: equal on every server.
var stable = proto.MarshalOptions{Deterministic: true}

// Processor applies MembersCommands. All state is in the transaction. Every
// change leaves an AuditRecord, and so does every refused attempt to join.
type Processor struct {
	maxRevoked int // 0 = the constant; another one in tests
}

var _ raft.Processor = Processor{}

// applying is one command under way.
type applying struct {
	tx     *raft.Tx
	at     time.Time
	index  uint64
	actor  *floxv1.Actor
	level  uint32 // see MembersCommand
	counts counts

	maxRevoked int

	reply *floxv1.MembersReply
	peers []string // whose record changed or went
	audit *floxv1.AuditRecord
}

// Apply is raft.Processor.
func (p Processor) Apply(tx *raft.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	c := &floxv1.MembersCommand{}
	if err := raft.DecodeCommand("members", command, c); err != nil {
		return nil, err
	}
	a := &applying{tx: tx, at: at, index: index, actor: c.GetActor(), level: c.GetLevel(), reply: &floxv1.MembersReply{Index: index}}
	if a.maxRevoked = p.maxRevoked; a.maxRevoked == 0 {
		a.maxRevoked = maxRevoked
	}
	var err error
	if a.counts, err = loadCounts(tx); err == nil {
		err = a.apply(c)
	}
	if err == nil {
		err = a.finish()
	}
	if err != nil {
		return nil, err
	}
	return stable.Marshal(a.reply)
}

func (a *applying) apply(c *floxv1.MembersCommand) error {
	switch c := c.GetCommand().(type) {
	case *floxv1.MembersCommand_Add:
		return a.add(c.Add)
	case *floxv1.MembersCommand_MakeInvite:
		return a.makeInvite(c.MakeInvite)
	case *floxv1.MembersCommand_CancelInvite:
		return a.cancelInvite(c.CancelInvite)
	case *floxv1.MembersCommand_Redeem:
		return a.redeem(c.Redeem)
	case *floxv1.MembersCommand_Change:
		return a.change(c.Change)
	case *floxv1.MembersCommand_Remove:
		return a.remove(c.Remove)
	case *floxv1.MembersCommand_Note:
		n := c.Note
		return a.note(n.GetAction(), n.GetSubject(), n.GetDetail(), n.GetRefused())
	case *floxv1.MembersCommand_Secrets:
		return a.secrets(c.Secrets)
	case *floxv1.MembersCommand_Forget:
		return a.forget(c.Forget.GetPeers())
	case *floxv1.MembersCommand_Seen:
		return a.seen(c.Seen.GetMachines())
	}
	return fmt.Errorf("members: no command inside: %w", raft.ErrUnknownCommand)
}

// note says what the audit log will hold of this command.
func (a *applying) note(action, subject, detail string, refused bool) error {
	if action == "" {
		return fmt.Errorf("audit record without an action: %w", flox.ErrBadInput)
	}
	short := func(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxDetail)], "") }
	a.audit = &floxv1.AuditRecord{
		Index: a.index, TimeUnixMs: a.at.UnixMilli(), Actor: a.actor, Refused: refused,
		Action: short(action), Subject: short(subject), Detail: short(detail),
	}
	return nil
}

// finish records what happened for watchers and the audit log.
func (a *applying) finish() error {
	if len(a.peers) > 0 {
		a.counts.changes++
		if err := a.put(indexKey(changeKey, a.index), &floxv1.MembersChange{Index: a.index, Peers: a.peers}); err != nil {
			return err
		}
	}
	dropped, err := raft.DropOldest(a.tx, changeKey, a.counts.dropped, &a.counts.changes, maxChanges)
	if err != nil {
		return err
	}
	a.counts.dropped = max(a.counts.dropped, dropped)
	if a.audit != nil {
		if err := a.put(indexKey(auditKey, a.index), a.audit); err != nil {
			return err
		}
	}
	return raft.SetCounts(a.tx, []byte{countsKey}, a.counts.fields())
}

func (a *applying) put(key []byte, m proto.Message) error {
	b, err := stable.Marshal(m)
	if err != nil {
		return err
	}
	return a.tx.Set(key, b)
}

// machine reads a member; ErrNotFound says so in words.
func (a *applying) machine(peer string) (*floxv1.Machine, error) {
	m, err := load(a.tx, textKey(machineKey, peer), &floxv1.Machine{})
	if errors.Is(err, flox.ErrNotFound) {
		return nil, fmt.Errorf("%s is no member: %w", peer, flox.ErrNotFound)
	}
	return m, err
}

// store writes a member under its name, which nobody else may have.
func (a *applying) store(m, was *floxv1.Machine) error {
	if err := check(m); err != nil {
		return err
	}
	if was == nil && a.counts.machines >= maxMachines {
		return fmt.Errorf("%d machines are members already: %w", a.counts.machines, flox.ErrFull)
	}
	// The last that may be refused: a caller that turns a refusal into an answer
	// must have written nothing.
	if was == nil || folded(was.GetName()) != folded(m.GetName()) {
		if err := a.takeName(m, was); err != nil {
			return err
		}
	}
	if was == nil {
		a.counts.machines++
	}
	m.ChangedIndex = a.index
	a.peers = append(a.peers, m.GetPeer())
	a.reply.Machine = m
	return a.put(textKey(machineKey, m.GetPeer()), m)
}

// takeName gives a machine its name and frees the one it had.
func (a *applying) takeName(m, was *floxv1.Machine) error {
	owner, err := a.tx.Get(textKey(nameKey, folded(m.GetName())))
	if err == nil && string(owner) != m.GetPeer() {
		free, err := a.freeName(m.GetName())
		if err != nil {
			return err
		}
		return fmt.Errorf("the name %s belongs to another machine, %s: take another one, such as %s, or revoke that machine first: %w", m.GetName(), owner, free, flox.ErrBusy)
	}
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if was != nil {
		if err := a.tx.Delete(textKey(nameKey, folded(was.GetName()))); err != nil {
			return err
		}
	}
	return a.tx.Set(textKey(nameKey, folded(m.GetName())), []byte(m.GetPeer()))
}

// freeName proposes a name like one that is taken.
func (a *applying) freeName(name string) (string, error) {
	for i := 2; ; i++ {
		try := fmt.Sprintf("%s-%d", name[:min(len(name), 56)], i)
		if _, err := a.tx.Get(textKey(nameKey, folded(try))); errors.Is(err, flox.ErrNotFound) {
			return try, nil
		} else if err != nil {
			return "", err
		}
	}
}

// add makes a machine a member without an invite.
func (a *applying) add(m *floxv1.Machine) error {
	was, err := a.machine(m.GetPeer())
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if was != nil {
		a.reply.Machine = was // told twice
		return nil
	}
	if err := a.notRevoked(m.GetPeer()); err != nil {
		return err
	}
	m.JoinedUnixMs = a.at.UnixMilli()
	normalize(m)
	if err := a.store(m, nil); err != nil {
		return err
	}
	return a.note("machine.add", m.GetName(), m.GetRole()+" "+m.GetPeer(), false)
}

// notRevoked refuses a key that was revoked, for ever.
func (a *applying) notRevoked(peer string) error {
	rev, err := load(a.tx, textKey(revokedKey, peer), &floxv1.Revoked{})
	if errors.Is(err, flox.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("the key of this machine was revoked on %s (%s): it needs a new one (remove its machine.key) and a new invite: %w",
		time.UnixMilli(rev.GetTimeUnixMs()).UTC().Format(time.DateOnly), rev.GetReason(), flox.ErrDenied)
}

// change alters what is kept of a member.
func (a *applying) change(c *floxv1.ChangeMachine) error {
	was, err := a.machine(c.GetPeer())
	if err != nil {
		return err
	}
	m := proto.CloneOf(was)
	for _, l := range c.GetSetLabels() {
		m.Labels = slices.DeleteFunc(m.Labels, func(o *floxv1.Label) bool { return o.GetKey() == l.GetKey() })
		m.Labels = append(m.Labels, l)
	}
	m.Labels = slices.DeleteFunc(m.Labels, func(l *floxv1.Label) bool { return slices.Contains(c.GetDropLabels(), l.GetKey()) })
	for _, u := range c.GetSetUsers() {
		m.Users = slices.DeleteFunc(m.Users, func(o *floxv1.UserGrant) bool { return o.GetName() == u.GetName() })
		m.Users = append(m.Users, u)
	}
	m.Users = slices.DeleteFunc(m.Users, func(u *floxv1.UserGrant) bool { return slices.Contains(c.GetDropUsers(), u.GetName()) })
	for _, text := range []struct {
		to   *string
		from string
	}{{&m.Name, c.GetName()}, {&m.RaftAddress, c.GetRaftAddress()}, {&m.HttpUrl, c.GetHttpUrl()}} {
		if text.from != "" {
			*text.to = text.from
		}
	}
	if len(c.GetAddrs()) > 0 {
		m.Addrs = c.GetAddrs()
	}
	if len(c.GetSealKey()) > 0 {
		m.SealKey = c.GetSealKey()
	}
	normalize(m)
	if proto.Equal(m, was) {
		a.reply.Machine = was
		return nil
	}
	if err := a.store(m, was); err != nil {
		return err
	}
	return a.note("machine.change", m.GetName(), describe(c), false)
}

// describe says in words what a change was.
func describe(c *floxv1.ChangeMachine) string {
	var did []string
	for _, l := range c.GetSetLabels() {
		did = append(did, "label "+l.GetKey()+"="+l.GetValue())
	}
	for _, l := range c.GetDropLabels() {
		did = append(did, "no label "+l)
	}
	for _, u := range c.GetSetUsers() {
		did = append(did, "user "+u.GetName()+" as "+u.GetRole())
	}
	for _, u := range c.GetDropUsers() {
		did = append(did, "no user "+u)
	}
	if c.GetName() != "" {
		did = append(did, "name "+c.GetName())
	}
	if len(c.GetAddrs())+len(c.GetRaftAddress())+len(c.GetSealKey())+len(c.GetHttpUrl()) > 0 {
		did = append(did, "where it is reached")
	}
	return strings.Join(did, ", ")
}

// remove takes a machine out of the member list, for ever if revoked.
func (a *applying) remove(c *floxv1.RemoveMachine) error {
	m, err := a.machine(c.GetPeer())
	if errors.Is(err, flox.ErrNotFound) && c.GetRevoked() && a.level >= 2 {
		return a.revokeStranger(c, err)
	}
	if err != nil {
		return err
	}
	if m.GetRole() == Server {
		others := 0
		err := each(a.tx, []byte{machineKey}, nil, func(o *floxv1.Machine) bool {
			if o.GetRole() == Server && o.GetPeer() != m.GetPeer() {
				others++
			}
			return others == 0
		})
		if err != nil {
			return err
		}
		if others == 0 {
			return fmt.Errorf("%s is the only server there is, and cannot be taken out: %w", m.GetName(), flox.ErrBusy)
		}
	}
	if err := a.drop(m); err != nil {
		return err
	}
	if !c.GetRevoked() {
		return a.note("machine.leave", m.GetName(), c.GetReason(), false)
	}
	return a.revoke(m.GetPeer(), m.GetName(), c.GetReason())
}

// drop deletes a member's record.
func (a *applying) drop(m *floxv1.Machine) error {
	a.counts.machines--
	a.peers = append(a.peers, m.GetPeer())
	a.reply.Removed = append(a.reply.Removed, m.GetPeer())
	return errors.Join(a.tx.Delete(textKey(machineKey, m.GetPeer())), a.tx.Delete(textKey(nameKey, folded(m.GetName()))), a.tx.Delete(textKey(seenKey, m.GetPeer())))
}

// forget drops ephemeral machines that nobody has seen for long.
func (a *applying) forget(peers []string) error {
	var names []string
	for _, p := range peers {
		m, err := a.machine(p)
		if errors.Is(err, flox.ErrNotFound) || err == nil && !m.GetEphemeral() || slices.Contains(a.peers, p) {
			continue
		}
		if err == nil {
			err = a.drop(m)
		}
		if err != nil {
			return err
		}
		names = append(names, m.GetName())
	}
	if len(names) == 0 {
		return nil
	}
	return a.note("machine.forget", strings.Join(names, " "), "ephemeral, not seen any more", false)
}

// secrets replaces the cluster's sealed secrets, if nobody did meanwhile.
func (a *applying) secrets(c *floxv1.SetSecrets) error {
	next := c.GetSecrets()
	if next.GetVersion() != c.GetAfter()+1 || len(next.GetSeals()) == 0 || len(next.GetBox()) == 0 {
		return fmt.Errorf("secrets version %d behind %d with %d seals: want the next version, sealed to a server at least: %w",
			next.GetVersion(), c.GetAfter(), len(next.GetSeals()), flox.ErrBadInput)
	}
	have, err := load(a.tx, []byte{secretsKey}, &floxv1.SealedSecrets{})
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if have.GetVersion() != c.GetAfter() {
		return fmt.Errorf("the cluster's secrets have version %d, not %d: somebody replaced them meanwhile, try again: %w", have.GetVersion(), c.GetAfter(), flox.ErrBusy)
	}
	to := make([]string, len(next.GetSeals()))
	for i, s := range next.GetSeals() {
		to[i] = s.GetPeer()
	}
	if err := a.put([]byte{secretsKey}, next); err != nil {
		return err
	}
	return a.note("keys.seal", fmt.Sprint("version ", next.GetVersion()), "sealed to "+strings.Join(to, " "), false)
}
