package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/queue"
	cluster "github.com/floxctl/flox/raft"
)

// What people do with builds and workers, as refusals and the audit log name it.
const (
	actionCancel = "build.cancel"
	actionRetry  = "build.retry"
	actionBump   = "build.bump"
)

// workerActions are those of states of workers.
var workerActions = map[floxv1.WorkerState]string{
	floxv1.WorkerState_WORKER_STATE_ACTIVE:   "worker.uncordon",
	floxv1.WorkerState_WORKER_STATE_CORDONED: "worker.cordon",
	floxv1.WorkerState_WORKER_STATE_DRAINING: "worker.drain",
}

// ChangeBuilds is floxv1connect.AdminHandler. Who wants builds may change them, and
// admins all.
func (a *admin) ChangeBuilds(ctx context.Context, req *connect.Request[floxv1.ChangeBuildsRequest]) (*connect.Response[floxv1.ChangeBuildsResponse], error) {
	q := req.Msg
	action := map[bool]string{q.GetCancel() != nil: actionCancel, q.GetRetry() != nil: actionRetry, q.GetBump() != nil: actionBump}[true]
	if action == "" || len(q.GetBuilds()) == 0 || len(q.GetBuilds()) > maxBuildsMeant {
		return nil, api.ToConnect(fmt.Errorf("a change of %d builds, want one that cancels, retries or bumps 1 to %d: %w", len(q.GetBuilds()), maxBuildsMeant, flox.ErrBadInput))
	}
	who, err := a.looks(ctx, req, action)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.changeBuilds(ctx, person{Actor: who, admin: a.rights(ctx, req, who) >= adminOnly}, action, q))
}

func (a *admin) changeBuilds(ctx context.Context, who person, action string, q *floxv1.ChangeBuildsRequest) (*floxv1.ChangeBuildsResponse, error) {
	out := &floxv1.ChangeBuildsResponse{}
	var keys []string
	err := a.viewQueue(ctx, func(r *cluster.Reader) (err error) {
		for _, text := range q.GetBuilds() {
			key, err := a.buildMeant(r, text)
			if err == nil {
				err = a.changeable(r, action, key)
			}
			if err != nil {
				return err
			}
			out.Keys = append(out.Keys, key)
		}
		if keys = out.GetKeys(); !who.admin {
			err = own(r, who, action, keys, q.GetBump())
		}
		switch {
		case err != nil:
		case action == actionBump:
			keys, err = behind(r, keys, q.GetBump().GetPriority())
		case action == actionRetry:
			keys, err = failedBehind(r, keys)
		}
		return err
	})
	if errors.Is(err, flox.ErrDenied) && a.refusals.first(who.GetPeer()+" "+action) {
		note := &floxv1.AuditRecord{Action: action, Subject: nameOr(who.GetMachine(), who.GetPeer()), Detail: err.Error(), Refused: true}
		_, failed := a.s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: who.Actor, Command: &floxv1.MembersCommand_Note{Note: note}})
		err = errors.Join(err, failed)
	}
	if err != nil {
		return nil, err
	}
	detail := ""
	switch action {
	case actionCancel:
		detail = q.GetCancel().GetReason()
	case actionBump:
		detail = fmt.Sprintf("priority %d", q.GetBump().GetPriority())
	}
	changed, err := a.change(ctx, who, q, keys)
	if err != nil {
		return nil, err
	}
	out.Changed = uint64(len(changed))
	if action == actionCancel { // one may have ended meanwhile
		if out.Keys = changed; len(changed) == 0 {
			return nil, fmt.Errorf("build %s is over: %w", strings.Join(keys, ", "), flox.ErrBadInput)
		}
	}
	for _, key := range out.GetKeys() {
		if err := a.s.note(ctx, who.Actor, action, key, detail); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// change has the log change builds, and gives those that it did change.
func (a *admin) change(ctx context.Context, who person, q *floxv1.ChangeBuildsRequest, keys []string) (changed []string, err error) {
	for part := range slices.Chunk(keys, queue.MaxKeys) {
		reply, err := a.s.farm.propose(ctx, a.s.node.NewSession(), changing(who, q, part))
		if err != nil {
			return nil, err
		}
		for _, b := range reply.GetBuilds() {
			changed = append(changed, b.GetKey())
		}
	}
	return changed, nil
}

// changing is the command for a change of builds.
func changing(who person, q *floxv1.ChangeBuildsRequest, keys []string) *floxv1.QueueCommand {
	switch {
	case q.GetCancel() != nil:
		by := nameOr(who.GetMachine(), who.GetPeer())
		if who.GetUser() != "" {
			by = who.GetUser() + " on " + by
		}
		return &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Cancel{Cancel: &floxv1.CancelBuilds{Keys: keys, By: by, Reason: q.GetCancel().GetReason()}}}
	case q.GetRetry() != nil:
		return &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Retry{Retry: &floxv1.RetryBuilds{Keys: keys}}}
	}
	return &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Rank{Rank: &floxv1.RankBuilds{Keys: keys, Priority: q.GetBump().GetPriority()}}}
}

