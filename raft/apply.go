package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/batchrepr"
	"github.com/hashicorp/raft"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// maxRunBytes bounds the writes that are held before they go into the state.
const maxRunBytes = 4 << 20

// Apply is raft.FSM.
func (m *machine) Apply(l *raft.Log) any { return m.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch is raft.BatchingFSM: committed entries in order, some of them not ours.
func (m *machine) ApplyBatch(logs []*raft.Log) []any {
	answers := make([]any, len(logs))
	r := run{m: m, answers: answers, index: m.applied(), time: m.time}
	for i, l := range logs {
		answers[i] = r.apply(i, l)
	}
	r.end()
	m.notify()
	return answers
}

// run is entries that go into the state together, in one batch. It leads to the
// same state as one batch for each, only in larger steps.
type run struct {
	m       *machine
	answers []any
	kept    int  // how many answers are in the state for good
	failed  bool // the state did not take a batch: nothing more goes into it

	db    *database     // nil = nothing was applied yet
	batch *pebble.Batch // what is applied and not yet in the state
	mark  mark          // the end of the last whole entry in batch
	index uint64        // its place in the log
	time  int64         // and its time
}

// mark is a place in a batch.
type mark struct {
	bytes int
	count uint32
}

// apply carries out one committed entry, the i-th of the run.
func (r *run) apply(i int, l *raft.Log) answer {
	m := r.m
	if err := m.stopped.Load(); err != nil {
		return answer{err: *err}
	}
	if l.Type != raft.LogCommand || l.Index <= r.index {
		return answer{} // a change of members, or replayed after a restart: nobody waits for it
	}
	o, kind, err := r.applyEntry(i, l)
	if err == nil && (kind == memberKind || r.batch.Len() > maxRunBytes) {
		err = r.commit(i + 1)
	}
	if err == nil && kind == memberKind {
		err = m.members()
	}
	if err != nil {
		return answer{err: r.fail(i, l.Index, err)}
	}
	return answer{outcome: o}
}

// fail stops the node at an entry, with those before it in the state.
func (r *run) fail(i int, index uint64, err error) error {
	err = fmt.Errorf("log entry %d cannot be applied, the state is as before it: %w", index, err)
	if r.batch != nil {
		err = errors.Join(err, r.cut(i))
	}
	r.m.stop(err)
	return err
}

// end puts what is applied into the state, and says of what could not be that
// its outcome is unknown.
func (r *run) end() {
	if r.db == nil {
		return
	}
	if !r.failed {
		if err := r.commit(len(r.answers)); err != nil {
			r.m.stop(err)
		}
	}
	if why := r.m.stopped.Load(); why != nil {
		for i := r.kept; i < len(r.answers); i++ {
			r.answers[i] = answer{err: *why}
		}
	}
	r.batch.Close() //nolint:errcheck // never fails
	r.db.release()  //nolint:errcheck // the state holds another reference
}

// begin opens the database for the run's first entry.
func (r *run) begin() (err error) {
	if r.db != nil {
		return nil
	}
	if r.db, err = r.m.state.acquire(); err != nil {
		return err
	}
	r.fresh()
	return nil
}

// fresh begins an empty batch.
func (r *run) fresh() {
	if r.batch != nil {
		r.batch.Close() //nolint:errcheck // never fails
	}
	r.batch = r.db.NewIndexedBatch()
	r.mark = mark{bytes: r.batch.Len()}
}

// commit puts the batch into the state; the first n answers are then for good.
func (r *run) commit(n int) error {
	if r.index == r.m.applied() {
		r.kept = n
		return nil
	}
	if err := r.put(r.batch, n); err != nil {
		return err
	}
	r.fresh()
	return nil
}

// cut takes back what the entry that is being applied wrote: what came before it
// goes into the state, and a new batch begins. The first n answers are then for good.
func (r *run) cut(n int) error {
	if r.batch.Len() == r.mark.bytes {
		return nil
	}
	if r.index > r.m.applied() {
		whole := r.db.NewBatch()
		defer whole.Close()
		repr := bytes.Clone(r.batch.Repr()[:r.mark.bytes])
		batchrepr.SetCount(repr, r.mark.count)
		err := whole.SetRepr(repr)
		if err == nil {
			err = r.put(whole, n)
		}
		if err != nil {
			r.failed = true
			return err
		}
	}
	r.fresh()
	return nil
}

// put commits b, which ends with the entry at r.index.
func (r *run) put(b *pebble.Batch, n int) error {
	err := errors.Join(
		b.Set(keyApplied, binary.BigEndian.AppendUint64(nil, r.index), nil),
		b.Set(keyTime, binary.BigEndian.AppendUint64(nil, uint64(r.time)), nil))
	if err == nil {
		// Not synced: the log is, and what the state lost of its end is applied again.
		err = b.Commit(pebble.NoSync)
	}
	if err != nil {
		r.failed = true
		return fmt.Errorf("write state: %w", err)
	}
	r.kept = n
	r.m.time = r.time
	r.m.mu.Lock()
	r.m.index = r.index
	r.m.mu.Unlock()
	return nil
}

// applyEntry puts the writes of one entry into the batch. An error means that
// the node must stop, with the state as it was before the entry.
func (r *run) applyEntry(i int, l *raft.Log) (o outcome, kind uint32, err error) {
	e, err := decodeEntry(l.Data)
	if err != nil {
		return outcome{}, 0, err
	}
	p := r.m.processors[e.Kind]
	if p == nil {
		return outcome{}, 0, fmt.Errorf("kind %d: %w", e.Kind, ErrUnknownCommand)
	}
	if err := r.begin(); err != nil {
		return outcome{}, 0, err
	}
	at := max(e.TimeUnixMs, r.time) // whoever led before may have had a faster clock
	if o, err = r.applyOnce(i, p, e, at, l.Index); err != nil {
		return outcome{}, 0, err
	}
	r.mark = mark{r.batch.Len(), r.batch.Count()}
	r.index, r.time = l.Index, at
	return o, e.Kind, nil
}

// applyOnce hands the command to its processor unless its session has the
// answer already, and fills the batch with what follows.
func (r *run) applyOnce(i int, p Processor, e *floxv1.Envelope, at int64, index uint64) (outcome, error) {
	own := &Tx{batch: r.batch, space: []byte{ownSpace}}
	table := sessions{own, &r.m.oldest, r.m.known}
	if e.Session != "" {
		done, err := table.check(e.Session, e.Sequence, at)
		if err != nil || done != nil {
			if done == nil {
				done = &outcome{}
			}
			return *done, err
		}
	}
	tx := &Tx{batch: r.batch, space: kindPrefix(e.Kind)}
	reply, err := p.Apply(tx, e.Command, time.UnixMilli(at).UTC(), index)
	o := outcome{reply: reply}
	switch {
	case tx.failed != nil:
		return outcome{}, tx.failed
	case errors.Is(err, ErrUnknownCommand):
		return outcome{}, fmt.Errorf("kind %d: %w", e.Kind, err)
	case err != nil:
		if err := r.cut(i); err != nil { // a refused command changes nothing
			return outcome{}, err
		}
		own.batch = r.batch
		o = refuse(err)
	}
	if e.Session != "" {
		err = table.remember(e.Session, e.Sequence, at, o)
	} else {
		err = nil
	}
	err = errors.Join(err, table.expire(at))
	if own.failed != nil {
		err = own.failed
	}
	return o, err
}
