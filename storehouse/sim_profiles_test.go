package storehouse

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/profile"
	cluster "github.com/floxctl/flox/raft"
)

// simProfiles are a profile of alice's, in which bob has a role, now and then. It has up
// to simPackages packages. One in two is deleted and made again.
type simProfiles struct{}

const (
	simPackages = 4
	// simVersions is how many versions there are of each package.
	simVersions = 3
	// simProfileTries bounds how often a change is made anew.
	simProfileTries = 5
)

// simRoles are what bob may do.
var simRoles = []string{"", profile.Reader, profile.Writer, profile.Owner}

// simSet is a version of each package, as a digit; 0 = it is not there.
type simSet string

const simEmpty simSet = "0000"

// simEdit is what a change does to each package: sets a version, drops it ('x'), or
// leaves it alone ('-').
type simEdit string

// on gives what an edit makes of packages; ok is false if it drops one that is not there.
func (e simEdit) on(set simSet) (after simSet, ok bool) {
	b := []byte(set)
	for i, what := range []byte(e) {
		switch {
		case what == 'x' && b[i] == '0':
			return set, false
		case what == 'x':
			b[i] = '0'
		case what != '-':
			b[i] = what
		}
	}
	return simSet(b), true
}

// profilesAsk is a command.
type profilesAsk struct {
	what     string
	bob      bool   // asks, not alice
	live, to uint64 // generations: which it is made on, and, of a rollback, its end
	made     string // profilesState.made of the profile that was seen
	edit     simEdit
	tag      string // of who makes the profile or a change, once
	role     uint8  // that bob gets
}

// profilesSaid is what is answered.
type profilesSaid struct {
	moved      bool
	live, last uint64
	held       bool
}

// profilesState is what is known of a profile, and what a reader sees of it.
type profilesState struct {
	is, held bool
	live     uint64
	made     string // the tag of who made it
	role     uint8
	sets     string // of each generation, one after another
	story    string // what happened
}

func (s profilesState) last() uint64 { return uint64(len(s.sets) / simPackages) }

// set gives the packages of a generation; 0 has none.
func (s profilesState) set(number uint64) simSet {
	if number == 0 || number > s.last() {
		return simEmpty
	}
	return simSet(s.sets[(number-1)*simPackages : number*simPackages])
}

func (s profilesState) said(moved bool) profilesSaid {
	return profilesSaid{moved, s.live, s.last(), s.held}
}

func (simProfiles) called(subject simSubject) string { return fmt.Sprintf("Alice/p%d", subject.serial) }

// goes says whether a subject is one that is deleted now and then.
func (simProfiles) goes(subject simSubject) bool { return subject.serial%2 == 1 }

func (simProfiles) person(bob bool) string {
	if bob {
		return "bob"
	}
	return "alice"
}

// packages are those of a set.
func (simProfiles) packages(set simSet) (all []*floxv1.Package) {
	for i, v := range []byte(set) {
		if v == '0' {
			continue
		}
		name, version := string(rune('a'+i)), string(v)
		all = append(all, &floxv1.Package{Name: name, Version: version, Priority: profile.DefaultPriority, Paths: []*floxv1.PackagePaths{
			{System: linux, Paths: []string{string(asPath(name+version, nil).info.Path)}},
		}})
	}
	return all
}

// edits are an edit as a command has it.
func (p simProfiles) edits(e simEdit) (set []*floxv1.Package, drop []string) {
	for i, what := range []byte(e) {
		switch what {
		case '-':
		case 'x':
			drop = append(drop, string(rune('a'+i)))
		default:
			set = append(set, p.packages(simEmpty[:i]+simSet(what)+simEmpty[i+1:])...)
		}
	}
	return set, drop
}

// environment is that of a set of packages; its name says which they are.
func (simProfiles) environment(set simSet) string {
	return string(asPath("environment-"+string(set), nil).info.Path)
}

