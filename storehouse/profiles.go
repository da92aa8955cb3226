package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/profile"
	"github.com/floxctl/flox/profile/environment"
	cluster "github.com/floxctl/flox/raft"
)

const (
	rootProfile = "profile"
	// environmentName is that of all environments: equal ones are one path, whoever has them.
	environmentName = "environment"
	// maxProfileChanges is how many changes of profiles are under way at once.
	maxProfileChanges = 64
	// maxEnvironments is how many environments are made at once: one takes a processor
	// and some 100 MB.
	maxEnvironments = 2
	// profileTries bounds how often a change is made anew because another server's came first.
	profileTries = 64
	// profileWait bounds one change of a profile.
	profileWait = 2 * time.Minute
	// maxConflicts is how many conflicts a refusal names.
	maxConflicts = 8
)

// profiles are what people change of profiles. Changes of one profile that reach this
// server come one after another; the log decides between servers.
type profiles struct {
	s      *Server
	slots  chan struct{} // of changes
	making chan struct{} // of environments
	news   bell          // rings when some changed

	mu    sync.Mutex
	lines map[string]*line // by folded name; of changes under way only
}

// line is where changes of one profile wait for each other.
type line struct {
	turn  chan struct{}
	users int
}

func newProfiles(s *Server) *profiles {
	return &profiles{s: s, slots: make(chan struct{}, maxProfileChanges), making: make(chan struct{}, maxEnvironments), lines: map[string]*line{}}
}

// enter waits for the turn of a change of a profile.
func (p *profiles) enter(ctx context.Context, name string) (leave func(), err error) {
	select {
	case p.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("profile %s: %d changes of profiles are under way: %w", name, maxProfileChanges, flox.ErrBusy)
	}
	folded := profile.Folded(name)
	p.mu.Lock()
	l := p.lines[folded]
	if l == nil {
		l = &line{turn: make(chan struct{}, 1)}
		p.lines[folded] = l
	}
	l.users++
	p.mu.Unlock()
	gone := func() {
		p.mu.Lock()
		if l.users--; l.users == 0 {
			delete(p.lines, folded)
		}
		p.mu.Unlock()
		<-p.slots
	}
	select {
	case l.turn <- struct{}{}:
		return func() { <-l.turn; gone() }, nil
	case <-ctx.Done():
		gone()
		return nil, fmt.Errorf("profile %s: other changes of it are under way: %w", name, flox.ErrBusy)
	}
}

// person is on whose behalf something is asked of profiles.
type person struct {
	*floxv1.Actor
	admin bool
	sight sight // of the machine, of who only reads
}

// sees reports whether a profile may be read: by the person, or by whoever uses a machine
// to which it is assigned.
func (w person) sees(p *floxv1.Profile) bool {
	return w.admin || profile.Role(p, w.GetUser()) != "" || w.sight.assigned(p)
}

// may refuses somebody who has not at least a role in a profile.
func (w person) may(p *floxv1.Profile, role string) error {
	if w.admin {
		return nil
	}
	return profile.May(p, w.GetUser(), role)
}

// view calls f with the profiles as of now.
func (p *profiles) view(ctx context.Context, c cluster.Consistency, f func(r *cluster.Reader) error) error {
	return p.s.viewing(ctx, profile.Kind, c, f)
}

// propose puts a command about profiles into the log.
func (p *profiles) propose(ctx context.Context, who person, c *floxv1.ProfilesCommand) (*floxv1.ProfilesReply, error) {
	c.Actor, c.Admin = who.Actor, who.admin
	reply := &floxv1.ProfilesReply{}
	return reply, p.s.proposed(ctx, profile.Level(c), profile.Kind, c, reply)
}

