package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	shared "github.com/floxctl/flox/profile"
)

const (
	// maxViewed bounds the profiles that are shown, maxAsked those of them that this machine
	// asked for.
	maxViewed, maxAsked = 8192, 1024
	// maxOlder bounds the generations of a profile that are known beside the one that
	// lives and what it was made on.
	maxOlder = 16
	// findTimeout is how long a name that is not known here is asked for: somebody waits
	// in the kernel.
	findTimeout = 2 * time.Second
	// maxFinding bounds such questions at once.
	maxFinding = 16
	// missTime is how long a name is not asked for again that is not there, maxMisses how
	// many such names are remembered.
	missTime  = time.Second
	maxMisses = 1024
)

// view is the profiles of the storehouse as this machine shows them: what it was told,
// kept on its disk. It is a fuse.Links. Nothing that was told waits for the network.
type view struct {
	file   string // see view_file.go
	invite []byte // inviteSum
	system string // of Nix, this machine's
	dir    flox.StoreDir
	log    *slog.Logger
	find   func(ctx context.Context, q *floxv1.FindProfileRequest) (*floxv1.FindProfileResponse, error)
	// shown is told which links may lead elsewhere, after they do.
	shown func(ctx context.Context, owner, name string)

	now       atomic.Pointer[viewState]
	connected atomic.Bool
	changed   chan struct{} // has one while what is kept, held and written durably is to be looked at
	rolled    chan struct{} // has one while rollbacks are to be passed on
	moved     chan struct{} // has one while somebody else is to look at what is shown; nil = nobody
	again     chan struct{} // has one while the stream is to begin anew, with what was asked for
	finding   chan struct{} // has room for questions

	changing sync.Mutex // held by who replaces now
	mu       sync.Mutex
	used     map[string]time.Time // of those asked for, by folded name
	misses   map[string]time.Time // names that are not there, and until when that is believed
}

// viewState is one moment of it; it never changes.
type viewState struct {
	index, epoch uint64
	users        []string          // for whom all is told, folded
	labels       []string          // of this machine, as the storehouse told them
	profiles     map[string]viewed // by folded name
}

// viewed is a profile that is shown.
type viewed struct {
	*floxv1.ToldProfile
	owner, name string // as they are spelled
}

// nixSystem is this machine's system in Nix's words.
func nixSystem() string {
	arch := map[string]string{"amd64": "x86_64", "arm64": "aarch64", "386": "i686"}[runtime.GOARCH]
	if arch == "" {
		arch = runtime.GOARCH
	}
	return arch + "-" + runtime.GOOS
}

func newView(file, system string, dir flox.StoreDir, log *slog.Logger) *view {
	if system == "" {
		system = nixSystem()
	}
	v := &view{
		file: file, system: system, dir: dir, log: log, shown: func(context.Context, string, string) {},
		changed: make(chan struct{}, 1), rolled: make(chan struct{}, 1), again: make(chan struct{}, 1), finding: make(chan struct{}, maxFinding),
		used: make(map[string]time.Time), misses: make(map[string]time.Time),
	}
	v.now.Store(&viewState{profiles: map[string]viewed{}})
	return v
}

// asViewed checks what somebody tells or kept.
func asViewed(k *floxv1.ToldProfile) (viewed, error) {
	owner, name, err := shared.Split(k.GetNews().GetName())
	p := viewed{k, owner, name}
	for _, g := range p.generations() {
		for _, e := range g.GetEnvironments() {
			_, bad := flox.ParseStorePath(e.GetPath())
			err = errors.Join(err, bad)
		}
	}
	return p, err
}

// own reports whether everything of an owner is told.
func (s *viewState) own(owner string) bool { return slices.Contains(s.users, shared.Folded(owner)) }

// generations lists those of a profile that are known, the one that lives first.
func (p viewed) generations() []*floxv1.GenerationNews {
	live := p.live()
	all := append([]*floxv1.GenerationNews{p.GetNews().GetLive(), p.GetNews().GetBefore()}, p.GetOlder()...)
	all = slices.DeleteFunc(all, func(g *floxv1.GenerationNews) bool { return g == nil || g == live })
	if live == nil {
		return all
	}
	return append([]*floxv1.GenerationNews{live}, all...)
}

