package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/nix"
	shared "github.com/floxctl/flox/profile"
	"github.com/floxctl/flox/profile/environment"
)

// changeBound changes a profile as somebody changed one of stock Nix, on their behalf.
func (a *Agent) changeBound(ctx context.Context, c boundChange) (*floxv1.ChangeProfileResponse, error) {
	as := actingFor{floxv1connect.NewAdminClient(&http.Client{Transport: p2pTransport{a}}, "http://peer", connect.WithReadMaxBytes(maxAnswer)), nameOf(int(c.user))}
	base, err := as.base(ctx, &c)
	if err != nil {
		return nil, err
	}
	has, err := a.boundPackages(ctx, as, c, base)
	if err != nil {
		return nil, err
	}
	q := &floxv1.ChangeProfileRequest{Name: c.profile, Parent: c.base, Kind: bindKind, Reason: c.dir}
	before, err := as.before(ctx, c, base)
	if err != nil {
		return nil, err
	}
	q.Set, q.Drop = whatChanged(base, has, before, c.first)
	var paths []flox.StorePath
	for _, p := range q.GetSet() {
		for _, s := range p.GetPaths() {
			for _, path := range s.GetPaths() {
				paths = append(paths, flox.StorePath(path))
			}
		}
	}
	if _, err := a.PublishStaged(ctx, paths...); err != nil {
		return nil, err
	}
	resp, err := as.change(ctx, q)
	if owner, _, _ := strings.Cut(c.profile, "/"); errors.Is(err, flox.ErrNotFound) && c.base == 0 && shared.Folded(owner) == shared.Folded(as.user) {
		if err = as.create(ctx, &floxv1.CreateProfileRequest{Name: c.profile, Systems: []string{c.system}}); err == nil {
			resp, err = as.change(ctx, q)
		}
	}
	return resp, err
}

// boundPackages are those that a profile of stock Nix has: of a generation that is known,
// or as what it leads to says.
func (a *Agent) boundPackages(ctx context.Context, as actingFor, c boundChange, base []*floxv1.Package) ([]*floxv1.Package, error) {
	if p, known := a.view.now.Load().profiles[shared.Folded(c.profile)]; known {
		for _, g := range p.generations() {
			if path, ok := environmentFor(g, c.system); ok && path == c.path {
				g, err := as.generation(ctx, c.profile, g.GetNumber())
				return g.GetPackages(), err
			}
		}
	}
	has, err := a.packagesAt(ctx, c.path)
	if err != nil {
		return nil, err
	}
	return asPackages(base, has, c.system), nil
}

// asPackages makes packages of a profile of what is installed for a system. One that the
// profile has as it is stays, by its name there, which Nix does not keep; of one that is
// another now, what it has for other systems.
func asPackages(base []*floxv1.Package, has []environment.Package, system string) (out []*floxv1.Package) {
	names := boundNames(base, has, system)
	for i, h := range has {
		if !h.Active {
			continue
		}
		var paths []string
		for _, p := range h.Paths {
			paths = append(paths, string(p))
		}
		h.Name = names[i]
		priority := uint32(max(h.Priority, 0)) //nolint:gosec // 32 bits, see environment
		p := &floxv1.Package{Name: h.Name}
		if i := slices.IndexFunc(base, func(b *floxv1.Package) bool { return b.GetName() == h.Name }); i >= 0 {
			p = proto.CloneOf(base[i])
		}
		at := slices.IndexFunc(p.GetPaths(), func(s *floxv1.PackagePaths) bool { return s.GetSystem() == system })
		if at < 0 {
			p.Paths, at = append(p.GetPaths(), &floxv1.PackagePaths{System: system}), len(p.GetPaths())
		}
		if s := p.GetPaths()[at]; !slices.Equal(slices.Sorted(slices.Values(s.GetPaths())), paths) {
			s.Paths = paths
			main := slices.MinFunc(h.Paths, func(x, y flox.StorePath) int { return len(x) - len(y) }) // others have their output behind
			_, p.Version = nix.NameAndVersion(main.Name())
			p.Source = string(main)
			if h.Source != nil {
				p.Source = h.Source.URL + "#" + h.Source.AttrPath
			}
		}
		if !h.NoPriority || p.Priority == 0 { // else it is as it was
			p.Priority = priority
		}
		out = append(out, p)
	}
	return out
}

// boundNames gives each of what is installed its name in a profile: those of the same paths
// have theirs there, others the one they came with, if it is not taken.
func boundNames(base []*floxv1.Package, has []environment.Package, system string) []string {
	named := make(map[string][]string) // by their paths
	for _, b := range base {
		for _, s := range b.GetPaths() {
			if s.GetSystem() == system {
				key := strings.Join(slices.Sorted(slices.Values(s.GetPaths())), " ")
				named[key] = append(named[key], b.GetName())
			}
		}
	}
	names, free := make([]string, len(has)), environment.NewNames()
	for i, h := range has {
		var paths []string
		for _, p := range h.Paths {
			paths = append(paths, string(p))
		}
		key := strings.Join(paths, " ")
		if left := named[key]; len(left) > 0 {
			names[i], named[key] = left[0], left[1:]
			free.Take(left[0])
		}
	}
	for i, h := range has {
		if names[i] == "" {
			names[i] = free.Free(h.Name)
		}
	}
	return names
}

