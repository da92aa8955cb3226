package storehouse

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

// pathModel is what the facts of a collection should be.
type pathModel struct {
	valid     map[flox.StorePath][]flox.StorePath // references
	condemned map[flox.StorePath]uint64           // log index
	kept      map[flox.StorePath]bool
	sets      map[string]map[flox.StorePath]bool // by machine
	changed   map[string]uint64
}

func (m *pathModel) referred(p flox.StorePath) bool {
	for by, refs := range m.valid {
		if by != p && slices.Contains(refs, p) {
			return true
		}
	}
	return false
}

// pathMachine drives the log and the model alike.
type pathMachine struct {
	f     *factLog
	all   []testPath
	model pathModel
}

func (m *pathMachine) draw(t *rapid.T) testPath { return rapid.SampledFrom(m.all).Draw(t, "path") }

func (m *pathMachine) some(t *rapid.T) []testPath {
	return rapid.SliceOfNDistinct(rapid.SampledFrom(m.all), 1, len(m.all), func(p testPath) flox.StorePath { return p.info.Path }).Draw(t, "paths")
}

func names(paths []testPath) (list []string) {
	for _, p := range paths {
		list = append(list, string(p.info.Path))
	}
	return list
}

func (m *pathMachine) must(t *rapid.T, c *floxv1.PathsCommand) *floxv1.PathsReply {
	reply, err := m.f.do(c)
	if err != nil {
		t.Fatal(err)
	}
	return reply
}

