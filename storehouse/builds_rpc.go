package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of calls about builds.
const (
	maxBuildCalls  = 256 // at once
	maxRealisedIDs = 4096
	maxReferrers   = 1 << 16
	logPiece       = 256 << 10
	maxKeptLog     = 1 << 30
)

// buildsRPC answers members' calls about builds.
type buildsRPC struct {
	floxv1connect.UnimplementedBuildsHandler
	*builds
	slots chan struct{}
	stop  context.Context //nolint:containedctx // ends streams that would not end by themselves
}

func newBuildsRPC(b *builds, stop context.Context) *buildsRPC { //nolint:revive // stop is kept, not used
	return &buildsRPC{builds: b, slots: make(chan struct{}, maxBuildCalls), stop: stop}
}

// Build is floxv1connect.BuildsHandler.
func (c *buildsRPC) Build(ctx context.Context, req *connect.Request[floxv1.BuildRequest], stream *connect.ServerStream[floxv1.BuildEvent]) error {
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	default:
		return api.ToConnect(fmt.Errorf("%d builds are asked for at once, try again: %w", maxBuildCalls, flox.ErrBusy))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.stop, func() { cancel(errStopping) })()
	asked := req.Peer().Addr
	if m, ok := c.s.roster.machine(p2p.PeerID(asked)); ok {
		asked = m.GetName()
	}
	return api.ToConnect(ended(ctx, c.serve(ctx, asked, req.Msg, stream.Send)))
}

// serve carries out a request and sends what happens.
func (c *buildsRPC) serve(ctx context.Context, asked string, req *floxv1.BuildRequest, send func(*floxv1.BuildEvent) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	to, done := newSink(), make(chan error, 1)
	go func() { done <- c.realise(ctx, asked, req, to) }()
	finished := false
	var failed error
	for {
		for _, e := range to.take() {
			if failed == nil {
				failed = send(e)
			}
		}
		if failed != nil {
			cancel() // nobody listens
		}
		if finished {
			return failed
		}
		select {
		case <-to.wake:
		case err := <-done:
			finished = true
			if failed == nil && err != nil {
				return err
			}
		}
	}
}

// realise has what a request names built, and puts the results into to.
func (b *builds) realise(ctx context.Context, asked string, req *floxv1.BuildRequest, to *sink) error {
	if req.GetMode() == floxv1.BuildMode_BUILD_MODE_REPAIR {
		return fmt.Errorf("the storehouse repairs what is damaged by itself: build mode repair is not for it: %w", flox.ErrBadInput)
	}
	r := &realising{b: b, asked: asked, req: req, to: to, check: req.GetMode() == floxv1.BuildMode_BUILD_MODE_CHECK, outcome: map[*node]*floxv1.BuildOutcome{}, fetched: map[flox.StorePath]bool{}}
	if err := r.substitute(ctx); err != nil {
		return err
	}
	if len(r.graph.order) > 0 {
		queued, err := b.s.farm.ready(ctx)
		if err != nil {
			return err
		}
		release, err := b.s.Hold(ctx, r.graph.paths()...)
		if err != nil {
			return err
		}
		defer release()
		if err := b.begins(ctx, r.graph, r.check); err != nil {
			return err
		}
		if queued {
			err = r.queue(ctx)
		} else {
			err = r.realise(ctx)
		}
		if err != nil {
			return err
		}
	}
	return r.results(ctx)
}

// begins refuses builds that do not run yet when the disk takes in only what builds
// that do need. ErrFull.
func (b *builds) begins(ctx context.Context, g *graph, check bool) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, n := range g.order {
		if b.flights[buildKey{n.path, check}] != nil {
			continue
		}
		if _, err := b.s.disk.admit(ctx); err != nil {
			return fmt.Errorf("build %s: %w", n.path, err)
		}
		return nil
	}
	return nil
}

// Missing is floxv1connect.BuildsHandler.
func (c *buildsRPC) Missing(ctx context.Context, req *connect.Request[floxv1.MissingRequest]) (*connect.Response[floxv1.MissingResponse], error) {
	g, err := c.plan(ctx, req.Msg.GetPaths(), planOptions{noSubstitutes: req.Msg.GetNoSubstitutes()})
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(g.missing()), nil
}

// DerivationOutputs is floxv1connect.BuildsHandler.
func (c *buildsRPC) DerivationOutputs(ctx context.Context, req *connect.Request[floxv1.DerivationOutputsRequest]) (*connect.Response[floxv1.DerivationOutputsResponse], error) {
	out := &floxv1.DerivationOutputsResponse{}
	drv, err := parseDrv(req.Msg.GetDrv())
	var d *nix.Derivation
	if err == nil {
		d, err = c.s.derivation(ctx, drv)
	}
	if err == nil {
		out.Outputs, err = c.built(ctx, d, d.OutputNames())
	}
	return answer(out, err)
}

// Realisations is floxv1connect.BuildsHandler.
func (c *buildsRPC) Realisations(ctx context.Context, req *connect.Request[floxv1.RealisationsRequest]) (*connect.Response[floxv1.RealisationsResponse], error) {
	out := &floxv1.RealisationsResponse{}
	if n := len(req.Msg.GetIds()); n > maxRealisedIDs {
		return nil, api.ToConnect(fmt.Errorf("%d realisations, want at most %d: %w", n, maxRealisedIDs, flox.ErrBadInput))
	}
	for _, text := range req.Msg.GetIds() {
		id, err := nix.ParseRealisationID(text)
		if err != nil {
			return nil, api.ToConnect(err)
		}
		r, err := c.s.realised(ctx, id)
		if err != nil {
			return nil, api.ToConnect(err)
		}
		if r != nil {
			out.Realisations = append(out.Realisations, r)
		}
	}
	return answer(out, nil)
}