// packagesAt are those that a store path says it has: an environment of nix-env or nix
// profile, or else itself.
func (a *Agent) packagesAt(ctx context.Context, p flox.StorePath) ([]environment.Package, error) {
	info, err := a.lookup(ctx, p)
	if err != nil {
		return nil, err
	}
	t, err := a.open(ctx, info)
	if err != nil {
		return nil, err
	}
	name, _ := nix.NameAndVersion(p.Name())
	made := slices.Contains([]string{"user-environment", "profile", "environment"}, name) // by Nix: it has packages
	for _, m := range []struct {
		file  string
		parse func([]byte, flox.StoreDir) ([]environment.Package, error)
	}{{environment.ManifestName, environment.ParseManifest}, {environment.UserEnvName, environment.ParseUserEnv}} {
		b, err := t.whole(ctx, m.file, environment.MaxManifest)
		if errors.Is(err, flox.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		has, err := m.parse(b, a.cfg.StoreDir)
		if err == nil {
			return has, nil
		}
		if made {
			return nil, fmt.Errorf("%s: %w", a.cfg.StoreDir.Join(p), err)
		}
	}
	if made {
		return nil, fmt.Errorf("%s has neither a %s nor a %s that says what is in it: %w", a.cfg.StoreDir.Join(p), environment.ManifestName, environment.UserEnvName, flox.ErrBadInput)
	}
	return []environment.Package{{Name: name, Priority: environment.DefaultPriority, Paths: []flox.StorePath{p}, Active: true}}, nil
}

// whole reads a file that is no larger than most bytes, also where a link leads to it, as
// nix-env makes it. ErrNotFound: there is none.
func (t *tree) whole(ctx context.Context, name string, most uint64) ([]byte, error) {
	at := t
	i, e, err := t.Find(ctx, name)
	if err == nil && e.Kind == flox.Symlink {
		at, i, e, err = t.a.find(ctx, e.Target)
	}
	if err != nil {
		return nil, err
	}
	if e.Kind != flox.Regular {
		return nil, fmt.Errorf("%s of %s: %w", name, t.path, flox.ErrNotFound)
	}
	if e.Size > most {
		return nil, fmt.Errorf("%s of %s has %d bytes, want at most %d: %w", name, t.path, e.Size, most, flox.ErrFull)
	}
	b := make([]byte, e.Size)
	n, err := at.ReadAt(ctx, i, b, 0, flox.Reader{})
	return b[:n], err
}

// actingFor asks the storehouse on behalf of a user of this machine.
type actingFor struct {
	floxv1connect.AdminClient
	user string
}

func asUser[T any](as actingFor, m *T) *connect.Request[T] {
	q := connect.NewRequest(m)
	q.Header().Set(userHeader, as.user)
	return q
}

// base gives the packages of the generation a change was made to. Where that is not kept any
// more, what is there is added to what lives.
func (as actingFor) base(ctx context.Context, c *boundChange) ([]*floxv1.Package, error) {
	if !c.first {
		g, err := as.generation(ctx, c.profile, c.base)
		if !errors.Is(err, flox.ErrNotFound) {
			return g.GetPackages(), err
		}
	}
	g, err := as.generation(ctx, c.profile, 0)
	if errors.Is(err, flox.ErrNotFound) {
		err = nil // it is to be made
	}
	c.first, c.base = true, g.GetNumber()
	return g.GetPackages(), err
}

// before gives the packages of what the profile of Nix's led to before, if it was led from there
// so lately that who changes it may not have seen that; else base.
func (as actingFor) before(ctx context.Context, c boundChange, base []*floxv1.Package) ([]*floxv1.Package, error) {
	if c.first || c.before == 0 {
		return base, nil
	}
	g, err := as.generation(ctx, c.profile, c.before)
	if errors.Is(err, flox.ErrNotFound) {
		return base, nil
	}
	return g.GetPackages(), err
}

// generation is one of a profile; 0 is the one that lives.
func (as actingFor) generation(ctx context.Context, name string, number uint64) (*floxv1.Generation, error) {
	resp, err := as.ShowProfile(ctx, asUser(as, &floxv1.ShowProfileRequest{Name: name, Generation: number}))
	if err != nil {
		return nil, api.FromConnect(err)
	}
	return resp.Msg.GetGeneration(), nil
}

func (as actingFor) change(ctx context.Context, q *floxv1.ChangeProfileRequest) (*floxv1.ChangeProfileResponse, error) {
	resp, err := as.ChangeProfile(ctx, asUser(as, q))
	if err != nil {
		return nil, api.FromConnect(err)
	}
	return resp.Msg, nil
}

func (as actingFor) create(ctx context.Context, q *floxv1.CreateProfileRequest) error {
	_, err := as.CreateProfile(ctx, asUser(as, q))
	return api.FromConnect(err)
}
