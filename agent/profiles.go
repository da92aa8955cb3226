package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/warden"
)

const (
	// maxProfiles bounds the profiles that are kept: each is read again and again.
	maxProfiles = 256
	// maxProfilesOf bounds those of one user, maxProfilesOfUsers those of all: the
	// rest is root's.
	maxProfilesOf, maxProfilesOfUsers = 32, 192
	// profileEvery is how often it is looked where profiles lead.
	profileEvery = 15 * time.Second
	// profileRetryMax bounds the pause after what a profile leads to could not be held.
	profileRetryMax = 10 * time.Minute
	// profileMark begins the names of profiles' owners in the cache: no store path
	// has one.
	profileMark = "@"
)

// profile is a link that is kept. Its policy is that of what it leads to, which is
// held in the cache with all it refers to; nothing of that is evicted.
type profile struct {
	Policy string         `json:"policy"`
	Path   flox.StorePath `json:"path"` // where it led when it could last be read
	Held   bool           `json:"held"` // all of that is held, and nothing else
	// Staged says that some of it lies in the staging store: nothing of the cache
	// can be held for that before the storehouse has it.
	Staged bool `json:"staged,omitempty"`
	// User is who keeps it; 0 is root, and whoever the agent runs as.
	User int `json:"user,omitempty"`
}

// profileState is what is known of a profile as long as this process lives.
type profileState struct {
	unread string // why it is not known where it leads now
	lacks  error  // why not all of it is held
	again  bool   // what of it is held is known since this process began
	pause  time.Duration
	until  time.Time // not to be tried before
}

// profiles are those that are kept, by link.
type profiles struct {
	a     *Agent
	file  string
	read  func(ctx context.Context, link string) (string, error)
	every time.Duration // profileEvery; tests have no time
	asked chan struct{} // somebody looks at them
	turn  chan struct{} // has room for the one that follows or changes them

	mu     sync.Mutex
	links  map[string]profile
	states map[string]*profileState // of some of links
}

// openProfiles reads the list. A damaged one is an error, as with policies.
func openProfiles(a *Agent, file string) (*profiles, error) {
	s := &profiles{
		a: a, file: file, every: profileEvery, turn: make(chan struct{}, 1), asked: make(chan struct{}, 1),
		states: make(map[string]*profileState),
	}
	if w := a.cfg.Warden; w != nil {
		s.read = w.Profile
	} else {
		own := warden.NewProfiles(string(a.cfg.StoreDir))
		s.read = func(_ context.Context, link string) (string, error) { return own.Read(link) }
	}
	var err error
	s.links, err = loadKept(file, "kept profiles", func(p profile) error {
		_, err := flox.ParseStorePath(string(p.Path))
		return errors.Join(checkPolicy(p.Policy), err)
	})
	return s, err
}

// owner begins the names under which what a profile leads to is held, a path each:
// generations have most of theirs in common.
func profileOwner(link string) string {
	sum := sha256.Sum256([]byte(link))
	return profileMark + hex.EncodeToString(sum[:16]) + "/"
}

// list gives all of them.
func (s *profiles) list() map[string]profile {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.links)
}

// state is what is known of one, for its eyes who has the turn.
func (s *profiles) state(link string) *profileState {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.states[link]
	if st == nil {
		st = &profileState{}
		s.states[link] = st
	}
	return st
}

// why says why one is not followed, or not held.
func (s *profiles) why(link string) (unread string, lacks error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.states[link]; st != nil {
		return st.unread, st.lacks
	}
	return "", nil
}

// put changes the list, durably; a nil profile is taken away.
func (s *profiles) put(link string, p *profile) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := maps.Clone(s.links)
	delete(next, link)
	if p != nil {
		next[link] = *p
	}
	if _, known := s.links[link]; p != nil && !known {
		if err := room(s.links, p.User); err != nil {
			return err
		}
	}
	if err := storeKept(s.file, "kept profiles", next); err != nil {
		return err
	}
	if s.links = next; p == nil {
		delete(s.states, link)
	}
	return nil
}

func (p profile) chooser() int { return p.User }

// room refuses one more profile of a user if there are too many.
func room(links map[string]profile, user int) error {
	own, users := chosenBy(links, user)
	const instead = "unkeep one of those that floxctl keep --list shows"
	switch {
	case len(links) >= maxProfiles:
		return fmt.Errorf("%d profiles are kept, and no more may be; %s: %w", maxProfiles, instead, flox.ErrFull)
	case user != 0 && own >= maxProfilesOf:
		return fmt.Errorf("user %d keeps %d profiles, and no user but root may keep more; %s, or let root keep it (sudo): %w", user, own, instead, flox.ErrFull)
	case user != 0 && users >= maxProfilesOfUsers:
		return fmt.Errorf("users keep %d profiles, the others are root's; %s, or let root keep it (sudo): %w", users, instead, flox.ErrFull)
	}
	return nil
}

// enter waits for the turn to follow or change profiles.
func (s *profiles) enter(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *profiles) leave() { <-s.turn }

