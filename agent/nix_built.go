package agent

import (
	"context"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix/worker"
)

// builtTarget gives the outcome of a derivation of which every wanted output is known
// here to be valid, without asking anybody; nil if that is not so. A build that has
// nothing to do needs no storehouse.
func (n *nixSession) builtTarget(ctx context.Context, t worker.DerivedPath) (*floxv1.BuildOutcome, error) {
	d, err := n.a.staged.Derivation(ctx, t.Path)
	if err != nil {
		return nil, ctx.Err() // who builds it says what is wrong
	}
	names := t.Outputs
	if t.All {
		names = d.OutputNames()
	}
	outcome := &floxv1.BuildOutcome{Status: uint32(worker.AlreadyValid)}
	for _, name := range names {
		o, ok := d.Outputs[name]
		if !ok || o.Path == "" {
			return nil, nil //nolint:nilnil // documented
		}
		if valid, _ := n.a.validHere(o.Path); !valid {
			return nil, nil //nolint:nilnil // documented
		}
		id, err := n.a.staged.Hasher().Realise(ctx, d, name)
		if err != nil {
			return nil, ctx.Err() // not all it comes from is here
		}
		outcome.Outputs = append(outcome.Outputs, &floxv1.BuiltOutput{Name: name, Path: string(o.Path), Id: id.String()})
	}
	return outcome, nil
}
