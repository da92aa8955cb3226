package profile

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/zeebo/blake3"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// stable writes messages of the state: equal on every server.
var stable = proto.MarshalOptions{Deterministic: true}

// Processor applies ProfilesCommands. All state is in the transaction. A command that was
// made on another generation than the one that lives does nothing, and says so.
type Processor struct {
	maxGenerations, maxEvents, maxChanges uint64 // 0 = the constants; others in tests
}

var _ raft.Processor = Processor{}

// applying is one command under way.
type applying struct {
	Processor
	tx     *raft.Tx
	at     time.Time
	index  uint64
	actor  *floxv1.Actor
	admin  bool
	counts counts
	reply  *floxv1.ProfilesReply
	name   string // folded, of the profile that changed
	was    string // folded, the one it had until then; "" = the same
}

// Apply is raft.Processor.
func (p Processor) Apply(tx *raft.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	c := &floxv1.ProfilesCommand{}
	if err := raft.DecodeCommand("profiles", command, c); err != nil {
		return nil, err
	}
	for _, d := range []struct {
		to    *uint64
		usual uint64
	}{{&p.maxGenerations, maxGenerations}, {&p.maxEvents, maxEvents}, {&p.maxChanges, maxChanges}} {
		if *d.to == 0 {
			*d.to = d.usual
		}
	}
	a := &applying{Processor: p, tx: tx, at: at, index: index, actor: c.GetActor(), admin: c.GetAdmin(), reply: &floxv1.ProfilesReply{}}
	var err error
	if a.counts, err = loadCounts(tx); err == nil {
		err = a.apply(c)
	}
	if err == nil && a.name != "" {
		err = a.finish()
	}
	if err != nil {
		return nil, err
	}
	return stable.Marshal(a.reply)
}

func (a *applying) apply(c *floxv1.ProfilesCommand) error {
	switch c := c.GetCommand().(type) {
	case *floxv1.ProfilesCommand_Create:
		return a.create(c.Create)
	case *floxv1.ProfilesCommand_Change:
		return a.change(c.Change)
	case *floxv1.ProfilesCommand_Switch:
		return a.makeLive(c.Switch)
	case *floxv1.ProfilesCommand_Delete:
		return a.remove(c.Delete)
	case *floxv1.ProfilesCommand_Grants:
		return a.grant(c.Grants)
	case *floxv1.ProfilesCommand_Rename:
		return a.rename(c.Rename)
	case *floxv1.ProfilesCommand_Retention:
		return a.retain(c.Retention)
	case *floxv1.ProfilesCommand_Tag:
		return a.tag(c.Tag)
	case *floxv1.ProfilesCommand_Prune:
		return a.prune(c.Prune)
	case *floxv1.ProfilesCommand_Assign:
		return a.assign(c.Assign)
	case *floxv1.ProfilesCommand_Schedule:
		return a.schedule(c.Schedule)
	case *floxv1.ProfilesCommand_Run:
		return a.ran(c.Run)
	}
	return fmt.Errorf("profiles: no command inside: %w", raft.ErrUnknownCommand)
}

// profile reads a profile for somebody who has at least a role in it.
func (a *applying) profile(name, role string) (*floxv1.Profile, error) {
	p, err := FindFor(a.tx, name, func(p *floxv1.Profile) bool { return a.admin || Role(p, a.actor.GetUser()) != "" })
	if err == nil && !a.admin {
		err = May(p, a.actor.GetUser(), role)
	}
	return p, err
}

func (a *applying) create(c *floxv1.NewProfile) error {
	owner, _, err := Split(c.GetName())
	if err != nil {
		return err
	}
	if !a.admin && Folded(owner) != Folded(a.actor.GetUser()) {
		return fmt.Errorf("profile %s: %s can make profiles of their own, %s/…; those of others an admin makes, who can give roles in them: %w",
			c.GetName(), nameOr(a.actor.GetUser(), "nobody"), nameOr(a.actor.GetUser(), "USER"), flox.ErrDenied)
	}
	systems, err := checkSystems(c.GetName(), c.GetSystems())
	if err != nil {
		return err
	}
	if have, err := Find(a.tx, c.GetName()); err == nil {
		return fmt.Errorf("profile %s is there already: %w", have.GetName(), flox.ErrBusy)
	} else if !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if a.counts.profiles >= maxProfiles {
		return fmt.Errorf("there are %d profiles already: delete some: %w", a.counts.profiles, flox.ErrFull)
	}
	if err := a.free(Folded(c.GetName())); err != nil {
		return err
	}
	a.counts.profiles++
	p := &floxv1.Profile{Name: c.GetName(), Systems: systems, CreatedUnixMs: a.at.UnixMilli(), CreatedIndex: a.index, CreatedBy: a.actor.GetUser()}
	if user := a.actor.GetUser(); user != "" && Folded(owner) != Folded(user) {
		p.Grants = []*floxv1.ProfileGrant{{User: user, Role: Owner}}
	}
	return a.store(p, &floxv1.ProfileEvent{Kind: "create", Detail: strings.Join(systems, ", ")})
}