func (m *pathMachine) add(t *rapid.T) {
	p := m.draw(t)
	_, was := m.model.valid[p.info.Path]
	missing := false
	for _, r := range p.info.References {
		_, ok := m.model.valid[r]
		missing = missing || !ok
	}
	_, err := m.f.add(p)
	if !was && missing {
		if !errors.Is(err, cluster.ErrRefused) {
			t.Fatalf("without a reference: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	delete(m.model.condemned, p.info.Path)
	if !was {
		m.model.valid[p.info.Path] = p.info.References
		for _, r := range p.info.References {
			delete(m.model.condemned, r)
		}
	}
}

func (m *pathMachine) condemn(t *rapid.T) {
	paths := m.some(t)
	// A state that somebody looked at: sets that changed later hold.
	asOf := rapid.Uint64Range(0, 1).Draw(t, "old") * m.f.node.Applied()
	reply := m.must(t, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Condemn{Condemn: &floxv1.CondemnPaths{Paths: names(paths), AsOf: asOf}}})
	var want []uint32
	for i, p := range paths {
		_, valid := m.model.valid[p.info.Path]
		_, marked := m.model.condemned[p.info.Path]
		held := m.model.kept[p.info.Path]
		for machine, set := range m.model.sets {
			held = held || set[p.info.Path] && m.model.changed[machine] > asOf
		}
		if valid && !marked && !held {
			m.model.condemned[p.info.Path] = reply.GetIndex()
			want = append(want, uint32(i))
		}
	}
	if !slices.Equal(reply.GetDone(), want) {
		t.Fatalf("condemned %v, want %v", reply.GetDone(), want)
	}
}

func (m *pathMachine) revive(t *rapid.T) {
	paths := m.some(t)
	m.must(t, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Condemn{Condemn: &floxv1.CondemnPaths{Paths: names(paths), Revive: true}}})
	for _, p := range paths {
		delete(m.model.condemned, p.info.Path)
	}
}

func (m *pathMachine) keep(t *rapid.T) {
	p := m.draw(t)
	undo := rapid.Bool().Draw(t, "undo")
	_, valid := m.model.valid[p.info.Path]
	_, err := m.f.do(&floxv1.PathsCommand{Command: &floxv1.PathsCommand_Keep{Keep: &floxv1.KeepPaths{Paths: []string{string(p.info.Path)}, Undo: undo}}})
	if (undo && !m.model.kept[p.info.Path]) || (!undo && !valid) {
		if !errors.Is(err, flox.ErrNotFound) {
			t.Fatalf("keep (undo %v): %v", undo, err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if undo {
		delete(m.model.kept, p.info.Path)
	} else {
		m.model.kept[p.info.Path] = true
		delete(m.model.condemned, p.info.Path)
	}
}

func (m *pathMachine) hold(t *rapid.T) {
	machine := rapid.SampledFrom([]string{"a", "ab", "c"}).Draw(t, "machine")
	if rapid.IntRange(0, 3).Draw(t, "forget") == 0 {
		m.must(t, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Roots{Roots: &floxv1.SetRootSet{Peer: machine}}})
		delete(m.model.sets, machine)
		return
	}
	set := map[flox.StorePath]bool{}
	for _, p := range m.some(t) {
		set[p.info.Path] = true
	}
	reply := m.must(t, setOf(t, machine, set))
	if !sameSet(m.model.sets[machine], set) {
		m.model.changed[machine] = reply.GetIndex()
		for p := range set {
			delete(m.model.condemned, p)
		}
	}
	m.model.sets[machine] = set
}

func sameSet(a, b map[flox.StorePath]bool) bool {
	for p := range a {
		if !b[p] {
			return false
		}
	}
	return len(a) == len(b)
}

func setOf(t interface{ Fatal(...any) }, machine string, paths map[flox.StorePath]bool) *floxv1.PathsCommand {
	var list []flox.StorePath
	for p := range paths {
		list = append(list, p)
	}
	set, err := content.MakeRootSet(list)
	if err != nil {
		t.Fatal(err)
	}
	id := set.ID()
	return &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Roots{Roots: &floxv1.SetRootSet{Peer: machine, Set: id[:], Hashes: set}}}
}

func (m *pathMachine) remove(t *rapid.T) {
	paths := m.some(t)
	// Of an index in the past, or of now.
	at := m.f.node.Applied() - rapid.Uint64Range(0, 3).Draw(t, "ago")
	reply := m.must(t, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Remove{
		Remove: &floxv1.RemovePaths{Paths: names(paths), Condemned: &floxv1.RemoveCondemned{Index: at}},
	}})
	var want []uint32
	for i, p := range paths {
		if index, ok := m.model.condemned[p.info.Path]; ok && index <= at && !m.model.referred(p.info.Path) {
			if m.model.kept[p.info.Path] {
				t.Fatalf("%s is kept and condemned", p.info.Path)
			}
			delete(m.model.condemned, p.info.Path)
			delete(m.model.valid, p.info.Path)
			want = append(want, uint32(i))
		}
	}
	if !slices.Equal(reply.GetDone(), want) {
		t.Fatalf("removed %v, want %v", reply.GetDone(), want)
	}
}

// check compares all that can be seen.
func (m *pathMachine) check(t *rapid.T) {
	err := m.f.read(within(m.f.t), cluster.Local, func(r *cluster.Reader) error {
		marks, err := readMarks(r)
		if err != nil || marks.condemned != uint64(len(m.model.condemned)) {
			return fmt.Errorf("%+v marks, want %d: %w", marks, len(m.model.condemned), err)
		}
		for _, p := range m.all {
			_, valid := m.model.valid[p.info.Path]
			info, err := validAs(r, string(p.info.Path))
			if err != nil || (info != nil) != valid {
				return fmt.Errorf("%s is valid: %v, want %v; %w", p.info.Path, info != nil, valid, err)
			}
			index, condemned := m.model.condemned[p.info.Path]
			mark, err := readCondemned(r, p.info.Path.HashPart())
			if condemned && (err != nil || mark.index != index) || !condemned && !errors.Is(err, flox.ErrNotFound) {
				return fmt.Errorf("%s has mark %+v, %w; want %v %d", p.info.Path, mark, err, condemned, index)
			}
			for _, ref := range m.model.valid[p.info.Path] {
				if _, ok := m.model.valid[ref]; !ok {
					return fmt.Errorf("%s is valid and refers to %s, which is not", p.info.Path, ref)
				}
			}
		}
		return m.checkSets(r)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// checkSets looks for exactly one set of every content that a machine has.
func (m *pathMachine) checkSets(r *cluster.Reader) error {
	want := map[flox.CID]bool{}
	for _, paths := range m.model.sets {
		var list []flox.StorePath
		for p := range paths {
			list = append(list, p)
		}
		set, err := content.MakeRootSet(list)
		if err != nil {
			return err
		}
		want[set.ID()] = true
	}
	stored, machines := 0, 0
	err := r.Iterate([]byte{setKey}, nil, func(key, _ []byte) bool {
		if want[flox.CID(key[1:])] {
			stored++
		} else {
			stored = -1 << 20
		}
		return true
	})
	err = errors.Join(err, eachMachine(r, func(*floxv1.MachineRoots) bool { machines++; return true }))
	if err != nil || stored != len(want) || machines != len(m.model.sets) {
		return fmt.Errorf("%d sets of %d machines, want %d of %d; %w", stored, machines, len(want), len(m.model.sets), err)
	}
	return nil
}

// Whatever is added, wanted, condemned and removed in whatever order: marks are
// where they should be, and nothing goes that a valid path refers to, or that was
// wanted after it was condemned.
func TestCollectionCommandsAgreeWithAModel(t *testing.T) {
	t.Parallel()
	f := newFactLog(t, paths{})
	run := 0
	rapid.Check(t, func(rt *rapid.T) {
		run++
		m := &pathMachine{f: f, model: pathModel{
			valid: map[flox.StorePath][]flox.StorePath{}, condemned: map[flox.StorePath]uint64{}, kept: map[flox.StorePath]bool{},
			sets: map[string]map[flox.StorePath]bool{}, changed: map[string]uint64{},
		}}
		for i := range 6 {
			var refs []flox.StorePath
			for _, p := range m.all {
				if rapid.Bool().Draw(rt, "refers") {
					refs = append(refs, p.info.Path)
				}
			}
			m.all = append(m.all, makePath(t, fmt.Sprintf("m%d-%d", run, i), 1, refs...))
		}
		rt.Repeat(map[string]func(*rapid.T){
			"add": m.add, "condemn": m.condemn, "revive": m.revive, "keep": m.keep, "hold": m.hold, "remove": m.remove, "": m.check,
		})
		m.clear(rt)
	})
}

// clear leaves nothing to the next run.
func (m *pathMachine) clear(t *rapid.T) {
	for p := range m.model.kept {
		m.must(t, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Keep{Keep: &floxv1.KeepPaths{Paths: []string{string(p)}, Undo: true}}})
	}
	for machine := range m.model.sets {
		m.must(t, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Roots{Roots: &floxv1.SetRootSet{Peer: machine}}})
	}
	if err := m.f.remove(m.all...); err != nil {
		t.Fatal(err)
	}
}

// A path in use by somebody who publishes it again is not condemned, and one that
// was condemned lately is not removed.
func TestCondemnWaits(t *testing.T) {
	t.Parallel()
	f := newFactLog(t, paths{touchEvery: time.Millisecond})
	p := makePath(t, "p", 1)
	if _, err := f.add(p); err != nil {
		t.Fatal(err)
	}
	condemn := func(since time.Time) int {
		reply, err := f.do(&floxv1.PathsCommand{Command: &floxv1.PathsCommand_Condemn{Condemn: &floxv1.CondemnPaths{
			Paths: []string{string(p.info.Path)}, AsOf: f.node.Applied(), UnusedSinceUnixMs: since.UnixMilli(),
		}}})
		if err != nil {
			t.Fatal(err)
		}
		return len(reply.GetDone())
	}
	if condemn(time.Now().Add(-time.Minute)) != 0 {
		t.Error("condemned although it was registered since")
	}
	later := time.Now().Add(2 * time.Second) // behind the second that it was registered in
	time.Sleep(time.Until(later))
	touch := &floxv1.AddPaths{Paths: []*floxv1.PathInfo{api.FromPathInfo(p.info)}, Touch: true}
	if _, err := f.do(&floxv1.PathsCommand{Command: &floxv1.PathsCommand_Add{Add: touch}}); err != nil {
		t.Fatal(err)
	}
	if condemn(later.Add(-500*time.Millisecond)) != 0 {
		t.Error("condemned although it was published again since")
	}
	if condemn(time.Now().Add(time.Minute)) != 1 {
		t.Fatal("not condemned")
	}
	remove := func(grace time.Duration) int {
		reply, err := f.do(&floxv1.PathsCommand{Command: &floxv1.PathsCommand_Remove{Remove: &floxv1.RemovePaths{
			Paths: []string{string(p.info.Path)}, Condemned: &floxv1.RemoveCondemned{Index: f.node.Applied(), GraceMs: uint64(grace.Milliseconds())},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		return len(reply.GetDone())
	}
	if remove(time.Hour) != 0 || !f.valid(p) {
		t.Error("removed before the grace was over")
	}
	if remove(0) != 1 || f.valid(p) {
		t.Error("not removed")
	}
}

// What makes no sense is refused, and changes nothing.
func TestCollectionCommandsRefuse(t *testing.T) {
	t.Parallel()
	f := newFactLog(t, paths{})
	many := make([]string, maxMarked+1)
	for i := range many {
		many[i] = string(makePath(t, fmt.Sprint(i), 0).info.Path)
	}
	set, err := content.MakeRootSet([]flox.StorePath{makePath(t, "x", 1).info.Path})
	if err != nil {
		t.Fatal(err)
	}
	id := set.ID()
	for name, c := range map[string]*floxv1.PathsCommand{
		"condemn none":     {Command: &floxv1.PathsCommand_Condemn{Condemn: &floxv1.CondemnPaths{}}},
		"condemn too many": {Command: &floxv1.PathsCommand_Condemn{Condemn: &floxv1.CondemnPaths{Paths: many}}},
		"condemn no path":  {Command: &floxv1.PathsCommand_Condemn{Condemn: &floxv1.CondemnPaths{Paths: []string{"x"}}}},
		"remove none":      {Command: &floxv1.PathsCommand_Remove{Remove: &floxv1.RemovePaths{Condemned: &floxv1.RemoveCondemned{}}}},
		"keep none":        {Command: &floxv1.PathsCommand_Keep{Keep: &floxv1.KeepPaths{}}},
		"no machine":       {Command: &floxv1.PathsCommand_Roots{Roots: &floxv1.SetRootSet{Set: id[:], Hashes: set}}},
		"another set":      {Command: &floxv1.PathsCommand_Roots{Roots: &floxv1.SetRootSet{Peer: "a", Set: make([]byte, 32), Hashes: set}}},
		"short name":       {Command: &floxv1.PathsCommand_Roots{Roots: &floxv1.SetRootSet{Peer: "a", Set: []byte{1}, Hashes: set}}},
		"torn set":         {Command: &floxv1.PathsCommand_Roots{Roots: &floxv1.SetRootSet{Peer: "a", Set: id[:], Hashes: set[1:]}}},
	} {
		if _, err := f.do(c); !errors.Is(err, cluster.ErrRefused) || !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v, want refused", name, err)
		}
	}
	unknown := &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Roots{Roots: &floxv1.SetRootSet{Peer: "a", Set: id[:]}}}
	if _, err := f.do(unknown); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a set nobody has: %v", err)
	}
}
