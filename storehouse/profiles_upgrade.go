package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
	"github.com/floxctl/flox/profile"
	"github.com/floxctl/flox/profile/environment"
	"github.com/floxctl/flox/profile/upgrade"
	cluster "github.com/floxctl/flox/raft"
)

// upgrade brings a profile to what its channels have. What of it cannot be had is left as
// it is, and said.
func (p *profiles) upgrade(ctx context.Context, of *floxv1.Profile) (*floxv1.ProfileRun, error) {
	var now *floxv1.Generation
	err := p.view(ctx, cluster.Linearizable, func(r *cluster.Reader) (err error) {
		seen := of
		if of, err = profile.Find(r, seen.GetName()); err != nil {
			return err
		}
		if of.GetCreatedIndex() != seen.GetCreatedIndex() || !proto.Equal(of.GetSchedule(), seen.GetSchedule()) {
			return fmt.Errorf("it has another schedule now: %w", flox.ErrBusy)
		}
		now, err = live(r, of)
		return err
	})
	if err != nil {
		return nil, err
	}
	run := &floxv1.ProfileRun{Result: profile.RunUnchanged, Generation: of.GetLive()}
	if of.GetHeld() {
		run.Result = profile.RunHeld
		return run, nil
	}
	set, left := p.newest(ctx, now)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	out, left, err := p.changeByItself(ctx, of, set, left)
	switch {
	case err != nil:
		return nil, err
	case left.has(flox.ErrBusy):
		return nil, left
	}
	if n := out.GetGeneration().GetNumber(); n != out.GetBefore().GetNumber() {
		run.Result, run.Generation = profile.RunUpgraded, n
		run.Detail = profile.Describe(out.GetBefore().GetPackages(), out.GetGeneration().GetPackages())
	} else if len(left) > 0 {
		run.Result = profile.RunFailed
	}
	if len(left) > 0 {
		p.s.cfg.Log.Warn("packages of a profile that was due could not be upgraded", "profile", of.GetName(), "error", left)
		run.Detail = strings.TrimPrefix(run.Detail+"; "+left.Error(), "; ")
	}
	return run, nil
}

// newest makes what channels have of the packages of a generation, as far as it can be made.
func (p *profiles) newest(ctx context.Context, now *floxv1.Generation) (set []*floxv1.Package, left leftOut) {
	ctx, cancel := context.WithTimeoutCause(ctx, upgradeWait, fmt.Errorf("it was not made within %s: %w", upgradeWait, flox.ErrUnreachable))
	defer cancel()
	was := slices.DeleteFunc(slices.Clone(now.GetPackages()), func(of *floxv1.Package) bool { return !upgrade.Looks(of) })
	is, failed := make([]*floxv1.Package, len(was)), make([]error, len(was))
	var group errgroup.Group
	group.SetLimit(packagesAtOnce)
	for i, of := range was {
		group.Go(func() error {
			made, err := p.s.channels.made(ctx, of.GetSource(), upgrade.Systems(of))
			switch {
			case err == nil:
				is[i] = upgrade.InPlaceOf(of, made)
			case ctx.Err() != nil:
				failed[i] = context.Cause(ctx)
			default:
				failed[i] = err
			}
			return nil
		})
	}
	_ = group.Wait() // each says for itself what is wrong
	for i, of := range was {
		if failed[i] != nil {
			left = append(left, leftPackage{of.GetName(), failed[i]})
		} else {
			set = append(set, is[i])
		}
	}
	return set, left
}

// changeByItself makes a generation of what is new of a profile. What of that does not go
// together with the rest is left out, too; nil if nothing is new.
func (p *profiles) changeByItself(ctx context.Context, of *floxv1.Profile, set []*floxv1.Package, left leftOut) (*floxv1.ChangeProfileResponse, leftOut, error) {
	for len(set) > 0 {
		reason := reasonSchedule
		if len(left) > 0 {
			reason += "; " + left.Error()
		}
		out, err := p.change(ctx, p.s.itself(), &floxv1.ChangeProfileRequest{
			Name: of.GetName(), Parent: of.GetLive(), Kind: "upgrade", Set: set, Reason: profile.Cut(reason), Automatic: true,
		})
		collision := (*environment.CollisionError)(nil)
		if !errors.As(err, &collision) {
			return out, left, err
		}
		all := len(set)
		set = slices.DeleteFunc(set, func(is *floxv1.Package) bool {
			collides := collision.Has(is.GetName())
			if collides {
				left = append(left, leftPackage{is.GetName(), err})
			}
			return collides
		})
		if len(set) == all {
			return nil, left, err
		}
	}
	return nil, left, nil
}

// leftOut are packages that an upgrade leaves as they are.
type leftOut []leftPackage

type leftPackage struct {
	name string
	why  error
}

// Error names all of them before it says why.
func (l leftOut) Error() string {
	var names, why []string
	for _, of := range l {
		names = append(names, of.name)
		why = append(why, of.name+": "+strings.Join(strings.Fields(of.why.Error()), " "))
	}
	return "left as they are: " + strings.Join(names, ", ") + "; " + strings.Join(why, "; ")
}

// Unwrap is what errors.Is asks for.
func (l leftOut) Unwrap() (all []error) {
	for _, of := range l {
		all = append(all, of.why)
	}
	return all
}

func (l leftOut) has(target error) bool { return len(l) > 0 && errors.Is(l, target) }

// made makes a package valid for some systems, and gives it as a member of a profile. Where
// this server builds nothing, others are asked.
func (c *channels) made(ctx context.Context, word string, systems []string) (*floxv1.Package, error) {
	q := &floxv1.BuildPackageRequest{Name: word, Systems: systems, Batch: true}
	var found []*floxv1.CataloguePackage
	err := c.build(ctx, c.s.machineName(), q, func(m *floxv1.BuildPackageProgress) { found = m.GetPackages() })
	if errors.Is(err, errNoBuilder) {
		others, _, _ := c.s.servers.others()
		for _, id := range others {
			all, failed := c.madeBy(ctx, id, q)
			if failed == nil || !errors.Is(failed, flox.ErrUnreachable) {
				found, err = all, failed
				break
			}
		}
	}
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("the server that made it does not say what: %w", flox.ErrUnreachable)
	}
	if err != nil {
		return nil, fmt.Errorf("package %s: %w", word, err)
	}
	return upgrade.Package(word, found), nil
}

// madeBy has another server make a package. ErrUnreachable if it builds nothing either.
func (c *channels) madeBy(ctx context.Context, id p2p.PeerID, q *floxv1.BuildPackageRequest) (found []*floxv1.CataloguePackage, err error) {
	req, err := passedFor(c.s.actor(), q)
	if err != nil {
		return nil, err
	}
	stream, err := c.s.servers.admin(id).BuildPackage(ctx, req)
	if err != nil {
		return nil, api.FromConnect(err)
	}
	for stream.Receive() {
		found = stream.Msg().GetPackages()
	}
	return found, errors.Join(api.FromConnect(stream.Err()), stream.Close())
}