// change makes a new generation of a profile, all of it for all its systems or nothing.
// What somebody else changed meanwhile stays: changes of different packages merge, others
// are refused.
func (p *profiles) change(ctx context.Context, who person, q *floxv1.ChangeProfileRequest) (*floxv1.ChangeProfileResponse, error) {
	ctx, cancel := context.WithTimeout(Essential(ctx), profileWait)
	defer cancel()
	if err := p.s.takesFacts(ctx); err != nil {
		return nil, fmt.Errorf("profile %s: %w", q.GetName(), err)
	}
	leave, err := p.enter(ctx, q.GetName())
	if err != nil {
		return nil, err
	}
	defer leave()
	for range profileTries {
		out, moved, err := p.changeOnce(ctx, who, q)
		if err != nil || !moved {
			return out, err
		}
	}
	return nil, fmt.Errorf("profile %s: others change it all the time: %w", q.GetName(), flox.ErrBusy)
}

// planned is a change on what lives now.
type planned struct {
	*floxv1.ChangeProfileResponse
	set   []*floxv1.Package
	drop  []string
	after []*floxv1.Package // of the generation that it makes
}

// plan finds out what a change does to what lives now.
func (p *profiles) plan(ctx context.Context, who person, q *floxv1.ChangeProfileRequest) (out planned, err error) {
	out = planned{ChangeProfileResponse: &floxv1.ChangeProfileResponse{}, drop: q.GetDrop()}
	err = p.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		if out.Profile, err = profile.FindFor(r, q.GetName(), who.sees); err != nil {
			return err
		}
		if err := who.may(out.Profile, profile.Writer); err != nil {
			return err
		}
		if out.Before, err = live(r, out.Profile); err != nil {
			return err
		}
		if parent := q.GetParent(); parent != 0 && parent != out.Profile.GetLive() {
			base, err := profile.ReadGeneration(r, q.GetName(), parent)
			if err != nil {
				return fmt.Errorf("what you changed is not known any more, look again: %w", err)
			}
			if err := conflict(out.Profile, profile.Conflicts(base.GetPackages(), out.Before.GetPackages(), q.GetSet(), out.drop)); err != nil {
				return err
			}
			// What both dropped is gone already.
			out.drop = slices.DeleteFunc(slices.Clone(out.drop), func(name string) bool {
				return has(base.GetPackages(), name) && !has(out.Before.GetPackages(), name)
			})
			out.Merged = true
		}
		out.set = keepHolds(q, out.Before)
		if q.GetAutomatic() {
			if err := profile.MayByItself(out.Profile, out.Before.GetPackages(), out.set, out.drop); err != nil {
				return err
			}
		}
		out.after, err = profile.Apply(out.Profile, out.Before.GetPackages(), out.set, out.drop)
		return err
	})
	return out, err
}

// changeOnce makes a change on what lives now. moved says that somebody else was quicker.
func (p *profiles) changeOnce(ctx context.Context, who person, q *floxv1.ChangeProfileRequest) (_ *floxv1.ChangeProfileResponse, moved bool, err error) {
	plan, err := p.plan(ctx, who, q)
	if err != nil {
		return nil, false, err
	}
	out, after := plan.ChangeProfileResponse, plan.after
	out.Generation = out.Before
	if len(profile.Differences(out.Before.GetPackages(), after)) == 0 && out.Profile.GetLive() > 0 {
		return out, false, nil // it is so already
	}
	out.Generation = &floxv1.Generation{Parent: out.Profile.GetLive(), Kind: q.GetKind(), Reason: q.GetReason(), Packages: after}
	release, missing, err := p.hold(ctx, after)
	if err != nil {
		return nil, false, err
	}
	defer release()
	if q.GetDryRun() {
		for _, m := range missing {
			out.Missing = append(out.Missing, m.path)
		}
		return out, false, nil
	}
	if len(missing) > 0 {
		return nil, false, fmt.Errorf("profile %s: %w", out.Profile.GetName(), missing[0])
	}
	kept, err := p.environments(ctx, out.Profile, out.Generation)
	if err != nil {
		return nil, false, err
	}
	defer kept()
	reply, err := p.propose(ctx, who, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Change{Change: &floxv1.NewGeneration{
		Profile: out.Profile.GetName(), Live: out.Profile.GetLive(), Created: out.Profile.GetCreatedIndex(), Set: plan.set, Drop: plan.drop,
		Environments: out.Generation.GetEnvironments(), Kind: q.GetKind(), Reason: q.GetReason(),
		Automatic: q.GetAutomatic(),
	}}})
	if err != nil || reply.GetMoved() {
		return nil, err == nil, err
	}
	out.Profile, out.Generation.Number = reply.GetProfile(), reply.GetProfile().GetLive()
	return out, false, nil
}

