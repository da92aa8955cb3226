package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/staging"
	"github.com/floxctl/flox/nix/worker"
	"github.com/floxctl/flox/p2p"
)

// askedAtOnce is how many hash parts one question to the storehouse holds.
const askedAtOnce = 1024

// Valid implements worker.Paths. What is not known here is asked for together:
// the closure somebody copies is a few round trips, not thousands.
func (n *nixSession) Valid(ctx context.Context, paths []flox.StorePath, substitute bool) ([]flox.StorePath, error) {
	valid, missing, err := n.a.sortValid(ctx, paths)
	if err == nil {
		var local []flox.StorePath
		if local, missing, err = n.a.sortLocal(ctx, missing); err == nil {
			valid = append(valid, local...)
		}
	}
	if err != nil || !substitute || len(missing) == 0 || !n.s.Options().UseSubstitutes {
		return valid, err
	}
	if _, err := n.substitute(ctx, missing); err != nil {
		return nil, err
	}
	more, _, err := n.a.sortValid(ctx, missing)
	return append(valid, more...), err
}

// sortValid tells paths that are valid from those that are not.
func (a *Agent) sortValid(ctx context.Context, paths []flox.StorePath) (valid, missing []flox.StorePath, err error) {
	var open []flox.StorePath
	for _, p := range paths {
		switch known, ok := a.validHere(p); {
		case !ok:
			open = append(open, p)
		case known:
			valid = append(valid, p)
		default:
			missing = append(missing, p)
		}
	}
	if len(open) == 1 { // peers are asked, too
		switch _, err := a.lookup(ctx, open[0]); {
		case err == nil:
			return append(valid, open[0]), missing, nil
		case errors.Is(err, flox.ErrNotFound):
			return valid, append(missing, open[0]), nil
		default:
			return nil, nil, err
		}
	}
	for part := range slices.Chunk(open, askedAtOnce) {
		if err := a.resolver.many(ctx, part); err != nil {
			return nil, nil, err
		}
		for _, p := range part {
			if known, ok := a.facts.path(p.HashPart()); ok && known == p {
				valid = append(valid, p)
			} else {
				missing = append(missing, p)
			}
		}
	}
	return valid, missing, nil
}

// validHere says whether a path is valid without asking anybody; ok is false if
// that is not known here.
func (a *Agent) validHere(p flox.StorePath) (valid, ok bool) {
	if known, ok := a.facts.path(p.HashPart()); ok {
		return known == p, true
	}
	if info, ok := a.stagedInfo(p); ok {
		return info.Path == p, true
	}
	return false, a.negatives.holds(p.HashPart()) && a.staged.Shut() == nil
}

// many asks the storehouse about many paths at once and keeps what it says.
func (r *resolver) many(ctx context.Context, paths []flox.StorePath) error {
	request := &floxv1.PathsRequest{MaxAgeMs: r.houses.maxAge()}
	for _, p := range paths {
		request.HashParts = append(request.HashParts, p.HashPart())
	}
	var response *connect.Response[floxv1.PathsResponse]
	err := r.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) (err error) {
		response, err = r.calls.facts(house).Paths(ctx, connect.NewRequest(request))
		return err
	})
	if err != nil {
		return fmt.Errorf("ask the storehouse about %d paths: %w", len(paths), err)
	}
	for _, m := range response.Msg.GetFound() {
		r.traffic.facts(m)
	}
	var refused error
	err = r.facts.settle(ctx, newComing(response.Msg.GetFound()), func(_ *floxv1.PathInfo, err error) { refused = err })
	if err = errors.Join(refused, err); err != nil {
		return err
	}
	for _, hash := range response.Msg.GetInvalid() {
		if flox.ValidHashPart(hash) {
			r.negatives.remember(hash, response.Msg.GetIndex())
		}
	}
	return nil
}

// Info implements worker.Paths.
func (n *nixSession) Info(ctx context.Context, p flox.StorePath) (*worker.Info, error) {
	if local, err := n.a.localInfo(ctx, p); err == nil {
		return local, nil
	}
	info, err := n.a.lookup(ctx, p)
	if err != nil {
		return nil, n.say(p, err)
	}
	return &worker.Info{PathInfo: *info}, nil
}

// All implements worker.Paths: what is known on this machine, as in the mount.
func (n *nixSession) All(ctx context.Context) ([]flox.StorePath, error) {
	const page = 4096
	var all []flox.StorePath
	for after := ""; ; {
		names, err := n.a.store.Names(ctx, after, page)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			all = append(all, flox.StorePath(name.Name))
		}
		if len(names) < page {
			return all, nil
		}
		after = names[len(names)-1].Name
	}
}

// ByHashPart implements worker.Paths.
func (n *nixSession) ByHashPart(ctx context.Context, hash string) (flox.StorePath, error) {
	// The name is not known: what is found has another.
	info, err := n.a.lookup(ctx, flox.StorePath(hash+"-x"))
	if err == nil {
		return info.Path, nil
	}
	if p, ok := n.a.facts.path(hash); ok {
		return p, nil
	}
	if n.a.local != nil {
		if p, err := n.a.local.ByHashPart(ctx, hash); err == nil {
			return p.Info.Path, nil
		}
	}
	if errors.Is(err, flox.ErrNotFound) {
		return "", nil
	}
	return "", err
}

// mostReferrers is how many referrers are told of what is known here.
const mostReferrers = 65_536

