package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/staging"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/worker"
)

// What a content-addressed output became is known in the storehouse if that built it,
// or a key it trusts says so. What else clients tell is kept on this machine, beside
// what they added: of a trusted client for everybody here, of another for its own user
// alone, since a wrong word has others take one thing for another. No other machine
// hears of it, nor does a build.

// Realisation implements worker.Realisations. What the storehouse knows comes first.
func (n *nixSession) Realisation(ctx context.Context, id nix.RealisationID) (*nix.Realisation, error) {
	r, err := n.realisedThere(ctx, id)
	if err == nil || !errors.Is(err, flox.ErrNotFound) && !away(err) {
		return r, err
	}
	here, herr := n.realisedHere(ctx, id)
	if errors.Is(herr, flox.ErrNotFound) {
		herr = err
	}
	return here, herr
}

// realisedThere asks the storehouse.
func (n *nixSession) realisedThere(ctx context.Context, id nix.RealisationID) (*nix.Realisation, error) {
	var response *connect.Response[floxv1.RealisationsResponse]
	err := n.builds(ctx, func(ctx context.Context, c buildsClient) (err error) {
		response, err = c.Realisations(ctx, connect.NewRequest(&floxv1.RealisationsRequest{Ids: []string{id.String()}}))
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, m := range response.Msg.GetRealisations() {
		if m.GetId() == id.String() {
			return nixRealisation(m)
		}
	}
	return nil, fmt.Errorf("nobody built %s: %w", id, flox.ErrNotFound)
}

// realisedHere gives what this client's user, or a trusted one, told, as long as its
// path is valid. ErrNotFound.
func (n *nixSession) realisedHere(ctx context.Context, id nix.RealisationID) (*nix.Realisation, error) {
	for _, owner := range slices.Compact([]uint32{n.owner(), staging.Everybody}) {
		r, err := n.a.staged.Realised(owner, id)
		if errors.Is(err, flox.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if valid, err := n.isValid(ctx, r.Path); err != nil || valid {
			return &r.Realisation, err
		}
	}
	return nil, fmt.Errorf("nobody realised %s: %w", id, flox.ErrNotFound)
}

// owner is as whose word counts what the client tells of realisations.
func (n *nixSession) owner() uint32 {
	uid := n.s.Peer().UID
	switch {
	case n.s.Trusted():
		return staging.Everybody
	case uid == staging.Everybody:
		return ^uint32(0) // nobody known
	}
	return uid
}

func (n *nixSession) isValid(ctx context.Context, p flox.StorePath) (bool, error) {
	valid, err := n.Valid(ctx, []flox.StorePath{p}, false)
	return len(valid) > 0, err
}

// realisedTarget is the outcome of a target whose outputs only this machine knows, so
// that what was copied here is not built anew; nil for others.
func (n *nixSession) realisedTarget(ctx context.Context, t worker.DerivedPath) (*floxv1.BuildOutcome, error) {
	if !n.a.staged.Realises() {
		return nil, nil //nolint:nilnil // documented
	}
	d, err := n.a.staged.Derivation(ctx, t.Path)
	if errors.Is(err, flox.ErrNotFound) {
		return nil, nil //nolint:nilnil // documented
	}
	if err != nil {
		return nil, err
	}
	names := t.Outputs
	if t.All {
		names = d.OutputNames()
	}
	outcome := &floxv1.BuildOutcome{Status: uint32(worker.AlreadyValid)}
	for _, name := range names {
		if o, ok := d.Outputs[name]; !ok || o.Path != "" {
			return nil, nil //nolint:nilnil // documented
		}
		id, err := n.a.staged.Hasher().Realise(ctx, d, name)
		var r *nix.Realisation
		if err == nil {
			r, err = n.realisedHere(ctx, id)
		}
		if err == nil {
			if _, terr := n.realisedThere(ctx, id); terr == nil {
				return nil, nil //nolint:nilnil // documented
			}
		}
		if errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrBadInput) {
			return nil, nil //nolint:nilnil // documented
		}
		if err != nil {
			return nil, err
		}
		outcome.Outputs = append(outcome.Outputs, &floxv1.BuiltOutput{Name: name, Path: string(r.Path), Id: id.String(), Realisation: realisationMessage(r)})
	}
	return outcome, nil
}

// realiseOutputs fills in those outputs of a derivation whose paths the storehouse does
// not know and this machine does.
func (n *nixSession) realiseOutputs(ctx context.Context, d *nix.Derivation, outputs map[string]flox.StorePath) error {
	for name, p := range outputs {
		if p != "" || d == nil {
			continue
		}
		id, err := n.a.staged.Hasher().Realise(ctx, d, name)
		if errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrBadInput) {
			continue // not all it comes from is here, or its outputs are not realised
		}
		var r *nix.Realisation
		if err == nil {
			r, err = n.realisedHere(ctx, id)
		}
		switch {
		case errors.Is(err, flox.ErrNotFound):
		case err != nil:
			return err
		default:
			outputs[name] = r.Path
		}
	}
	return nil
}

// nixRealisation reads a message.
func nixRealisation(m *floxv1.Realisation) (*nix.Realisation, error) {
	id, err := nix.ParseRealisationID(m.GetId())
	if err != nil {
		return nil, err
	}
	p, err := flox.ParseStorePath(m.GetPath())
	if err != nil {
		return nil, err
	}
	r := &nix.Realisation{ID: id, Path: p, Signatures: m.GetSignatures(), Dependencies: make(map[nix.RealisationID]flox.StorePath)}
	for _, in := range m.GetInputs() {
		id, err := nix.ParseRealisationID(in.GetId())
		if err != nil {
			return nil, err
		}
		if r.Dependencies[id], err = flox.ParseStorePath(in.GetPath()); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// realisationMessage is what nixRealisation reads.
func realisationMessage(r *nix.Realisation) *floxv1.Realisation {
	m := &floxv1.Realisation{Id: r.ID.String(), Path: string(r.Path), Signatures: r.Signatures}
	for id, p := range r.Dependencies {
		m.Inputs = append(m.Inputs, &floxv1.RealisedInput{Id: id.String(), Path: string(p)})
	}
	return m
}

// AddRealisation implements worker.Realisations: for all machines if a key of the
// storehouse says so, else for this one. What is refused is refused in Nix's words
// (Nix 2.8 src/libstore/local-store.cc).
func (n *nixSession) AddRealisation(ctx context.Context, r nix.Realisation) error {
	known, err := n.Realisation(ctx, r.ID)
	switch {
	case err == nil && known.Path == r.Path:
		return nil
	case err == nil:
		return &worker.Error{Message: fmt.Sprintf("Trying to register a realisation of '%s', but we already have another one locally.\nLocal:  %s\nRemote: %s", r.ID, known.Path, r.Path), Cause: flox.ErrBadInput}
	case !errors.Is(err, flox.ErrNotFound) && !away(err):
		return err
	}
	if valid, err := n.isValid(ctx, r.Path); err != nil {
		return err
	} else if !valid {
		return worker.NotValid(n.a.cfg.StoreDir, r.Path)
	}
	for id, p := range r.Dependencies {
		in, err := n.Realisation(ctx, id)
		switch {
		case errors.Is(err, flox.ErrNotFound):
			return &worker.Error{Message: fmt.Sprintf("unable to register the derivation '%s' as it depends on the non existent '%s'", r.ID, id), Cause: flox.ErrBadInput}
		case err != nil:
			return err
		case in.Path != p:
			return &worker.Error{Message: fmt.Sprintf("unable to register the derivation '%s' as it depends on a realisation of '%s' that doesn't match what we have locally", r.ID, id), Cause: flox.ErrBadInput}
		}
	}
	if n.a.facts.vouchesFor([]byte(r.Fingerprint()), r.Signatures) {
		if err := n.register(ctx, &r); err == nil || !errors.Is(err, flox.ErrDenied) && !errors.Is(err, flox.ErrNotFound) && !away(err) {
			return err
		}
	}
	return n.a.staged.Realise(n.owner(), &r)
}

// register tells the storehouse what a key of its own vouches for.
func (n *nixSession) register(ctx context.Context, r *nix.Realisation) error {
	return n.builds(ctx, func(ctx context.Context, c buildsClient) error {
		_, err := c.RegisterRealisation(ctx, connect.NewRequest(&floxv1.RegisterRealisationRequest{Realisation: realisationMessage(r)}))
		return err
	})
}
