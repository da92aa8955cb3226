package agent

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

// substitute has the storehouse say what its upstreams have, or fetch it: see
// floxv1.Upstreams. tell gets the progress; what it gives ends the call. When a server
// leaves, the next goes on from there, and some of the progress may come again. It is
// for who asked for exactly these paths: a look-up in the mount never gets here.
func (a *Agent) substitute(ctx context.Context, q *floxv1.SubstituteRequest, tell func(*floxv1.SubstituteProgress) error) error {
	var failed []error
	for _, house := range a.houses.order() {
		err := a.substituteAt(ctx, house, q, tell)
		if ctx.Err() != nil || !away(err) {
			a.houses.answered(house)
			return err
		}
		a.houses.failed(house)
		failed = append(failed, err)
	}
	if len(failed) == 0 {
		return fmt.Errorf("no server of the storehouse is known: %w", flox.ErrUnreachable)
	}
	return because(failed...)
}

// substituteAt is substitute by one server.
func (a *Agent) substituteAt(ctx context.Context, house p2p.PeerID, q *floxv1.SubstituteRequest, tell func(*floxv1.SubstituteProgress) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends it there too
	stream, err := a.calls.upstreams(house).Substitute(ctx, connect.NewRequest(q))
	if err != nil {
		return api.FromConnect(err)
	}
	defer stream.Close()
	finished := false
	for stream.Receive() {
		finished = stream.Msg().GetFinished()
		if err := tell(stream.Msg()); err != nil {
			return err
		}
	}
	if err := stream.Err(); err != nil {
		return api.FromConnect(err)
	}
	if !finished {
		return fmt.Errorf("the storehouse ended a substitution without finishing it: %w", flox.ErrUnreachable)
	}
	return nil
}

// substituted makes paths valid that are not and that an upstream has, with all they
// refer to, and gives why others are not. The facts of those that are valid then are
// here. Asked of a storehouse that knows no upstreams it does nothing.
func (a *Agent) substituted(ctx context.Context, paths []flox.StorePath, tell func(*floxv1.SubstituteProgress) error) (failed map[flox.StorePath]string, err error) {
	q := &floxv1.SubstituteRequest{}
	for _, p := range paths {
		q.Paths = append(q.Paths, string(p))
	}
	failed = map[flox.StorePath]string{}
	err = a.substitute(ctx, q, func(p *floxv1.SubstituteProgress) error {
		for _, f := range p.GetFailed() {
			failed[flox.StorePath(f.GetPath())] = f.GetReason()
		}
		return tell(p)
	})
	if connect.CodeOf(err) == connect.CodeUnimplemented {
		return failed, nil
	}
	a.houses.wrote()
	if err != nil {
		return failed, err
	}
	for _, p := range paths {
		if failed[p] != "" {
			continue
		}
		// The watch stream may not have said yet that it is valid.
		err := a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) error {
			_, err := a.resolver.askHouse(ctx, house, p)
			return err
		})
		if err != nil && !errors.Is(err, flox.ErrNotFound) {
			return failed, err
		}
	}
	return failed, nil
}