// run follows all of them until ctx ends.
func (s *profiles) run(ctx context.Context) error {
	tick := time.NewTicker(s.every)
	defer tick.Stop()
	if err := s.dropStrange(ctx); err != nil && ctx.Err() == nil {
		s.a.log.Warn("what profiles held that are kept no more stays in the cache", "error", err)
	}
	for said := ""; ; {
		err := s.followAll(ctx)
		if err != nil && ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			s.a.log.Warn("profiles are not followed", "error", err)
		}
		select {
		case <-tick.C:
		case <-s.asked:
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *profiles) followAll(ctx context.Context) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	list := s.list()
	var errs []error
	for _, link := range slices.Sorted(maps.Keys(list)) {
		errs = append(errs, s.follow(ctx, link, list[link]))
	}
	return errors.Join(errs...)
}

// follow looks where one leads now, and holds that. What cannot be read, or leads
// nowhere, keeps what it had: a home may be mounted again.
func (s *profiles) follow(ctx context.Context, link string, p profile) error {
	name, err := string(p.Path), error(nil)
	if !strings.HasPrefix(link, viewMark) { // else whoever adopts it says where it leads
		name, err = s.read(ctx, link)
	}
	st, unread := s.state(link), ""
	switch {
	case err == nil:
	case errors.Is(err, warden.ErrUnread):
		unread = "its file system does not answer, or refuses; what it was when it last did is kept"
	case errors.Is(err, flox.ErrNotFound):
		unread = "it leads into the store no more; what it was stays until floxctl unkeep " + link
	case errors.Is(err, flox.ErrBadInput):
		unread = "the agent's parent process is older than itself, and profiles are followed after it is restarted"
	default:
		return fmt.Errorf("profile %s: %w", link, err)
	}
	s.mu.Lock()
	st.unread = unread
	s.mu.Unlock()
	if target := flox.StorePath(name); err == nil && target != p.Path {
		p.Path, p.Held, p.Staged = target, false, false
		if err := s.put(link, &p); err != nil {
			return err
		}
		st.pause, st.until = 0, time.Time{}
		s.changed()
	}
	if p.Held && !p.Staged || time.Now().Before(st.until) {
		return nil
	}
	err = s.hold(ctx, link, p)
	st.pause = min(max(2*st.pause, s.every), profileRetryMax)
	st.until = time.Now().Add(st.pause)
	s.changed()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.lacks = err
	return nil
}

// changed says that other paths are kept.
func (s *profiles) changed() {
	s.a.executed.again()
	s.a.complete.resurvey()
	s.a.complete.poke()
	s.a.roots.changed()
}

// hold holds what one leads to with all it refers to, and lets go of the rest when
// that is known.
func (s *profiles) hold(ctx context.Context, link string, p profile) error {
	top, err := s.a.lookup(ctx, p.Path)
	if err != nil {
		return err
	}
	infos, err := s.a.closure(ctx, []*flox.PathInfo{top})
	if err != nil {
		return err
	}
	have, err := s.owners(ctx, profileOwner(link))
	if err != nil {
		return err
	}
	st := s.state(link)
	p.Held, p.Staged = true, false
	wanted := make(map[string]bool, len(infos))
	for _, info := range infos {
		owner := profileOwner(link) + string(info.Path)
		wanted[owner] = true
		if s.a.onlyStaged(info.Path) {
			p.Staged = true
			continue
		}
		if have[owner] && st.again {
			continue
		}
		if err := s.a.keepAs(ctx, owner, info); err != nil {
			return errors.Join(err, s.a.letGo(context.WithoutCancel(ctx), owner)) // half of it would pass for all
		}
	}
	st.again = true
	for owner := range have {
		if !wanted[owner] {
			err = errors.Join(err, s.a.letGo(ctx, owner))
		}
	}
	if err != nil {
		return err
	}
	return s.put(link, &p)
}

// owners are those in the cache whose names begin so.
func (s *profiles) owners(ctx context.Context, prefix string) (map[string]bool, error) {
	all, err := s.a.cache.Owners(ctx)
	if err != nil {
		return nil, err
	}
	out := make(map[string]bool)
	for _, o := range all {
		if strings.HasPrefix(o, prefix) {
			out[o] = true
		}
	}
	return out, nil
}

// dropStrange lets go of what profiles hold that are kept no more: a crash came
// between the two halves of an unkeep.
func (s *profiles) dropStrange(ctx context.Context) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	have, err := s.owners(ctx, profileMark)
	if err != nil {
		return err
	}
	known := make(map[string]bool)
	for link := range s.list() {
		known[profileOwner(link)] = true
	}
	for owner := range have {
		if at := strings.IndexByte(owner, '/'); !known[owner[:at+1]] {
			err = errors.Join(err, s.a.letGo(ctx, owner))
		}
	}
	return err
}

// letGo is the cache's Unkeep of an owner that may keep nothing.
func (a *Agent) letGo(ctx context.Context, owner string) error {
	if err := a.cache.Unkeep(ctx, owner); err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	return nil
}

// onlyStaged reports whether the content of a path lies in the staging store, and
// its facts are not the storehouse's.
func (a *Agent) onlyStaged(p flox.StorePath) bool {
	if info, ok := a.facts.get(p.HashPart()); ok && info.Path == p {
		return false
	}
	_, ok := a.stagedInfo(p)
	return ok
}
