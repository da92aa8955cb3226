package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/fuse"
	"github.com/floxctl/flox/p2p"
	shared "github.com/floxctl/flox/profile"
)

const (
	// viewMark begins the links of profiles.links that the storehouse's profiles have there:
	// a file system has no such name.
	viewMark = "shared:"
	// maxViewHeld bounds what is held of them: two generations each.
	maxViewHeld = 64
	// ownDefault is the name of a user's own profile, all of which is here offline.
	ownDefault = "default"
)

// openView reads which profiles were shown, and begins to serve their mount, if there is one.
func (a *Agent) openView() error {
	a.view.load()
	w := a.cfg.Warden
	if w == nil || w.Links == nil {
		return nil
	}
	var err error
	a.links, err = fuse.NewServer(fuse.ServerConfig{
		Device: w.Links, Init: w.LinksInit, Links: a.view, Journal: w.LinksJournal(), Log: a.log,
		LookupTimeout: findTimeout + time.Second,
	})
	if err != nil {
		return fmt.Errorf("mount of profiles: %w", err)
	}
	a.view.shown = func(ctx context.Context, owner, name string) {
		if err := a.links.Invalidate(ctx, owner, name); err != nil && ctx.Err() == nil && !errors.Is(err, flox.ErrClosed) {
			a.log.Error("a profile's link is shown as it was", "profile", owner+"/"+name, "error", err)
		}
	}
	a.servingLinks = serveInBackground(a.links)
	return nil
}

// linksDir is where profiles are mounted; "" = nowhere.
func (a *Agent) linksDir() string {
	if w := a.cfg.Warden; w != nil {
		return w.LinksDir
	}
	return ""
}

// runLinks stays with the mount of profiles until ctx ends. Somebody may unmount it: the
// store goes on.
func (a *Agent) runLinks(ctx context.Context) error {
	if a.servingLinks == nil {
		return nil
	}
	if err := a.servingLinks.run(ctx); ctx.Err() == nil {
		a.log.Warn("profiles are not shown any more; restart the agent to mount them again", "dir", a.cfg.Warden.LinksDir, "error", err)
	}
	return nil
}

// findProfile asks whichever server answers.
func (a *Agent) findProfile(ctx context.Context, q *floxv1.FindProfileRequest) (resp *floxv1.FindProfileResponse, err error) {
	err = a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) error {
		r, err := a.calls.storehouse(house).FindProfile(ctx, connect.NewRequest(q))
		if err == nil {
			resp = r.Msg
		}
		return err
	})
	return resp, err
}

// held lists what is to be held of profiles: of those that are listed what lives and what
// lived before, by link, with a policy. The one of which all is here offline is a
// user's own.
func (v *view) held(standard string) map[string]profileLead {
	out := make(map[string]profileLead)
	s := v.now.Load()
	for _, key := range slices.Sorted(maps.Keys(s.profiles)) {
		p := s.profiles[key]
		if !p.GetNews().GetListed() || len(out) >= maxViewHeld {
			continue
		}
		policy := standard
		if s.own(p.owner) && strings.EqualFold(p.name, ownDefault) {
			policy = policyClosure
		}
		for i, g := range p.generations() {
			path, ok := environmentFor(g, v.system)
			if !ok || i >= 2 {
				continue
			}
			link := viewMark + key
			if i > 0 {
				link += "@before"
			}
			out[link] = profileLead{path, policy}
		}
	}
	return out
}

// profileLead is where a link of the storehouse's profiles leads.
type profileLead struct {
	path   flox.StorePath
	policy string
}

// settleView has what profiles lead to held and completed, and told to the storehouse.
func (a *Agent) settleView(ctx context.Context) error {
	a.roots.changed()
	return errors.Join(a.writeShellList(), a.profiles.adopt(ctx, a.view.held(a.cfg.Offline)))
}

// writeShellList tells shells of this machine whose paths get which profiles.
func (a *Agent) writeShellList() error {
	dir := a.linksDir()
	if a.cfg.ShellList == "" || dir == "" || strings.ContainsAny(dir, ":\n") {
		return nil
	}
	if err := replaceFile(a.cfg.ShellList, []byte(a.view.shellList(dir)), 0o644, false); err != nil { // everybody's shells read it
		return fmt.Errorf("shells are not told which profiles there are: %w", err)
	}
	return nil
}

