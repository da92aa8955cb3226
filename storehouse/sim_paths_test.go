package storehouse

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

// simPaths are two paths, the second of which refers to the first; NARs that are
// offered for them; and a machine that may hold them.
type simPaths struct{}

// The two paths, as bits of a set.
const (
	simLib = 1 << iota
	simApp
)

// simBoth are they.
var simBoth = []uint8{simLib, simApp}

// pathsAsk is a command.
type pathsAsk struct {
	what  string
	paths uint8
	nar   uint8  // which one is offered, from 1
	index uint64 // as of which a collection looked
}

// pathsSaid is what is answered.
type pathsSaid struct {
	done   uint8    // added, condemned, revived, collected
	differ [2]uint8 // NARs that were there instead
}

// pathsState is what is known of the paths.
type pathsState struct {
	nar     [2]uint8 // 0 = not valid
	mark    [2]uint64
	kept    uint8
	holds   uint8 // of the machine's set; 0 = it has none
	changed uint64
}

// pathsSeen is what a reader sees of it.
type pathsSeen struct {
	nar                 [2]uint8
	marked, kept, holds uint8
}

// path gives one of the paths with one of its NARs.
func (simPaths) path(subject simSubject, i int, nar uint8) *flox.PathInfo {
	name := fmt.Sprintf("p%d-%d", subject.serial, i)
	var refs []flox.StorePath
	if i == 1 {
		refs = append(refs, simPaths{}.path(subject, 0, 1).Path)
	}
	info := asPath(name, fmt.Append(nil, name, nar), refs...).info
	info.Manifest = flox.CID{1}
	return info
}

// names gives the chosen paths; the one that refers to the other goes first.
func (p simPaths) names(subject simSubject, chosen uint8) (list []string) {
	for i := 1; i >= 0; i-- {
		if chosen&simBoth[i] != 0 {
			list = append(list, string(p.path(subject, i, 1).Path))
		}
	}
	return list
}

func (p simPaths) ask(rng *rand.Rand, subject simSubject, near uint64) (any, simCommand) {
	a := pathsAsk{paths: uint8(1 + rng.IntN(3)), nar: uint8(1 + rng.IntN(2)), index: near - min(near, rng.Uint64N(20))}
	names := p.names(subject, a.paths)
	c := &floxv1.PathsCommand{}
	switch what := rng.IntN(16); {
	case what < 5:
		a.what = "add"
		add := &floxv1.AddPaths{Publisher: "tester", Touch: rng.IntN(2) == 0}
		for i, bit := range simBoth {
			if a.paths&bit != 0 {
				add.Paths = append(add.Paths, api.FromPathInfo(p.path(subject, i, a.nar)))
			}
		}
		c.Command = &floxv1.PathsCommand_Add{Add: add}
	case what < 8:
		a.what = "condemn"
		c.Command = &floxv1.PathsCommand_Condemn{Condemn: &floxv1.CondemnPaths{Paths: names, AsOf: a.index}}
	case what < 9:
		a.what = "revive"
		c.Command = &floxv1.PathsCommand_Condemn{Condemn: &floxv1.CondemnPaths{Paths: names, Revive: true}}
	case what < 10:
		a.what = "keep"
		c.Command = &floxv1.PathsCommand_Keep{Keep: &floxv1.KeepPaths{Paths: names}}
	case what < 11:
		a.what = "let go"
		c.Command = &floxv1.PathsCommand_Keep{Keep: &floxv1.KeepPaths{Paths: names, Undo: true}}
	case what < 13:
		a.what, a.paths = "hold", uint8(rng.IntN(4))
		c.Command = &floxv1.PathsCommand_Roots{Roots: p.roots(subject, a.paths)}
	case what < 15:
		a.what = "collect"
		c.Command = &floxv1.PathsCommand_Remove{Remove: &floxv1.RemovePaths{Paths: names, Condemned: &floxv1.RemoveCondemned{Index: a.index}}}
	default:
		a.what = "remove"
		c.Command = &floxv1.PathsCommand_Remove{Remove: &floxv1.RemovePaths{Paths: names}}
	}
	return a, simCommand{pathsKind, 0, c}
}

// machine is who holds the paths.
func (simPaths) machine(subject simSubject) string { return fmt.Sprint("m", subject.serial) }