// ask makes up a command of somebody who has not looked.
func (p simProfiles) ask(rng *rand.Rand, subject simSubject, _ uint64) (any, simCommand) {
	return p.command(subject, simProfile{}, profilesAsk{what: "create", bob: rng.IntN(8) == 0})
}

// command is a question as the log takes it, of somebody who saw a state.
func (p simProfiles) command(subject simSubject, seen simProfile, a profilesAsk) (any, simCommand) {
	name := p.called(subject)
	a.live, a.made = seen.live, seen.made
	c := &floxv1.ProfilesCommand{Actor: &floxv1.Actor{Machine: "desk", User: p.person(a.bob)}}
	switch a.what {
	case "create":
		c.Actor.Machine = a.tag
		c.Command = &floxv1.ProfilesCommand_Create{Create: &floxv1.NewProfile{Name: name, Systems: []string{linux}}}
	case "change":
		set, drop := p.edits(a.edit)
		after, _ := a.edit.on(seen.set(seen.live))
		c.Command = &floxv1.ProfilesCommand_Change{Change: &floxv1.NewGeneration{
			Profile: strings.ToUpper(name), Live: a.live, Created: seen.index, Set: set, Drop: drop, Kind: "install", Reason: a.tag,
			Environments: []*floxv1.Environment{{System: linux, Path: p.environment(after)}},
		}}
	case "rollback":
		c.Command = &floxv1.ProfilesCommand_Switch{Switch: &floxv1.LiveGeneration{Profile: name, Live: a.live, Created: seen.index, To: a.to}}
	case "delete":
		c.Command = &floxv1.ProfilesCommand_Delete{Delete: name}
	case "grant":
		c.Command = &floxv1.ProfilesCommand_Grants{Grants: &floxv1.SetGrants{
			Profile: name, Grants: []*floxv1.ProfileGrant{{User: "Bob", Role: simRoles[a.role]}},
		}}
	}
	return a, simCommand{profile.Kind, profile.Level(c), c}
}

func (simProfiles) heard(_ simSubject, ask any, reply []byte) (any, uint64, error) {
	r := &floxv1.ProfilesReply{}
	if err := proto.Unmarshal(reply, r); err != nil {
		return nil, 0, err
	}
	p := r.GetProfile()
	said := profilesSaid{r.GetMoved(), p.GetLive(), p.GetLast(), p.GetHeld()}
	if a := ask.(profilesAsk); said.moved || a.what == "rollback" && a.to == a.live {
		return said, 0, nil // nothing was done, so the profile is as another entry left it
	}
	return said, p.GetChangedIndex(), nil
}

// read gives a profile with all its generations and all that happened to it. What does
// not fit together is no state that there can be.
func (p simProfiles) read(r *cluster.Reader, subject simSubject) (any, error) {
	events, _, err := profile.Events(r, p.called(subject), 0, 1000)
	if err != nil {
		return nil, err
	}
	slices.Reverse(events)
	seen := profilesState{}
	at, err := profile.Find(r, p.called(subject))
	if errors.Is(err, flox.ErrNotFound) {
		for _, e := range events {
			seen.story += "left: " + e.String()
		}
		return seen, nil
	}
	if err != nil {
		return nil, err
	}
	seen.is, seen.held, seen.live = true, at.GetHeld(), at.GetLive()
	seen.role = uint8(max(0, slices.Index(simRoles, profile.Role(at, "bob")))) //nolint:gosec // there are four
	made := map[uint64]*floxv1.ProfileEvent{}
	for _, e := range events {
		if e.GetKind() == "create" {
			seen.made += e.GetActor().GetMachine()
		}
		seen.story += fmt.Sprintf("%s %s %d>%d %s, ", e.GetActor().GetUser(), e.GetKind(), e.GetFrom(), e.GetTo(), e.GetReason())
		if e.GetKind() == "install" {
			made[e.GetTo()] = e
		}
	}
	for n := uint64(1); n <= at.GetLast(); n++ {
		g, err := profile.ReadGeneration(r, at.GetName(), n)
		if err != nil {
			return nil, err
		}
		set := []byte(simEmpty)
		for _, pkg := range g.GetPackages() {
			set[pkg.GetName()[0]-'a'] = pkg.GetVersion()[0]
		}
		seen.sets += string(set)
		e := made[n]
		if g.GetNumber() != n || g.GetParent() != e.GetFrom() || g.GetIndex() != e.GetIndex() || g.GetReason() != e.GetReason() || g.GetActor().GetUser() != e.GetActor().GetUser() {
			seen.story += fmt.Sprintf("generation %d is not that of its event: %v, %v; ", n, g, e)
		}
		if want := p.environment(simSet(set)); len(g.GetEnvironments()) != 1 || g.GetEnvironments()[0].GetPath() != want {
			seen.story += fmt.Sprintf("generation %d of %s has the environment of others: %v; ", n, set, g.GetEnvironments())
		}
	}
	return seen, nil
}

