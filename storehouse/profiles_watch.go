package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	"github.com/floxctl/flox/profile"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// maxWatchedNames and maxAskedNames bound the profiles of a watcher.
	maxWatchedNames, maxAskedNames = 8192, 1024
	// profileBatch is how many profiles one message of a stream holds.
	profileBatch = 256
	// profilesAge is how old the profiles of a server may be that still tells agents of
	// them.
	profilesAge = 3 * time.Second
)

// WatchProfiles is floxv1connect.StorehouseHandler. A watcher reads the replicated list
// of changes at its own pace, so there is no queue per watcher: of several changes of a
// profile it is told the last, and one that is too far behind is told all anew.
func (s *rpc) WatchProfiles(ctx context.Context, req *connect.Request[floxv1.WatchProfilesRequest], stream *connect.ServerStream[floxv1.ProfilesEvent]) error {
	select {
	case s.profileWatchers <- struct{}{}:
		defer func() { <-s.profileWatchers }()
	default:
		return api.ToConnect(fmt.Errorf("%d machines watch profiles already: %w", maxWatchers, flox.ErrFull))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.stop, cancel)()
	if len(req.Msg.GetNames()) > maxWatchedNames || len(req.Msg.GetAsked()) > maxAskedNames {
		return api.ToConnect(fmt.Errorf("watch %d profiles and %d others, want at most %d and %d: %w",
			len(req.Msg.GetNames()), len(req.Msg.GetAsked()), maxWatchedNames, maxAskedNames, flox.ErrBadInput))
	}
	if err := s.ready(ctx); err != nil {
		return api.ToConnect(err)
	}
	w := &profileWatch{
		s: s.Server, peer: p2p.PeerID(req.Peer().Addr), at: req.Msg.GetAfterIndex(), send: stream.Send,
		names: foldedSet(req.Msg.GetNames()), asked: foldedSet(req.Msg.GetAsked()), users: req.Msg.GetUsers(), labels: req.Msg.GetLabels(),
	}
	err := w.run(ctx)
	if s.stop.Err() != nil {
		err = errStopping
	}
	return api.ToConnect(err)
}

func foldedSet(names []string) map[string]bool {
	set := make(map[string]bool, len(names))
	for _, name := range names {
		set[profile.Folded(name)] = true
	}
	return set
}

// profileWatch is one stream.
type profileWatch struct {
	s            *Server
	peer         p2p.PeerID
	at           uint64          // what the watcher knows of
	names, asked map[string]bool // folded: what it was told, and what it wants to hear of beside its own
	users        []string        // its machine's, as it was told
	labels       []string
	send         func(*floxv1.ProfilesEvent) error
}