// RegisterRealisation is floxv1connect.BuildsHandler.
func (c *buildsRPC) RegisterRealisation(ctx context.Context, req *connect.Request[floxv1.RegisterRealisationRequest]) (*connect.Response[floxv1.RegisterRealisationResponse], error) {
	return answer(&floxv1.RegisterRealisationResponse{}, c.register(ctx, req.Msg.GetRealisation()))
}

// register takes in a realisation that a key of ours vouches for.
func (b *builds) register(ctx context.Context, m *floxv1.Realisation) error {
	r := toRealisation(m)
	if r.ID.String() != m.GetId() {
		_, err := nix.ParseRealisationID(m.GetId())
		return errors.Join(err, fmt.Errorf("realisation %.300q: %w", m.GetId(), flox.ErrBadInput))
	}
	have, err := b.s.id.ring.get()
	if err != nil {
		return err
	}
	ring, err := nix.ParseKeyRing(public(have.nix))
	if err != nil {
		return err
	}
	if _, ok := ring.Verify([]byte(r.Fingerprint()), m.GetSignatures()); !ok {
		return fmt.Errorf("cannot register realisation '%s' because it lacks a signature by a trusted key: %w", m.GetId(), flox.ErrDenied)
	}
	valid, err := b.s.isValid(ctx, r.Path)
	if err != nil {
		return err
	}
	if !valid {
		return fmt.Errorf("realisation %s: %s is not valid here, upload it first: %w", m.GetId(), r.Path, flox.ErrNotFound)
	}
	if _, err := b.s.disk.admit(ctx); err != nil {
		return fmt.Errorf("realisation %s: %w", m.GetId(), err)
	}
	// Under no derivation in particular: the id is all that is known of it.
	return b.note(ctx, &floxv1.NoteBuild{Outputs: []*floxv1.BuiltOutput{{Name: r.ID.Output, Path: string(r.Path), Id: m.GetId(), Realisation: m}}})
}

// ValidDerivers is floxv1connect.BuildsHandler.
func (c *buildsRPC) ValidDerivers(ctx context.Context, req *connect.Request[floxv1.ValidDeriversRequest]) (*connect.Response[floxv1.ValidDeriversResponse], error) {
	out := &floxv1.ValidDeriversResponse{}
	path, err := flox.ParseStorePath(req.Msg.GetPath())
	if err != nil {
		return nil, api.ToConnect(err)
	}
	err = c.s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		names, err := suffixes(r, hashKey(deriverKey, path.HashPart()), maxDerivers)
		if err != nil {
			return err
		}
		if info, err := validAs(r, string(path)); err != nil {
			return err
		} else if d := info.GetDeriver(); d != "" && !slices.Contains(names, d) {
			names = append(names, d)
		}
		for _, name := range names {
			if valid, err := validAs(r, name); err != nil {
				return err
			} else if valid != nil {
				out.Drvs = append(out.Drvs, name)
			}
		}
		return nil
	})
	slices.Sort(out.Drvs)
	return answer(out, err)
}

// Referrers is floxv1connect.BuildsHandler.
func (c *buildsRPC) Referrers(ctx context.Context, req *connect.Request[floxv1.ReferrersRequest]) (*connect.Response[floxv1.ReferrersResponse], error) {
	out := &floxv1.ReferrersResponse{}
	path, err := flox.ParseStorePath(req.Msg.GetPath())
	if err != nil {
		return nil, api.ToConnect(err)
	}
	err = c.s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		hashes, err := suffixes(r, hashKey(referrerKey, path.HashPart()), maxReferrers+1)
		if err != nil {
			return err
		}
		if out.More = len(hashes) > maxReferrers; out.More {
			hashes = hashes[:maxReferrers]
		}
		for _, h := range hashes {
			info, err := readInfo(r, h)
			if err != nil {
				return err
			}
			out.Paths = append(out.Paths, info.GetPath())
		}
		return nil
	})
	slices.Sort(out.Paths)
	return answer(out, err)
}

// BuildLog is floxv1connect.BuildsHandler.
func (c *buildsRPC) BuildLog(ctx context.Context, req *connect.Request[floxv1.BuildLogRequest], stream *connect.ServerStream[floxv1.BuildLogPiece]) error {
	record, log, err := c.log(ctx, req.Msg.GetDrv())
	if err != nil {
		return api.ToConnect(err)
	}
	for first := true; first || len(log) > 0; first = false {
		piece := &floxv1.BuildLogPiece{Data: log[:min(len(log), logPiece)]}
		if first {
			piece.Record = record
		}
		if err := stream.Send(piece); err != nil {
			return err
		}
		log = log[len(piece.GetData()):]
	}
	return nil
}

// log gives the log of the last build of a derivation; ErrNotFound.
func (b *builds) log(ctx context.Context, name string) (record *floxv1.BuildRecord, log []byte, err error) {
	drv, err := parseDrv(name)
	if err != nil {
		return nil, nil, err
	}
	err = b.s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		record, err = readRecord(r, drv.HashPart())
		return err
	})
	if errors.Is(err, flox.ErrNotFound) || err == nil && record.GetDrv() != string(drv) {
		return nil, nil, fmt.Errorf("build log of '%s' is not available: it was not built here, or its log was collected with what it built: %w", b.s.cfg.StoreDir.Join(drv), flox.ErrNotFound)
	}
	if err != nil {
		return nil, nil, err
	}
	info, err := b.s.Info(ctx, flox.StorePath(record.GetLog()).HashPart())
	if err != nil {
		return nil, nil, err
	}
	log, err = b.s.fileText(ctx, info, maxKeptLog)
	return record, log, err
}