func (p simProfiles) next(state, ask any, _ uint64) []simNext {
	s := state.(profilesState)
	if ask == (simLook{}) {
		return []simNext{{s, s}}
	}
	next, said := s.after(ask.(profilesAsk))
	return []simNext{{next, said}}
}

// after is what an entry makes of a profile.
func (s profilesState) after(a profilesAsk) (next profilesState, said any) {
	role := uint8(profile.Rank(profile.Owner)) //nolint:gosec // 3
	if a.bob {
		role = s.role
	}
	needs := map[string]int{"change": 2, "rollback": 2, "delete": 3, "grant": 3}[a.what]
	switch {
	case a.what == "create" && a.bob:
		return s, flox.ErrDenied
	case a.what == "create" && s.is:
		return s, flox.ErrBusy
	case a.what != "create" && !s.is:
		return s, flox.ErrNotFound
	case int(role) < needs:
		return s, flox.ErrDenied
	case needs == 2 && (a.live != s.live || a.made != s.made):
		return s, s.said(true)
	}
	before := s.live
	switch a.what {
	case "create":
		s.is, s.made, a.tag = true, a.tag, ""
	case "change":
		set, ok := a.edit.on(s.set(s.live))
		if !ok {
			return s, flox.ErrNotFound
		}
		s.sets += string(set)
		s.live, s.held = s.last(), false
	case "rollback":
		if a.to == 0 || a.to > s.last() {
			return s, flox.ErrNotFound
		}
		if a.to == s.live {
			return s, s.said(false)
		}
		s.live, s.held = a.to, true
	case "delete":
		return profilesState{}, profilesSaid{}
	case "grant":
		s.role = a.role
	}
	kind := map[string]string{"change": "install"}[a.what]
	if kind == "" {
		kind = a.what
	}
	s.story += fmt.Sprintf("%s %s %d>%d %s, ", simProfiles{}.person(a.bob), kind, before, s.live, a.tag)
	return s, s.said(false)
}

// simChange is a change that was asked for.
type simChange struct {
	subject simSubject
	base    simSet // what it was made on, as its author saw it
	edit    simEdit
	made    uint64 // the generation that was acknowledged; 0 = none was
}

// simProfile is a profile as a client saw it.
type simProfile struct {
	profilesState
	index uint64 // of the entry that made it
}

// lookAt reads a profile, of all that was answered.
func (c *simClient) lookAt(subject simSubject) (seen simProfile, ok bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	n, call := c.Any(c.rng), c.Age()
	v, err := n.View(ctx, profile.Kind, cluster.Linearizable)
	if err != nil {
		return seen, false
	}
	if p, err := profile.Find(v, simProfiles{}.called(subject)); err == nil {
		seen.index = p.GetCreatedIndex()
	}
	said, ok := c.look(v, n, subject, call)
	if ok {
		seen.profilesState = said.(profilesState)
	}
	return seen, ok
}

