package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/warden"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	shared "github.com/floxctl/flox/profile"
)

// boundChange is what somebody did to a profile of stock Nix.
type boundChange struct {
	dir, profile string
	user         uint32         // who did
	base         uint64         // the generation it was done to
	before       uint64         // the one it was at before, if that was a moment ago; 0 = it was not
	path         flox.StorePath // what it leads to now
	system       string
	// first says that it was never like the profile: what it has beside the one that lives is
	// added.
	first bool
}

// settle has one be as the profile is, or the profile as it is. What it leads to that is
// neither as it was left nor as the profile is, somebody led it to.
func (s *binder) settle(ctx context.Context, dir string, b binding, st *boundState) (err error) {
	if st.is, err = s.links.NixProfile(ctx, dir); err != nil {
		return err
	}
	if b.User != 0 && int64(b.User) != int64(st.is.User) {
		return fmt.Errorf("profile %s is in a directory of %s, and was bound by %s; bind it again: %w", dir, userName(int(st.is.User)), userName(b.User), flox.ErrDenied)
	}
	if st.is.Number == 0 {
		return fmt.Errorf("there is no profile %s yet; it is made by: nix-env -p %s --set PATH: %w", dir, dir, flox.ErrNotFound)
	}
	if err := s.foreign(dir, st.is); err != nil {
		return err
	}
	if b, err = s.finish(ctx, dir, b, st); err != nil {
		return err
	}
	at, err := s.live(ctx, b.Profile)
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if err == nil && b.Created != at.created { // another profile has that name
		b.Generation, b.Created, b.Index = 0, at.created, 0
	}
	is := flox.StorePath(st.is.Path)
	behind := at.epoch == b.Epoch && at.index < b.Index // what was done from here is not told yet
	switch {
	case is == at.path && at.path != "" && !behind:
		st.tried = ""
		return s.note(dir, b, at.generation, is, at)
	case is == b.Path && err != nil:
		return err // there is no such profile
	case is == b.Path && (behind || at.path == ""):
		return nil
	case is == b.Path:
		return s.lead(ctx, dir, b, st, &boundMove{From: is, To: at.path, Generation: at.generation}, at)
	}
	return s.tell(ctx, dir, b, st, at)
}

// note writes down that one is as a generation of the profile.
func (s *binder) note(dir string, b binding, generation uint64, path flox.StorePath, at lives) error {
	next := b
	next.Generation, next.Path, next.Next, next.Created, next.Epoch, next.Index = generation, path, nil, at.created, at.epoch, at.index
	if list, _ := s.all(); list[dir] == next {
		return nil
	}
	return s.put(dir, &next)
}

// finish ends what an earlier process began: where it leads still, or leads now. Where
// somebody led it meanwhile is theirs.
func (s *binder) finish(ctx context.Context, dir string, b binding, st *boundState) (binding, error) {
	n := b.Next
	if n == nil {
		return b, nil
	}
	b.Next = nil
	switch flox.StorePath(st.is.Path) {
	case n.From:
		var err error
		if st.is, err = s.links.MoveNixProfile(ctx, dir, warden.NixMove{Was: st.is, To: string(n.To), Again: n.Again}); err != nil {
			return b, err
		}
		fallthrough
	case n.To:
		if b.Generation != n.Generation && !n.Again {
			b.Before, b.Led = b.Generation, time.Now().Unix()
		}
		b.Path, b.Generation = n.To, n.Generation
	}
	return b, s.put(dir, &b)
}

// lead leads one to a generation of the profile. That is written down before it is done, so
// that it is never taken for somebody else's doing.
func (s *binder) lead(ctx context.Context, dir string, b binding, st *boundState, to *boundMove, at lives) error {
	b.Next, b.Created, b.Epoch, b.Index = to, at.created, at.epoch, at.index
	if err := s.put(dir, &b); err != nil {
		return err
	}
	_, err := s.finish(ctx, dir, b, st)
	return err
}

// tell makes a change of the profile of what somebody did. What is refused is tried again,
// now and then, and stays as it is.
func (s *binder) tell(ctx context.Context, dir string, b binding, st *boundState, at lives) error {
	what := fmt.Sprint(st.is.Path, at.index, at.epoch)
	if what == st.tried && time.Now().Before(st.until) {
		return errors.New(st.problem)
	}
	c := boundChange{
		dir: dir, profile: b.Profile, user: st.is.User, base: b.Generation, path: flox.StorePath(st.is.Path), system: s.system,
		first: b.Path == "" || b.Generation == 0 && at.generation > 0,
	}
	if time.Since(time.Unix(b.Led, 0)) < unseen {
		c.before = b.Before
	}
	ctx, cancel := context.WithTimeout(ctx, bindTimeout)
	defer cancel()
	resp, err := s.change(ctx, c)
	if err != nil {
		if what != st.tried {
			st.pause = bindPoll / 2
		}
		st.tried, st.pause = what, min(2*st.pause, bindRetryMax)
		if errors.Is(err, flox.ErrUnreachable) {
			st.pause = bindPoll
		}
		st.until = time.Now().Add(st.pause)
		return fmt.Errorf("what %s has is not in %s yet, and is tried again: %w", dir, b.Profile, err)
	}
	st.tried, st.pause = "", 0
	g := resp.GetGeneration()
	path, ok := environmentFor(&floxv1.GenerationNews{Environments: g.GetEnvironments()}, s.system)
	if !ok {
		return fmt.Errorf("profile %s has nothing for %s: %w", b.Profile, s.system, flox.ErrNotFound)
	}
	at.created, at.index = resp.GetProfile().GetCreatedUnixMs(), max(at.index, resp.GetProfile().GetChangedIndex())
	if path == c.path {
		return s.note(dir, b, g.GetNumber(), path, at)
	}
	return s.lead(ctx, dir, b, st, &boundMove{From: c.path, To: path, Generation: g.GetNumber(), Again: !c.first}, at)
}

// boundLives is where the storehouse's profile is, as far as this machine was told.
func (a *Agent) boundLives(ctx context.Context, name string) (lives, error) {
	at := lives{epoch: a.view.now.Load().epoch}
	p, err := a.view.lookUp(ctx, name, 0)
	if err != nil {
		return at, err
	}
	n := p.GetNews()
	at.generation, at.created, at.index = n.GetLive().GetNumber(), n.GetCreatedUnixMs(), n.GetChangedIndex()
	at.path, _ = environmentFor(n.GetLive(), a.view.system)
	return at, nil
}

// whatChanged gives what is to be done to a generation's packages to have what a profile of
// stock Nix has. Nix reads a profile when it begins and writes it when it has fetched or
// built: what others brought in between, which is not in before, it leaves out without
// anybody's having said so. That is dropped only if nothing else is done.
func whatChanged(base, has, before []*floxv1.Package, first bool) (set []*floxv1.Package, drop []string) {
	var unseen []string
	for _, d := range shared.Differences(base, has) {
		switch {
		case d.After == nil && !first:
			if slices.ContainsFunc(before, func(p *floxv1.Package) bool { return p.GetName() == d.Name }) {
				drop = append(drop, d.Name)
			} else {
				unseen = append(unseen, d.Name)
			}
		case d.After != nil && (d.Before == nil || !first):
			set = append(set, d.After)
		}
	}
	if len(set) == 0 && len(drop) == 0 {
		drop = unseen
	}
	return set, drop
}
