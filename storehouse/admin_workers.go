package storehouse

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/buildfarm/queue"
	cluster "github.com/floxctl/flox/raft"
)

// ListWorkers is floxv1connect.AdminHandler. The server that leads answers, which hears them.
func (a *admin) ListWorkers(ctx context.Context, req *connect.Request[floxv1.ListWorkersRequest]) (*connect.Response[floxv1.ListWorkersResponse], error) {
	who, err := a.looks(ctx, req, "worker.list")
	if err != nil {
		return nil, api.ToConnect(err)
	}
	own := func() (*floxv1.ListWorkersResponse, error) { return a.listWorkers(ctx) }
	return byLeader(ctx, a, who, req, own, floxv1connect.AdminClient.ListWorkers)
}

func (a *admin) listWorkers(ctx context.Context) (*floxv1.ListWorkersResponse, error) {
	f, out := a.s.farm, &floxv1.ListWorkersResponse{}
	return out, a.viewQueue(ctx, func(r *cluster.Reader) error {
		all, err := queue.Workers(r)
		if err != nil {
			return err
		}
		by := map[string]*floxv1.WorkerStanding{}
		for _, w := range all {
			by[w.GetId()] = &floxv1.WorkerStanding{Worker: w, Away: !f.there(f.beats, w.GetId(), time.Now(), f.patience())}
			out.Workers = append(out.Workers, by[w.GetId()])
		}
		return queue.Builds(r, "", func(b *floxv1.QueuedBuild) bool {
			if w := by[b.GetLease().GetWorker()]; w != nil {
				b.Needs = nil
				w.Builds = append(w.Builds, b)
			}
			return true
		})
	})
}

// SetWorker is floxv1connect.AdminHandler.
func (a *admin) SetWorker(ctx context.Context, req *connect.Request[floxv1.SetWorkerRequest]) (*connect.Response[floxv1.SetWorkerResponse], error) {
	action := workerActions[req.Msg.GetState()]
	if action == "" {
		return nil, api.ToConnect(fmt.Errorf("a worker's state %d: %w", req.Msg.GetState(), flox.ErrBadInput))
	}
	who, err := a.may(ctx, req, adminOnly, action)
	if err == nil && !a.s.farm.on() {
		err = errFarmLevel
	}
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.setWorker(ctx, who, action, req.Msg))
}

func (a *admin) setWorker(ctx context.Context, who *floxv1.Actor, action string, q *floxv1.SetWorkerRequest) (*floxv1.SetWorkerResponse, error) {
	var w *floxv1.FarmWorker
	err := a.viewQueue(ctx, func(r *cluster.Reader) (err error) {
		w, err = workerMeant(r, q.GetWorker())
		return err
	})
	if err != nil {
		return nil, err
	}
	set := &floxv1.SetWorkerState{Worker: w.GetId(), State: q.GetState()}
	_, err = a.s.farm.propose(ctx, a.s.node.NewSession(), &floxv1.QueueCommand{Command: &floxv1.QueueCommand_WorkerState{WorkerState: set}})
	if err == nil {
		err = a.s.note(ctx, who, action, nameOr(w.GetName(), w.GetId()), "")
	}
	w.State = q.GetState()
	return &floxv1.SetWorkerResponse{Worker: w}, err
}

// workerMeant gives the worker of a name, an ID or the beginning of one.
func workerMeant(r *cluster.Reader, text string) (*floxv1.FarmWorker, error) {
	w, err := queue.Worker(r, text)
	if !errors.Is(err, flox.ErrNotFound) {
		return w, err
	}
	all, err := queue.Workers(r)
	if err != nil {
		return nil, err
	}
	var found, names []string
	for _, o := range all {
		names = append(names, nameOr(o.GetName(), o.GetId()))
		if strings.EqualFold(o.GetName(), text) || len(text) >= minWorkerID && strings.HasPrefix(o.GetId(), text) {
			found, w = append(found, fmt.Sprintf("%s (%s)", o.GetName(), o.GetId())), o
		}
	}
	switch {
	case len(found) == 0:
		names = append(names[:min(len(names), maxNamed)], map[bool]string{true: "…"}[len(names) > maxNamed])
		return nil, fmt.Errorf("no worker is called %.80q; there are: %s: %w", text, nameOr(strings.TrimSpace(strings.Join(names, " ")), "none"), flox.ErrNotFound)
	case len(found) > 1:
		return nil, fmt.Errorf("%q may be %s: name one by its ID: %w", text, strings.Join(found[:min(len(found), maxNamed)], " or "), flox.ErrBadInput)
	}
	return w, nil
}

// minWorkerID is how much of an ID is enough to look for it.
const minWorkerID = 6