// environments makes those of a generation, which stay until release is called.
func (p *profiles) environments(ctx context.Context, of *floxv1.Profile, g *floxv1.Generation) (release func(), err error) {
	var all []func()
	release = func() {
		for _, f := range all {
			f()
		}
	}
	for _, system := range of.GetSystems() {
		path, err := p.environment(ctx, system, g.GetPackages())
		if err == nil {
			var keep func()
			if keep, err = p.s.Hold(ctx, path); err == nil {
				all = append(all, keep)
			}
		}
		if err != nil {
			release()
			return nil, fmt.Errorf("profile %s for %s: %w", of.GetName(), system, err)
		}
		g.Environments = append(g.Environments, &floxv1.Environment{System: system, Path: string(path)})
	}
	return release, nil
}

func has(packages []*floxv1.Package, name string) bool {
	return slices.ContainsFunc(packages, func(p *floxv1.Package) bool { return p.GetName() == name })
}

// live gives the generation of a profile that lives; nil if there is none yet.
func live(r *cluster.Reader, p *floxv1.Profile) (*floxv1.Generation, error) {
	if p.GetLive() == 0 {
		return nil, nil //nolint:nilnil // its getters give what an empty one has
	}
	return profile.ReadGeneration(r, p.GetName(), p.GetLive())
}

// conflict says what two people want to be different.
func conflict(p *floxv1.Profile, all []profile.Conflict) error {
	if len(all) == 0 {
		return nil
	}
	is := func(pkg *floxv1.Package) string {
		if pkg == nil {
			return "not there"
		}
		return strings.TrimSpace(pkg.GetName() + " " + pkg.GetVersion())
	}
	var words []string
	for _, c := range all[:min(len(all), maxConflicts)] {
		words = append(words, fmt.Sprintf("%s: theirs is %s, yours %s", c.Name, is(c.Theirs), is(c.Ours)))
	}
	return fmt.Errorf("profile %s: somebody changed the same meanwhile, in generation %d: %s. Nothing was changed; look at theirs with floxctl show, and decide anew: %w",
		p.GetName(), p.GetLive(), strings.Join(words, "; "), flox.ErrBusy)
}

// missingPath is one that the storehouse does not have.
type missingPath struct {
	pkg, system, path string
}

// Error says what to do.
func (m missingPath) Error() string {
	return fmt.Sprintf("package %s for %s: %s is not in the storehouse (nothing was changed for any system): build it through an agent, copy it there (nix copy), or leave it out: %v",
		m.pkg, m.system, m.path, flox.ErrNotFound)
}

// Unwrap is what errors.Is asks for.
func (m missingPath) Unwrap() error { return flox.ErrNotFound }

// hold keeps what packages consist of from being collected, and says what of it is not valid.
func (p *profiles) hold(ctx context.Context, packages []*floxv1.Package) (release func(), missing []missingPath, err error) {
	var all []missingPath
	var paths []flox.StorePath
	for _, pkg := range packages {
		for _, s := range pkg.GetPaths() {
			for _, path := range s.GetPaths() {
				all = append(all, missingPath{pkg.GetName(), s.GetSystem(), path})
				paths = append(paths, flox.StorePath(path))
			}
		}
	}
	if release, err = p.s.Hold(ctx, paths...); err != nil {
		return nil, nil, err
	}
	for _, m := range all {
		info, err := p.s.Info(ctx, flox.StorePath(m.path).HashPart())
		switch {
		case errors.Is(err, flox.ErrNotFound) || err == nil && string(info.Path) != m.path:
			missing = append(missing, m)
		case err != nil:
			release()
			return nil, nil, err
		}
	}
	return release, missing, nil
}

