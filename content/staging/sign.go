package staging

import (
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/floxctl/flox"
)

// MaxSignatures is how many signatures a path may have.
const MaxSignatures = 64

// Sign adds signatures to a path; those it has are not added again. Whether they
// are worth anything is for readers to find out. ErrNotFound, ErrFull.
func (s *Store) Sign(path flox.StorePath, sigs []string) error {
	s.valid.Lock() // nobody else changes records
	defer s.valid.Unlock()
	p, err := s.Path(path)
	if err != nil {
		return err
	}
	all, err := AppendSignatures(path, p.Info.Signatures, sigs)
	if err != nil || len(all) == len(p.Info.Signatures) {
		return err
	}
	p.Info.Signatures = all
	b, err := appendPath(p)
	if err != nil {
		return err
	}
	batch := new(pebble.Batch)
	_ = batch.Set(pathKey(path.HashPart()), b, nil)
	if err := s.put(batch, false); err != nil {
		return fmt.Errorf("staging: sign %s: %w", path, err)
	}
	return nil
}

// AppendSignatures gives the signatures a path has with those that are new behind
// them. ErrFull: they would be more than MaxSignatures.
func AppendSignatures(path flox.StorePath, have, more []string) ([]string, error) {
	all := slices.Clone(have)
	for _, sig := range more {
		if !slices.Contains(all, sig) {
			all = append(all, sig)
		}
	}
	if len(all) > MaxSignatures {
		return nil, fmt.Errorf("%s would have %d signatures, want at most %d: %w", path, len(all), MaxSignatures, flox.ErrFull)
	}
	return all, nil
}
