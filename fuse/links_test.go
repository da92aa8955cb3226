package fuse

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

// memLinks is Links in memory. Its keys are OWNER/NAME as they are spelled.
type memLinks struct {
	mu    sync.Mutex
	at    map[string]string
	held  bool            // what is not known waits for the deadline
	asked map[string]bool // found by a look-up and not listed
}

func newMemLinks(at map[string]string) *memLinks {
	return &memLinks{at: maps.Clone(at), asked: map[string]bool{}}
}

// obey does what a test says; "" = it worked.
func (l *memLinks) obey(s *Server, c command) string {
	l.mu.Lock()
	switch c.Cmd {
	case "link", "remember":
		l.at[c.Arg] = c.Kind
	case "unlink":
		delete(l.at, c.Arg)
	case "holdlinks":
		l.held = true
	}
	l.mu.Unlock()
	if c.Cmd == "holdlinks" || c.Cmd == "remember" { // as one that is killed before it tells the kernel
		return ""
	}
	owner, name, _ := strings.Cut(c.Arg, "/")
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := s.Invalidate(ctx, owner, name); err != nil {
		return err.Error()
	}
	return ""
}

func (l *memLinks) Known(yield func(owner, name string) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key := range l.at {
		owner, name, _ := strings.Cut(key, "/")
		if !yield(owner, "") || !yield(owner, name) {
			return
		}
	}
}

