package queue

import (
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// Processor applies QueueCommands. All state is in the transaction.
type Processor struct{ bounds bounds }

// bounds are constants that tests make smaller; 0 = the constant.
type bounds struct{ builds, failures, times, history, changes uint64 }

var _ raft.Processor = Processor{}

// applying is one command under way.
type applying struct {
	bounds
	tx     *raft.Tx
	at     time.Time
	index  uint64
	counts counts
	reply  *floxv1.QueueReply
	change *floxv1.QueueChange
}

// Apply is raft.Processor.
func (p Processor) Apply(tx *raft.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	c := &floxv1.QueueCommand{}
	if err := raft.DecodeCommand(processorName, command, c); err != nil {
		return nil, err
	}
	a := &applying{bounds: p.bounds, tx: tx, at: at, index: index, reply: &floxv1.QueueReply{}, change: &floxv1.QueueChange{}}
	for _, d := range []struct {
		to    *uint64
		usual uint64
	}{{&a.builds, maxBuilds}, {&a.failures, maxFailures}, {&a.times, maxTimes}, {&a.history, maxHistory}, {&a.changes, maxChanges}} {
		if *d.to == 0 {
			*d.to = d.usual
		}
	}
	var err error
	if a.counts, err = loadCounts(tx); err == nil {
		err = a.apply(c)
	}
	if err == nil {
		err = a.finish()
	}
	if err != nil {
		return nil, err
	}
	return stable.Marshal(a.reply)
}

func (a *applying) apply(c *floxv1.QueueCommand) error {
	switch c := c.GetCommand().(type) {
	case *floxv1.QueueCommand_Enqueue:
		return a.enqueue(c.Enqueue)
	case *floxv1.QueueCommand_Leave:
		return a.leave(c.Leave.GetWant())
	case *floxv1.QueueCommand_Lease:
		return a.lease(c.Lease)
	case *floxv1.QueueCommand_Finish:
		return a.finishBuild(c.Finish)
	case *floxv1.QueueCommand_Release:
		return a.release(c.Release)
	case *floxv1.QueueCommand_Settle:
		return a.each(c.Settle.GetKeys(), a.settle)
	case *floxv1.QueueCommand_Retry:
		return a.each(c.Retry.GetKeys(), a.retry)
	case *floxv1.QueueCommand_Cancel:
		return a.cancel(c.Cancel)
	case *floxv1.QueueCommand_Rank:
		return a.rank(c.Rank)
	case *floxv1.QueueCommand_Register:
		return a.register(c.Register)
	case *floxv1.QueueCommand_WorkerState:
		return a.setState(c.WorkerState)
	case *floxv1.QueueCommand_RemoveWorker:
		return a.removeWorker(c.RemoveWorker)
	}
	return fmt.Errorf("%s: no command inside: %w", processorName, raft.ErrUnknownCommand)
}

// each carries out something for some keys.
func (a *applying) each(keys []string, do func(key string) error) error {
	if len(keys) > MaxKeys {
		return fmt.Errorf("%d builds, want at most %d: %w", len(keys), MaxKeys, flox.ErrBadInput)
	}
	for _, key := range keys {
		if _, _, err := Split(key); err != nil {
			return err
		}
		if err := do(key); err != nil {
			return err
		}
	}
	return nil
}

// build reads a build; nil if it is not in the queue.
func (a *applying) build(key string) (*floxv1.QueuedBuild, error) {
	b, err := load(a.tx, textKey(buildKey, key), &floxv1.QueuedBuild{})
	if errors.Is(err, flox.ErrNotFound) {
		return nil, nil //nolint:nilnil // that is an answer
	}
	return b, err
}

// store writes a build that changed.
func (a *applying) store(b *floxv1.QueuedBuild) error {
	a.change.Keys = append(a.change.Keys, b.GetKey())
	return a.put(textKey(buildKey, b.GetKey()), b)
}

func (a *applying) put(key []byte, m proto.Message) error {
	b, err := stable.Marshal(m)
	if err != nil {
		return err
	}
	return a.tx.Set(key, b)
}

// finish tells watchers what changed.
func (a *applying) finish() error {
	if proto.Size(a.change) > 0 {
		if err := a.put(indexKey(changeKey, a.index), a.change); err != nil {
			return err
		}
		a.counts.changes++
	}
	for _, l := range []struct {
		list             byte
		have, gone, most *uint64
	}{{changeKey, &a.counts.changes, &a.counts.goneChanges, &a.changes}, {historyKey, &a.counts.history, &a.counts.goneHistory, &a.history}} {
		dropped, err := raft.DropOldest(a.tx, l.list, *l.gone, l.have, *l.most)
		if err != nil {
			return err
		}
		*l.gone = max(*l.gone, dropped)
	}
	return raft.SetCounts(a.tx, []byte{countsKey}, a.counts.fields())
}
