package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/staging"
	"github.com/floxctl/flox/nix/worker"
	"github.com/floxctl/flox/p2p"
)

// collectHouse goes on with a collection in the storehouse, if that is this machine's
// own and no other machine uses it: there, what stock Nix shows is what happens.
func (c nixCollector) collectHouse(ctx context.Context, o worker.GCOptions, result *worker.GCResult) error {
	if !c.n.a.cfg.Embedded || o.Action == worker.GCDeleteDead && result.Freed > o.MaxFreed {
		return nil
	}
	dir, m := c.n.a.cfg.StoreDir, &floxv1.MachineCollection{}
	for _, p := range o.Paths {
		m.Paths = append(m.Paths, string(p))
	}
	if o.MaxFreed != math.MaxUint64 && o.Action == worker.GCDeleteDead {
		m.MaxFreedBytes = max(o.MaxFreed-result.Freed, 1)
	}
	gone, freed, err := c.askHouse(ctx, m, false)
	if err != nil {
		return err
	}
	for _, p := range gone {
		if err := c.n.a.facts.remove(p.HashPart()); err != nil { // before the watch stream says so
			return err
		}
		c.n.s.Log().Message(worker.LevelInfo, "deleting '"+dir.Join(p)+"'")
		if full := dir.Join(p); !slices.Contains(result.Paths, full) {
			result.Paths = append(result.Paths, full)
		}
	}
	if len(gone) > 0 {
		c.n.a.store.forgetTrees()
	}
	result.Freed += freed
	for _, p := range o.Paths {
		if _, err := c.n.a.lookup(ctx, p); o.Action == worker.GCDeleteSpecific && !errors.Is(err, flox.ErrNotFound) {
			return c.alive(p)
		}
	}
	return nil
}

// judge takes what the storehouse keeps, if it is this machine's own, for live, and what
// it does not for dead.
func (c nixCollector) judge(ctx context.Context, all []flox.StorePath, live map[flox.StorePath]bool) error {
	if !c.n.a.cfg.Embedded {
		return nil
	}
	dead, _, err := c.askHouse(ctx, &floxv1.MachineCollection{}, true)
	if err != nil || dead == nil {
		return err
	}
	gone := make(map[flox.StorePath]bool, len(dead))
	for _, p := range dead {
		gone[p] = true
	}
	for _, p := range all {
		if _, staged := c.n.a.stagedInfo(p); !staged {
			live[p] = !gone[p]
		}
	}
	return nil
}

// alive is the refusal to delete what something keeps, in Nix's words.
func (c nixCollector) alive(p flox.StorePath) error {
	return &worker.Error{Message: fmt.Sprintf("Cannot delete path '%s' since it is still alive. To find out why, use: nix-store --query --roots", c.n.a.cfg.StoreDir.Join(p)), Cause: flox.ErrDenied}
}

// askHouse has the storehouse collect what this machine does not hold on to, and gives
// what went, or in a dry run would, and the size of its NARs. Where other machines use
// the storehouse nothing goes, and the client is told so.
func (c nixCollector) askHouse(ctx context.Context, m *floxv1.MachineCollection, dry bool) (gone []flox.StorePath, bytes uint64, err error) {
	held, err := c.held(ctx)
	if err == nil {
		err = c.n.a.staged.List(ctx, "", func(p *staging.Path) bool { // what stays here needs what it refers to
			held = append(held, p.Info.References...)
			return true
		})
	}
	if err != nil {
		return nil, 0, err
	}
	slices.Sort(held)
	for _, p := range slices.Compact(held) {
		m.Roots = append(m.Roots, string(p))
	}
	gone = []flox.StorePath{}
	err = c.n.a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) error {
		stream, err := c.n.a.calls.admin(house).Collect(ctx, connect.NewRequest(&floxv1.CollectRequest{Machine: m, DryRun: dry}))
		if err != nil {
			return api.FromConnect(err)
		}
		defer stream.Close()
		for stream.Receive() {
			paths, err := storePaths(stream.Msg().GetPaths())
			if err != nil {
				return err
			}
			gone = append(gone, paths...)
			if stream.Msg().GetFinished() {
				bytes = stream.Msg().GetDeadBytes()
			}
		}
		return api.FromConnect(stream.Err())
	})
	if errors.Is(err, flox.ErrDenied) {
		c.n.s.Log().Message(worker.LevelWarn, fmt.Sprintf("warning: only what was added on this machine is collected: %v", err))
		return nil, 0, nil
	}
	return gone, bytes, err
}
