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
	"github.com/floxctl/flox/agent/warden"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// maxProfileLink is longer than no name may be that the kernel takes.
const maxProfileLink = 4096

// target is where a link leads now, in words for who named it.
func (s *profiles) target(ctx context.Context, link string) (flox.StorePath, error) {
	dir := string(s.a.cfg.StoreDir)
	if !filepath.IsAbs(link) || filepath.Clean(link) != link || len(link) >= maxProfileLink || strings.ContainsRune(link, 0) {
		return "", fmt.Errorf("profile %.200q: want the absolute name of a link, such as /nix/var/nix/profiles/default: %w", link, flox.ErrBadInput)
	}
	if strings.HasPrefix(link+"/", dir+"/") {
		return "", fmt.Errorf("profile %s lies in %s, where nothing ever changes; keep it as a path: %w", link, dir, flox.ErrBadInput)
	}
	name, err := s.read(ctx, link)
	switch {
	case errors.Is(err, warden.ErrUnread):
		return "", fmt.Errorf("profile %s: its file system does not answer, or refuses; say it again when it can be read: %w", link, flox.ErrUnreachable)
	case errors.Is(err, flox.ErrNotFound):
		return "", fmt.Errorf("profile %s: there is no such link, or it does not lead to a path in %s; want one such as /nix/var/nix/profiles/default, or a store path: %w", link, dir, flox.ErrNotFound)
	case errors.Is(err, flox.ErrBadInput):
		return "", errors.New("the agent's parent process is older than itself and cannot read profiles: restart the agent (systemctl restart floxd)")
	case err != nil:
		return "", fmt.Errorf("profile %s: %w", link, err)
	}
	return flox.StorePath(name), nil
}

// keep keeps a profile; policy "" = as it was, used if it is new. It returns when
// all it leads to is held, or with an error, and then a new one is not kept.
func (s *profiles) keep(ctx context.Context, link, policy string) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	target, err := s.target(ctx, link)
	if err != nil {
		return err
	}
	old, known := s.list()[link]
	user := caller(ctx)
	if known && user != 0 {
		if user != old.User && policy != "" && policy != old.Policy {
			return fmt.Errorf("profile %s is kept by %s with the policy %s: only they and root may change that; try sudo: %w", link, userName(old.User), old.Policy, flox.ErrDenied)
		}
		user = old.User
	}
	if policy == "" {
		if policy = old.Policy; !known {
			policy = policyUsed
		}
	}
	p := profile{Policy: policy, Path: target, User: user}
	if old.Path == target {
		p.Held, p.Staged = old.Held, old.Staged
	}
	if err := s.put(link, &p); err != nil {
		return err
	}
	s.state(link).until = time.Time{} // whoever asks wants to hear now
	err = s.follow(ctx, link, p)
	if _, lacks := s.why(link); err == nil && lacks != nil {
		err = fmt.Errorf("profile %s leads to %s, of which not all can be kept now: %w", link, s.a.cfg.StoreDir.Join(target), lacks)
	}
	if err == nil || known {
		s.changed()
		return nil // of one that is kept status says it
	}
	return errors.Join(err, s.forget(context.WithoutCancel(ctx), link))
}

// userName names a user for people.
func userName(uid int) string {
	if uid == 0 {
		return "root"
	}
	return fmt.Sprintf("user %d", uid)
}

// unkeep lets go of a profile, and says what it was. ErrNotFound: it is not kept.
// ErrDenied: it is another user's.
func (s *profiles) unkeep(ctx context.Context, link string) (profile, error) {
	if err := s.enter(ctx); err != nil {
		return profile{}, err
	}
	defer s.leave()
	p, known := s.list()[link]
	if !known {
		return p, fmt.Errorf("profile %s is not kept: %w", link, flox.ErrNotFound)
	}
	if user := caller(ctx); user != 0 && (user != p.User || user < 0) {
		return p, fmt.Errorf("profile %s is kept by %s: only they and root may let go of it; try sudo: %w", link, userName(p.User), flox.ErrDenied)
	}
	return p, s.forget(ctx, link)
}

// forget takes one off the list, and what it held out of the cache's.
func (s *profiles) forget(ctx context.Context, link string) error {
	if err := s.put(link, nil); err != nil {
		return err
	}
	defer s.changed()
	have, err := s.owners(ctx, profileOwner(link))
	for owner := range have {
		err = errors.Join(err, s.a.letGo(ctx, owner))
	}
	return err
}

// Kept implements floxv1connect.AgentHandler.
func (c *control) Kept(ctx context.Context, _ *connect.Request[floxv1.KeptRequest]) (*connect.Response[floxv1.KeptResponse], error) {
	poke(c.a.profiles.asked)
	kept, err := c.a.keptOwners(ctx)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	response := &floxv1.KeptResponse{Profiles: c.a.complete.state(ctx).GetProfiles()}
	for _, o := range slices.Sorted(maps.Keys(kept)) {
		response.Paths = append(response.Paths, &floxv1.OfflinePath{Path: c.a.cfg.StoreDir.Join(flox.StorePath(o)), Policy: c.a.policies.of(o).Policy})
	}
	return connect.NewResponse(response), nil
}

// profile is what is told of one that is kept, as state has it.
func (c *completer) profile(ctx context.Context, link string) *floxv1.KeptProfile {
	for _, p := range c.state(ctx).GetProfiles() {
		if p.GetLink() == link {
			return p
		}
	}
	return &floxv1.KeptProfile{Link: link} // it was let go of meanwhile
}

// profiles says of all of them whether they are ready.
func (c *completer) profiles(w *wishes, used, kept map[flox.StorePath]*lack) (out []*floxv1.KeptProfile) {
	for _, link := range slices.Sorted(maps.Keys(w.profiles)) {
		p := w.profiles[link]
		l := &lack{}
		if whole := kept[flox.StorePath(profileOwner(link))]; whole != nil {
			l = whole
		}
		if p.Policy == policyUsed {
			for _, member := range c.closure(p.Path) {
				l.join(used[member])
			}
		}
		m := &floxv1.KeptProfile{
			Link: shownLink(link, c.a.linksDir()), Path: c.a.cfg.StoreDir.Join(p.Path), Offline: p.Policy, Complete: !l.lacks && p.Held,
			MissingBytes: l.sum(), Reason: l.reason,
		}
		unread, lacks := c.a.profiles.why(link)
		switch {
		case unread != "":
			m.Reason = unread
		case !p.Held && lacks != nil:
			m.Reason = oneLine(lacks)
		case !p.Held && !l.lacks:
			m.Reason = "what it refers to is being looked up"
		}
		out = append(out, m)
	}
	return out
}

// join adds what another lacks.
func (l *lack) join(o *lack) {
	if o == nil {
		return
	}
	for p, n := range o.bytes {
		l.add(goal{path: p}, n, o.reason)
	}
	if !l.lacks {
		l.lacks, l.reason = true, o.reason
	}
}
