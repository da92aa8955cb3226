package queue

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
)

// enqueue adds builds to a want.
func (a *applying) enqueue(c *floxv1.EnqueueBuilds) error {
	if err := checkEnqueue(c); err != nil {
		return err
	}
	w, err := load(a.tx, textKey(wantKey, c.GetWant()), &floxv1.BuildWant{})
	switch {
	case errors.Is(err, flox.ErrNotFound):
		if a.counts.wants >= maxWants {
			return fmt.Errorf("builds are wanted by %d already, try again later: %w", a.counts.wants, flox.ErrBusy)
		}
		a.counts.wants++
		w = &floxv1.BuildWant{Id: c.GetWant(), Owner: c.GetOwner(), Holder: c.GetHolder(), UnixMs: a.at.UnixMilli()}
	case err != nil:
		return err
	case w.GetLeft():
		return fmt.Errorf("want %s is ending: %w", c.GetWant(), flox.ErrClosed)
	}
	for _, n := range c.GetBuilds() {
		if err := a.add(c, w, n); err != nil {
			return err
		}
	}
	a.change.Want = w.GetId()
	a.change.Keys = nil // they are those of the want
	return a.put(textKey(wantKey, w.GetId()), w)
}

func checkEnqueue(c *floxv1.EnqueueBuilds) error {
	if c.GetWant() == "" || len(c.GetBuilds()) == 0 || len(c.GetBuilds()) > MaxBatch {
		return fmt.Errorf("want %.80q of %d builds, want a name, and 1 to %d: %w", c.GetWant(), len(c.GetBuilds()), MaxBatch, flox.ErrBadInput)
	}
	for _, text := range []string{c.GetWant(), c.GetOwner(), c.GetHolder()} {
		if len(text) > maxText || bytes.IndexByte([]byte(text), 0) >= 0 {
			return fmt.Errorf("want %.80q: a name of %d bytes, want at most %d and none of them 0: %w", c.GetWant(), len(text), maxText, flox.ErrBadInput)
		}
	}
	if c.GetPriority() > maxPriority || c.GetPriority() < -maxPriority {
		return badPriority(c.GetPriority())
	}
	all := 0
	for _, n := range c.GetBuilds() {
		if all += len(n.GetNeeds()); len(n.GetNeeds()) > maxNeeds || all > maxAllNeeds {
			return fmt.Errorf("build %s needs %d others, of %d at once, want at most %d and %d: %w", n.GetDrv(), len(n.GetNeeds()), all, maxNeeds, maxAllNeeds, flox.ErrBadInput)
		}
		if n.GetSystem() == "" || len(n.GetSystem()) > maxText || len(n.GetFeatures()) > maxFeatures {
			return fmt.Errorf("build %s for system %.80q with %d features: %w", n.GetDrv(), n.GetSystem(), len(n.GetFeatures()), flox.ErrBadInput)
		}
		for _, f := range n.GetFeatures() {
			if len(f) > maxText {
				return fmt.Errorf("build %s: feature %.80q: %w", n.GetDrv(), f, flox.ErrBadInput)
			}
		}
	}
	return nil
}

func badPriority(p int32) error {
	return fmt.Errorf("priority %d, want %d to %d: %w", p, -maxPriority, maxPriority, flox.ErrBadInput)
}