// Referrers implements worker.Paths: all that the storehouse knows, and if it
// is away those known here.
func (n *nixSession) Referrers(ctx context.Context, p flox.StorePath) ([]flox.StorePath, error) {
	here := n.a.facts.referrers(p, mostReferrers)
	if info, err := n.Info(ctx, p); err == nil && slices.Contains(info.References, p) {
		here = append(here, p)
	}
	err := n.a.staged.List(ctx, "", func(s *staging.Path) bool {
		if slices.Contains(s.Info.References, p) {
			here = append(here, s.Info.Path)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	var response *connect.Response[floxv1.ReferrersResponse]
	err = n.a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) (err error) {
		response, err = n.a.calls.builds(house).Referrers(ctx, connect.NewRequest(&floxv1.ReferrersRequest{Path: string(p)}))
		return err
	})
	switch {
	case away(err) && ctx.Err() == nil:
		n.s.Log().Message(worker.LevelWarn, "warning: the storehouse does not answer; only referrers known on this machine are listed")
		return here, nil
	case err != nil:
		return nil, err
	}
	there, err := storePaths(response.Msg.GetPaths())
	return append(here, there...), err
}

// storePaths parses base names.
func storePaths(names []string) ([]flox.StorePath, error) {
	out := make([]flox.StorePath, 0, len(names))
	for _, name := range names {
		p, err := flox.ParseStorePath(name)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// Nar implements worker.Files.
func (n *nixSession) Nar(ctx context.Context, p flox.StorePath, w io.Writer) error {
	if local, err := n.a.local.find(ctx, n.a, p, elsewhere, nil); err == nil {
		return n.a.local.Nar(ctx, local, w)
	}
	info, err := n.a.lookup(ctx, p)
	if err != nil {
		return n.say(p, err)
	}
	t, err := n.a.open(ctx, info)
	if err != nil {
		return err
	}
	return t.WriteNar(ctx, w, blocks{n.a, p, n.a.cfg.ReadTimeout}, 0, -1)
}

// AddLog implements worker.Files: the log is for who looks on this machine.
func (n *nixSession) AddLog(ctx context.Context, drv flox.StorePath, log io.Reader) error {
	return n.logs.add(ctx, drv, log)
}

// Substitutable implements worker.Substitutes. What is valid in the storehouse
// counts: to a client it is what can be had without building.
func (n *nixSession) Substitutable(ctx context.Context, paths map[flox.StorePath]string) ([]worker.Substitutable, error) {
	var found []worker.Substitutable
	q := &floxv1.SubstituteRequest{Dry: true, Alone: true}
	var mu sync.Mutex
	group, look := errgroup.WithContext(ctx)
	group.SetLimit(openAtOnce)
	for p := range paths {
		group.Go(func() error {
			info, err := n.a.lookup(look, p)
			if err != nil && !errors.Is(err, flox.ErrNotFound) {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				q.Paths = append(q.Paths, string(p))
				return nil
			}
			found = append(found, worker.Substitutable{Path: p, Deriver: info.Deriver, References: info.References, NarSize: info.NarSize})
			return nil
		})
	}
	if err := group.Wait(); err != nil || len(q.Paths) == 0 {
		return found, err
	}
	err := n.a.substitute(ctx, q, func(m *floxv1.SubstituteProgress) error {
		for _, f := range m.GetFound() {
			info, err := api.ToPathInfo(f.GetInfo())
			if err != nil {
				return err
			}
			if _, asked := paths[info.Path]; asked {
				found = append(found, worker.Substitutable{
					Path: info.Path, Deriver: info.Deriver, References: info.References,
					DownloadSize: f.GetDownloadSize(), NarSize: info.NarSize,
				})
			}
		}
		return nil
	})
	if connect.CodeOf(err) == connect.CodeUnimplemented {
		err = nil
	}
	return found, err
}

// Ensure implements worker.Substitutes.
func (n *nixSession) Ensure(ctx context.Context, p flox.StorePath) error {
	if _, err := n.a.local.find(ctx, n.a, p, elsewhere, nil); err == nil {
		return nil
	}
	_, err := n.a.lookup(ctx, p)
	if !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if n.s.Options().UseSubstitutes {
		failed, err := n.substitute(ctx, []flox.StorePath{p})
		if err != nil {
			return err
		}
		if failed[p] != "" {
			n.s.Log().Message(worker.LevelInfo, failed[p])
		}
		if _, err := n.a.lookup(ctx, p); err == nil {
			return nil
		}
	}
	return worker.CannotMake(n.a.cfg.StoreDir, p)
}

// substitute has the storehouse fetch what its upstreams have, and shows it.
func (n *nixSession) substitute(ctx context.Context, paths []flox.StorePath) (map[flox.StorePath]string, error) {
	dir := n.a.cfg.StoreDir
	all := n.s.Log().Start(worker.LevelInfo, worker.ActCopyPaths, "", nil)
	defer all.Stop()
	return n.a.substituted(ctx, paths, func(m *floxv1.SubstituteProgress) error {
		all.Result(worker.ResProgress, worker.Number(m.GetDonePaths()), worker.Number(m.GetTotalPaths()), worker.Number(0), worker.Number(0))
		if now := m.GetNow(); now != "" {
			n.s.Log().Message(worker.LevelInfo, "copied path '"+dir.Join(flox.StorePath(now))+"' into the storehouse")
		}
		return nil
	})
}