// changeable refuses what would change nothing: ErrNotFound of a build that is not there,
// ErrBadInput of one that is over.
func (a *admin) changeable(r *cluster.Reader, action, key string) error {
	b, err := queue.Find(r, key)
	if errors.Is(err, flox.ErrNotFound) && action == actionRetry {
		if _, failed := queue.Failure(r, key); failed == nil {
			return nil
		}
		return fmt.Errorf("build %s is not in the queue, nor remembered to have failed: %w", key, err)
	}
	if err != nil {
		return err
	}
	over := b.GetState() == floxv1.BuildState_BUILD_STATE_DONE || b.GetState() == floxv1.BuildState_BUILD_STATE_FAILED
	switch {
	case action == actionRetry && b.GetState() != floxv1.BuildState_BUILD_STATE_FAILED:
		return fmt.Errorf("build %s has not failed: there is nothing to try again: %w", key, flox.ErrBadInput)
	case action != actionRetry && over:
		return fmt.Errorf("build %s is over: %w", key, flox.ErrBadInput)
	case action == actionBump && b.GetState() == floxv1.BuildState_BUILD_STATE_LEASED:
		return fmt.Errorf("build %s is being built, it does not wait behind others: %w", key, flox.ErrBadInput)
	}
	return nil
}

// own refuses a machine what others want, ErrDenied: each of the builds must be wanted by
// it, and one that is cancelled, or put back, by nobody else. What is only remembered to
// have failed may be tried again by everybody, as who has it built does.
func own(r *cluster.Reader, who person, action string, keys []string, bump *floxv1.BumpThem) error {
	me := nameOr(who.GetMachine(), who.GetPeer())
	owners, err := ownersOf(r, keys)
	if err != nil {
		return err
	}
	for _, key := range keys {
		b, err := queue.Find(r, key)
		if err != nil && !errors.Is(err, flox.ErrNotFound) {
			return err
		}
		all := owners[key]
		others := slices.DeleteFunc(slices.Clone(all), func(o string) bool { return o == me })
		switch {
		case len(all) == 0 && action == actionRetry:
		case len(others) == len(all):
			return fmt.Errorf("%s: build %s is wanted by %s and not by %s: an admin may do it: %w", action, key, nameOr(strings.Join(all, ", "), "nobody"), me, flox.ErrDenied)
		case action == actionCancel && len(others) > 0:
			return fmt.Errorf("%s: build %s is wanted by %s as well: an admin may do it; to leave it to them, stop what waits for it (Ctrl-C): %w", action, key, strings.Join(others, ", "), flox.ErrDenied)
		case action == actionBump && bump.GetPriority() < b.GetPriority() && len(others) > 0:
			return fmt.Errorf("%s: build %s has priority %d and is wanted by %s as well: an admin may put it back: %w", action, key, b.GetPriority(), strings.Join(others, ", "), flox.ErrDenied)
		}
	}
	return nil
}

