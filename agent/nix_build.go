package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/worker"
	"github.com/floxctl/flox/p2p"
)

// builds calls one server after the other about derivations.
func (n *nixSession) builds(ctx context.Context, ask func(context.Context, buildsClient) error) error {
	return n.a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) error { return ask(ctx, n.a.calls.builds(house)) })
}

// Outputs implements worker.Derivations.
func (n *nixSession) Outputs(ctx context.Context, drv flox.StorePath) (map[string]flox.StorePath, error) {
	staged := make(map[string]flox.StorePath)
	d, err := n.a.staged.Derivation(ctx, drv)
	if err == nil {
		whole := true
		for name, o := range d.Outputs {
			staged[name] = o.Path
			whole = whole && o.Path != ""
		}
		if whole {
			return staged, nil
		}
	}
	// Of other outputs only who has built them knows the paths.
	var response *connect.Response[floxv1.DerivationOutputsResponse]
	err = n.builds(ctx, func(ctx context.Context, c buildsClient) (err error) {
		response, err = c.DerivationOutputs(ctx, connect.NewRequest(&floxv1.DerivationOutputsRequest{Drv: string(drv)}))
		return err
	})
	if errors.Is(err, flox.ErrNotFound) && len(staged) > 0 {
		return staged, n.realiseOutputs(ctx, d, staged)
	}
	if err != nil {
		return nil, n.say(drv, err)
	}
	out := make(map[string]flox.StorePath)
	for _, o := range response.Msg.GetOutputs() {
		p := flox.StorePath(o.GetPath())
		if p != "" {
			if p, err = flox.ParseStorePath(o.GetPath()); err != nil {
				return nil, err
			}
		}
		out[o.GetName()] = p
	}
	return out, n.realiseOutputs(ctx, d, out)
}

// Derivers implements worker.Derivations.
func (n *nixSession) Derivers(ctx context.Context, p flox.StorePath) ([]flox.StorePath, error) {
	var response *connect.Response[floxv1.ValidDeriversResponse]
	err := n.builds(ctx, func(ctx context.Context, c buildsClient) (err error) {
		response, err = c.ValidDerivers(ctx, connect.NewRequest(&floxv1.ValidDeriversRequest{Path: string(p)}))
		return err
	})
	if err != nil {
		return nil, err
	}
	return storePaths(response.Msg.GetDrvs())
}

// derivedPaths are targets as the storehouse is asked for them.
func derivedPaths(targets []worker.DerivedPath) []*floxv1.DerivedPath {
	out := make([]*floxv1.DerivedPath, 0, len(targets))
	for _, t := range targets {
		m := &floxv1.DerivedPath{Path: string(t.Path), Outputs: t.Outputs}
		if t.All {
			m.Outputs = []string{"*"}
		}
		out = append(out, m)
	}
	return out
}

// Missing implements worker.Builder.
func (n *nixSession) Missing(ctx context.Context, targets []worker.DerivedPath) (*worker.Missing, error) {
	targets, _, err := n.open(ctx, targets, worker.BuildNormal)
	if err != nil || len(targets) == 0 {
		return &worker.Missing{}, err
	}
	var response *connect.Response[floxv1.MissingResponse]
	err = n.builds(ctx, func(ctx context.Context, c buildsClient) (err error) {
		response, err = c.Missing(ctx, connect.NewRequest(&floxv1.MissingRequest{Paths: derivedPaths(targets), NoSubstitutes: !n.s.Options().UseSubstitutes}))
		return err
	})
	if err != nil {
		return nil, err
	}
	m := &worker.Missing{DownloadSize: response.Msg.GetDownloadBytes(), NarSize: response.Msg.GetNarBytes()}
	var errs [3]error
	m.Build, errs[0] = storePaths(response.Msg.GetWillBuild())
	m.Substitute, errs[1] = storePaths(response.Msg.GetWillSubstitute())
	m.Unknown, errs[2] = storePaths(response.Msg.GetUnknown())
	return m, errors.Join(errs[:]...)
}

