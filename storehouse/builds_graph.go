package storehouse

import (
	"context"
	"fmt"
	"slices"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of one question about derivations.
const (
	maxDerivedPaths = 1 << 16
	maxGraph        = 1 << 17 // derivations it leads to
)

// node is a derivation of a graph.
type node struct {
	path   flox.StorePath
	drv    *nix.Derivation
	wanted map[string]bool // outputs
	build  bool            // some of them are not valid
	inputs []*node         // that are to be built before it
}

// planOptions say how paths are to be had.
type planOptions struct {
	check         bool                    // derivations asked for are built also if their outputs are valid
	noSubstitutes bool                    // upstreams are not asked
	denied        map[flox.StorePath]bool // what upstreams failed to give
}

// graph is what has to be done to have some paths.
type graph struct {
	b       *builds
	opts    planOptions
	nodes   map[flox.StorePath]*node
	todo    []*node          // whose wanted outputs are to be looked at
	order   []*node          // those to build, inputs before what needs them
	unknown []flox.StorePath // neither valid nor known how to make

	lacks  []upstreamLack                               // what upstreams are to be asked for
	asked  map[flox.StorePath]bool                      // what they were
	offers map[flox.StorePath]*floxv1.SubstitutablePath // what they have, with what that refers to
	fetch  []flox.StorePath                             // what is to be substituted
	first  []flox.StorePath                             // derivations to be substituted before more is known

	realised []*nix.Realisation // what upstreams say became of outputs
}

// plan finds what has to be substituted and built to have some paths.
func (b *builds) plan(ctx context.Context, paths []*floxv1.DerivedPath, opts planOptions) (*graph, error) {
	if len(paths) > maxDerivedPaths {
		return nil, fmt.Errorf("%d paths, want at most %d: %w", len(paths), maxDerivedPaths, flox.ErrBadInput)
	}
	if err := b.s.catchUpReads(ctx); err != nil {
		return nil, err
	}
	g := &graph{b: b, opts: opts, nodes: map[flox.StorePath]*node{}, asked: map[flox.StorePath]bool{}, offers: map[flox.StorePath]*floxv1.SubstitutablePath{}}
	if err := g.anyUpstream(ctx); err != nil {
		return nil, err
	}
	for _, p := range paths {
		path, err := flox.ParseStorePath(p.GetPath())
		if err != nil {
			return nil, err
		}
		if len(p.GetOutputs()) == 0 {
			err = g.opaque(ctx, path)
		} else {
			err = g.wants(ctx, path, p.GetOutputs(), opts.check)
		}
		if err != nil {
			return nil, err
		}
	}
	for len(g.todo)+len(g.lacks) > 0 {
		// First all that is known here, so that upstreams are asked for much at once.
		for len(g.todo) > 0 {
			n := g.todo[len(g.todo)-1]
			g.todo = g.todo[:len(g.todo)-1]
			if err := g.look(ctx, n); err != nil {
				return nil, err
			}
		}
		if err := g.askUpstreams(ctx); err != nil {
			return nil, err
		}
	}
	g.sort()
	return g, nil
}

// paths are the derivations of the graph and their outputs, built and to be built.
func (g *graph) paths() (all []flox.StorePath) {
	for _, n := range g.nodes {
		all = append(all, n.path)
		if n.drv == nil {
			continue
		}
		for _, o := range n.drv.Outputs {
			if o.Path != "" {
				all = append(all, o.Path)
			}
		}
	}
	return all
}

// opaque looks at a path that is not asked for as an output.
func (g *graph) opaque(ctx context.Context, p flox.StorePath) error {
	valid, err := g.b.s.isValid(ctx, p)
	if err == nil && !valid {
		g.lacks = append(g.lacks, upstreamLack{paths: []flox.StorePath{p}})
	}
	return err
}

// catchUpReads waits until reads of this server's own facts see all that was
// answered to anybody before.
func (s *Server) catchUpReads(ctx context.Context) error {
	return s.read(ctx, cluster.Linearizable, func(*cluster.Reader) error { return nil })
}

// isValid reports whether exactly this path is valid, as far as this server knows.
func (s *Server) isValid(ctx context.Context, p flox.StorePath) (valid bool, err error) {
	err = s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		info, err := validAs(r, string(p))
		valid = info != nil
		return err
	})
	return valid, err
}

