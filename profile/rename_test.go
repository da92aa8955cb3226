package profile

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

func rename(name, to string) *floxv1.ProfilesCommand {
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Rename{Rename: &floxv1.RenameProfile{Profile: name, To: to}}}
}

func remove(name string) *floxv1.ProfilesCommand {
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Delete{Delete: name}}
}

// A profile that is renamed is the same: its generations, their parents and its history
// are there by the new name, and the old one says which that is.
func TestRename(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	p := l.must("Alice", create("Alice/ci"))
	p = l.must("alice", change(p, pkgs(pkg("git", "1"))))
	p = l.must("alice", change(p, pkgs(pkg("git", "2"))))
	p = l.must("alice", rollback(p, 1))
	p = l.must("alice", change(p, pkgs(pkg("jq", "1"))))
	l.must("alice", create("alice/ci-2")) // whose records are next to it
	seen := p
	p = l.must("alice", rename("ALICE/ci", "Alice/Build"))
	if p.GetName() != "Alice/Build" || p.GetLive() != 3 || p.GetCreatedIndex() != seen.GetCreatedIndex() {
		t.Errorf("renamed: %v", p)
	}
	l.view(func(r *raft.Reader) error {
		for number, parent := range map[uint64]uint64{1: 0, 2: 1, 3: 1} {
			if g, err := ReadGeneration(r, "alice/build", number); err != nil || g.GetParent() != parent || len(g.GetPackages()) == 0 {
				t.Errorf("generation %d: %v, %v", number, g, err)
			}
			if _, err := ReadGeneration(r, "alice/ci", number); !errors.Is(err, flox.ErrNotFound) {
				t.Errorf("generation %d by the old name: %v", number, err)
			}
		}
		events, _, err := Events(r, "alice/build", 0, 10)
		if len(events) != 6 || events[0].GetKind() != "rename" || events[0].GetDetail() != "Alice/ci -> Alice/Build" || events[5].GetKind() != "create" {
			t.Errorf("history %v", events)
		}
		_, gone := Find(r, "alice/CI")
		if renamed := (*RenamedError)(nil); !errors.As(gone, &renamed) || renamed.Now != "Alice/Build" || !errors.Is(gone, flox.ErrNotFound) {
			t.Errorf("the old name: %v", gone)
		}
		names, ok, changes := Changes(r, r.Index()-1)
		if slices.Sort(names); !ok || !slices.Equal(names, []string{"alice/build", "alice/ci"}) {
			t.Errorf("watchers hear of %v", names)
		}
		return errors.Join(err, changes)
	})
	if _, err := l.apply("alice", change(seen, pkgs(pkg("fd", "1")))); err == nil || !strings.Contains(err.Error(), "it was renamed to Alice/Build") {
		t.Errorf("a change by the old name: %v", err)
	}
	if _, err := l.apply("mallory", change(seen, pkgs(pkg("fd", "1")))); !errors.Is(err, flox.ErrNotFound) || strings.Contains(err.Error(), "Build") {
		t.Errorf("who may not read it hears %v", err)
	}
	if p = l.must("alice", change(p, pkgs(pkg("fd", "1")))); p.GetLive() != 4 {
		t.Errorf("a change by the new one: %v", p)
	}
	if p = l.must("alice", rename("alice/build", "alice/BUILD")); p.GetName() != "alice/BUILD" || len(p.GetFormerly()) != 1 {
		t.Errorf("spelled otherwise: %v", p)
	}
}

// Who may rename, and to what.
func TestRenameIsRefused(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.must("alice", create("alice/x"))
	l.must("alice", create("alice/y"))
	l.must("alice", grant("alice/x", "bob", Writer))
	for _, c := range []struct {
		user, to, words string
		want            error
	}{
		{"bob", "alice/z", "needs the role owner there, and bob has writer", flox.ErrDenied},
		{"alice", "bob/x", "of another owner: want alice/NAME", flox.ErrBadInput},
		{"alice", "alice/Y", "profile alice/y is there already", flox.ErrBusy},
		{"alice", "z", "want OWNER/NAME", flox.ErrBadInput},
	} {
		if _, err := l.apply(c.user, rename("alice/x", c.to)); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s to %s: %v, want %q", c.user, c.to, err, c.words)
		}
	}
	l.must("alice", grant("alice/x", "bob", Owner))
	l.must("bob", rename("alice/x", "alice/z"))
}

// An old name leads to what its profile is called now, until another one has it, or that
// is deleted; of many old names the oldest are free again.
func TestOldNamesLead(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	leads := func(name, want string) {
		t.Helper()
		l.view(func(r *raft.Reader) error {
			_, err := Find(r, name)
			renamed, now := (*RenamedError)(nil), ""
			if errors.As(err, &renamed) {
				now = renamed.Now
			}
			if now != want {
				t.Errorf("%s leads to %q, want %q: %v", name, now, want, err)
			}
			return nil
		})
	}
	l.must("alice", create("alice/a"))
	l.must("alice", rename("alice/a", "alice/b"))
	l.must("alice", rename("alice/b", "alice/c"))
	leads("alice/a", "alice/c")
	leads("alice/b", "alice/c")
	l.must("alice", create("alice/a"))
	leads("alice/a", "")
	if p := l.must("alice", rename("alice/c", "alice/b")); !slices.Equal(p.GetFormerly(), []string{"alice/c"}) {
		t.Errorf("back to a name that it had: %v", p)
	}
	leads("alice/c", "alice/b")
	last := "alice/b"
	for i := range maxFormerly + 1 {
		next := fmt.Sprint("alice/n", i)
		l.must("alice", rename(last, next))
		last = next
	}
	leads("alice/c", "")
	leads("alice/b", "")
	leads("alice/n0", last)
	l.must("alice", remove(last))
	l.must("alice", remove("alice/a"))
	leads("alice/n0", "")
	l.view(func(r *raft.Reader) error {
		return r.Iterate(nil, nil, func(key, _ []byte) bool {
			if key[0] != changeKey && key[0] != countsKey {
				t.Errorf("%q is left of deleted profiles", key)
			}
			return true
		})
	})
}
