package storehouse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/buildfarm/dispatch"
	"github.com/floxctl/flox/buildfarm/queue"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of what people ask about builds.
const (
	buildsListed    = 1000
	maxBuildsListed = 10_000
	maxBuildsMeant  = 256 // of one change
	maxTriesShown   = 32
)

// errFarmLevel says why the queue knows nothing yet.
var errFarmLevel = fmt.Errorf("builds do not go through the queue yet: a server of the storehouse runs an older version: %w", flox.ErrBusy)

// looks refuses those who may not see the queue of builds.
func (a *admin) looks(ctx context.Context, call connect.AnyRequest, action string) (*floxv1.Actor, error) {
	who, err := a.may(ctx, call, anyMember, action)
	if err == nil && !a.s.farm.on() {
		err = errFarmLevel
	}
	return who, err
}

// viewQueue calls do with the queue as the log has it now.
func (a *admin) viewQueue(ctx context.Context, do func(r *cluster.Reader) error) error {
	return a.s.viewing(ctx, queue.Kind, cluster.Linearizable, do)
}

// buildMeant gives the key of the build that is meant by a key, the store path of its
// derivation, a beginning of that name or the name behind its hash. A key need not be in
// the queue. ErrBadInput, ErrNotFound.
func (a *admin) buildMeant(r *cluster.Reader, text string) (string, error) {
	name, check := strings.CutSuffix(text, queue.Key("", true))
	if strings.HasPrefix(name, "/") {
		p, err := a.pathOf(name)
		if err != nil {
			return "", err
		}
		name = string(p)
	}
	if drv, err := flox.ParseStorePath(name); err == nil && strings.HasSuffix(name, nix.DrvExtension) {
		return queue.Key(drv, check), nil
	}
	if len(name) < minBuildName || len(name) > maxSaid {
		return "", fmt.Errorf("build %.80q: want the name of a derivation (HASH-NAME.drv), at least %d characters of its beginning, or its NAME: %w", text, minBuildName, flox.ErrBadInput)
	}
	var found []string
	err := queue.Builds(r, "", func(b *floxv1.QueuedBuild) bool {
		drv, checks, err := queue.Split(b.GetKey())
		if err == nil && (!check || checks) && (strings.HasPrefix(b.GetKey(), name) || strings.TrimSuffix(drv.Name(), nix.DrvExtension) == name) {
			found = append(found, b.GetKey())
		}
		return len(found) <= maxNamed
	})
	switch {
	case err != nil:
		return "", err
	case len(found) == 0:
		return "", fmt.Errorf("no build in the queue is called %q or begins so; see: floxctl queue list; one that is over is named by its derivation, HASH-NAME.drv: %w", name, flox.ErrNotFound)
	case len(found) > 1:
		return "", fmt.Errorf("%q may be %s: name one: %w", name, strings.Join(found[:min(len(found), maxNamed)], " or "), flox.ErrBadInput)
	}
	return found[0], nil
}

// minBuildName is how much of a name is enough to look for it.
const minBuildName = 3

// workerNames are names of workers by their IDs.
func workerNames(r *cluster.Reader) (map[string]string, error) {
	all, err := queue.Workers(r)
	names := map[string]string{}
	for _, w := range all {
		names[w.GetId()] = nameOr(w.GetName(), w.GetId())
	}
	return names, err
}

// ListBuilds is floxv1connect.AdminHandler.
func (a *admin) ListBuilds(ctx context.Context, req *connect.Request[floxv1.ListBuildsRequest]) (*connect.Response[floxv1.ListBuildsResponse], error) {
	if _, err := a.looks(ctx, req, "build.list"); err != nil {
		return nil, api.ToConnect(err)
	}
	limit := int(cmp.Or(req.Msg.GetLimit(), buildsListed))
	if limit > maxBuildsListed {
		return nil, api.ToConnect(fmt.Errorf("the first %d builds, want at most %d: %w", limit, maxBuildsListed, flox.ErrBadInput))
	}
	out := &floxv1.ListBuildsResponse{}
	return answer(out, a.viewQueue(ctx, func(r *cluster.Reader) (err error) {
		if out.Workers, err = workerNames(r); err != nil {
			return err
		}
		err = queue.Builds(r, "", func(b *floxv1.QueuedBuild) bool {
			if req.Msg.GetOwner() != "" && b.GetOwner() != req.Msg.GetOwner() {
				return true
			}
			switch b.GetState() {
			case floxv1.BuildState_BUILD_STATE_WAITING:
				out.Waiting++
			case floxv1.BuildState_BUILD_STATE_LEASED:
				out.Building++
			default:
				out.Over++
			}
			b.Needs = nil
			if out.Builds = append(out.Builds, b); len(out.GetBuilds()) >= 2*limit {
				out.Builds = firstBuilds(out.GetBuilds(), limit)
			}
			return true
		})
		out.Builds = firstBuilds(out.GetBuilds(), limit)
		return err
	}))
}