// wants adds outputs of a derivation to what is wanted.
func (g *graph) wants(ctx context.Context, drv flox.StorePath, outputs []string, build bool) error {
	n := g.nodes[drv]
	if n == nil {
		if len(g.nodes) >= maxGraph {
			return fmt.Errorf("more than %d derivations are to be looked at: %w", maxGraph, flox.ErrFull)
		}
		if _, err := parseDrv(string(drv)); err != nil {
			return err
		}
		n = &node{path: drv, wanted: map[string]bool{}}
		valid, err := g.b.s.isValid(ctx, drv)
		if err != nil {
			return err
		}
		if valid {
			n.drv, err = g.b.s.derivation(ctx, drv)
		} else {
			g.lacks = append(g.lacks, upstreamLack{paths: []flox.StorePath{drv}, drv: true})
		}
		if err != nil {
			return err
		}
		g.nodes[drv] = n
	}
	if n.drv == nil {
		return nil
	}
	if slices.Contains(outputs, "*") {
		outputs = n.drv.OutputNames()
	}
	before := len(n.wanted)
	for _, name := range outputs {
		if _, ok := n.drv.Outputs[name]; !ok {
			return fmt.Errorf("derivation '%s' does not have wanted outputs '%s': %w", g.b.s.cfg.StoreDir.Join(drv), name, flox.ErrBadInput)
		}
		n.wanted[name] = true
	}
	if build && !n.build || len(n.wanted) > before {
		g.todo = append(g.todo, n)
	}
	if build && !n.build {
		return g.toBuild(ctx, n)
	}
	return nil
}

// look finds whether a derivation has to be built for what is wanted of it.
func (g *graph) look(ctx context.Context, n *node) error {
	if n.build {
		return nil
	}
	missing, known, err := g.b.lacking(ctx, n)
	switch {
	case err != nil || known && len(missing) == 0:
		return err
	case n.drv.AllowsSubstitutes():
		g.lacks = append(g.lacks, upstreamLack{n: n, paths: missing, unrealised: !known})
		return nil
	}
	return g.toBuild(ctx, n)
}

// lacking gives the outputs wanted of a node that are not valid; known says that the
// paths of all that are wanted are known.
func (b *builds) lacking(ctx context.Context, n *node) (missing []flox.StorePath, known bool, err error) {
	for name := range n.wanted {
		p, err := b.outputPath(ctx, n.drv, name)
		if err != nil || p == "" {
			return nil, false, err
		}
		valid, err := b.s.isValid(ctx, p)
		if err != nil {
			return nil, false, err
		}
		if !valid {
			missing = append(missing, p)
		}
	}
	return missing, true, nil
}

// haveOutputs reports whether all outputs wanted of a node are valid.
func (b *builds) haveOutputs(ctx context.Context, n *node) (bool, error) {
	missing, known, err := b.lacking(ctx, n)
	return known && len(missing) == 0, err
}

// toBuild marks a node to be built, and wants its inputs.
func (g *graph) toBuild(ctx context.Context, n *node) error {
	n.build = true
	for in, outputs := range n.drv.Inputs {
		if err := g.wants(ctx, in, outputs, false); err != nil {
			return err
		}
	}
	return nil
}

// sort puts what is to be built in order.
func (g *graph) sort() {
	const entered, left = 1, 2
	state := map[*node]int{}
	for _, start := range g.nodes {
		stack := []*node{start}
		for len(stack) > 0 {
			n := stack[len(stack)-1]
			switch {
			case !n.build || state[n] == left:
				stack = stack[:len(stack)-1]
			case state[n] == entered:
				state[n] = left
				stack = stack[:len(stack)-1]
				g.order = append(g.order, n)
			default:
				state[n] = entered
				for in := range n.drv.Inputs {
					if i := g.nodes[in]; i.build {
						n.inputs = append(n.inputs, i)
						if state[i] == 0 {
							stack = append(stack, i)
						}
					}
				}
			}
		}
	}
}

// missing is what a graph means to who asks what would be done.
func (g *graph) missing() *floxv1.MissingResponse {
	out := &floxv1.MissingResponse{}
	for _, n := range g.order {
		out.WillBuild = append(out.WillBuild, string(n.path))
	}
	for _, p := range g.unknown {
		out.Unknown = append(out.Unknown, string(p))
	}
	slices.Sort(out.Unknown)
	g.addSubstitutes(out)
	return out
}