// roots has the machine hold the chosen paths, or nothing.
func (p simPaths) roots(subject simSubject, chosen uint8) *floxv1.SetRootSet {
	set := &floxv1.SetRootSet{Peer: p.machine(subject)}
	if chosen != 0 {
		roots := p.set(subject, chosen)
		id := roots.ID()
		set.Set, set.Hashes = id[:], roots
	}
	return set
}

func (p simPaths) set(subject simSubject, chosen uint8) content.RootSet {
	var list []flox.StorePath
	for _, name := range p.names(subject, chosen) {
		list = append(list, flox.StorePath(name))
	}
	set, err := content.MakeRootSet(list)
	if err != nil {
		panic(err) // of names made above
	}
	return set
}

func (p simPaths) heard(subject simSubject, ask any, reply []byte) (any, uint64, error) {
	r := &floxv1.PathsReply{}
	if err := proto.Unmarshal(reply, r); err != nil {
		return nil, 0, err
	}
	said := pathsSaid{}
	bit := map[string]uint8{}
	for i := range simBoth {
		bit[string(p.path(subject, i, 1).Path)] = simBoth[i]
	}
	for _, name := range r.GetAdded() {
		said.done |= bit[name]
	}
	names := p.names(subject, ask.(pathsAsk).paths)
	for _, i := range r.GetDone() {
		said.done |= bit[names[i]]
	}
	for _, d := range r.GetDifferences() {
		i := int(bit[d.GetPath()]) - 1
		said.differ[i] = p.which(subject, i, d.GetValidNarHash())
	}
	return said, r.GetIndex(), nil
}

// which NAR of a path has a hash.
func (p simPaths) which(subject simSubject, i int, hash []byte) uint8 {
	for nar := uint8(1); nar <= 2; nar++ {
		if h := p.path(subject, i, nar).NarHash; string(h[:]) == string(hash) {
			return nar
		}
	}
	return 99
}

func (p simPaths) read(r *cluster.Reader, subject simSubject) (any, error) {
	seen := pathsSeen{}
	for i, bit := range simBoth {
		path := p.path(subject, i, 1).Path
		info, err := validAs(r, string(path))
		if err != nil {
			return nil, err
		}
		if info != nil {
			seen.nar[i] = p.which(subject, i, info.GetNarHash())
		}
		for key, set := range map[byte]*uint8{condemnedKey: &seen.marked, keptKey: &seen.kept} {
			if _, err := r.Get(hashKey(key, path.HashPart())); err == nil {
				*set |= bit
			} else if !errors.Is(err, flox.ErrNotFound) {
				return nil, err
			}
		}
	}
	m, err := readMachineRoots(r, p.machine(subject))
	if errors.Is(err, flox.ErrNotFound) {
		return seen, nil
	}
	if err != nil {
		return nil, err
	}
	set, err := readRootSet(r, m.GetSet())
	for i, bit := range simBoth {
		if set.Has(p.path(subject, i, 1).Path.HashPart()) {
			seen.holds |= bit
		}
	}
	return seen, err
}

func (simPaths) next(state, ask any, index uint64) []simNext {
	s := state.(pathsState)
	if ask == (simLook{}) {
		seen := pathsSeen{nar: s.nar, kept: s.kept, holds: s.holds}
		for i, bit := range simBoth {
			if s.mark[i] != 0 {
				seen.marked |= bit
			}
		}
		return []simNext{{s, seen}}
	}
	a := ask.(pathsAsk)
	next, said, refused := s, pathsSaid{}, error(nil)
	switch a.what {
	case "add":
		refused = next.add(a, &said)
	case "condemn", "collect":
		return s.collection(a, index)
	case "revive":
		for i, bit := range simBoth {
			if a.paths&bit != 0 && s.mark[i] != 0 {
				next.mark[i], said.done = 0, said.done|bit
			}
		}
	case "keep", "let go":
		refused = next.keep(a)
		said.done = a.paths
	case "hold":
		next.hold(a.paths, index)
	case "remove":
		if a.paths&simApp != 0 {
			next.nar[1], next.mark[1] = 0, 0
		}
		if a.paths&simLib != 0 && s.nar[0] != 0 {
			if next.nar[1] != 0 {
				refused = flox.ErrBusy
			}
			next.nar[0], next.mark[0] = 0, 0
		}
	}
	if refused != nil {
		return []simNext{{s, refused}}
	}
	return []simNext{{next, said}}
}