// firstBuilds are those under way, those that wait and those that are over, each as they came.
func firstBuilds(all []*floxv1.QueuedBuild, limit int) []*floxv1.QueuedBuild {
	rank := func(b *floxv1.QueuedBuild) int {
		switch b.GetState() {
		case floxv1.BuildState_BUILD_STATE_LEASED:
			return 0
		case floxv1.BuildState_BUILD_STATE_WAITING:
			return 1
		}
		return 2
	}
	slices.SortFunc(all, func(x, y *floxv1.QueuedBuild) int {
		return cmp.Or(cmp.Compare(rank(x), rank(y)), cmp.Compare(x.GetQueuedIndex(), y.GetQueuedIndex()), cmp.Compare(x.GetKey(), y.GetKey()))
	})
	return all[:min(len(all), limit)]
}

// ShowBuild is floxv1connect.AdminHandler.
func (a *admin) ShowBuild(ctx context.Context, req *connect.Request[floxv1.ShowBuildRequest]) (*connect.Response[floxv1.ShowBuildResponse], error) {
	if _, err := a.looks(ctx, req, "build.show"); err != nil {
		return nil, api.ToConnect(err)
	}
	out := &floxv1.ShowBuildResponse{}
	return answer(out, a.viewQueue(ctx, func(r *cluster.Reader) (err error) {
		if out.Key, err = a.buildMeant(r, req.Msg.GetBuild()); err != nil {
			return err
		}
		if out.Workers, err = workerNames(r); err != nil {
			return err
		}
		if out.Build, err = queue.Find(r, out.GetKey()); err != nil && !errors.Is(err, flox.ErrNotFound) {
			return err
		}
		if out.Failure, err = queue.Failure(r, out.GetKey()); errors.Is(err, flox.ErrNotFound) {
			out.Failure, err = nil, nil
		}
		if err != nil {
			return err
		}
		if out.Build != nil {
			owners, err := ownersOf(r, []string{out.GetKey()})
			if err != nil {
				return err
			}
			out.Owners = owners[out.GetKey()]
		}
		out.Tries, err = queue.TriesOf(r, out.GetKey(), maxTriesShown)
		if err == nil && out.GetBuild() == nil && out.GetFailure() == nil && len(out.GetTries()) == 0 {
			err = fmt.Errorf("nothing is known of build %s: it is not in the queue, and was not among the last that were tried: %w", out.GetKey(), flox.ErrNotFound)
		}
		return err
	}))
}

// ownersOf gives who wants builds, sorted, by build.
func ownersOf(r *cluster.Reader, keys []string) (map[string][]string, error) {
	owners := map[string][]string{}
	var bad error
	err := queue.Wants(r, func(w *floxv1.BuildWant) bool {
		for _, key := range keys {
			var is bool
			if is, bad = queue.Wanted(r, w.GetId(), key); bad != nil {
				return false
			}
			if is && !w.GetLeft() && !slices.Contains(owners[key], w.GetOwner()) {
				owners[key] = append(owners[key], w.GetOwner())
			}
		}
		return true
	})
	for _, all := range owners {
		slices.Sort(all)
	}
	return owners, errors.Join(err, bad)
}

// WhyBuild is floxv1connect.AdminHandler. The server that leads answers, since it decides.
func (a *admin) WhyBuild(ctx context.Context, req *connect.Request[floxv1.WhyBuildRequest]) (*connect.Response[floxv1.WhyBuildResponse], error) {
	who, err := a.looks(ctx, req, "build.why")
	if err != nil {
		return nil, api.ToConnect(err)
	}
	own := func() (*floxv1.WhyBuildResponse, error) { return a.whyBuild(ctx, req.Msg.GetBuild()) }
	return byLeader(ctx, a, who, req, own, floxv1connect.AdminClient.WhyBuild)
}

func (a *admin) whyBuild(ctx context.Context, text string) (*floxv1.WhyBuildResponse, error) {
	out := &floxv1.WhyBuildResponse{}
	key := ""
	err := a.viewQueue(ctx, func(r *cluster.Reader) (err error) {
		if key, err = a.buildMeant(r, text); err == nil {
			_, err = queue.Find(r, key)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, whyWait)
	defer cancel()
	for out.Standing == nil && err == nil {
		rung := a.s.farm.changed.wait()
		err = a.s.farm.knowing(limited, func(d *dispatch.Dispatcher) error {
			out.Standing = d.Standing(key, time.Now())
			return nil
		})
		if out.GetStanding() == nil && err == nil { // it has come just now, or has gone
			select {
			case <-rung:
			case <-limited.Done():
				err = fmt.Errorf("build %s is not in the queue any more: %w", key, flox.ErrNotFound)
			}
		}
	}
	return out, err
}
