package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/cockroachdb/pebble/v2"

	"github.com/floxctl/flox"
)

// The state's keys: what the node keeps for itself, and each kind's own.
const (
	ownSpace  = 0x00
	kindSpace = 0x01
)

// kindPrefix is what stands before every key of a kind.
func kindPrefix(kind uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{kindSpace}, kind)
}

// reader is what batches and snapshots have in common.
type reader interface {
	Get(key []byte) ([]byte, io.Closer, error)
	NewIter(o *pebble.IterOptions) (*pebble.Iterator, error)
}

// get reads the value at key; ErrNotFound when there is none. The value is the caller's.
func get(r reader, key []byte) ([]byte, error) {
	value, closer, err := r.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, flox.ErrNotFound
	}
	if err != nil {
		return nil, readError(err)
	}
	defer closer.Close()
	return bytes.Clone(value), nil
}

// readError says what is wrong with the state.
func readError(err error) error {
	if errors.Is(err, pebble.ErrCorruption) {
		return fmt.Errorf("read state: %w: %w", err, flox.ErrCorrupt)
	}
	return fmt.Errorf("read state: %w", err)
}

// iterate calls yield with the pairs under space+prefix from space+from on.
func iterate(r reader, space, prefix, from []byte, yield func(key, value []byte) bool) (err error) {
	lower := append(bytes.Clone(space), prefix...)
	upper := prefixEnd(lower)
	if start := append(bytes.Clone(space), from...); from != nil && bytes.Compare(start, lower) > 0 {
		lower = start
	}
	it, err := r.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return readError(err)
	}
	defer func() {
		if e := it.Close(); e != nil && err == nil {
			err = readError(e)
		}
	}()
	for ok := it.First(); ok; ok = it.Next() {
		value, err := it.ValueAndErr()
		if err != nil {
			return readError(err)
		}
		if !yield(it.Key()[len(space):], value) {
			break
		}
	}
	return nil
}

// prefixEnd is the first key behind all that begin with p; p is never all 0xff.
func prefixEnd(p []byte) []byte {
	end := bytes.Clone(p)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i]++; end[i] != 0 {
			return end[:i+1]
		}
	}
	return nil
}

// Tx is the state as one command sees and changes it: all of its writes
// become visible together with the command's index, or none. It is valid until
// Apply returns.
type Tx struct {
	batch *pebble.Batch
	space []byte
	// failed is the first error of the database itself. It is not the same on
	// every server, so it stops the node whatever the Processor makes of it.
	failed error
}

// fail remembers a failure of the database.
func (tx *Tx) fail(err error) error {
	if err != nil && !errors.Is(err, flox.ErrNotFound) && tx.failed == nil {
		tx.failed = err
	}
	return err
}

func (tx *Tx) key(k []byte) []byte { return append(bytes.Clone(tx.space), k...) }

// Get reads the value at key; ErrNotFound when there is none.
func (tx *Tx) Get(key []byte) ([]byte, error) {
	value, err := get(tx.batch, tx.key(key))
	return value, tx.fail(err)
}

// Iterate calls yield in key order with every pair whose key begins with prefix
// and is not before from (nil = from the first), until yield returns false. Key
// and value are valid during the call only; tx must not be written meanwhile.
func (tx *Tx) Iterate(prefix, from []byte, yield func(key, value []byte) bool) error {
	return tx.fail(iterate(tx.batch, tx.space, prefix, from, yield))
}

// Of reads the state of another kind, as this command finds it.
func (tx *Tx) Of(kind uint32) Getter { return other{tx, kindPrefix(kind)} }

// other is the state of another kind in a transaction.
type other struct {
	tx    *Tx
	space []byte
}

// Get is Getter.
func (o other) Get(key []byte) ([]byte, error) {
	value, err := get(o.tx.batch, append(bytes.Clone(o.space), key...))
	return value, o.tx.fail(err)
}

// Iterate is Getter.
func (o other) Iterate(prefix, from []byte, yield func(key, value []byte) bool) error {
	return o.tx.fail(iterate(o.tx.batch, o.space, prefix, from, yield))
}

// Set writes value at key.
func (tx *Tx) Set(key, value []byte) error {
	return tx.fail(tx.batch.Set(tx.key(key), value, nil))
}

// Delete removes key; it need not exist.
func (tx *Tx) Delete(key []byte) error {
	return tx.fail(tx.batch.Delete(tx.key(key), nil))
}

// DeleteRange removes the keys from first up to, not including, end.
func (tx *Tx) DeleteRange(first, end []byte) error {
	return tx.fail(tx.batch.DeleteRange(tx.key(first), tx.key(end), nil))
}

// Reader is one kind's state at one moment. It must be closed.
type Reader struct {
	db    *database
	snap  *pebble.Snapshot
	space []byte
	index uint64
	lent  bool // snap and db are a State's
}

// Index is the log index of the last command this state holds.
func (r *Reader) Index() uint64 { return r.index }

// Get reads the value at key; ErrNotFound when there is none.
func (r *Reader) Get(key []byte) ([]byte, error) {
	return get(r.snap, append(bytes.Clone(r.space), key...))
}

// Iterate is as Tx.Iterate.
func (r *Reader) Iterate(prefix, from []byte, yield func(key, value []byte) bool) error {
	return iterate(r.snap, r.space, prefix, from, yield)
}

// Close releases the state.
func (r *Reader) Close() error {
	if r.snap == nil || r.lent {
		return nil
	}
	err := r.snap.Close()
	r.snap = nil
	return errors.Join(err, r.db.release())
}
