package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/warden"
	"github.com/floxctl/flox/nix/worker"
)

// Bounds of the roots that Nix clients make.
const (
	maxIndirectRoots = 10_000
	maxTempRoots     = 100_000   // of one connection
	maxAllTempRoots  = 1_000_000 // of all
)

// nixRoots are the roots Nix clients make: symlinks of theirs, remembered over
// restarts, and what their connections keep.
type nixRoots struct {
	a    *Agent
	file string
	old  sync.Once // the warden is older than this
	// search and read ask the warden; tests replace them. See Conn.Roots, Conn.RootTarget.
	search func(ctx context.Context) ([]warden.Root, []string, error)
	read   func(ctx context.Context, link string) (target string, unread bool, err error)
	known  *knownTargets

	mu       sync.Mutex
	links    []string // sorted
	temps    int      // paths of all sessions
	sessions map[*sessionRoots]struct{}
	unread   []string      // of the last search: roots that do not answer
	shut     chan struct{} // closed when the collection under way has ended; nil = none is
}

// openNixRoots reads the list of symlinks; a missing or damaged one is empty.
func openNixRoots(a *Agent) *nixRoots {
	r := &nixRoots{a: a, file: filepath.Join(a.cfg.StateDir, "nix-roots.json"), sessions: make(map[*sessionRoots]struct{})}
	r.known = openKnownTargets(filepath.Join(a.cfg.StateDir, "nix-targets.json"), a.log)
	r.search = func(context.Context) ([]warden.Root, []string, error) { return nil, nil, nil }
	r.read = func(_ context.Context, link string) (string, bool, error) {
		target, err := os.Readlink(link)
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%s: %w", link, flox.ErrNotFound)
		}
		return target, false, err
	}
	if w := a.cfg.Warden; w != nil {
		r.search, r.read = w.Roots, w.RootTarget
	}
	b, err := os.ReadFile(r.file)
	if err == nil {
		err = json.Unmarshal(b, &r.links)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		a.log.Warn("the list of roots Nix clients made is lost: what they keep may be collected", "file", r.file, "error", err)
		r.links = nil
	}
	return r
}

// add remembers a symlink before its maker hears of it.
func (r *nixRoots) add(link string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	at, found := slices.BinarySearch(r.links, link)
	if found {
		return nil
	}
	if len(r.links) >= maxIndirectRoots {
		return fmt.Errorf("%d indirect roots are on this machine, remove some of their symlinks: %w", len(r.links), flox.ErrFull)
	}
	links := slices.Insert(slices.Clone(r.links), at, link)
	if err := r.save(links); err != nil {
		return err
	}
	r.links = links
	return nil
}

// save replaces the file, durably.
func (r *nixRoots) save(links []string) error {
	b, err := json.Marshal(links)
	if err != nil {
		return fmt.Errorf("indirect roots: %w", err)
	}
	if err := replaceFile(r.file, b, 0o600, true); err != nil {
		return fmt.Errorf("indirect roots: %w", err)
	}
	return nil
}

// machine gives profiles, links below gcroots, and what processes use, as the
// warden finds them. What processes only name counts if it is a path.
// unread are those in file systems that do not answer: they count as they were.
func (r *nixRoots) machine(ctx context.Context) (roots []worker.Root, unread []string, err error) {
	found, unread, err := r.search(ctx)
	if errors.Is(err, flox.ErrBadInput) {
		r.old.Do(func() {
			r.a.log.Warn("profiles and running processes are no roots until the agent is restarted: its parent process is older than itself")
		})
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("roots of this machine: %w", err)
	}
	for _, root := range r.known.machine(found, unread) {
		p, err := flox.ParseStorePath(root.Name)
		if err != nil {
			return nil, nil, fmt.Errorf("root %s: %w", root.Link, err)
		}
		if known, _ := r.a.validHere(p); known || !ofProcess(root.Link) {
			roots = append(roots, worker.Root{Link: root.Link, Target: p})
		}
	}
	return roots, unread, nil
}

func ofProcess(link string) bool { return strings.HasPrefix(link, "/proc/") }

