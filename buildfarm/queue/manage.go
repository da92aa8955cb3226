package queue

import (
	"errors"
	"fmt"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
)

// retry forgets that a build failed, and has it wait if it is in the queue.
func (a *applying) retry(key string) error {
	if err := a.forget(key); err != nil {
		return err
	}
	b, err := a.build(key)
	if err != nil || b == nil || !again(b) {
		return err
	}
	a.reply.Builds = append(a.reply.Builds, b)
	return a.store(b)
}

// cancel ends builds that are not over, whoever wants them.
func (a *applying) cancel(c *floxv1.CancelBuilds) error {
	if len(c.GetBy()) > maxText || len(c.GetReason()) > maxText {
		return fmt.Errorf("cancelled by a name of %d bytes for a reason of %d, want at most %d: %w", len(c.GetBy()), len(c.GetReason()), maxText, flox.ErrBadInput)
	}
	why := "it was cancelled by " + c.GetBy()
	if c.GetReason() != "" {
		why += ": " + c.GetReason()
	}
	return a.each(c.GetKeys(), func(key string) error {
		b, err := a.build(key)
		if err != nil || b == nil || over(b) {
			return err
		}
		if b.GetLease() != nil {
			if err := a.use(b.GetOwner(), b.GetLease()); err != nil {
				return err
			}
		}
		b.State, b.Lease = floxv1.BuildState_BUILD_STATE_FAILED, nil
		b.Outcome = &floxv1.BuildOutcome{Status: uint32(buildfarm.MiscFailure), Message: why}
		a.reply.Builds = append(a.reply.Builds, b)
		return a.store(b)
	})
}

// rank sets the priority of builds.
func (a *applying) rank(c *floxv1.RankBuilds) error {
	if c.GetPriority() > maxPriority || c.GetPriority() < -maxPriority {
		return badPriority(c.GetPriority())
	}
	return a.each(c.GetKeys(), func(key string) error {
		b, err := a.build(key)
		if err != nil || b == nil {
			return err
		}
		b.Priority = c.GetPriority()
		a.reply.Builds = append(a.reply.Builds, b)
		return a.store(b)
	})
}

// register takes in a worker, or what it says of itself now.
func (a *applying) register(w *floxv1.FarmWorker) error {
	names := append(append(append([]string{w.GetId(), w.GetName()}, w.GetSystems()...), w.GetFeatures()...), w.GetMandatory()...)
	for _, text := range names {
		if len(text) > maxText {
			return fmt.Errorf("worker %.80q: %.80q has %d bytes, want at most %d: %w", w.GetId(), text, len(text), maxText, flox.ErrBadInput)
		}
	}
	if w.GetId() == "" || len(names) > 3*maxFeatures || w.GetSlots() > maxFeatures*maxFeatures || w.GetSpeed() < 0 || w.GetSpeed() > 1e6 {
		return fmt.Errorf("worker %.80q with %d systems and features, %d slots and speed %g: %w", w.GetId(), len(names)-2, w.GetSlots(), w.GetSpeed(), flox.ErrBadInput)
	}
	have, err := load(a.tx, textKey(workerKey, w.GetId()), &floxv1.FarmWorker{})
	switch {
	case errors.Is(err, flox.ErrNotFound):
		if a.counts.workers >= maxWorkers {
			return fmt.Errorf("there are %d workers already: %w", a.counts.workers, flox.ErrFull)
		}
		a.counts.workers++
		w.State, w.SinceUnixMs = floxv1.WorkerState_WORKER_STATE_ACTIVE, a.at.UnixMilli()
	case err != nil:
		return err
	default:
		w.State, w.SinceUnixMs = have.GetState(), have.GetSinceUnixMs()
	}
	a.change.Worker = w.GetId()
	return a.put(textKey(workerKey, w.GetId()), w)
}

func (a *applying) worker(id string) (*floxv1.FarmWorker, error) {
	w, err := load(a.tx, textKey(workerKey, id), &floxv1.FarmWorker{})
	if errors.Is(err, flox.ErrNotFound) {
		err = fmt.Errorf("there is no worker %.80q: %w", id, flox.ErrNotFound)
	}
	return w, err
}

// setState has a worker get builds, or none.
func (a *applying) setState(c *floxv1.SetWorkerState) error {
	w, err := a.worker(c.GetWorker())
	if err != nil {
		return err
	}
	if _, known := floxv1.WorkerState_name[int32(c.GetState())]; !known {
		return fmt.Errorf("worker %s: state %d: %w", w.GetId(), c.GetState(), flox.ErrBadInput)
	}
	w.State, a.change.Worker = c.GetState(), w.GetId()
	return a.put(textKey(workerKey, w.GetId()), w)
}

// removeWorker forgets a worker. Leases that it has go on until they are taken back.
func (a *applying) removeWorker(id string) error {
	if _, err := a.worker(id); err != nil {
		return err
	}
	a.counts.workers--
	a.change.Worker = id
	return a.tx.Delete(textKey(workerKey, id))
}
