package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
)

// Getter is a transaction or a reader.
type Getter interface {
	Get(key []byte) ([]byte, error)
	Iterate(prefix, from []byte, yield func(key, value []byte) bool) error
}

// LoadRecord reads one message of the state of a processor, which is named for people.
// ErrNotFound; ErrCorrupt.
func LoadRecord[M proto.Message](g Getter, processor string, key []byte, into M) (M, error) {
	b, err := g.Get(key)
	if err == nil {
		err = DecodeRecord(processor, key, b, into)
	}
	return into, err
}

// DecodeRecord reads the message of a record. ErrCorrupt.
func DecodeRecord(processor string, key, value []byte, into proto.Message) error {
	if err := proto.Unmarshal(value, into); err != nil {
		return fmt.Errorf("%s: record %q: %w: %w", processor, key, err, flox.ErrCorrupt)
	}
	return nil
}

// LoadCounts reads the counters that SetCounts wrote; all are 0 before it did. ErrCorrupt.
func LoadCounts(g Getter, processor string, key []byte, counts []*uint64) error {
	b, err := g.Get(key)
	if errors.Is(err, flox.ErrNotFound) {
		return nil
	}
	if err == nil && len(b) != 8*len(counts) {
		err = fmt.Errorf("%s: counters of %d bytes: %w", processor, len(b), flox.ErrCorrupt)
	}
	if err != nil {
		return err
	}
	for i, c := range counts {
		*c = binary.BigEndian.Uint64(b[8*i:])
	}
	return nil
}

// SetCounts writes counters in one record: 8 bytes each, big-endian.
func SetCounts(tx *Tx, key []byte, counts []*uint64) error {
	b := make([]byte, 0, 8*len(counts))
	for _, c := range counts {
		b = binary.BigEndian.AppendUint64(b, *c)
	}
	return tx.Set(key, b)
}

// DropOldest keeps a list within its bound: records whose keys are a byte and a log index,
// of which there are have. It looks behind an index, and gives the last one that it dropped; 0 = none.
func DropOldest(tx *Tx, list byte, behind uint64, have *uint64, most uint64) (dropped uint64, err error) {
	from := binary.BigEndian.AppendUint64([]byte{list}, behind)
	for *have > most {
		var oldest []byte
		err := tx.Iterate([]byte{list}, from, func(key, _ []byte) bool {
			oldest = bytes.Clone(key)
			return false
		})
		if err == nil && len(oldest) != len(from) {
			err = fmt.Errorf("list %q: %d records are counted, and the oldest has the key %q: %w", list, *have, oldest, flox.ErrCorrupt)
		}
		if err == nil {
			err = tx.Delete(oldest)
		}
		if err != nil {
			return 0, err
		}
		dropped = binary.BigEndian.Uint64(oldest[1:])
		*have--
	}
	return dropped, nil
}
