package storehouse

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	cluster "github.com/floxctl/flox/raft"
)

// maxFetchRounds is how often one build asks upstreams anew for what they failed to
// give; then everything is built.
const maxFetchRounds = 4

// upstreamLack is something not valid that upstreams may have, all or nothing of it.
type upstreamLack struct {
	n     *node // whose outputs it is; nil = a path for itself
	paths []flox.StorePath
	drv   bool // it is a derivation of which outputs are wanted

	unrealised bool // which paths its outputs have is not known
}

// anyUpstream has nobody asked where there is nobody to ask.
func (g *graph) anyUpstream(ctx context.Context) error {
	if g.opts.noSubstitutes {
		return nil
	}
	list, err := g.b.s.upstreams.current(ctx, cluster.Local) // after catchUpReads
	g.opts.noSubstitutes = len(list) == 0
	return err
}

// askUpstreams asks for what is lacked so far, and has built what nobody has whole.
func (g *graph) askUpstreams(ctx context.Context) error {
	lacks := g.lacks
	g.lacks = nil
	if err := g.askRealisations(ctx, lacks); err != nil {
		return err
	}
	var names []string
	for _, l := range lacks {
		for _, p := range l.paths {
			if !g.asked[p] && !g.opts.noSubstitutes && !g.opts.denied[p] {
				g.asked[p] = true
				names = append(names, string(p))
			}
		}
	}
	for part := range slices.Chunk(names, maxSubstituted) {
		if err := g.askFor(ctx, part); err != nil {
			return err
		}
	}
	for _, l := range lacks {
		had := !l.unrealised && !slices.ContainsFunc(l.paths, func(p flox.StorePath) bool { return g.offers[p] == nil })
		switch {
		case l.n != nil && l.n.build: // more of it is wanted than upstreams have
		case had && l.drv:
			g.first = append(g.first, l.paths...)
		case had:
			g.fetch = append(g.fetch, l.paths...)
		case l.n != nil:
			if err := g.toBuild(ctx, l.n); err != nil {
				return err
			}
		default:
			g.unknown = append(g.unknown, l.paths...)
		}
	}
	return nil
}

// askFor finds which of some paths upstreams have with all they refer to.
func (g *graph) askFor(ctx context.Context, names []string) error {
	var failed []string
	err := g.b.s.Substitute(ctx, SubstituteOptions{Paths: names, Dry: true}, func(p *floxv1.SubstituteProgress) {
		for _, f := range p.GetFound() {
			g.offers[flox.StorePath(f.GetInfo().GetPath())] = f
		}
		for _, f := range p.GetFailed() {
			failed = append(failed, f.GetPath())
		}
	})
	for _, p := range failed {
		delete(g.offers, flox.StorePath(p))
	}
	return err
}

// addSubstitutes says what would be substituted, with what it refers to.
func (g *graph) addSubstitutes(out *floxv1.MissingResponse) {
	all := map[flox.StorePath]bool{}
	for todo := slices.Clone(g.fetch); len(todo) > 0; {
		p := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		offer := g.offers[p]
		if offer == nil || all[p] { // valid, or seen
			continue
		}
		all[p] = true
		out.DownloadBytes += offer.GetDownloadSize()
		out.NarBytes += offer.GetInfo().GetNarSize()
		for _, ref := range offer.GetInfo().GetReferences() {
			todo = append(todo, flox.StorePath(ref))
		}
	}
	for _, p := range slices.Sorted(maps.Keys(all)) {
		out.WillSubstitute = append(out.WillSubstitute, string(p))
	}
	for _, p := range g.first { // what they lead to is known once they are here
		out.Unknown = append(out.Unknown, string(p))
	}
	slices.Sort(out.Unknown)
}

// substitute plans, and makes valid what upstreams have. What they fail to give is
// built.
func (r *realising) substitute(ctx context.Context) (err error) {
	opts := planOptions{check: r.check, noSubstitutes: r.req.GetOptions().GetNoSubstitutes(), denied: map[flox.StorePath]bool{}}
	for round := 0; ; round++ {
		opts.noSubstitutes = opts.noSubstitutes || round == maxFetchRounds
		if r.graph, err = r.b.plan(ctx, r.req.GetPaths(), opts); err != nil {
			return err
		}
		wanted := append(slices.Clone(r.graph.first), r.graph.fetch...)
		failed := false
		for part := range slices.Chunk(wanted, maxSubstituted) {
			lost, err := r.bring(ctx, part)
			if err != nil {
				return err
			}
			for _, p := range part {
				_, gone := lost[p]
				r.fetched[p] = !gone
				opts.denied[p] = gone
				failed = failed || gone
			}
		}
		if !failed && len(r.graph.first) == 0 {
			return r.b.keepRealisations(ctx, r.graph.realised)
		}
	}
}

// bring fetches paths from upstreams and gives those that could not be had, and why.
func (r *realising) bring(ctx context.Context, paths []flox.StorePath) (lost map[flox.StorePath]string, err error) {
	q := &floxv1.SubstituteRequest{}
	for _, p := range paths {
		q.Paths = append(q.Paths, string(p))
	}
	lost = map[flox.StorePath]string{}
	dir := r.b.s.cfg.StoreDir
	err = r.b.s.substituteFor(ctx, q, func(p *floxv1.SubstituteProgress) {
		for _, f := range p.GetFound() {
			r.say(3, "copying path '%s' from '%s'", dir.Join(flox.StorePath(f.GetInfo().GetPath())), f.GetUpstream())
		}
		for _, f := range p.GetFailed() {
			lost[flox.StorePath(f.GetPath())] = f.GetReason()
			r.say(1, "path '%s' cannot be substituted: %s", dir.Join(flox.StorePath(f.GetPath())), f.GetReason())
		}
	})
	return lost, err
}

// say tells the caller something at one of Nix's verbosities.
func (r *realising) say(level uint32, format string, args ...any) {
	r.to.put(&floxv1.BuildEvent{Event: &floxv1.BuildEvent_Note{Note: &floxv1.BuildNote{Level: level, Text: fmt.Sprintf(format, args...)}}})
}

// had is how a valid path came to be there.
func (r *realising) had(p flox.StorePath) buildfarm.Status {
	if r.fetched[p] {
		return buildfarm.Substituted
	}
	return buildfarm.AlreadyValid
}