// add puts a build into the queue, or has a want take part in it.
func (a *applying) add(c *floxv1.EnqueueBuilds, w *floxv1.BuildWant, n *floxv1.NewBuild) error {
	drv, err := flox.ParseStorePath(n.GetDrv())
	if err != nil {
		return err
	}
	key := Key(drv, n.GetCheck())
	if _, _, err := Split(key); err != nil {
		return err
	}
	needs := slices.Compact(slices.Sorted(slices.Values(n.GetNeeds())))
	failed := false
	for _, need := range needs {
		if _, err := a.tx.Get(append(membersOf(w.GetId()), need...)); err != nil {
			if errors.Is(err, flox.ErrNotFound) {
				err = fmt.Errorf("build %s needs %.300s, which is not of its want, or comes behind it: %w", key, need, flox.ErrBadInput)
			}
			return err
		}
		in, err := a.build(need)
		if err != nil {
			return err
		}
		failed = failed || in.GetState() == floxv1.BuildState_BUILD_STATE_FAILED
	}
	b, err := a.build(key)
	if err != nil {
		return err
	}
	if c.GetRetry() {
		if err := a.forget(key); err != nil {
			return err
		}
	}
	if b == nil {
		if b, err = a.newBuild(c, n, key, drv); err != nil {
			return err
		}
	} else {
		b.Interactive, b.Priority = b.GetInteractive() || c.GetInteractive(), max(b.GetPriority(), c.GetPriority())
		if c.GetRetry() {
			again(b)
		}
	}
	// Who asks last knows best what is not valid yet.
	b.Needs = needs
	settled(b, failed)
	at := append(membersOf(w.GetId()), key...)
	if _, err := a.tx.Get(at); errors.Is(err, flox.ErrNotFound) {
		b.Wants++
		w.Builds++
		err = a.tx.Set(at, nil)
		if err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	if over(b) {
		a.reply.Builds = append(a.reply.Builds, b)
	}
	return a.store(b)
}

// newBuild makes a build; one that is remembered to fail is over.
func (a *applying) newBuild(c *floxv1.EnqueueBuilds, n *floxv1.NewBuild, key string, drv flox.StorePath) (*floxv1.QueuedBuild, error) {
	if a.counts.builds >= a.builds {
		return nil, fmt.Errorf("there are %d builds in the queue already, try again later: %w", a.counts.builds, flox.ErrBusy)
	}
	a.counts.builds++
	b := &floxv1.QueuedBuild{
		Key: key, System: n.GetSystem(), Features: slices.Compact(slices.Sorted(slices.Values(n.GetFeatures()))), Memory: n.GetMemory(), Disk: n.GetDisk(),
		Options: n.GetOptions(), Owner: c.GetOwner(), Interactive: c.GetInteractive(), Priority: c.GetPriority(),
		QueuedUnixMs: a.at.UnixMilli(), QueuedIndex: a.index,
	}
	took, err := load(a.tx, textKey(timeKey, nameOf(drv)), &floxv1.BuildTime{})
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return nil, err
	}
	b.ExpectMs = took.GetMs()
	f, err := load(a.tx, textKey(failureKey, key), &floxv1.BuildFailure{})
	if errors.Is(err, flox.ErrNotFound) {
		return b, nil
	}
	b.State, b.Outcome, b.Remembered = floxv1.BuildState_BUILD_STATE_FAILED, f.GetOutcome(), true
	return b, err
}

// settled has a build fail because one that it needs has, or wait again because none has
// any more. It gives whether that changed it.
func settled(b *floxv1.QueuedBuild, failed bool) bool {
	switch {
	case failed && b.GetState() == floxv1.BuildState_BUILD_STATE_WAITING:
		b.State = floxv1.BuildState_BUILD_STATE_FAILED
		b.Outcome = &floxv1.BuildOutcome{Status: uint32(buildfarm.DependencyFailed)}
		return true
	case !failed && b.GetState() == floxv1.BuildState_BUILD_STATE_FAILED && b.GetOutcome().GetStatus() == uint32(buildfarm.DependencyFailed):
		return again(b)
	}
	return false
}

// again has a build that failed wait, as if it were new.
func again(b *floxv1.QueuedBuild) bool {
	if b.GetState() != floxv1.BuildState_BUILD_STATE_FAILED {
		return false
	}
	b.State, b.Outcome, b.Remembered = floxv1.BuildState_BUILD_STATE_WAITING, nil, false
	b.Tries, b.Fault, b.NotBeforeUnixMs = 0, "", 0
	return true
}

// leave ends some of a want.
func (a *applying) leave(want string) error {
	w, err := load(a.tx, textKey(wantKey, want), &floxv1.BuildWant{})
	if errors.Is(err, flox.ErrNotFound) {
		return nil // it has ended
	}
	if err != nil {
		return err
	}
	prefix := membersOf(want)
	var keys []string
	err = a.tx.Iterate(prefix, nil, func(key, _ []byte) bool {
		keys = append(keys, string(key[len(prefix):]))
		return len(keys) < leaveStep
	})
	for _, key := range keys {
		err = errors.Join(err, a.tx.Delete(append(bytes.Clone(prefix), key...)))
		if err == nil {
			err = a.unwant(key)
		}
	}
	if err != nil {
		return err
	}
	w.Left = true
	if w.Builds -= uint32(len(keys)); w.GetBuilds() > 0 { //nolint:gosec // at most leaveStep
		a.reply.More = true
		return a.put(textKey(wantKey, want), w)
	}
	a.counts.wants--
	a.change.Want = want
	return a.tx.Delete(textKey(wantKey, want))
}

// unwant takes one who wants it off a build. What nobody wants leaves the queue, whoever
// has a lease of it.
func (a *applying) unwant(key string) error {
	b, err := a.build(key)
	if err != nil {
		return err
	}
	if b == nil {
		return fmt.Errorf("build %s is wanted and not in the queue: %w", key, flox.ErrCorrupt)
	}
	if b.Wants--; b.GetWants() > 0 {
		return a.store(b)
	}
	a.counts.builds--
	a.change.Keys = append(a.change.Keys, key)
	return a.tx.Delete(textKey(buildKey, key))
}