// shellList has a line for each profile that is put on somebody's paths: who, * for
// everybody, a blank, and its directory. A later one is put before the earlier ones. A
// user's own need not be there yet: looking for it asks nobody.
func (v *view) shellList(dir string) string {
	var b strings.Builder
	s := v.now.Load()
	for _, key := range slices.Sorted(maps.Keys(s.profiles)) {
		if p := s.profiles[key]; p.GetNews().GetAssigned() {
			fmt.Fprintf(&b, "* %s\n", filepath.Join(dir, p.owner, p.name))
		}
	}
	for _, user := range s.users {
		if _, _, err := shared.Split(user + "/" + ownDefault); err == nil {
			fmt.Fprintf(&b, "%s %s\n", user, filepath.Join(dir, user, ownDefault))
		}
	}
	return b.String()
}

// adopt keeps links of the storehouse's profiles, and no others of these.
func (s *profiles) adopt(ctx context.Context, want map[string]profileLead) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	have := s.list()
	var errs []error
	for link, to := range want {
		old, known := have[link]
		if known && old.Path == to.path && old.Policy == to.policy {
			continue
		}
		p := profile{Policy: to.policy, Path: to.path}
		if old.Path == to.path {
			p.Held, p.Staged = old.Held, old.Staged
		}
		if err := s.put(link, &p); err != nil {
			errs = append(errs, err)
			continue
		}
		st := s.state(link)
		st.pause, st.until = 0, time.Time{}
	}
	for link := range have {
		if _, wanted := want[link]; strings.HasPrefix(link, viewMark) && !wanted {
			errs = append(errs, s.forget(ctx, link))
		}
	}
	s.changed()
	poke(s.asked)
	return errors.Join(errs...)
}

// ShownProfiles implements floxv1connect.AgentHandler.
func (c *control) ShownProfiles(ctx context.Context, req *connect.Request[floxv1.ShownProfilesRequest]) (*connect.Response[floxv1.ShownProfilesResponse], error) {
	v := c.a.view
	out := &floxv1.ShownProfilesResponse{Connected: v.connected.Load(), System: v.system}
	out.Dir = c.a.linksDir()
	if name := req.Msg.GetName(); name != "" {
		owner, link, _ := strings.Cut(name, "/")
		to, ok := splitLink(link)
		if _, _, err := shared.Split(owner + "/" + to.profile); err != nil || !ok {
			return nil, api.ToConnect(fmt.Errorf("profile %.200q: want OWNER/NAME, OWNER/NAME@GENERATION or OWNER/NAME@TAG: %w", name, flox.ErrBadInput))
		}
		p, number, err := v.resolve(ctx, owner, to)
		if err != nil {
			return nil, api.ToConnect(err)
		}
		out.Profiles = append(out.Profiles, c.shown(p, number))
		return connect.NewResponse(out), nil
	}
	s := v.now.Load()
	for _, key := range slices.Sorted(maps.Keys(s.profiles)) {
		if p := s.profiles[key]; p.GetNews().GetListed() {
			out.Profiles = append(out.Profiles, c.shown(p, 0))
		}
	}
	return connect.NewResponse(out), nil
}

// shown tells of a profile and one of its generations, 0 = the one that lives.
func (c *control) shown(p viewed, number uint64) *floxv1.ShownProfile {
	g := p.generation(number)
	out := &floxv1.ShownProfile{Name: p.GetNews().GetName(), Generation: g.GetNumber(), Before: p.GetNews().GetBefore().GetNumber(), Here: p.GetHere()}
	if path, ok := environmentFor(g, c.a.view.system); ok {
		out.Path = c.a.cfg.StoreDir.Join(path)
	}
	return out
}

// shownLink is the name of a link for people.
func shownLink(link, dir string) string {
	if name, ok := strings.CutPrefix(link, viewMark); ok {
		return filepath.Join(dir, name)
	}
	return link
}