// generation gives one that is known; 0 is the one that lives.
func (p viewed) generation(number uint64) *floxv1.GenerationNews {
	if number == 0 {
		return p.live()
	}
	for _, g := range p.generations() {
		if g.GetNumber() == number {
			return g
		}
	}
	return nil
}

// environmentFor is a generation's for a system.
func environmentFor(g *floxv1.GenerationNews, system string) (flox.StorePath, bool) {
	for _, e := range g.GetEnvironments() {
		if e.GetSystem() == system {
			return flox.StorePath(e.GetPath()), true
		}
	}
	return "", false
}

// Known implements fuse.Links.
func (v *view) Known(yield func(owner, name string) bool) {
	for _, p := range v.now.Load().profiles {
		if !yield(p.owner, "") || !yield(p.owner, p.name) {
			return
		}
		for _, g := range p.generations() {
			if !yield(p.owner, p.fixedName(g.GetNumber())) {
				return
			}
		}
		for _, t := range p.GetNews().GetTags() {
			if !yield(p.owner, p.tagName(t.GetName())) {
				return
			}
		}
	}
}

// Listed implements fuse.Links.
func (v *view) Listed(owner string) (names []string) {
	for _, p := range v.now.Load().profiles {
		if _, here := environmentFor(p.live(), v.system); !here || !p.GetNews().GetListed() {
			continue
		}
		switch {
		case owner == "":
			names = append(names, p.owner)
		case strings.EqualFold(owner, p.owner):
			names = append(names, p.name)
		}
	}
	slices.Sort(names)
	return slices.CompactFunc(names, strings.EqualFold)
}

// Owner implements fuse.Links.
func (v *view) Owner(ctx context.Context, owner string) (string, error) {
	if _, _, err := shared.Split(owner + "/x"); err != nil {
		return "", fmt.Errorf("%q is no owner of profiles: %w", owner, flox.ErrNotFound)
	}
	s := v.now.Load()
	for key, p := range s.profiles {
		if strings.HasPrefix(key, shared.Folded(owner)+"/") {
			return p.owner, nil
		}
	}
	if s.own(owner) {
		return "", fmt.Errorf("%s has no profiles: %w", owner, flox.ErrNotFound)
	}
	resp, err := v.ask(ctx, owner, 0)
	if err == nil && !strings.EqualFold(resp.GetOwner(), owner) {
		err = fmt.Errorf("asked for %s, told of %q: %w", owner, resp.GetOwner(), flox.ErrCorrupt)
	}
	return resp.GetOwner(), err
}

// Link implements fuse.Links.
func (v *view) Link(ctx context.Context, owner, link string) (spelling, target string, err error) {
	to, ok := splitLink(link)
	if !ok {
		return "", "", fmt.Errorf("%q is no name of a profile: %w", link, flox.ErrNotFound)
	}
	p, number, err := v.resolve(ctx, owner, to)
	if err != nil {
		return "", "", err
	}
	path, ok := environmentFor(p.generation(number), v.system)
	if !ok {
		return "", "", fmt.Errorf("profile %s/%s has nothing for %s: %w", owner, link, v.system, flox.ErrNotFound)
	}
	switch {
	case to.tag != "":
		spelling = p.tagName(p.tag(to.tag).GetName())
	case number > 0:
		spelling = p.fixedName(number)
	default:
		spelling = p.name
	}
	return spelling, v.dir.Join(path), nil
}

// lookUp finds a profile, with one of its generations if number is not 0. What is not
// known is asked for.
func (v *view) lookUp(ctx context.Context, full string, number uint64) (viewed, error) {
	owner, _, err := shared.Split(full)
	if err != nil {
		return viewed{}, err
	}
	s := v.now.Load()
	p, known := s.profiles[shared.Folded(full)]
	if known && !p.GetNews().GetListed() {
		v.use(shared.Folded(full))
	}
	switch {
	case known && (number == 0 || p.generation(number) != nil):
		return p, nil
	case !known && s.own(owner):
		return viewed{}, fmt.Errorf("there is no profile %s: %w", full, flox.ErrNotFound)
	}
	resp, err := v.ask(ctx, full, number)
	if err != nil {
		return viewed{}, err
	}
	return v.learn(ctx, full, resp)
}