// keepHolds gives what is set, held where what it replaces was: a person may install
// something else in place of it, upgrades still may not.
func keepHolds(q *floxv1.ChangeProfileRequest, live *floxv1.Generation) []*floxv1.Package {
	if q.GetKind() != "install" {
		return q.GetSet()
	}
	set := slices.Clone(q.GetSet())
	for i, p := range set {
		if slices.ContainsFunc(live.GetPackages(), func(was *floxv1.Package) bool { return was.GetName() == p.GetName() && was.GetHeld() }) {
			held := proto.CloneOf(p)
			held.Held = true
			set[i] = held
		}
	}
	return set
}

// environment makes the environment of packages for a system valid. Equal ones are made
// once, and are the same path.
func (p *profiles) environment(ctx context.Context, system string, packages []*floxv1.Package) (flox.StorePath, error) {
	var of []environment.Package
	for _, pkg := range packages {
		for _, s := range pkg.GetPaths() {
			if s.GetSystem() != system {
				continue
			}
			e := environment.Package{Name: pkg.GetName(), Priority: int(pkg.GetPriority()), Active: true}
			for _, path := range s.GetPaths() {
				e.Paths = append(e.Paths, flox.StorePath(path))
			}
			of = append(of, e)
		}
	}
	select {
	case p.making <- struct{}{}:
		defer func() { <-p.making }()
	case <-ctx.Done():
		return "", fmt.Errorf("other environments are being made: %w", flox.ErrBusy)
	}
	made, err := environment.Build(ctx, p.s.cfg.StoreDir, packageTrees{p.s}, of)
	if err != nil {
		return "", err
	}
	info, err := made.Info(environmentName)
	if err != nil {
		return "", err
	}
	var valid *flox.PathInfo
	err = piped(made.WriteNAR, func(nar io.Reader) (err error) {
		valid, _, err = p.s.Publish(ctx, &info, nar, "profiles")
		return err
	})
	if err != nil {
		return "", err
	}
	return valid.Path, nil
}

// packageTrees are the file trees of valid paths.
type packageTrees struct{ s *Server }

// Open implements environment.Trees.
func (t packageTrees) Open(ctx context.Context, path flox.StorePath) (flox.Tree, error) {
	info, err := t.s.Info(ctx, path.HashPart())
	if err == nil && info.Path != path {
		err = fmt.Errorf("%s is not valid: %w", path, flox.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	blocks := anyServers(t)
	m, err := content.OpenManifest(ctx, info.Manifest, blocks)
	if err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", path, err)
	}
	return packageTree{m, blocks}, nil
}

// packageTree is the tree of a manifest.
type packageTree struct {
	*content.Manifest
	blocks flox.Blocks
}

// ReadAt implements flox.Tree.
func (t packageTree) ReadAt(ctx context.Context, index uint32, into []byte, off int64, _ flox.Reader) (int, error) {
	text, inline, err := t.Inline(ctx, index)
	if err != nil {
		return 0, err
	}
	if inline {
		return copy(into, text[min(off, int64(len(text))):]), nil
	}
	n := 0
	var failed error
	err = t.Chunks(ctx, index, off, int64(len(into)), func(at int64, c flox.Chunk) bool {
		var b []byte
		if b, failed = t.blocks.Get(ctx, c.ID); failed != nil {
			return false
		}
		n += copy(into[n:], b[max(0, off+int64(n)-at):])
		return n < len(into)
	})
	return n, errors.Join(err, failed)
}

// roots implements rootSource: what some kept generation has stays, by its environments,
// which refer to all packages.
func (p *profiles) roots(ctx context.Context, _ *cluster.Reader, yield func(root) bool) error {
	return p.view(ctx, cluster.Local, func(r *cluster.Reader) error {
		return profile.Generations(r, func(name string, of *floxv1.Generation) bool {
			for _, e := range of.GetEnvironments() {
				if !yield(root{kind: rootProfile, name: fmt.Sprintf("%s@%d", name, of.GetNumber()), hashPart: flox.StorePath(e.GetPath()).HashPart()}) {
					return false
				}
			}
			return true
		})
	})
}