// add is a registration: the first NAR of a path stays.
func (s *pathsState) add(a pathsAsk, said *pathsSaid) error {
	for i, bit := range simBoth {
		switch {
		case a.paths&bit == 0:
		case s.nar[i] == a.nar:
			s.mark[i] = 0
		case s.nar[i] != 0:
			said.differ[i] = s.nar[i]
		case i == 1 && s.nar[0] == 0:
			return flox.ErrBadInput
		default:
			s.nar[i], said.done = a.nar, said.done|bit
			if i == 1 {
				s.mark[0] = 0
			}
		}
	}
	return nil
}

// keep makes paths roots or takes that back, all or none.
func (s *pathsState) keep(a pathsAsk) error {
	for i, bit := range simBoth {
		switch {
		case a.paths&bit == 0:
		case a.what == "let go" && s.kept&bit == 0, a.what == "keep" && s.nar[i] == 0:
			return flox.ErrNotFound
		case a.what == "let go":
			s.kept &^= bit
		default:
			s.kept |= bit
			s.mark[i] = 0
		}
	}
	return nil
}

// hold makes other paths the machine's.
func (s *pathsState) hold(chosen uint8, index uint64) {
	if chosen == s.holds {
		return
	}
	s.holds, s.changed = chosen, index
	for i, bit := range simBoth {
		if chosen&bit != 0 {
			s.mark[i] = 0
		}
	}
}

// collection condemns or removes paths. Where it is not known which of two entries
// was first, both may be.
func (s pathsState) collection(a pathsAsk, index uint64) []simNext {
	after := []simNext{{s, pathsSaid{}}}
	for i := 1; i >= 0; i-- { // the one that refers to the other first
		if a.paths&simBoth[i] == 0 {
			continue
		}
		var all []simNext
		for _, n := range after {
			if a.what == "condemn" {
				all = append(all, n.state.(pathsState).condemn(i, a.index, index, n)...)
			} else {
				all = append(all, n.state.(pathsState).collect(i, a.index, n)...)
			}
		}
		after = all
	}
	return after
}

func (s pathsState) condemn(i int, asOf, index uint64, undone simNext) []simNext {
	done := s
	done.mark[i] = index
	held := s.holds&simBoth[i] != 0
	if s.nar[i] == 0 || s.mark[i] != 0 || s.kept&simBoth[i] != 0 || held && s.changed != simSomewhere && s.changed > asOf {
		return []simNext{undone}
	}
	return either(held && s.changed == simSomewhere, undone, done, i)
}

func (s pathsState) collect(i int, upTo uint64, undone simNext) []simNext {
	done := s
	done.nar[i], done.mark[i] = 0, 0
	if s.mark[i] == 0 || s.mark[i] != simSomewhere && s.mark[i] > upTo || i == 0 && s.nar[1] != 0 {
		return []simNext{undone}
	}
	return either(s.mark[i] == simSomewhere, undone, done, i)
}

// either gives what follows when a path's turn came, and, if perhaps, also when not.
func either(perhaps bool, undone simNext, done pathsState, i int) []simNext {
	said := undone.said.(pathsSaid)
	said.done |= simBoth[i]
	if after := (simNext{done, said}); !perhaps {
		return []simNext{after}
	} else {
		return []simNext{after, undone}
	}
}

// countsAgree looks that what is counted of paths, so that nobody has to, is what there is.
func (s *simulation) countsAgree(n *cluster.Node) error {
	v, err := n.View(context.Background(), pathsKind, cluster.Local)
	if err != nil {
		return err
	}
	counts, err1 := readCounts(v)
	marks, err2 := readMarks(v)
	have := map[byte]uint64{}
	err3 := v.Iterate(nil, nil, func(key, _ []byte) bool {
		have[key[0]]++
		return true
	})
	if have[infoKey] != counts.paths || have[condemnedKey] != marks.condemned || have[changeKey] != counts.changes || have[differKey] != counts.differences {
		err = fmt.Errorf("there are %d paths, %d marks, %d changes and %d differences; counted are %+v, %+v: %w",
			have[infoKey], have[condemnedKey], have[changeKey], have[differKey], counts, marks, flox.ErrCorrupt)
	}
	return errors.Join(err, err1, err2, err3, v.Close())
}