// Target implements fuse.Links.
func (v *view) Target(owner, link string) (string, error) {
	to, ok := splitLink(link)
	s := v.now.Load()
	p, known := s.profiles[shared.Folded(owner+"/"+to.profile)]
	number := to.number
	if known && to.tag != "" {
		number = p.tag(to.tag).GetGeneration()
		ok = number > 0
	}
	if !ok || !known && s.own(owner) {
		return "", fmt.Errorf("profile %s/%s: %w", owner, link, flox.ErrNotFound)
	}
	if !known || number > 0 && p.generation(number) == nil {
		return "", fmt.Errorf("profile %s/%s is not known here any more: %w", owner, link, flox.ErrUnreachable)
	}
	path, ok := environmentFor(p.generation(number), v.system)
	if !ok {
		return "", fmt.Errorf("profile %s/%s: %w", owner, link, flox.ErrNotFound)
	}
	return v.dir.Join(path), nil
}

// use notes that somebody looked at one that was asked for.
func (v *view) use(key string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.used[key] = time.Now()
}

// ask asks the storehouse for what is not known here. While it is not connected, there is
// no waiting for it.
func (v *view) ask(ctx context.Context, name string, number uint64) (*floxv1.FindProfileResponse, error) {
	key := fmt.Sprintf("%s@%d", shared.Folded(name), number)
	v.mu.Lock()
	until := v.misses[key]
	v.mu.Unlock()
	if time.Now().Before(until) {
		return nil, fmt.Errorf("there is no profile %s that this machine may see: %w", name, flox.ErrNotFound)
	}
	if !v.connected.Load() {
		return nil, fmt.Errorf("profile %s is not known here, and the storehouse is not connected: %w", key, flox.ErrUnreachable)
	}
	select {
	case v.finding <- struct{}{}:
		defer func() { <-v.finding }()
	default:
		return nil, fmt.Errorf("profile %s is not known here, and %d others are asked for: %w", key, maxFinding, flox.ErrBusy)
	}
	ctx, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	resp, err := v.find(ctx, &floxv1.FindProfileRequest{Name: name, Generation: number})
	if errors.Is(err, flox.ErrNotFound) {
		v.mu.Lock()
		defer v.mu.Unlock()
		if len(v.misses) >= maxMisses {
			clear(v.misses)
		}
		v.misses[key] = time.Now().Add(missTime)
	}
	return resp, err
}

// learn adds what was asked for.
func (v *view) learn(ctx context.Context, full string, resp *floxv1.FindProfileResponse) (viewed, error) {
	if !strings.EqualFold(resp.GetProfile().GetName(), full) {
		return viewed{}, fmt.Errorf("asked for the profile %s, told of %q: %w", full, resp.GetProfile().GetName(), flox.ErrCorrupt)
	}
	key := shared.Folded(full)
	_, known := v.now.Load().profiles[key]
	v.use(key)
	err := v.change(ctx, func(next *viewState) error {
		if err := next.put(resp.GetProfile()); err != nil {
			return err
		}
		p, here := next.profiles[key]
		if g := resp.GetGeneration(); here && g != nil && p.generation(g.GetNumber()) == nil {
			with := p.with(g)
			if _, err := asViewed(with.ToldProfile); err != nil {
				return fmt.Errorf("profile %s: %w: %w", full, err, flox.ErrCorrupt)
			}
			next.profiles[key] = with
		}
		v.dropUnused(next)
		return nil
	})
	if err != nil {
		return viewed{}, err
	}
	if !known {
		poke(v.again)
	}
	p, here := v.now.Load().profiles[key]
	if !here {
		return p, fmt.Errorf("profile %s: %d are shown already: %w", full, maxViewed, flox.ErrFull)
	}
	return p, nil
}

// with adds a generation to those that are known.
func (p viewed) with(g *floxv1.GenerationNews) viewed {
	older := []*floxv1.GenerationNews{g}
	for _, o := range p.GetOlder() {
		if o.GetNumber() != g.GetNumber() && len(older) < maxOlder {
			older = append(older, o)
		}
	}
	p.ToldProfile = &floxv1.ToldProfile{News: p.GetNews(), Older: older, Here: p.GetHere()}
	return p
}

