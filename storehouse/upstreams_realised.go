package storehouse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// findRealisation asks the upstreams what an output of a content-addressed derivation
// became, signed by a key of who says so. ErrNotFound as with find.
func (u *upstreams) findRealisation(ctx context.Context, id nix.RealisationID) (*nix.Realisation, error) {
	list, err := u.current(ctx, cluster.Local)
	if err != nil {
		return nil, err
	}
	o, err := u.hedged(ctx, id.String(), list, &noAnswers{})
	if err != nil {
		return nil, err
	}
	return o.realised, nil
}

// readRealisation reads and checks what an upstream says of an output.
func (up *upstream) readRealisation(ctx context.Context, source cacheSource, id nix.RealisationID) (*offer, error) {
	b, err := readSmall(ctx, source, realisationDir+id.String()+realisationExt)
	if err != nil {
		return nil, err
	}
	r, err := nix.ParseRealisation(b)
	if err != nil {
		return nil, err
	}
	if r.ID != id {
		return nil, fmt.Errorf("asked for realisation %s it gives %s: %w", id, r.ID, flox.ErrBadInput)
	}
	if _, ok := up.keys.Verify([]byte(r.Fingerprint()), r.Signatures); !ok {
		return nil, fmt.Errorf("realisation %s: none of its %d signatures is by an accepted key: %w", id, len(r.Signatures), flox.ErrUntrusted)
	}
	if len(r.Dependencies) > maxRealisedInputs {
		return nil, fmt.Errorf("realisation %s names %d others, want at most %d: %w", id, len(r.Dependencies), maxRealisedInputs, flox.ErrBadInput)
	}
	return &offer{from: up.url(), realised: r}, nil
}

// fromRealisation is a realisation as it is kept.
func fromRealisation(r *nix.Realisation) *floxv1.Realisation {
	m := &floxv1.Realisation{Id: r.ID.String(), Path: string(r.Path), Signatures: r.Signatures}
	for id, p := range r.Dependencies {
		m.Inputs = append(m.Inputs, &floxv1.RealisedInput{Id: id.String(), Path: string(p)})
	}
	slices.SortFunc(m.GetInputs(), func(a, b *floxv1.RealisedInput) int { return cmp.Compare(a.GetId(), b.GetId()) })
	return m
}

// askRealisations finds what upstreams say became of outputs whose paths nobody here
// knows, and adds the paths to what is lacked. What nobody knows is left without any.
func (g *graph) askRealisations(ctx context.Context, lacks []upstreamLack) error {
	if g.opts.noSubstitutes {
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(maxAsked)
	found := make([][]*nix.Realisation, len(lacks))
	for i := range lacks {
		if l := &lacks[i]; l.unrealised {
			group.Go(func() (err error) {
				l.paths, found[i], err = g.b.realisedElsewhere(ctx, l.n)
				return err
			})
		}
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for i := range lacks {
		if lacks[i].unrealised = lacks[i].unrealised && found[i] == nil; found[i] != nil {
			g.realised = append(g.realised, found[i]...)
		}
	}
	return nil
}

// realisedElsewhere gives the paths that the outputs wanted of a node have by what
// upstreams say, less those that are valid, and what they said; nil where they do not
// know all.
func (b *builds) realisedElsewhere(ctx context.Context, n *node) (missing []flox.StorePath, said []*nix.Realisation, err error) {
	for name := range n.wanted {
		p, err := b.outputPath(ctx, n.drv, name)
		if err == nil && p == "" {
			var id nix.RealisationID
			var more []*nix.Realisation
			if id, err = b.hasher.Realise(ctx, n.drv, name); err == nil {
				more, err = b.realisationsBehind(ctx, id)
			}
			if errors.Is(err, flox.ErrNotFound) {
				return nil, nil, nil
			}
			if err == nil {
				p, said = more[0].Path, append(said, more...)
			}
		}
		var valid bool
		if err == nil {
			valid, err = b.s.isValid(ctx, p)
		}
		if err != nil {
			return nil, nil, err
		}
		if !valid {
			missing = append(missing, p)
		}
	}
	return missing, said, nil
}

// realisationsBehind gives what upstreams say of an output, and then of those that it
// was made with which are not known here. ErrNotFound if they do not know all.
func (b *builds) realisationsBehind(ctx context.Context, id nix.RealisationID) (all []*nix.Realisation, err error) {
	seen := map[nix.RealisationID]bool{id: true}
	for todo := []nix.RealisationID{id}; len(todo) > 0; todo = todo[1:] {
		r, err := b.s.upstreams.findRealisation(ctx, todo[0])
		if err != nil {
			return nil, err
		}
		all = append(all, r)
		for dep := range r.Dependencies {
			if seen[dep] {
				continue
			}
			seen[dep] = true
			known, err := b.s.realised(ctx, dep)
			switch {
			case err != nil:
				return nil, err
			case known == nil && len(seen) > maxRealisedInputs:
				return nil, fmt.Errorf("realisation %s leads to more than %d: %w", id, maxRealisedInputs, flox.ErrNotFound)
			case known == nil:
				todo = append(todo, dep)
			}
		}
	}
	return all, nil
}

// keepRealisations records what upstreams said of outputs, where their paths are valid
// by now. With the upstream's signature they have ours, which says that an admin
// trusts the upstream.
func (b *builds) keepRealisations(ctx context.Context, said []*nix.Realisation) error {
	have, err := b.s.id.ring.get()
	if err != nil {
		return err
	}
	for part := range slices.Chunk(said, maxOutputs) {
		note := &floxv1.NoteBuild{}
		for _, r := range part {
			m := have.signRealisation(fromRealisation(r))
			note.Outputs = append(note.Outputs, &floxv1.BuiltOutput{Name: r.ID.Output, Path: string(r.Path), Id: m.GetId(), Realisation: m})
		}
		if err := b.note(ctx, note); err != nil {
			return err
		}
	}
	return nil
}