// open gives the targets that are not valid already, and has the derivations among
// them in the storehouse. here are, by derivedKey, those that only this machine knows
// to be.
func (n *nixSession) open(ctx context.Context, targets []worker.DerivedPath, mode worker.BuildMode) (left []worker.DerivedPath, here map[string]*floxv1.BuildOutcome, err error) {
	var paths []flox.StorePath
	for _, t := range targets {
		if t.IsOpaque() {
			paths = append(paths, t.Path)
		}
	}
	valid, _, err := n.a.sortValid(ctx, paths)
	if err != nil {
		return nil, nil, err
	}
	have := make(map[flox.StorePath]bool, len(valid))
	for _, p := range valid {
		have[p] = true
	}
	here = make(map[string]*floxv1.BuildOutcome)
	for i, m := range derivedPaths(targets) {
		t := targets[i]
		if !t.IsOpaque() && mode == worker.BuildNormal {
			known, err := n.builtTarget(ctx, t)
			if known == nil && err == nil {
				known, err = n.realisedTarget(ctx, t)
			}
			if err != nil {
				return nil, nil, err
			}
			if known != nil {
				here[derivedKey(m)] = known
			}
		}
		if here[derivedKey(m)] == nil && (!t.IsOpaque() || !have[t.Path]) {
			left = append(left, t)
		}
	}
	return left, here, n.publish(ctx, left)
}

// Build implements worker.Builder: the storehouse builds, the client sees what a
// Nix daemon would show.
func (n *nixSession) Build(ctx context.Context, targets []worker.DerivedPath, mode worker.BuildMode) ([]worker.TargetResult, error) {
	if mode == worker.BuildRepair {
		results, err := n.Build(ctx, targets, worker.BuildNormal)
		if err == nil {
			err = n.repair(ctx, results)
		}
		return results, err
	}
	left, results, err := n.open(ctx, targets, mode)
	if err != nil {
		return nil, err
	}
	if len(left) > 0 {
		if err := n.build(ctx, left, mode, results); err != nil {
			return nil, err
		}
	}
	out := make([]worker.TargetResult, 0, len(targets))
	for i, m := range derivedPaths(targets) {
		t := targets[i]
		outcome := results[derivedKey(m)]
		switch {
		case outcome != nil:
		case !t.IsOpaque() || slices.ContainsFunc(left, func(l worker.DerivedPath) bool { return l.IsOpaque() && l.Path == t.Path }):
			return nil, fmt.Errorf("the storehouse says nothing about %s: %w", n.a.cfg.StoreDir.Join(t.Path), flox.ErrUnreachable)
		default:
			outcome = &floxv1.BuildOutcome{Status: uint32(worker.AlreadyValid)}
		}
		r, err := n.result(ctx, t, outcome)
		if err != nil {
			return nil, err
		}
		out = append(out, worker.TargetResult{Target: t, BuildResult: *r})
	}
	return out, nil
}

// build has the storehouse build targets and collects their outcomes.
func (n *nixSession) build(ctx context.Context, targets []worker.DerivedPath, mode worker.BuildMode, results map[string]*floxv1.BuildOutcome) error {
	o := n.s.Options()
	request := &floxv1.BuildRequest{
		Paths: derivedPaths(targets), Mode: floxv1.BuildMode(mode), //nolint:gosec // 0 to 2
		Options: &floxv1.BuildOptions{
			KeepGoing: o.KeepGoing, NoSubstitutes: !o.UseSubstitutes, Cores: uint32(min(o.Cores, 1<<16)), //nolint:gosec // bounded
			MaxSilentSeconds: uint64(max(0, int64(o.MaxSilent/time.Second))), //nolint:gosec // not negative
			TimeoutSeconds:   uint64(max(0, int64(o.Timeout/time.Second))),   //nolint:gosec // not negative
		},
	}
	show := newBuildShow(n, targets, mode)
	defer show.end()
	return n.buildStream(ctx, request, show, results)
}

func derivedKey(p *floxv1.DerivedPath) string {
	return fmt.Sprintf("%s!%q", p.GetPath(), p.GetOutputs())
}

// buildStream follows a build; when a server leaves, the next goes on from what
// is valid by then.
func (n *nixSession) buildStream(ctx context.Context, request *floxv1.BuildRequest, show *buildShow, results map[string]*floxv1.BuildOutcome) error {
	var failed []error
	for _, house := range n.a.houses.order() {
		err := n.buildAt(ctx, house, request, show, results)
		if ctx.Err() != nil || !away(err) {
			n.a.houses.answered(house)
			return err
		}
		n.a.houses.failed(house)
		failed = append(failed, err)
	}
	return because(append(failed, flox.ErrUnreachable)...)
}