func (l *memLinks) Listed(of string) (names []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key := range l.at {
		owner, name, _ := strings.Cut(key, "/")
		if of == "" {
			names = append(names, owner)
		} else if of == owner && !strings.Contains(name, "@") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (l *memLinks) find(ctx context.Context, match func(owner, name string) bool) (owner, name, target string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, to := range l.at {
		if owner, name, _ = strings.Cut(key, "/"); match(owner, name) {
			return owner, name, to, nil
		}
	}
	if l.held {
		l.mu.Unlock()
		<-ctx.Done()
		l.mu.Lock()
		return "", "", "", fmt.Errorf("nobody answers: %w", flox.ErrUnreachable)
	}
	return "", "", "", flox.ErrNotFound
}

func (l *memLinks) Owner(ctx context.Context, of string) (string, error) {
	owner, _, _, err := l.find(ctx, func(owner, _ string) bool { return strings.EqualFold(owner, of) })
	return owner, err
}

func (l *memLinks) Link(ctx context.Context, of, called string) (string, string, error) {
	_, name, to, err := l.find(ctx, func(owner, name string) bool { return owner == of && strings.EqualFold(name, called) })
	return name, to, err
}

func (l *memLinks) Target(owner, name string) (string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if to, ok := l.at[owner+"/"+name]; ok {
		return to, nil
	}
	return "", flox.ErrNotFound
}

const (
	oldTarget = "/nix/store/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-environment"
	newTarget = "/nix/store/bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb-environment"
)

func newLinksMount(t *testing.T) *mount {
	return newMount(t, serveOptions{
		LookupTimeout: 300 * time.Millisecond,
		Links:         map[string]string{"acme/ci": oldTarget, "acme/ci@1": oldTarget, "Bob/default": newTarget},
	})
}

func TestLinksLeadWhereTheySay(t *testing.T) {
	m := newLinksMount(t)
	got := m.touch(t,
		op{Do: "readlink", Path: "acme/ci"}, op{Do: "readlink", Path: "ACME/Ci@1"}, op{Do: "readlink", Path: "bob/DEFAULT"},
		op{Do: "stat", Path: "acme/ci"}, op{Do: "stat", Path: "acme"},
		op{Do: "stat", Path: "acme/none"}, op{Do: "stat", Path: "none"}, op{Do: "create", Path: "acme/new"}, op{Do: "statfs"},
	)
	for i, want := range []string{oldTarget, oldTarget, newTarget} {
		if got[i].Text != want || got[i].Errno != "" {
			t.Errorf("%s leads to %q, %s", got[i].Path, got[i].Text, got[i].Errno)
		}
	}
	if got[3].Mode != modeSymlink || got[3].Size != int64(len(oldTarget)) || got[4].Mode != modeDir {
		t.Errorf("attributes %+v, %+v", got[3], got[4])
	}
	for i, want := range map[int]string{5: "ENOENT", 6: "ENOENT", 7: "EROFS", 8: ""} {
		if got[i].Errno != want {
			t.Errorf("%s %s: %q, want %q", got[i].Do, got[i].Path, got[i].Errno, want)
		}
	}
}

func TestListingsOfLinksAreNeverStale(t *testing.T) {
	m := newLinksMount(t)
	for round := range 2 {
		var names []string
		for i := range 500 { // more than one answer holds
			name := fmt.Sprintf("p%d-%d", round, i)
			m.ask(t, command{Cmd: "remember", Arg: "acme/" + name, Kind: oldTarget})
			names = append(names, name)
		}
		got := m.touch(t, op{Do: "readdir"}, op{Do: "readdir", Path: "acme"})
		slices.Sort(got[0].Names)
		if diff := cmp.Diff([]string{"Bob", "acme"}, got[0].Names); diff != "" {
			t.Errorf("top: %s", diff)
		}
		if got[1].Errno != "" || got[1].Count != 1+500*(round+1) {
			t.Errorf("%d names, %s", got[1].Count, got[1].Errno)
		}
		for _, name := range names {
			if !slices.Contains(got[1].Names, name) {
				t.Fatalf("%s is not listed", name)
			}
		}
	}
}

func TestAChangedLinkIsSeenAtOnce(t *testing.T) {
	m := newLinksMount(t)
	read := op{Do: "readlink", Path: "acme/ci"}
	m.touch(t, read)
	before := m.total(t)
	m.touch(t, read)
	if n := m.total(t) - before; n > 0 {
		t.Errorf("a second look at a link asked %d times", n)
	}
	for i := range 20 {
		want := []string{newTarget, oldTarget}[i%2]
		m.ask(t, command{Cmd: "link", Arg: "acme/ci", Kind: want})
		if got := m.touch(t, read)[0]; got.Text != want {
			t.Fatalf("change %d: it leads to %q, %s", i, got.Text, got.Errno)
		}
	}
	m.ask(t, command{Cmd: "unlink", Arg: "acme/ci"})
	if got := m.touch(t, op{Do: "walk", Path: "acme/ci/bin"}, read); got[1].Errno != "ENOENT" {
		t.Errorf("a link that is gone: %+v", got[1])
	}
	m.ask(t, command{Cmd: "link", Arg: "acme/ci", Kind: newTarget})
	if got := m.touch(t, read)[0]; got.Text != newTarget {
		t.Errorf("a link that is there again: %+v", got)
	}
}

func TestTheNextServerOfLinksForgetsWhatTheLastOneSaid(t *testing.T) {
	m := newLinksMount(t)
	read := op{Do: "readlink", Path: "acme/ci"}
	m.touch(t, read)
	m.ask(t, command{Cmd: "remember", Arg: "acme/ci", Kind: newTarget}) // and it is killed
	m.srv.kill()
	m.opts.Links["acme/ci"] = newTarget
	delete(m.opts.Links, "Bob/default") // was looked up by nobody
	late := m.begin(t, op{Do: "readlink", Path: "acme/ci@1"})
	m.start(t)
	if got := late.wait(t, 10*time.Second)[0]; got.Text != oldTarget {
		t.Errorf("asked while nobody served: %+v", got)
	}
	// It begins with that, but not before it answers.
	for begun := time.Now(); ; {
		got := m.touch(t, read)[0]
		if got.Text == newTarget {
			break
		}
		if got.Errno != "" || time.Since(begun) > 20*time.Second {
			t.Fatalf("%+v", got)
		}
	}
}

func TestWhatIsNotKnownHoldsUpNothingElse(t *testing.T) {
	m := newLinksMount(t)
	m.touch(t, op{Do: "readlink", Path: "acme/ci"})
	m.ask(t, command{Cmd: "holdlinks"})
	waits := []*toucher{m.begin(t, op{Do: "stat", Path: "acme/unknown"}), m.begin(t, op{Do: "stat", Path: "nobody/x"})}
	m.awaitWait(t, "LOOKUP")
	m.ask(t, command{Cmd: "link", Arg: "acme/ci", Kind: newTarget})
	if got := m.touch(t, op{Do: "readlink", Path: "acme/ci"}, op{Do: "readdir", Path: "acme"}); got[0].Text != newTarget || got[1].Errno != "" {
		t.Errorf("%+v", got)
	}
	for _, w := range waits {
		if got := w.wait(t, 20*time.Second)[0]; got.Errno != "EIO" {
			t.Errorf("what nobody answers: %q", got.Errno)
		}
	}
}