// dropUnused forgets of those asked for the ones used least lately, if there are too many.
func (v *view) dropUnused(next *viewState) {
	var asked []string
	for key, p := range next.profiles {
		if !p.GetNews().GetListed() {
			asked = append(asked, key)
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	slices.SortFunc(asked, func(x, y string) int { return v.used[y].Compare(v.used[x]) })
	for len(asked) > maxAsked {
		last := asked[len(asked)-1]
		asked = asked[:len(asked)-1]
		delete(next.profiles, last)
	}
	maps.DeleteFunc(v.used, func(key string, _ time.Time) bool { _, still := next.profiles[key]; return !still })
}

// put takes the news of one profile in. What lived before stays known: a rollback to it
// needs nobody.
func (s *viewState) put(n *floxv1.ProfileNews) error {
	next, err := asViewed(&floxv1.ToldProfile{News: n})
	if err != nil {
		return fmt.Errorf("profile %.100q: %w: %w", n.GetName(), err, flox.ErrCorrupt)
	}
	key := shared.Folded(n.GetName())
	was, known := s.profiles[key]
	if !known && len(s.profiles) >= maxViewed {
		return nil // the others are asked for by name
	}
	if known && was.GetNews().GetCreatedUnixMs() == n.GetCreatedUnixMs() {
		if n.GetChangedIndex() < was.GetNews().GetChangedIndex() {
			return nil // an answer that was overtaken
		}
		next.ToldProfile.Older, next.ToldProfile.Here = was.GetOlder(), stillHere(was.GetHere(), n)
		for _, g := range []*floxv1.GenerationNews{was.GetNews().GetBefore(), was.GetNews().GetLive()} {
			if g != nil && g.GetNumber() != n.GetLive().GetNumber() {
				next = next.with(g)
			}
		}
		next.ToldProfile.Older = slices.DeleteFunc(slices.Clone(next.GetOlder()), func(g *floxv1.GenerationNews) bool {
			tagged := slices.ContainsFunc(n.GetTags(), func(t *floxv1.ProfileTag) bool { return t.GetGeneration() == g.GetNumber() })
			return g.GetNumber() < n.GetFirst() && !tagged // it was dropped
		})
	}
	s.profiles[key] = next
	return nil
}

// change replaces the state by what f makes of a copy of it. It is on the disk before it
// is shown, so that the process after this one never shows an older one.
func (v *view) change(ctx context.Context, f func(next *viewState) error) error {
	v.changing.Lock()
	defer v.changing.Unlock()
	was := v.now.Load()
	next := &viewState{index: was.index, epoch: was.epoch, users: was.users, labels: was.labels, profiles: maps.Clone(was.profiles)}
	if err := f(next); err != nil {
		return err
	}
	same := func(x, y viewed) bool { return proto.Equal(x.ToldProfile, y.ToldProfile) }
	if next.epoch == was.epoch && slices.Equal(next.users, was.users) && slices.Equal(next.labels, was.labels) && maps.EqualFunc(next.profiles, was.profiles, same) {
		v.now.Store(next) // the index alone
		return nil
	}
	if err := v.write(next, false); err != nil {
		v.log.Warn("where profiles are is not kept, and is told again after a restart", "file", v.file, "error", err)
	}
	v.now.Store(next)
	for _, l := range next.different(was) {
		v.shown(ctx, l[0], l[1])
	}
	poke(v.changed)
	poke(v.moved)
	return nil
}

// different lists the links (owner, name) that lead elsewhere than they did.
func (s *viewState) different(was *viewState) (links [][2]string) {
	for key, p := range was.profiles {
		n, still := s.profiles[key]
		if still && n.ToldProfile == p.ToldProfile {
			continue
		}
		if !still || !proto.Equal(n.live(), p.live()) {
			links = append(links, [2]string{p.owner, p.name})
		}
		for _, g := range p.generations() {
			if !still || !proto.Equal(n.generation(g.GetNumber()), g) {
				links = append(links, [2]string{p.owner, p.fixedName(g.GetNumber())})
			}
		}
		for _, t := range p.GetNews().GetTags() {
			number := t.GetGeneration()
			if !still || n.tag(t.GetName()).GetGeneration() != number || !proto.Equal(n.generation(number), p.generation(number)) {
				links = append(links, [2]string{p.owner, p.tagName(t.GetName())})
			}
		}
	}
	for key, p := range s.profiles {
		if _, had := was.profiles[key]; !had {
			links = append(links, [2]string{p.owner, p.name}) // the kernel may have it from before it was forgotten
		}
	}
	return links
}