func (n *nixSession) buildAt(ctx context.Context, house p2p.PeerID, request *floxv1.BuildRequest, show *buildShow, results map[string]*floxv1.BuildOutcome) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends it there too
	defer n.a.houses.wrote()
	stream, err := n.a.calls.builds(house).Build(ctx, connect.NewRequest(request))
	if err != nil {
		return api.FromConnect(err)
	}
	defer stream.Close()
	logs := n.logs.fetches(ctx, n.a.calls.builds(house))
	defer logs.wait() // they are there when the client hears that it is over
	for stream.Receive() {
		m := stream.Msg()
		if m.GetStop() != nil {
			logs.stopped(m.GetStop())
		}
		if r := m.GetResult(); r != nil {
			results[derivedKey(r.GetPath())] = r.GetOutcome()
			continue
		}
		show.event(m)
	}
	return api.FromConnect(stream.Err())
}

// result puts an outcome in Nix's form. What was built is known here, and thus
// in the mount, when the client hears of it.
func (n *nixSession) result(ctx context.Context, t worker.DerivedPath, m *floxv1.BuildOutcome) (*worker.BuildResult, error) {
	r := &worker.BuildResult{
		Status: worker.BuildStatus(m.GetStatus()), Error: n.failure(t.Path, m), TimesBuilt: uint64(m.GetTimesBuilt()), NonDeterministic: m.GetNonDeterministic(),
	}
	if m.GetStartUnix() > 0 {
		r.Start, r.Stop = time.Unix(m.GetStartUnix(), 0), time.Unix(m.GetStopUnix(), 0)
	}
	var valid []flox.StorePath
	if t.IsOpaque() && r.Status.Succeeded() {
		valid = append(valid, t.Path)
	}
	for _, o := range m.GetOutputs() {
		real := o.GetRealisation()
		if real == nil {
			real = &floxv1.Realisation{Id: o.GetId(), Path: o.GetPath()}
		}
		known, err := nixRealisation(real)
		if err != nil {
			return nil, err
		}
		r.Outputs = append(r.Outputs, *known)
		valid = append(valid, known.Path)
	}
	if !r.Status.Succeeded() {
		return r, nil
	}
	for _, p := range valid {
		if err := n.keep(ctx, p); err != nil {
			return nil, err
		}
		if known, _ := n.a.validHere(p); known {
			continue
		}
		// The watch stream may not have said yet that it is valid.
		err := n.a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) error {
			_, err := n.a.resolver.askHouse(ctx, house, p)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("%s was built: %w", n.a.cfg.StoreDir.Join(p), err)
		}
	}
	return r, nil
}

// BuildDerivation implements worker.Builder. It is what another Nix sends to a
// remote builder: a derivation without the derivations it came from. It is
// written down here as one of its own, which the storehouse checks like any
// other; so outputs that their content proves can be built this way, and of the others
// those of derivations that are known here or there with all they came from.
func (n *nixSession) BuildDerivation(ctx context.Context, p flox.StorePath, drv *nix.Derivation, mode worker.BuildMode) (*worker.BuildResult, error) {
	for name, o := range drv.Outputs {
		if o.Algo != "" {
			continue
		}
		// Nothing says that this is what the path stands for, but the whole graph.
		if known, err := n.Outputs(ctx, p); err != nil || known[name] != o.Path {
			return nil, &worker.Error{Message: "you are not privileged to build input-addressed derivations", Cause: flox.ErrDenied}
		}
		return n.buildAll(ctx, p, mode)
	}
	path, text, err := drv.DrvPath(n.a.cfg.StoreDir)
	if err != nil {
		return nil, err
	}
	if _, err := n.a.staged.AddText(ctx, path.Name(), text, drv.References()); err != nil {
		return nil, err
	}
	return n.buildAll(ctx, path, mode)
}

// buildAll builds every output of a derivation.
func (n *nixSession) buildAll(ctx context.Context, drv flox.StorePath, mode worker.BuildMode) (*worker.BuildResult, error) {
	results, err := n.Build(ctx, []worker.DerivedPath{{Path: drv, All: true}}, mode)
	if err != nil {
		return nil, err
	}
	return &results[0].BuildResult, nil
}
