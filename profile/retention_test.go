package profile

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

func retain(name string, keep, days uint32) *floxv1.ProfilesCommand {
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Retention{Retention: &floxv1.SetRetention{Profile: name, Keep: keep, Days: days}}}
}

func tag(name, tag string, generation uint64) *floxv1.ProfilesCommand {
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Tag{Tag: &floxv1.TagGeneration{Profile: name, Name: tag, Generation: generation}}}
}

func prune(name string) *floxv1.ProfilesCommand {
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Prune{Prune: name}}
}

// kept gives the numbers of the generations of a profile that are kept.
func (l *log) kept(name string) (numbers []uint64) {
	l.t.Helper()
	l.view(func(r *raft.Reader) error {
		all, err := generationsOf(r, name)
		for _, g := range all {
			numbers = append(numbers, g.GetNumber())
		}
		return err
	})
	return numbers
}

// A retention drops what is neither new enough nor has a tag, nor lives, nor is what that
// was made on; the history says what went, and who asks for it hears that it was dropped.
func TestRetention(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	p := l.must("alice", create("alice/x"))
	for i := range 10 {
		p = l.must("alice", change(p, pkgs(pkg("git", fmt.Sprint(i)))))
		if i == 5 {
			p = l.must("alice", rollback(p, 4)) // what 7 is made on
		}
	}
	l.must("alice", rollback(p, 7))
	l.must("alice", tag("alice/x", "v1", 2))
	l.must("alice", prune("alice/x"))
	if got := l.kept("alice/x"); len(got) != 10 {
		t.Errorf("without a retention %v are kept", got)
	}
	l.must("alice", retain("alice/x", 2, 0))
	p = l.must("alice", prune("alice/x"))
	if got := l.kept("alice/x"); !slices.Equal(got, []uint64{2, 4, 7, 9, 10}) || p.GetFirst() != 9 || p.GetOlder() != 3 {
		t.Errorf("%v are kept: %v", got, p)
	}
	if again := l.must("alice", prune("alice/x")); !proto.Equal(again, p) {
		t.Errorf("nothing to drop: %v", again)
	}
	l.view(func(r *raft.Reader) error {
		events, _, err := Events(r, "alice/x", 0, 1)
		if events[0].GetKind() != "dropped" || events[0].GetDetail() != "generations 1, 3, 5-6, 8" {
			t.Errorf("history %v", events)
		}
		for number, words := range map[uint64]string{3: "generation 3 of profile alice/x was dropped (it keeps the newest 2 generations", 11: "has no generation 11, the last is 10"} {
			if _, err := ReadGeneration(r, "alice/x", number); !errors.Is(err, flox.ErrNotFound) || !strings.Contains(err.Error(), words) {
				t.Errorf("generation %d: %v, want %q", number, err, words)
			}
		}
		packages := 0
		return errors.Join(err, Packages(r, func(*floxv1.Package) bool { packages++; return true }), func() error {
			if packages != 5 {
				t.Errorf("%d packages are kept, want one for each generation", packages)
			}
			return nil
		}())
	})
	if _, err := l.apply("alice", rollback(p, 3)); !errors.Is(err, flox.ErrNotFound) || !strings.Contains(err.Error(), "was dropped") {
		t.Errorf("rolled back to one that was dropped: %v", err)
	}
	// What no longer lives and has no tag any more goes with the next.
	l.must("alice", rollback(p, 10))
	l.must("alice", tag("alice/x", "V1", 0))
	if p = l.must("alice", prune("alice/x")); !slices.Equal(l.kept("alice/x"), []uint64{9, 10}) || p.GetOlder() != 0 {
		t.Errorf("%v are kept: %v", l.kept("alice/x"), p)
	}
	if p = l.must("alice", change(p, pkgs(pkg("git", "new")))); p.GetLive() != 11 {
		t.Errorf("a change after that: %v", p)
	}
	l.must("alice", remove("alice/x"))
	l.view(func(r *raft.Reader) error {
		return Packages(r, func(p *floxv1.Package) bool {
			t.Errorf("%v is left of a deleted profile", p)
			return true
		})
	})
}

// Who says what is kept, and what cannot be said.
func TestRetentionIsRefused(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	p := l.must("alice", create("alice/x"))
	l.must("alice", change(p, pkgs(pkg("git", "1"))))
	l.must("alice", grant("alice/x", "bob", Writer))
	l.must("alice", grant("alice/x", "eve", Reader))
	for _, c := range []struct {
		user, words string
		command     *floxv1.ProfilesCommand
		want        error
	}{
		{"bob", "needs the role owner there, and bob has writer", retain("alice/x", 1, 0), flox.ErrDenied},
		{"bob", "needs the role owner", prune("alice/x"), flox.ErrDenied},
		{"eve", "needs the role writer there, and eve has reader", tag("alice/x", "a", 1), flox.ErrDenied},
		{"alice", "want at most 1000 and", retain("alice/x", 1001, 0), flox.ErrBadInput},
		{"alice", "want at most 1000 and 36500", retain("alice/x", 1, 40_000), flox.ErrBadInput},
		{"alice", "not digits alone", tag("alice/x", "41", 1), flox.ErrBadInput},
		{"alice", "want 1 to 63", tag("alice/x", "", 1), flox.ErrBadInput},
		{"alice", "has no generation 2", tag("alice/x", "a", 2), flox.ErrNotFound},
		{"alice", "has no tag a", tag("alice/x", "a", 0), flox.ErrNotFound},
	} {
		if _, err := l.apply(c.user, c.command); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s, %v: %v, want %q", c.user, c.command, err, c.words)
		}
	}
	p = l.must("bob", tag("alice/x", "b", 1))
	l.must("bob", tag("alice/x", "a", p.GetLive()))
	if p = l.must("bob", tag("alice/x", "B", 1)); len(p.GetTags()) != 2 || p.GetTags()[0].GetName() != "a" || p.GetTags()[1].GetName() != "B" {
		t.Errorf("tags %v", p.GetTags())
	}
	for i := len(p.GetTags()); i < maxTags; i++ {
		l.must("bob", tag("alice/x", fmt.Sprint("t", i), 1))
	}
	if _, err := l.apply("bob", tag("alice/x", "more", 1)); !errors.Is(err, flox.ErrFull) {
		t.Errorf("one tag too many: %v", err)
	}
}