// behind gives builds and what they need that is not over, of those what has another
// priority; what is needed is not put back.
func behind(r *cluster.Reader, keys []string, priority int32) (ranked []string, err error) {
	err = withNeeds(r, keys, func(key string, b *floxv1.QueuedBuild) bool {
		waits := b != nil && b.GetState() == floxv1.BuildState_BUILD_STATE_WAITING
		if waits && (b.GetPriority() < priority || slices.Contains(keys, key)) {
			ranked = append(ranked, key)
		}
		return waits
	})
	return ranked, err
}

// failedBehind gives builds and what they need that failed, as they would fail again with it.
func failedBehind(r *cluster.Reader, keys []string) (all []string, err error) {
	err = withNeeds(r, keys, func(key string, b *floxv1.QueuedBuild) bool {
		failed := b.GetState() == floxv1.BuildState_BUILD_STATE_FAILED
		if failed || slices.Contains(keys, key) {
			all = append(all, key)
		}
		return failed
	})
	return all, err
}

// withNeeds calls visit once with each of some builds, nil = it is not in the queue, and
// with what those need for which visit returns true.
func withNeeds(r *cluster.Reader, keys []string, visit func(key string, b *floxv1.QueuedBuild) bool) error {
	seen := map[string]bool{}
	for stack := slices.Clone(keys); len(stack) > 0; {
		key := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if seen[key] {
			continue
		}
		seen[key] = true
		b, err := queue.Find(r, key)
		if errors.Is(err, flox.ErrNotFound) {
			b, err = nil, nil
		}
		if err != nil {
			return err
		}
		if visit(key, b) {
			stack = append(stack, b.GetNeeds()...)
		}
	}
	return nil
}

// BuildOutput is floxv1connect.AdminHandler.
func (a *admin) BuildOutput(ctx context.Context, req *connect.Request[floxv1.BuildOutputRequest], stream *connect.ServerStream[floxv1.BuildOutputPiece]) error {
	_, err := a.mayAs(ctx, req.Peer().Addr, req.Header(), anyMember, "build.log")
	if err != nil {
		return api.ToConnect(err)
	}
	select {
	case a.followers <- struct{}{}:
		defer func() { <-a.followers }()
	default:
		return api.ToConnect(fmt.Errorf("%d follow logs already, try again: %w", maxFollowers, flox.ErrBusy))
	}
	return sending(ctx, a, stream, func(ctx context.Context, send func(*floxv1.BuildOutputPiece)) error {
		return a.buildOutput(ctx, req.Msg, send)
	})
}

// buildOutput sends the log of a build under way, or else the one that is kept.
func (a *admin) buildOutput(ctx context.Context, q *floxv1.BuildOutputRequest, send func(*floxv1.BuildOutputPiece)) error {
	key, lease := "", (*floxv1.BuildLease)(nil)
	err := a.viewQueue(ctx, func(r *cluster.Reader) (err error) {
		if key, err = a.buildMeant(r, q.GetBuild()); err != nil {
			return err
		}
		b, err := queue.Find(r, key)
		if lease = b.GetLease(); errors.Is(err, flox.ErrNotFound) {
			err = nil
		}
		return err
	})
	if err != nil {
		return err
	}
	if lease != nil {
		send(&floxv1.BuildOutputPiece{Ongoing: true})
		said := false
		err := a.s.farm.eventsOf(ctx, lease, !q.GetFollow(), func(e *floxv1.BuildEvent) error {
			if e.GetLine() != nil {
				said = true
				send(&floxv1.BuildOutputPiece{Data: []byte(e.GetLine().GetText() + "\n"), Ongoing: true})
			}
			return ctx.Err()
		})
		if said || !errors.Is(err, flox.ErrNotFound) { // else it has ended just now
			return err
		}
	}
	drv, _, err := queue.Split(key)
	if err != nil {
		return err
	}
	record, log, err := a.s.builds.log(ctx, string(drv))
	if err != nil {
		return err
	}
	send(&floxv1.BuildOutputPiece{Record: record})
	for piece := range slices.Chunk(log, logPiece) {
		send(&floxv1.BuildOutputPiece{Data: piece})
	}
	return ctx.Err()
}