func checkSystems(name string, systems []string) ([]string, error) {
	systems = slices.Compact(slices.Sorted(slices.Values(systems)))
	if len(systems) == 0 || len(systems) > maxSystems {
		return nil, fmt.Errorf("profile %s: %d systems, want 1 to %d, such as x86_64-linux: %w", name, len(systems), maxSystems, flox.ErrBadInput)
	}
	for _, s := range systems {
		if !system(s) {
			return nil, fmt.Errorf("profile %s: system %q, want one such as x86_64-linux: %w", name, short(s), flox.ErrBadInput)
		}
	}
	return systems, nil
}

// madeOn is a command about one generation of one profile.
type madeOn interface {
	GetLive() uint64
	GetCreated() uint64
}

// moved says that a command was made on another generation than the one that lives. One of
// a profile that was deleted is another one, whatever its number.
func moved(p *floxv1.Profile, c madeOn) bool {
	return p.GetLive() != c.GetLive() || p.GetCreatedIndex() != c.GetCreated()
}

// change makes a generation, and makes it live.
func (a *applying) change(c *floxv1.NewGeneration) error {
	p, err := a.profile(c.GetProfile(), Writer)
	if err != nil {
		return err
	}
	if moved(p, c) {
		a.reply.Moved, a.reply.Profile = true, p
		return nil
	}
	if c.GetKind() == "" || len(c.GetKind()) > maxText || len(c.GetReason()) > maxText {
		return fmt.Errorf("profile %s: a change with kind %q: %w", p.GetName(), short(c.GetKind()), flox.ErrBadInput)
	}
	var before []*floxv1.Package
	if p.GetLive() > 0 {
		g, err := ReadGeneration(a.tx, p.GetName(), p.GetLive())
		if err != nil {
			return err
		}
		before = g.GetPackages()
	}
	if c.GetAutomatic() {
		if err := MayByItself(p, before, c.GetSet(), c.GetDrop()); err != nil {
			return err
		}
	}
	after, err := Apply(p, before, c.GetSet(), c.GetDrop())
	if err != nil {
		return err
	}
	p.Last++
	g := &floxv1.Generation{
		Number: p.GetLast(), Parent: p.GetLive(), Index: a.index, TimeUnixMs: a.at.UnixMilli(), Actor: a.actor,
		Kind: c.GetKind(), Reason: c.GetReason(), Environments: c.GetEnvironments(),
	}
	for _, pkg := range after {
		id, err := a.use(pkg)
		if err != nil {
			return err
		}
		g.PackageIds = append(g.PackageIds, id)
	}
	if err := a.put(numberKey(generationKey, p.GetName(), g.GetNumber()), g); err != nil {
		return err
	}
	if p.GetFirst() == 0 {
		p.First = 1
	}
	e := &floxv1.ProfileEvent{Kind: c.GetKind(), From: p.GetLive(), To: g.GetNumber(), Reason: c.GetReason(), Detail: Describe(before, after)}
	p.Live, p.Held = g.GetNumber(), false
	if err := a.trim(p, g.GetParent()); err != nil {
		return err
	}
	return a.store(p, e)
}

// makeLive lets an earlier generation live again.
func (a *applying) makeLive(c *floxv1.LiveGeneration) error {
	p, err := a.profile(c.GetProfile(), Writer)
	if err != nil {
		return err
	}
	if moved(p, c) {
		a.reply.Moved, a.reply.Profile = true, p
		return nil
	}
	if len(c.GetReason()) > maxText {
		return fmt.Errorf("profile %s: a reason of %d bytes, want at most %d: %w", p.GetName(), len(c.GetReason()), maxText, flox.ErrBadInput)
	}
	if _, err := ReadGeneration(a.tx, p.GetName(), c.GetTo()); err != nil {
		return err
	}
	if c.GetTo() == p.GetLive() {
		a.reply.Profile = p
		return nil
	}
	e := &floxv1.ProfileEvent{Kind: "rollback", From: p.GetLive(), To: c.GetTo(), Reason: c.GetReason()}
	p.Live, p.Held = c.GetTo(), true
	return a.store(p, e)
}

// use counts one more generation that has a package, and gives the package's ID.
func (a *applying) use(pkg *floxv1.Package) ([]byte, error) {
	b, err := stable.Marshal(pkg)
	if err != nil {
		return nil, err
	}
	sum := blake3.Sum256(b)
	id := sum[:16]
	r, err := load(a.tx, append([]byte{packageKey}, id...), &floxv1.PackageRecord{})
	if errors.Is(err, flox.ErrNotFound) {
		r = &floxv1.PackageRecord{Package: pkg}
	} else if err != nil {
		return nil, err
	}
	r.Users++
	return id, a.put(append([]byte{packageKey}, id...), r)
}

