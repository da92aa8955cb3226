package agent

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/warden"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	shared "github.com/floxctl/flox/profile"
)

const (
	// maxBindings bounds the profiles of stock Nix that are bound, maxBindingsOf those of
	// one user, maxBindingsOfUsers those of all: the rest is root's.
	maxBindings, maxBindingsOf, maxBindingsOfUsers = 64, 8, 48
	// bindEvery is how often it is looked where they lead, bindPoll how often if the kernel
	// does not tell, or something is to be tried again.
	bindEvery, bindPoll = 15 * time.Second, 2 * time.Second
	// bindRetryMax bounds the pause after what was refused.
	bindRetryMax = time.Minute
	// bindTimeout bounds one change of a profile.
	bindTimeout = 2 * time.Minute
	// unseen is for how long somebody who changes one may not have seen where it was led.
	unseen = 10 * time.Minute
	// bindKind is what history says of such a change.
	bindKind = "nix-env"
)

// binding is a profile of stock Nix, by its name, that is one with one of the storehouse's.
// Generation was there when it last led to Path: what is different since then is the user's,
// or of the others.
type binding struct {
	Profile    string         `json:"profile"`
	User       int            `json:"user,omitempty"` // who bound it; 0 is root, and whoever the agent runs as
	Path       flox.StorePath `json:"path,omitempty"` // "" = it was not looked at yet
	Generation uint64         `json:"generation,omitempty"`
	Created    int64          `json:"created,omitempty"` // ProfileNews.created_unix_ms of the profile it is of
	Epoch      uint64         `json:"epoch,omitempty"`
	Index      uint64         `json:"index,omitempty"` // of the log, of the profile's newest change that is known here
	// Before is the generation it was at before it was led to that of Path, which was at Led,
	// Unix seconds.
	Before uint64 `json:"before,omitempty"`
	Led    int64  `json:"led,omitempty"`
	// Configured says that it is bound by the configuration, as long as that says so.
	Configured bool `json:"configured,omitempty"`
	// Next is where it is about to be led.
	Next *boundMove `json:"next,omitempty"`
}

type boundMove struct {
	From       flox.StorePath `json:"from"`
	To         flox.StorePath `json:"to"`
	Generation uint64         `json:"generation"`
	Again      bool           `json:"again,omitempty"`
}

func (b binding) chooser() int { return b.User }

// boundState is what is known of one as long as this process lives.
type boundState struct {
	is      warden.NixProfile
	problem string // why it is not as the profile is; "" = it is
	tried   string // what was refused
	pause   time.Duration
	until   time.Time // and is not to be tried again before
}

// nixLinks reads and moves profiles of stock Nix.
type nixLinks interface {
	NixProfile(ctx context.Context, dir string) (warden.NixProfile, error)
	MoveNixProfile(ctx context.Context, dir string, m warden.NixMove) (warden.NixProfile, error)
}

// ownLinks are nixLinks with the rights of this process.
type ownLinks struct{ *warden.Profiles }

func (l ownLinks) NixProfile(_ context.Context, dir string) (warden.NixProfile, error) {
	return l.Profiles.NixProfile(dir)
}

func (l ownLinks) MoveNixProfile(_ context.Context, dir string, m warden.NixMove) (warden.NixProfile, error) {
	return l.Profiles.MoveNixProfile(dir, m)
}

// lives is where a profile is now.
type lives struct {
	generation   uint64         // 0 = nothing was installed yet, or there is no such profile
	path         flox.StorePath // of its environment for this machine; "" = there is none
	created      int64
	epoch, index uint64
}

// binder binds profiles of stock Nix to those of the storehouse: where one goes, the other
// goes as well.
type binder struct {
	file       string
	configured map[string]string // directory -> profile
	links      nixLinks
	live       func(ctx context.Context, name string) (lives, error)
	change     func(ctx context.Context, c boundChange) (*floxv1.ChangeProfileResponse, error)
	system     string
	storeDir   flox.StoreDir
	elsewhere  func(flox.StorePath) bool // whether another Nix store of this machine has a path; nil = there is none
	log        *slog.Logger
	asked      chan struct{} // has one while there is something to be looked at
	turn       chan struct{} // has room for the one that looks
	watch      *dirWatch

	mu     sync.Mutex
	list   map[string]binding // by directory
	states map[string]*boundState
}

