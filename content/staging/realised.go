package staging

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Bounds in bytes of realisations: of all, and of the word of one owner but
// Everybody's, so that none keeps the others out. Most have a few hundred.
const (
	maxRealised     = 64 << 20
	maxRealisedEach = 4 << 20
)

// Everybody is the owner of a realisation whose word counts for all who ask.
const Everybody uint32 = 0

// realisedPrefix begins the key of a realisation: 'r', owner (4 bytes), its id. Its
// value: when it was added (Unix milliseconds), then its JSON.
const realisedPrefix = 'r'

// Realised is a realisation that somebody told, and nobody vouches for.
type Realised struct {
	nix.Realisation
	Owner uint32    // whose word it is
	Added time.Time // when it was told

	size int // bytes of its record
}

func realisedKey(owner uint32, id nix.RealisationID) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{realisedPrefix}, owner), id.String()...)
}

// Realise keeps a realisation on somebody's word; it is durable when that returns. One
// of the same id and path takes on the signatures. Errors: ErrBadInput if the owner
// said another path before, ErrFull.
func (s *Store) Realise(owner uint32, r *nix.Realisation) error {
	if err := s.ready(true); err != nil {
		return err
	}
	s.valid.Lock() // nobody else changes records
	defer s.valid.Unlock()
	own := *r
	have, err := s.Realised(owner, r.ID)
	switch {
	case errors.Is(err, flox.ErrNotFound):
		have = &Realised{}
	case err != nil:
		return err
	case have.Path != r.Path:
		return fmt.Errorf("%s was realised as %s already, not as %s: %w", r.ID, have.Path, r.Path, flox.ErrBadInput)
	default:
		if own.Signatures, err = AppendSignatures(r.Path, have.Signatures, r.Signatures); err != nil {
			return err
		}
	}
	slices.Sort(own.Signatures)
	value := append(binary.BigEndian.AppendUint64(nil, uint64(time.Now().UnixMilli())), own.Marshal()...)
	if len(value) > nix.MaxRealisation {
		return fmt.Errorf("realisation %s has %d bytes, at most %d are kept: %w", r.ID, len(value), nix.MaxRealisation, flox.ErrBadInput)
	}
	more := len(value) - have.size
	if err := errors.Join(s.realisedRoom(owner, more), s.room(int64(more))); err != nil {
		return err
	}
	batch := new(pebble.Batch)
	_ = batch.Set(realisedKey(owner, r.ID), value, nil)
	if err := s.put(batch, false); err != nil {
		return fmt.Errorf("staging: realisation %s: %w", r.ID, err)
	}
	s.told[owner] += more
	return nil
}

// realisedRoom says whether an owner may tell so many bytes more. It needs s.valid.
func (s *Store) realisedRoom(owner uint32, n int) error {
	all := 0
	for _, of := range s.told {
		all += of
	}
	if all+n > maxRealised || owner != Everybody && s.told[owner]+n > maxRealisedEach {
		return fmt.Errorf("realisations take %d bytes here, those of user %d %d; collect garbage: %w", all, owner, s.told[owner], flox.ErrFull)
	}
	return nil
}

// countRealised reads how many bytes of realisations there are of whom.
func (s *Store) countRealised() error {
	s.told = make(map[uint32]int)
	return s.eachRealised(func(r *Realised) bool {
		s.told[r.Owner] += r.size
		return true
	})
}

// Realises reports whether there are any realisations.
func (s *Store) Realises() bool {
	if s.ready(false) != nil {
		return false
	}
	s.valid.RLock()
	defer s.valid.RUnlock()
	return len(s.told) > 0
}

// Realised gives the realisation an owner told. ErrNotFound.
func (s *Store) Realised(owner uint32, id nix.RealisationID) (*Realised, error) {
	if err := s.ready(false); err != nil {
		return nil, err
	}
	b, closer, err := s.db.Get(realisedKey(owner, id))
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, fmt.Errorf("nobody here realised %s: %w", id, flox.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("staging: realisation %s: %w", id, err)
	}
	r, err := parseRealised(owner, b)
	return r, errors.Join(err, closer.Close())
}

func parseRealised(owner uint32, b []byte) (*Realised, error) {
	if len(b) < 8 {
		return nil, fmt.Errorf("staging: realisation of %d bytes: %w", len(b), flox.ErrCorrupt)
	}
	r, err := nix.ParseRealisation(b[8:])
	if err != nil {
		return nil, fmt.Errorf("staging: %w: %w", err, flox.ErrCorrupt)
	}
	return &Realised{Realisation: *r, Owner: owner, Added: time.UnixMilli(int64(binary.BigEndian.Uint64(b))).UTC(), size: len(b)}, nil
}

// eachRealised needs the indexes to be open.
func (s *Store) eachRealised(yield func(*Realised) bool) error {
	it, err := s.db.NewIter(context.Background(), &pebble.IterOptions{LowerBound: []byte{realisedPrefix}, UpperBound: []byte{realisedPrefix + 1}})
	if err != nil {
		return fmt.Errorf("staging: %w", err)
	}
	for it.First(); it.Valid(); it.Next() {
		r, err := parseRealised(binary.BigEndian.Uint32(it.Key()[1:]), it.Value())
		if err != nil {
			return errors.Join(err, it.Close())
		}
		if !yield(r) {
			break
		}
	}
	return it.Close()
}

// Unrealise forgets every realisation that keep does not want, and says how many.
func (s *Store) Unrealise(keep func(*Realised) bool) (removed int, err error) {
	if err := s.ready(false); errors.Is(err, flox.ErrNotFound) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	s.valid.Lock()
	defer s.valid.Unlock()
	batch := new(pebble.Batch)
	gone := make(map[uint32]int)
	err = s.eachRealised(func(r *Realised) bool {
		if !keep(r) {
			_ = batch.Delete(realisedKey(r.Owner, r.ID), nil)
			gone[r.Owner] += r.size
			removed++
		}
		return true
	})
	if err != nil || batch.Empty() {
		return 0, err
	}
	if err := s.put(batch, false); err != nil {
		return 0, fmt.Errorf("staging: realisations: %w", err)
	}
	for owner, size := range gone {
		if s.told[owner] -= size; s.told[owner] <= 0 {
			delete(s.told, owner)
		}
	}
	return removed, nil
}