// The bound of what is kept passes over tags, too.
func TestBoundKeepsTags(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{maxGenerations: 3})
	p := l.must("alice", create("alice/x"))
	for i := range 6 {
		p = l.must("alice", change(p, pkgs(pkg("git", fmt.Sprint(i)))))
		if i == 0 {
			l.must("alice", tag("alice/x", "v1", 1))
		}
	}
	if got := l.kept("alice/x"); !slices.Equal(got, []uint64{1, 4, 5, 6}) || p.GetOlder() != 1 {
		t.Errorf("%v are kept: %v", got, p)
	}
	l.must("alice", prune("alice/x"))
	if got := l.kept("alice/x"); !slices.Equal(got, []uint64{1, 4, 5, 6}) {
		t.Errorf("with the tag %v are kept", got)
	}
	l.must("alice", tag("alice/x", "v1", 0))
	p = l.must("alice", prune("alice/x"))
	if got := l.kept("alice/x"); !slices.Equal(got, []uint64{4, 5, 6}) || p.GetFirst() != 4 || p.GetOlder() != 0 {
		t.Errorf("without the tag %v are kept: %v", got, p)
	}
}

// memory is a state in memory.
type memory map[string][]byte

// Get is raft.Getter.
func (m memory) Get(key []byte) ([]byte, error) {
	b, ok := m[string(key)]
	if !ok {
		return nil, flox.ErrNotFound
	}
	return b, nil
}

// Iterate is raft.Getter.
func (m memory) Iterate(prefix, from []byte, yield func(key, value []byte) bool) error {
	var keys []string
	for key := range m {
		if strings.HasPrefix(key, string(prefix)) && key >= string(from) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		if !yield([]byte(key), m[key]) {
			break
		}
	}
	return nil
}

// Whatever a profile is like, what lives, what that was made on, what has a tag, the newest
// and the youngest stay, all else goes, and what goes is there.
func TestWhatIsDroppable(t *testing.T) {
	t.Parallel()
	start := time.UnixMilli(1_700_000_000_000)
	rapid.Check(t, func(t *rapid.T) {
		p := &floxv1.Profile{Name: "alice/x", Last: rapid.Uint64Range(1, 12).Draw(t, "last"), Keep: rapid.Uint32Range(0, 6).Draw(t, "keep"), Days: rapid.Uint32Range(0, 6).Draw(t, "days")}
		state, there, hours := memory{}, []uint64{}, int64(0)
		parents, made := map[uint64]uint64{}, map[uint64]time.Time{}
		first := rapid.Uint64Range(1, p.GetLast()).Draw(t, "first")
		for n := uint64(1); n <= p.GetLast(); n++ {
			hours += rapid.Int64Range(0, 48).Draw(t, "hours")
			if n < first && rapid.Bool().Draw(t, "gone") {
				continue
			}
			if n < first {
				p.Older++
			}
			g := &floxv1.Generation{Number: n, TimeUnixMs: start.Add(time.Duration(hours) * time.Hour).UnixMilli(), Parent: rapid.Uint64Range(0, n-1).Draw(t, "parent")}
			b, err := proto.Marshal(g)
			if err != nil {
				t.Fatal(err)
			}
			state[string(numberKey(generationKey, p.GetName(), n))] = b
			there = append(there, n)
			parents[n], made[n] = g.GetParent(), time.UnixMilli(g.GetTimeUnixMs())
		}
		p.First, p.Live = first, rapid.SampledFrom(there).Draw(t, "live")
		for i := range rapid.IntRange(0, 2).Draw(t, "tags") {
			p.Tags = append(p.Tags, &floxv1.ProfileTag{Name: fmt.Sprint("t", i), Generation: rapid.SampledFrom(there).Draw(t, "tag")})
		}
		now := start.Add(time.Duration(hours+rapid.Int64Range(0, 200).Draw(t, "later")) * time.Hour)
		drop, err := Droppable(state, p, now)
		if err != nil {
			t.Fatal(err)
		}
		var want []uint64
		for i, n := range there {
			switch {
			case p.GetKeep() == 0 && p.GetDays() == 0 && n >= first, uint32(len(there)-i) <= p.GetKeep(), n == p.GetLive(), n == parents[p.GetLive()], tagged(p, n):
			case p.GetDays() > 0 && now.Sub(made[n]) <= time.Duration(p.GetDays())*day:
			default:
				want = append(want, n)
			}
		}
		if !slices.Equal(drop, want) {
			t.Fatalf("%v would be dropped of %v, want %v: %v", drop, there, want, p)
		}
	})
}