// openBinder reads what was bound. A damaged list is an error, as with policies.
func openBinder(a *Agent, file string) (*binder, error) {
	s := &binder{
		file: file, configured: a.cfg.Bind, system: a.cfg.System, storeDir: a.cfg.StoreDir, log: a.log,
		asked: make(chan struct{}, 1), turn: make(chan struct{}, 1), states: make(map[string]*boundState),
	}
	if s.system == "" {
		s.system = nixSystem()
	}
	s.live, s.change = a.boundLives, a.changeBound
	if a.local != nil {
		s.elsewhere = a.local.Has
	}
	s.watch = &dirWatch{tell: s.asked, dirs: make(map[string]int32)}
	if s.links = nixLinks(a.cfg.Warden); a.cfg.Warden == nil {
		s.links = ownLinks{warden.NewProfiles(string(a.cfg.StoreDir))}
	}
	var err error
	s.list, err = loadKept(file, "bound profiles", func(b binding) error { _, _, err := shared.Split(b.Profile); return err })
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(s.list, func(dir string, b binding) bool { return b.Configured && s.configured[dir] == "" })
	for dir, name := range s.configured {
		if err := CheckBinding(dir, name); err != nil {
			return nil, err
		}
		if b := s.list[dir]; shared.Folded(b.Profile) != shared.Folded(name) {
			s.list[dir] = binding{Profile: name, Configured: true}
		}
	}
	return s, nil
}

// CheckBinding refuses what cannot be bound.
func CheckBinding(dir, name string) error {
	if !filepath.IsAbs(dir) || filepath.Clean(dir) != dir || len(dir) >= maxProfileLink || strings.ContainsRune(dir, 0) || dir == "/" {
		return fmt.Errorf("bind %.200q: want the absolute name of a profile of Nix's, such as /nix/var/nix/profiles/default: %w", dir, flox.ErrBadInput)
	}
	_, _, err := shared.Split(name)
	return err
}

// enter waits for the turn to look at one.
func (s *binder) enter(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *binder) leave() { <-s.turn }

// all gives those that are bound, and what is known of them.
func (s *binder) all() (map[string]binding, map[string]boundState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	states := make(map[string]boundState, len(s.states))
	for dir, st := range s.states {
		states[dir] = *st
	}
	return maps.Clone(s.list), states
}

// put changes the list, durably; nil takes one away.
func (s *binder) put(dir string, b *binding) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := maps.Clone(s.list)
	delete(next, dir)
	if b == nil {
		delete(s.states, dir)
	} else {
		next[dir] = *b
	}
	if err := storeKept(s.file, "bound profiles", next); err != nil {
		return err
	}
	s.list = next
	return nil
}

// bind binds one to a profile for a user, 0 = root. Who binds a directory has to own it.
func (s *binder) bind(ctx context.Context, dir, name string, user int) error {
	if err := CheckBinding(dir, name); err != nil {
		return err
	}
	if as, fixed := s.configured[dir]; fixed {
		return fmt.Errorf("%s is bound to %s by the configuration (agent.bind): change it there: %w", dir, as, flox.ErrDenied)
	}
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	is, err := s.links.NixProfile(ctx, dir)
	if err != nil {
		return err
	}
	if user != 0 && int64(user) != int64(is.User) {
		return fmt.Errorf("profile %s is in a directory of %s: only they and root may bind it; try sudo: %w", dir, userName(int(is.User)), flox.ErrDenied)
	}
	if err := s.foreign(dir, is); err != nil {
		return err
	}
	list, _ := s.all()
	old, known := list[dir]
	same := known && shared.Folded(old.Profile) == shared.Folded(name)
	switch {
	case same && (old.User == user || old.User == 0):
		return nil
	case known && old.User == 0 && user != 0:
		return fmt.Errorf("%s was bound to %s by root: only root may bind it to another profile: %w", dir, old.Profile, flox.ErrDenied)
	}
	own, users := chosenBy(list, user)
	if !known && (len(list) >= maxBindings || user != 0 && (own >= maxBindingsOf || users >= maxBindingsOfUsers)) {
		return fmt.Errorf("%d profiles are bound, %d of them by %s, and no more may be; unbind one of those that floxctl profile bind shows: %w", len(list), own, userName(user), flox.ErrFull)
	}
	b := binding{Profile: name, User: user}
	if same {
		b = old
		b.User = user
	}
	if err := s.put(dir, &b); err != nil {
		return err
	}
	s.look(ctx, dir, b)
	poke(s.asked)
	return nil
}

