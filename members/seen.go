package members

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// seen records when ephemeral machines were there.
func (a *applying) seen(list []*floxv1.SeenMachine) error {
	for _, s := range list {
		m, err := a.machine(s.GetPeer())
		if errors.Is(err, flox.ErrNotFound) || err == nil && !m.GetEphemeral() {
			continue
		}
		if err != nil {
			return err
		}
		at := min(s.GetAtUnixMs(), a.at.UnixMilli())
		key := textKey(seenKey, s.GetPeer())
		switch b, err := a.tx.Get(key); {
		case err == nil:
			before, err := seenAt(key, b)
			if err != nil {
				return err
			}
			if before.UnixMilli() >= at {
				continue
			}
		case !errors.Is(err, flox.ErrNotFound):
			return err
		}
		if err := a.tx.Set(key, binary.BigEndian.AppendUint64(nil, uint64(max(at, 0)))); err != nil { //nolint:gosec // not negative
			return err
		}
	}
	return nil
}

func seenAt(key, value []byte) (time.Time, error) {
	if len(value) != 8 {
		return time.Time{}, fmt.Errorf("members: record %q of %d bytes: %w", key, len(value), flox.ErrCorrupt)
	}
	return time.UnixMilli(int64(binary.BigEndian.Uint64(value))), nil //nolint:gosec // was an int64
}

// Seen calls yield with the ephemeral machines of which is known when they were
// there last, until it returns false.
func Seen(r *raft.Reader, yield func(peer string, at time.Time) bool) error {
	var bad error
	err := r.Iterate([]byte{seenKey}, nil, func(key, value []byte) bool {
		at, err := seenAt(key, value)
		if bad = err; err != nil {
			return false
		}
		return yield(string(key[1:]), at)
	})
	return errors.Join(bad, err)
}