func (w *profileWatch) run(ctx context.Context) error {
	for first := true; ; first = false {
		news, people := w.s.profiles.news.wait(), w.s.news.wait() // before the look: nothing between them is missed
		if err := w.tell(ctx, first); err != nil {
			return err
		}
		pause := time.NewTimer(watchHeartbeat)
		select {
		case <-news:
		case <-people:
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// tell sends what changed, or a heartbeat: where profiles are is what it was a moment ago.
func (w *profileWatch) tell(ctx context.Context, first bool) error {
	r, err := w.view(ctx, first)
	if err != nil {
		return err
	}
	sight := w.s.sightOf(w.peer)
	e := &floxv1.ProfilesEvent{Index: r.Index()}
	reset := first && w.at == 0 || !slices.Equal(sight.users, w.users) || !slices.Equal(sight.labels, w.labels)
	if !reset {
		err = w.changes(r, sight, e, first, &reset)
	}
	if reset && err == nil {
		e = &floxv1.ProfilesEvent{Index: r.Index(), Reset_: true}
		err = w.all(r, sight, e)
	}
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	if first || reset {
		e.Users, e.Labels = sight.users, sight.labels
	}
	w.users, w.labels = sight.users, sight.labels
	return w.pass(e)
}

// pass sends an event, in several messages if it is large.
func (w *profileWatch) pass(e *floxv1.ProfilesEvent) error {
	if e.GetReset_() {
		clear(w.names)
	}
	for _, p := range e.GetPut() {
		w.names[profile.Folded(p.GetName())] = true
	}
	for _, name := range e.GetGone() {
		delete(w.names, name)
	}
	for len(e.GetPut()) > profileBatch {
		part := &floxv1.ProfilesEvent{Reset_: e.GetReset_(), Put: e.GetPut()[:profileBatch]}
		if err := w.send(part); err != nil {
			return err
		}
		e.Put, e.Reset_ = e.GetPut()[profileBatch:], false
	}
	e.Heartbeat = !e.GetReset_() && len(e.GetPut())+len(e.GetGone()) == 0
	w.at = e.GetIndex()
	return w.send(e)
}

// view gives the state here, if it is not too old. One that knows less than the
// watcher is brought up to date first: another server may have told it more.
func (w *profileWatch) view(ctx context.Context, first bool) (*cluster.Reader, error) {
	r, err := w.s.node.ViewWithin(ctx, profile.Kind, profilesAge)
	if err != nil || !first || w.at <= r.Index() {
		return r, err
	}
	if err := r.Close(); err != nil {
		return nil, err
	}
	return w.s.view(ctx, profile.Kind, cluster.Linearizable)
}

// changes fills e with what changed behind w.at, and sets reset if that is not known.
func (w *profileWatch) changes(r *cluster.Reader, sight sight, e *floxv1.ProfilesEvent, first bool, reset *bool) error {
	names, ok, err := profile.Changes(r, w.at)
	if err != nil || !ok {
		*reset = !ok
		return err
	}
	if first { // it may have asked for one that changed while it was told of others
		for name := range w.asked {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	for _, name := range names {
		p, err := profile.Find(r, name)
		if err != nil && !errors.Is(err, flox.ErrNotFound) && !errors.Is(err, flox.ErrBadInput) {
			return err
		}
		if err == nil && (sight.lists(p) || w.asked[name] && sight.sees(p)) {
			n, err := newsOf(r, p, sight)
			if err != nil {
				return err
			}
			e.Put = append(e.Put, n)
			continue
		}
		if w.names[name] || w.asked[name] {
			e.Gone = append(e.Gone, name)
		}
	}
	return nil
}

// all fills e with every profile that the watcher is told of.
func (w *profileWatch) all(r *cluster.Reader, sight sight, e *floxv1.ProfilesEvent) error {
	var list []*floxv1.Profile
	err := profile.List(r, "", "", func(p *floxv1.Profile) bool {
		if sight.lists(p) || w.asked[profile.Folded(p.GetName())] && sight.sees(p) {
			list = append(list, p)
		}
		return len(list) < maxWatchedNames
	})
	for _, p := range list {
		n, err := newsOf(r, p, sight)
		if err != nil {
			return err
		}
		e.Put = append(e.Put, n)
	}
	return err
}

// newsOf says where a profile is.
func newsOf(r *cluster.Reader, p *floxv1.Profile, sight sight) (*floxv1.ProfileNews, error) {
	n := &floxv1.ProfileNews{Name: p.GetName(), CreatedUnixMs: p.GetCreatedUnixMs(), ChangedIndex: p.GetChangedIndex(), Listed: sight.lists(p), First: p.GetFirst(), Assigned: sight.assigned(p), Tags: p.GetTags(), Writers: sight.writers(p)}
	if p.GetLive() == 0 {
		return n, nil
	}
	g, err := profile.ReadEnvironments(r, p.GetName(), p.GetLive())
	if err != nil {
		return nil, err
	}
	n.Live = &floxv1.GenerationNews{Number: g.GetNumber(), Environments: g.GetEnvironments()}
	if g.GetParent() == 0 {
		return n, nil
	}
	was, err := profile.ReadEnvironments(r, p.GetName(), g.GetParent())
	if err == nil {
		n.Before = &floxv1.GenerationNews{Number: was.GetNumber(), Environments: was.GetEnvironments()}
	} else if !errors.Is(err, flox.ErrNotFound) {
		return nil, err
	}
	return n, nil
}

// sight is what a machine may see of profiles: what some user may whom it may speak for.
type sight struct {
	users  []string // folded, sorted
	admin  bool     // one of them is an admin of the storehouse
	open   bool     // it speaks for anybody
	peer   string   // the machine
	labels []string // its, KEY=VALUE, sorted
}

// sightOf gives a machine's.
func (s *Server) sightOf(peer p2p.PeerID) (out sight) {
	m, ok := s.roster.machine(peer)
	if ok {
		out.peer = string(peer)
	}
	for _, l := range m.GetLabels() {
		out.labels = append(out.labels, l.GetKey()+"="+l.GetValue())
	}
	slices.Sort(out.labels)
	for _, u := range m.GetUsers() {
		out.users = append(out.users, profile.Folded(u.GetName()))
		out.admin = out.admin || members.Rights(u.GetRole()) >= adminOnly
	}
	slices.Sort(out.users)
	out.users, out.open = slices.Compact(out.users), s.cfg.OpenMembership
	return out
}

// writers lists the users of the machine who may change a profile, folded and sorted.
func (v sight) writers(p *floxv1.Profile) (all []string) {
	users := slices.Clone(v.users)
	if v.open {
		owner, _, _ := strings.Cut(p.GetName(), "/")
		users = append(users, profile.Folded(owner))
		for _, g := range p.GetGrants() {
			users = append(users, profile.Folded(g.GetUser()))
		}
	}
	for _, u := range users {
		if profile.Rank(profile.Role(p, u)) >= profile.Rank(profile.Writer) {
			all = append(all, u)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// sees reports whether a profile may be read.
func (v sight) sees(p *floxv1.Profile) bool {
	return v.admin || v.assigned(p) || profile.Role(p, "") != "" || slices.ContainsFunc(v.users, func(u string) bool { return profile.Role(p, u) != "" })
}

// assigned reports whether an operator has the machine show a profile.
func (v sight) assigned(p *floxv1.Profile) bool { return profile.Assigned(p, v.peer, v.labels) }

// lists reports whether it is a user's own, or one of those who have a role in it by name,
// or assigned to the machine.
func (v sight) lists(p *floxv1.Profile) bool {
	owner, _, _ := strings.Cut(profile.Folded(p.GetName()), "/")
	if slices.Contains(v.users, owner) || v.assigned(p) {
		return true
	}
	return slices.ContainsFunc(p.GetGrants(), func(g *floxv1.ProfileGrant) bool {
		return g.GetRole() != "" && slices.Contains(v.users, profile.Folded(g.GetUser()))
	})
}

// FindProfile is floxv1connect.StorehouseHandler. What the machine may not see is not
// told from what is not there.
func (s *rpc) FindProfile(ctx context.Context, req *connect.Request[floxv1.FindProfileRequest]) (*connect.Response[floxv1.FindProfileResponse], error) {
	if err := s.ready(ctx); err != nil {
		return nil, api.ToConnect(err)
	}
	out := &floxv1.FindProfileResponse{}
	sight := s.sightOf(p2p.PeerID(req.Peer().Addr))
	err := s.profiles.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error { return findProfile(r, sight, req.Msg, out) })
	return answer(out, err)
}

func findProfile(r *cluster.Reader, sight sight, q *floxv1.FindProfileRequest, out *floxv1.FindProfileResponse) error {
	if !strings.Contains(q.GetName(), "/") {
		if _, _, err := profile.Split(q.GetName() + "/x"); err != nil {
			return err
		}
		err := profile.List(r, q.GetName(), "", func(p *floxv1.Profile) bool {
			if sight.sees(p) {
				out.Owner, _, _ = strings.Cut(p.GetName(), "/")
			}
			return out.GetOwner() == ""
		})
		if err == nil && out.GetOwner() == "" {
			err = fmt.Errorf("%s has no profiles that this machine may see: %w", q.GetName(), flox.ErrNotFound)
		}
		return err
	}
	p, err := profile.FindFor(r, q.GetName(), sight.sees)
	if err == nil && !sight.sees(p) {
		err = fmt.Errorf("there is no profile %s that this machine may see: %w", q.GetName(), flox.ErrNotFound)
	}
	if err != nil {
		return err
	}
	out.Owner, _, _ = strings.Cut(p.GetName(), "/")
	if out.Profile, err = newsOf(r, p, sight); err != nil || q.GetGeneration() == 0 {
		return err
	}
	g, err := profile.ReadEnvironments(r, p.GetName(), q.GetGeneration())
	out.Generation = &floxv1.GenerationNews{Number: g.GetNumber(), Environments: g.GetEnvironments()}
	return err
}

// run rings for the watchers when profiles changed, until ctx ends.
func (p *profiles) run(ctx context.Context) error {
	for at := uint64(0); ; {
		next, err := p.s.node.Follow(ctx, at)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("follow the profiles: %w", err)
		}
		changed := at == 0
		err = p.view(ctx, cluster.Local, func(r *cluster.Reader) error {
			names, ok, err := profile.Changes(r, at)
			changed, next = changed || !ok || len(names) > 0, max(next, r.Index())
			return err
		})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("follow the profiles: %w", err)
		}
		if at = next; changed {
			p.news.ring()
		}
	}
}