// foreign refuses a profile of the Nix that this machine has beside the agent's store: what the
// storehouse makes of it that one has not, so that the profile would lead nowhere.
func (s *binder) foreign(dir string, is warden.NixProfile) error {
	if is.Path != "" && s.elsewhere != nil && s.elsewhere(flox.StorePath(is.Path)) {
		return fmt.Errorf("profile %s is of this machine's own Nix, which has not what the storehouse makes of it; bind one that is made with the agent's store (floxctl nix -- nix-env -p DIR --set PATH): %w", dir, flox.ErrBadInput)
	}
	return nil
}

// unbind lets go of one; what it leads to stays.
func (s *binder) unbind(ctx context.Context, dir string, user int) (binding, error) {
	if as, fixed := s.configured[dir]; fixed {
		return binding{}, fmt.Errorf("%s is bound to %s by the configuration (agent.bind): take it out there: %w", dir, as, flox.ErrDenied)
	}
	if err := s.enter(ctx); err != nil {
		return binding{}, err
	}
	defer s.leave()
	list, states := s.all()
	b, known := list[dir]
	if !known {
		return b, fmt.Errorf("profile %s is not bound: %w", dir, flox.ErrNotFound)
	}
	if user != 0 && user != b.User && int64(user) != int64(states[dir].is.User) {
		return b, fmt.Errorf("profile %s was bound by %s: only they and root may unbind it; try sudo: %w", dir, userName(b.User), flox.ErrDenied)
	}
	return b, s.put(dir, nil)
}

// run looks where all of them lead until ctx ends.
func (s *binder) run(ctx context.Context) error {
	s.watch.open()
	defer s.watch.close()
	for {
		wait, err := s.lookAll(ctx)
		if err != nil {
			return nil //nolint:nilerr // ctx ended
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-s.asked:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// lookAll looks at all of them, and says when to do so again.
func (s *binder) lookAll(ctx context.Context) (wait time.Duration, err error) {
	if err := s.enter(ctx); err != nil {
		return 0, err
	}
	defer s.leave()
	list, _ := s.all()
	for _, dir := range slices.Sorted(maps.Keys(list)) {
		s.look(ctx, dir, list[dir])
	}
	_, states := s.all()
	wait = bindEvery
	var readable []string
	for dir, st := range states {
		if st.is.Number > 0 {
			readable = append(readable, dir)
		}
		if st.problem != "" {
			wait = bindPoll
		}
	}
	if len(list) > 0 && !s.watch.only(readable) {
		wait = bindPoll
	}
	return wait, nil
}

// look has one be as the profile is, or the profile as it is, and notes why that is not so.
func (s *binder) look(ctx context.Context, dir string, b binding) {
	s.mu.Lock()
	st := s.states[dir]
	if st == nil {
		st = &boundState{}
		s.states[dir] = st
	}
	was := *st
	s.mu.Unlock()
	now := was
	err := s.settle(ctx, dir, b, &now)
	if ctx.Err() != nil {
		return
	}
	now.problem = ""
	if err != nil {
		now.problem = oneLine(err)
	}
	if now.problem != "" && now.problem != was.problem {
		s.log.Warn("a profile of Nix's is not as the one it is bound to", "dir", dir, "profile", b.Profile, "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.states[dir] != nil {
		*s.states[dir] = now
	}
}
