package queue

import (
	"encoding/binary"
	"errors"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
)

// remembered are the ways to fail that would be the same again. What a timeout or too much
// output is depends on who asks.
var remembered = map[uint32]bool{
	uint32(buildfarm.PermanentFailure): true, uint32(buildfarm.InputRejected): true, uint32(buildfarm.OutputRejected): true,
}

// learn remembers of a build that ended how long it took, or that it fails.
func (a *applying) learn(b *floxv1.QueuedBuild, e *floxv1.BuildEvidence) error {
	drv, _, err := Split(b.GetKey())
	if err != nil {
		return err
	}
	if err := a.forget(b.GetKey()); err != nil {
		return err
	}
	switch {
	case b.GetState() == floxv1.BuildState_BUILD_STATE_DONE && e.GetBuildingMs() > 0:
		return a.time(nameOf(drv), e.GetBuildingMs())
	case remembered[b.GetOutcome().GetStatus()]:
		a.counts.failures++
		f := &floxv1.BuildFailure{Key: b.GetKey(), Outcome: b.GetOutcome(), UnixMs: a.at.UnixMilli(), Index: a.index}
		err := errors.Join(a.put(textKey(failureKey, b.GetKey()), f), a.tx.Set(indexKey(failuresKey, a.index), []byte(b.GetKey())))
		if err != nil {
			return err
		}
		return a.trim(failuresKey, &a.counts.goneFailures, &a.counts.failures, a.failures, failureKey)
	}
	return nil
}

// forget forgets that a build failed.
func (a *applying) forget(key string) error {
	f, err := load(a.tx, textKey(failureKey, key), &floxv1.BuildFailure{})
	if errors.Is(err, flox.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	a.counts.failures--
	return errors.Join(a.tx.Delete(textKey(failureKey, key)), a.tx.Delete(indexKey(failuresKey, f.GetIndex())))
}

// time remembers how long builds of a name take: mostly the last ones.
func (a *applying) time(name string, ms uint64) error {
	t, err := load(a.tx, textKey(timeKey, name), &floxv1.BuildTime{})
	switch {
	case errors.Is(err, flox.ErrNotFound):
		t.Ms = ms
	case err != nil:
		return err
	default:
		t.Ms = (t.GetMs() + ms) / 2
		a.counts.times--
		if err := a.tx.Delete(indexKey(timesKey, t.GetIndex())); err != nil {
			return err
		}
	}
	a.counts.times++
	t.Index = a.index
	if err := errors.Join(a.put(textKey(timeKey, name), t), a.tx.Set(indexKey(timesKey, a.index), []byte(name))); err != nil {
		return err
	}
	return a.trim(timesKey, &a.counts.goneTimes, &a.counts.times, a.times, timeKey)
}

// trim keeps a list within its bound: it forgets the oldest, and what they name.
func (a *applying) trim(list byte, gone, have *uint64, most uint64, of byte) error {
	for *have > most {
		var index uint64
		var name string
		err := a.tx.Iterate([]byte{list}, indexKey(list, *gone), func(key, value []byte) bool {
			index, name = binary.BigEndian.Uint64(key[1:]), string(value)
			return false
		})
		if err = errors.Join(err, a.tx.Delete(indexKey(list, index)), a.tx.Delete(textKey(of, name))); err != nil {
			return err
		}
		*gone = index
		*have--
	}
	return nil
}

// use counts how long an owner had a worker.
func (a *applying) use(owner string, l *floxv1.BuildLease) error {
	key := usedIn(a.at, owner)
	used := binary.BigEndian.AppendUint64(nil, 0)
	have, err := a.tx.Get(key)
	switch {
	case err == nil && len(have) == len(used):
		used = have
	case err != nil && !errors.Is(err, flox.ErrNotFound):
		return err
	}
	sum := binary.BigEndian.Uint64(used) + uint64(max(a.at.Sub(time.UnixMilli(l.GetUnixMs())), 0).Milliseconds()) //nolint:gosec // not negative
	return errors.Join(
		a.tx.Set(key, binary.BigEndian.AppendUint64(nil, sum)),
		a.tx.DeleteRange([]byte{usedKey}, usedIn(a.at.Add(-Window), "")))
}

// usedIn is where it is counted what an owner uses at a time.
func usedIn(at time.Time, owner string) []byte {
	return append(indexKey(usedKey, uint64(max(at.UnixNano(), 0)/int64(windowPart))), owner...) //nolint:gosec // not negative
}

// witness keeps what is known of a try.
func (a *applying) witness(b *floxv1.QueuedBuild, l *floxv1.BuildLease, c *floxv1.FinishBuild) error {
	e := &floxv1.BuildEvidence{
		Key: b.GetKey(), Owner: b.GetOwner(), Worker: l.GetWorker(), Status: c.GetOutcome().GetStatus(), Tries: b.GetTries(),
		QueuedUnixMs: b.GetQueuedUnixMs(), LeasedUnixMs: l.GetUnixMs(), StoppedUnixMs: a.at.UnixMilli(), Index: a.index,
	}
	if c.GetFault() != "" {
		e.Fault = b.GetFault()
	}
	if is := c.GetEvidence(); is != nil {
		e.FetchingMs, e.BuildingMs, e.UploadingMs = is.GetFetchingMs(), is.GetBuildingMs(), is.GetUploadingMs()
		e.PeakMemory, e.Fetched, e.Uploaded = is.GetPeakMemory(), is.GetFetched(), is.GetUploaded()
	}
	a.counts.history++
	return a.put(indexKey(historyKey, a.index), e)
}