// changeProfile looks at a profile and asks for something.
func (c *simClient) changeProfile(subject simSubject) {
	p := simProfiles{}
	seen, ok := c.lookAt(subject)
	if !ok {
		return
	}
	a := profilesAsk{bob: c.rng.IntN(4) == 0}
	c.mu.Lock()
	a.tag = fmt.Sprint("t", c.tags)
	c.tags++
	c.mu.Unlock()
	if c.rng.IntN(2) == 0 { // others come between
		time.Sleep(time.Duration(c.rng.IntN(3000)) * time.Millisecond)
	}
	switch what := c.rng.IntN(20); {
	case !seen.is && what > 0 || what == 1:
		a.what, a.bob = "create", c.rng.IntN(8) == 0
	case what < 4:
		a.what, a.to = "rollback", c.rng.Uint64N(seen.last()+2)
	case what < 8 && p.goes(subject):
		a.what = "delete"
	case what == 8 || what == 9:
		a.what, a.role = "grant", uint8(c.rng.IntN(len(simRoles))) //nolint:gosec // there are four
	default:
		a.what = "change"
		c.changePackages(subject, seen, a)
		return
	}
	if a.what != "create" {
		a.tag = ""
	}
	ask, cmd := p.command(subject, seen, a)
	c.put(subject, ask, cmd)
}

// changePackages makes a change on what lives, and again on what somebody else made
// meanwhile, unless that is of the same packages.
func (c *simClient) changePackages(subject simSubject, seen simProfile, a profilesAsk) {
	p, base := simProfiles{}, seen.set(seen.live)
	edit := []byte(strings.Repeat("-", simPackages))
	for range 1 + c.rng.IntN(2) {
		i := c.rng.IntN(simPackages)
		edit[i] = byte('1' + c.rng.IntN(simVersions)) //nolint:gosec // a digit
		if base[i] != '0' && c.rng.IntN(3) == 0 {
			edit[i] = 'x'
		}
	}
	change := &simChange{subject: subject, base: base, edit: simEdit(edit)}
	c.mu.Lock()
	c.changes[a.tag] = change
	c.mu.Unlock()
	a.edit = change.edit
	for range simProfileTries {
		ask, cmd := p.command(subject, seen, a)
		said, ok := c.put(subject, ask, cmd).(profilesSaid)
		if !ok {
			return
		}
		if !said.moved {
			c.mu.Lock()
			change.made = said.live
			c.mu.Unlock()
			return
		}
		if seen, ok = c.lookAt(subject); !ok || !seen.is {
			return
		}
		set, drop := p.edits(change.edit)
		is := seen.set(seen.live)
		if len(profile.Conflicts(p.packages(base), p.packages(is), set, drop)) > 0 {
			return
		}
		a.edit = change.edit.over(is)
	}
}

// over is an edit that leaves out what is dropped in it and gone already. What comes
// back after that is dropped by the next try: each begins with the whole edit.
func (e simEdit) over(is simSet) simEdit {
	b := []byte(e)
	for i, what := range b {
		if what == 'x' && is[i] == '0' {
			b[i] = '-'
		}
	}
	return simEdit(b)
}

// profilesAgree looks that every change that was acknowledged is in its profile's
// history once, and none twice; that none undid what its author had not seen; and that
// packages, profiles and changes are counted right.
func (s *simulation) profilesAgree(n *cluster.Node) error {
	v, err := n.View(context.Background(), profile.Kind, cluster.Local)
	if err != nil {
		return err
	}
	var wrong []string
	have := map[string]int{}
	subjects := map[simSubject]profilesState{}
	for tag, change := range s.changes {
		if (simProfiles{}).goes(change.subject) {
			continue
		}
		at, known := subjects[change.subject]
		if !known {
			seen, err := simProfiles{}.read(v, change.subject)
			if err != nil {
				return errors.Join(err, v.Close())
			}
			at = seen.(profilesState)
			subjects[change.subject] = at
			for _, e := range strings.Split(at.story, ", ") {
				if words := strings.Fields(e); len(words) == 4 {
					have[words[3]]++
				}
			}
		}
		if n := have[tag]; n > 1 || n == 0 && change.made != 0 {
			wrong = append(wrong, fmt.Sprintf("%s of %s (generation %d) is %d times in the history", tag, change.subject.name(), change.made, n))
		}
		if change.made != 0 {
			wrong = append(wrong, change.wrong(at, tag)...)
		}
	}
	wrong = append(wrong, s.profileRecords(v)...)
	if len(wrong) > 0 {
		slices.Sort(wrong)
		err = fmt.Errorf("%d changes of profiles: %s: %w", len(s.changes), strings.Join(wrong, "; "), flox.ErrCorrupt)
	}
	return errors.Join(err, v.Close())
}