func (a *applying) dropGeneration(name string, number uint64) error {
	key := numberKey(generationKey, name, number)
	g, err := load(a.tx, key, &floxv1.Generation{})
	if errors.Is(err, flox.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, id := range g.GetPackageIds() {
		at := append([]byte{packageKey}, id...)
		r, err := load(a.tx, at, &floxv1.PackageRecord{})
		if err != nil {
			return err
		}
		if r.Users--; r.GetUsers() == 0 {
			err = a.tx.Delete(at)
		} else {
			err = a.put(at, r)
		}
		if err != nil {
			return err
		}
	}
	return a.tx.Delete(key)
}

// remove forgets a profile with all its generations.
func (a *applying) remove(name string) error {
	p, err := a.profile(name, Owner)
	if err != nil {
		return err
	}
	all, err := generationsOf(a.tx, p.GetName())
	if err != nil {
		return err
	}
	for _, g := range all {
		if err := a.dropGeneration(p.GetName(), g.GetNumber()); err != nil {
			return err
		}
	}
	prefix := append(textKey(eventKey, Folded(p.GetName())), 0)
	var events [][]byte
	err = a.tx.Iterate(prefix, nil, func(key, _ []byte) bool {
		events = append(events, bytes.Clone(key))
		return true
	})
	for _, key := range events {
		err = errors.Join(err, a.tx.Delete(key))
	}
	for _, name := range p.GetFormerly() {
		err = errors.Join(err, a.free(Folded(name)))
	}
	a.counts.profiles--
	a.name = Folded(p.GetName())
	return errors.Join(err, a.tx.Delete(textKey(runKey, a.name)), a.tx.Delete(textKey(profileKey, a.name)))
}

func (a *applying) grant(c *floxv1.SetGrants) error {
	p, err := a.profile(c.GetProfile(), Owner)
	if err != nil {
		return err
	}
	var did []string
	for _, g := range c.GetGrants() {
		if len(g.GetUser()) == 0 || len(g.GetUser()) > maxText || g.GetRole() != "" && Rank(g.GetRole()) == 0 || g.GetUser() == "*" && Rank(g.GetRole()) > Rank(Reader) {
			return fmt.Errorf("profile %s: role %q for %q: want %s, %s or %s for a user, or %s for everybody (*): %w",
				p.GetName(), short(g.GetRole()), short(g.GetUser()), Reader, Writer, Owner, Reader, flox.ErrBadInput)
		}
		p.Grants = slices.DeleteFunc(p.Grants, func(o *floxv1.ProfileGrant) bool { return Folded(o.GetUser()) == Folded(g.GetUser()) })
		if g.GetRole() != "" {
			p.Grants = append(p.Grants, g)
		}
		did = append(did, g.GetUser()+"="+nameOr(g.GetRole(), "none"))
	}
	if len(p.GetGrants()) > maxGrants {
		return fmt.Errorf("profile %s: %d people would have roles, at most %d can: %w", p.GetName(), len(p.GetGrants()), maxGrants, flox.ErrFull)
	}
	// Grants of one person are looked at before that of everybody.
	slices.SortFunc(p.Grants, func(x, y *floxv1.ProfileGrant) int {
		if (x.GetUser() == "*") != (y.GetUser() == "*") {
			if x.GetUser() == "*" {
				return 1
			}
			return -1
		}
		return strings.Compare(Folded(x.GetUser()), Folded(y.GetUser()))
	})
	return a.store(p, &floxv1.ProfileEvent{Kind: "grant", From: p.GetLive(), To: p.GetLive(), Detail: strings.Join(did, ", ")})
}

// store writes a profile that changed, and what happened to it.
func (a *applying) store(p *floxv1.Profile, e *floxv1.ProfileEvent) error {
	p.ChangedUnixMs, p.ChangedIndex = a.at.UnixMilli(), a.index
	e.Index, e.TimeUnixMs, e.Actor = a.index, a.at.UnixMilli(), a.actor
	a.reply.Profile, a.name = p, Folded(p.GetName())
	if err := a.put(numberKey(eventKey, a.name, a.index), e); err != nil {
		return err
	}
	if err := a.trimEvents(p); err != nil {
		return err
	}
	return a.put(textKey(profileKey, a.name), p)
}

// trimEvents forgets the oldest event of a profile that has one too many.
func (a *applying) trimEvents(p *floxv1.Profile) error {
	if p.Events++; p.GetEvents() <= a.maxEvents {
		return nil
	}
	p.Events--
	var oldest []byte
	err := a.tx.Iterate(append(textKey(eventKey, a.name), 0), nil, func(key, _ []byte) bool {
		oldest = bytes.Clone(key)
		return false
	})
	return errors.Join(err, a.tx.Delete(oldest))
}

func (a *applying) put(key []byte, m proto.Message) error {
	b, err := stable.Marshal(m)
	if err != nil {
		return err
	}
	return a.tx.Set(key, b)
}

// finish tells watchers which profile changed.
func (a *applying) finish() error {
	a.counts.changes++
	names := a.name
	if a.was != "" {
		names += "\x00" + a.was
	}
	if err := a.tx.Set(indexKey(a.index), []byte(names)); err != nil {
		return err
	}
	dropped, err := raft.DropOldest(a.tx, changeKey, a.counts.dropped, &a.counts.changes, a.maxChanges)
	if err != nil {
		return err
	}
	a.counts.dropped = max(a.counts.dropped, dropped)
	return raft.SetCounts(a.tx, []byte{countsKey}, a.counts.fields())
}
