package queue

import (
	"errors"
	"fmt"
	"strings"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
)

// lease gives a build to a worker, if it may have it.
func (a *applying) lease(c *floxv1.LeaseBuild) error {
	b, err := a.build(c.GetKey())
	if err != nil {
		return err
	}
	a.reply.Refused = true
	if b == nil || b.GetState() != floxv1.BuildState_BUILD_STATE_WAITING || b.GetNotBeforeUnixMs() > a.at.UnixMilli() {
		return nil
	}
	w, err := load(a.tx, textKey(workerKey, c.GetWorker()), &floxv1.FarmWorker{})
	if errors.Is(err, flox.ErrNotFound) || err == nil && w.GetState() != floxv1.WorkerState_WORKER_STATE_ACTIVE {
		return nil
	}
	if err != nil {
		return err
	}
	for _, need := range b.GetNeeds() {
		// One that has left the queue holds nothing up: the worker sees whether it is valid.
		in, err := a.build(need)
		if err != nil || in != nil && in.GetState() != floxv1.BuildState_BUILD_STATE_DONE {
			return err
		}
	}
	b.State = floxv1.BuildState_BUILD_STATE_LEASED
	b.Lease = &floxv1.BuildLease{Key: b.GetKey(), Token: a.index, Worker: w.GetId(), UnixMs: a.at.UnixMilli()}
	a.reply.Refused, a.reply.Token, a.reply.Builds = false, a.index, []*floxv1.QueuedBuild{b}
	return a.store(b)
}

// holds gives the build of a lease; nil if another one counts, or none.
func (a *applying) holds(key string, token uint64) (*floxv1.QueuedBuild, error) {
	b, err := a.build(key)
	if err != nil || token == 0 || b.GetLease().GetToken() != token {
		return nil, err
	}
	return b, nil
}

// finishBuild ends a lease with what came of it.
func (a *applying) finishBuild(c *floxv1.FinishBuild) error {
	if err := checkOutcome(c); err != nil {
		return err
	}
	b, err := a.holds(c.GetKey(), c.GetToken())
	if b == nil {
		a.reply.Lost = err == nil
		return err
	}
	lease := b.GetLease()
	b.Lease = nil
	if c.GetFault() != "" {
		a.fault(b, c.GetFault(), true)
	} else {
		b.Outcome, b.State = c.GetOutcome(), floxv1.BuildState_BUILD_STATE_FAILED
		if succeeded(b.GetOutcome()) {
			b.State = floxv1.BuildState_BUILD_STATE_DONE
		}
		if err := a.learn(b, c.GetEvidence()); err != nil {
			return err
		}
	}
	if err := a.use(b.GetOwner(), lease); err != nil {
		return err
	}
	if err := a.witness(b, lease, c); err != nil {
		return err
	}
	a.reply.Builds = []*floxv1.QueuedBuild{b}
	return a.store(b)
}

func checkOutcome(c *floxv1.FinishBuild) error {
	o := c.GetOutcome()
	size := len(o.GetMessage()) + len(c.GetFault())
	for _, line := range o.GetTail() {
		size += len(line)
	}
	if c.GetFault() == "" && o == nil || size > 16*maxMessage || len(o.GetOutputs()) > maxNeeds {
		return fmt.Errorf("build %.300s: an outcome of %d bytes of text and %d outputs, or none: %w", c.GetKey(), size, len(o.GetOutputs()), flox.ErrBadInput)
	}
	return nil
}

// Resolves is Nix's status of what turned out to be something that was built before
// (ResolvesToAlreadyValid).
const Resolves = 13

func succeeded(o *floxv1.BuildOutcome) bool {
	return o.GetStatus() <= uint32(buildfarm.AlreadyValid) || o.GetStatus() == Resolves
}

// fault has a build wait for another try, or gives it up.
func (a *applying) fault(b *floxv1.QueuedBuild, fault string, wait bool) {
	b.State, b.Lease, b.Fault = floxv1.BuildState_BUILD_STATE_WAITING, nil, strings.ToValidUTF8(fault[:min(len(fault), maxMessage)], "")
	b.Tries++
	if b.GetTries() >= maxTries {
		b.State = floxv1.BuildState_BUILD_STATE_FAILED
		b.Outcome = &floxv1.BuildOutcome{
			Status:  uint32(buildfarm.TransientFailure),
			Message: fmt.Sprintf("it could not be built in %d tries; the last one: %s", b.GetTries(), b.GetFault()),
		}
		return
	}
	if wait {
		b.NotBeforeUnixMs = a.at.Add(Delay(b.GetTries())).UnixMilli()
	}
}

// release takes leases back.
func (a *applying) release(c *floxv1.ReleaseBuilds) error {
	if len(c.GetLeases()) > MaxKeys || len(c.GetFault()) > maxMessage {
		return fmt.Errorf("%d leases are taken back with %d bytes of text, want at most %d and %d: %w", len(c.GetLeases()), len(c.GetFault()), MaxKeys, maxMessage, flox.ErrBadInput)
	}
	for _, l := range c.GetLeases() {
		b, err := a.holds(l.GetKey(), l.GetToken())
		if err != nil {
			return err
		}
		if b == nil {
			continue
		}
		if err := a.use(b.GetOwner(), b.GetLease()); err != nil {
			return err
		}
		if c.GetFault() == "" {
			b.State, b.Lease = floxv1.BuildState_BUILD_STATE_WAITING, nil
		} else {
			a.fault(b, c.GetFault(), false)
		}
		if err := a.store(b); err != nil {
			return err
		}
	}
	return nil
}

// settle has a build fail, or wait again, as what it needs has failed or not.
func (a *applying) settle(key string) error {
	b, err := a.build(key)
	if err != nil || b == nil {
		return err
	}
	failed := false
	for _, need := range b.GetNeeds() {
		in, err := a.build(need)
		if err != nil {
			return err
		}
		failed = failed || in.GetState() == floxv1.BuildState_BUILD_STATE_FAILED
	}
	if !settled(b, failed) {
		return nil
	}
	a.reply.Builds = append(a.reply.Builds, b)
	return a.store(b)
}