// wrong says what a change did that it may not.
func (c *simChange) wrong(at profilesState, tag string) (wrong []string) {
	var from, to uint64
	for _, e := range strings.Split(at.story, ", ") {
		if strings.HasSuffix(e, " "+tag) {
			if _, err := fmt.Sscanf(strings.Fields(e)[2], "%d>%d", &from, &to); err != nil {
				wrong = append(wrong, fmt.Sprintf("%q: %v", e, err))
			}
		}
	}
	if to != c.made {
		wrong = append(wrong, fmt.Sprintf("%s is generation %d, and %d was acknowledged", tag, to, c.made))
	}
	before, after := at.set(from), at.set(to)
	for i, what := range []byte(c.edit) {
		want := map[byte]byte{'x': '0', '-': before[i]}[what]
		if want == 0 {
			want = what
		}
		if after[i] != want || what != '-' && before[i] != c.base[i] && before[i] != want {
			wrong = append(wrong, fmt.Sprintf("%s: %s made on %s came on %s and gave %s", tag, c.edit, c.base, before, after))
			break
		}
	}
	return wrong
}

// profileRecords looks that what is counted is what there is, and that watchers are told
// of the last change of every profile.
func (s *simulation) profileRecords(v *cluster.Reader) (wrong []string) {
	users, have := map[string]uint64{}, map[byte]uint64{}
	bad := profile.Generations(v, func(_ string, of *floxv1.Generation) bool {
		for _, id := range of.GetPackageIds() {
			users[string(id)]++
		}
		return true
	})
	bad = errors.Join(bad, v.Iterate(nil, nil, func(key, value []byte) bool {
		have[key[0]]++
		r := &floxv1.PackageRecord{}
		switch {
		case key[0] != 'k':
		case proto.Unmarshal(value, r) != nil || r.GetUsers() != users[string(key[1:])]:
			wrong = append(wrong, fmt.Sprintf("package %v is counted in %d generations, %d have it", r.GetPackage(), r.GetUsers(), users[string(key[1:])]))
		}
		return true
	}))
	counts, err := v.Get([]byte{'n'})
	if bad = errors.Join(bad, err); bad != nil {
		return append(wrong, bad.Error())
	}
	if profiles, changes := binary.BigEndian.Uint64(counts), binary.BigEndian.Uint64(counts[8:]); have['p'] != profiles || have['c'] != changes || have['k'] != uint64(len(users)) {
		wrong = append(wrong, fmt.Sprintf("there are %d profiles, %d changes and %d packages; counted are %d, %d, and %d have users", have['p'], have['c'], have['k'], profiles, changes, len(users)))
	}
	bad = profile.List(v, "ALICE", "", func(p *floxv1.Profile) bool {
		if names, known, err := profile.Changes(v, p.GetChangedIndex()-1); err != nil || known && !slices.Contains(names, profile.Folded(p.GetName())) {
			wrong = append(wrong, fmt.Sprintf("%s changed at %d, and the changes from there on are %q, %v", p.GetName(), p.GetChangedIndex(), names, err))
		}
		return true
	})
	if bad != nil {
		wrong = append(wrong, bad.Error())
	}
	return wrong
}