// find gives what all symlinks, connections, profiles and processes keep now, and
// forgets symlinks that are gone. Those that do not answer keep what they kept.
func (r *nixRoots) find(ctx context.Context) ([]worker.Root, error) {
	r.mu.Lock()
	links := slices.Clone(r.links)
	var roots []worker.Root
	for s := range r.sessions {
		for p := range s.paths {
			roots = append(roots, worker.Root{Link: fmt.Sprintf("{temp:%d}", s.pid), Target: p})
		}
	}
	r.mu.Unlock()
	machine, unread, err := r.machine(ctx)
	if err != nil {
		return nil, err
	}
	roots = append(roots, machine...)
	var gone []string
	for _, link := range links {
		target, hangs, err := r.target(ctx, link)
		if hangs || errors.Is(err, warden.ErrUnread) {
			unread = append(unread, link)
		}
		target, err = r.known.link(link, target, err)
		switch {
		case errors.Is(err, warden.ErrUnread): // what it keeps is not known
		case err == nil:
			roots = append(roots, worker.Root{Link: link, Target: target})
		case errors.Is(err, flox.ErrNotFound):
			gone = append(gone, link)
		default:
			return nil, fmt.Errorf("indirect root %s: %w", link, err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unread = unread
	if err := r.known.save(links); err != nil {
		r.a.log.Warn("where roots point to is not saved", "error", err)
	}
	if len(gone) == 0 {
		return roots, nil
	}
	left := slices.DeleteFunc(slices.Clone(r.links), func(link string) bool {
		if _, found := slices.BinarySearch(gone, link); !found {
			return false
		}
		_, _, err := r.target(ctx, link) // again: it may have been made anew and added meanwhile
		return errors.Is(err, flox.ErrNotFound)
	})
	if err := r.save(left); err != nil {
		return nil, err
	}
	r.links = left
	return roots, nil
}

// notRead says which roots did not answer the last search; "" = all did.
func (r *nixRoots) notRead() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.unread) == 0 {
		return ""
	}
	const most, longest = 5, 512
	var said string
	for i, name := range r.unread[:min(len(r.unread), most)] {
		if i > 0 {
			said += ", "
		}
		said += name[:min(len(name), longest)]
	}
	if more := len(r.unread) - most; more > 0 {
		said += fmt.Sprintf(" and %d more", more)
	}
	why := "their file systems do not answer, or refuse; what they pointed to when they last did is kept"
	if slices.ContainsFunc(r.unread, ofProcess) {
		why += "; a process of /proc waits for bytes itself, and keeps what it had mapped"
	}
	return "roots not read: " + said + ": " + why
}

// target is the store path a symlink points to, or pointed to when its file system
// last answered, if that hangs. The warden reads it: it lies in
// the home of a user, where this process may not look.
func (r *nixRoots) target(ctx context.Context, link string) (p flox.StorePath, _ bool, _ error) {
	target, hangs, err := r.read(ctx, link)
	if err != nil {
		return "", false, err
	}
	if p, _, err = r.a.cfg.StoreDir.Split(target); err != nil {
		return "", false, fmt.Errorf("%s points to %s: %w", link, target, flox.ErrNotFound)
	}
	return p, hangs, nil
}

// session gives a connection its temporary roots.
func (r *nixRoots) session(pid int32) *sessionRoots {
	s := &sessionRoots{all: r, pid: pid, paths: make(map[flox.StorePath]struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sessions[s] = struct{}{}
	return s
}

// collect keeps other collections waiting, and connections from keeping more, until
// done is called: what is valid to them then stays so.
func (r *nixRoots) collect(ctx context.Context) (done func(), err error) {
	if err := r.open(ctx); err != nil { // locks
		return nil, err
	}
	defer r.mu.Unlock()
	shut := make(chan struct{})
	r.shut = shut
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.shut = nil
		close(shut)
	}, nil
}

// open locks r.mu while no collection is under way.
func (r *nixRoots) open(ctx context.Context) error {
	for {
		r.mu.Lock()
		shut := r.shut
		if shut == nil {
			return nil
		}
		r.mu.Unlock()
		select {
		case <-shut:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sessionRoots implements worker.Roots for one connection.
type sessionRoots struct {
	all   *nixRoots
	pid   int32
	own   bool                        // the client is this process's user
	paths map[flox.StorePath]struct{} // under all.mu
}

func (s *sessionRoots) release() {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	delete(s.all.sessions, s)
	s.all.temps -= len(s.paths)
}

// AddTemp implements worker.Roots. It waits while somebody collects.
func (s *sessionRoots) AddTemp(ctx context.Context, p flox.StorePath) error {
	if err := s.all.open(ctx); err != nil { // locks
		return err
	}
	defer s.all.mu.Unlock()
	if _, kept := s.paths[p]; kept {
		return nil
	}
	if len(s.paths) >= maxTempRoots || s.all.temps >= maxAllTempRoots {
		return fmt.Errorf("this connection keeps %d paths already, all of them %d: %w", len(s.paths), s.all.temps, flox.ErrFull)
	}
	s.paths[p] = struct{}{}
	s.all.temps++
	return nil
}

// AddIndirect implements worker.Roots. The storehouse hears of it with the next
// set of this machine.
func (s *sessionRoots) AddIndirect(_ context.Context, link string) error {
	if err := s.all.add(link); err != nil {
		return err
	}
	s.all.a.roots.changed()
	return nil
}

// Find implements worker.Roots.
func (s *sessionRoots) Find(ctx context.Context, censored bool) ([]worker.Root, error) {
	roots, err := s.all.find(ctx)
	for i := range roots {
		if censored && (roots[i].Link[0] == '{' || ofProcess(roots[i].Link)) {
			roots[i].Link = "{censored}"
		}
	}
	return roots, err
}
