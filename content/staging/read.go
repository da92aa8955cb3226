package staging

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// Path gives a staged path. ErrNotFound: it is not staged, nor is another one
// whose name has the same hash part.
func (s *Store) Path(p flox.StorePath) (*Path, error) {
	got, err := s.get(p.HashPart())
	if err == nil && got.Info.Path != p {
		err = fmt.Errorf("%s is not staged, %s is: %w", p, got.Info.Path, flox.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return got, nil
}

// ByHashPart gives the staged path whose name begins so. ErrNotFound.
func (s *Store) ByHashPart(hashPart string) (*Path, error) { return s.get(hashPart) }

// ByManifest gives a staged path with this manifest. ErrNotFound. Paths of equal
// content have it in common.
func (s *Store) ByManifest(manifest flox.CID) (p *Path, err error) {
	err = s.byCID(manifestPrefix, manifest, func(hashPart string, _ []byte) (err error) {
		p, err = s.get(hashPart)
		return err
	})
	return p, err
}

// List calls yield with every staged path behind after, in the order of their
// names, until it returns false. It may be called while paths come and go.
func (s *Store) List(ctx context.Context, after string, yield func(*Path) bool) error {
	hash := after[:min(len(after), flox.HashPartLen)]
	err := s.each(hash, func(p *Path) bool { return ctx.Err() == nil && (string(p.Info.Path) <= after || yield(p)) })
	return errors.Join(err, ctx.Err())
}

// Get is flox.Blocks: a block of a staged path's manifest or content.
func (s *Store) Get(ctx context.Context, id flox.CID) (b []byte, err error) {
	err = s.byCID(blockPrefix, id, func(_ string, value []byte) error {
		b = bytes.Clone(value)
		return nil
	})
	if errors.Is(err, flox.ErrNotFound) && s.isOpen() {
		packs, err := s.blocks()
		if err != nil {
			return nil, err
		}
		return packs.Get(ctx, id)
	}
	if err == nil && content.Hash(b) != id {
		return nil, fmt.Errorf("staging: block %s: its bytes are others: %w", id, flox.ErrCorrupt)
	}
	return b, err
}

// Open opens the manifest of a staged path.
func (s *Store) Open(ctx context.Context, p *Path) (*content.Manifest, error) {
	return content.OpenManifest(ctx, p.Info.Manifest, s)
}

// text reads a staged path that is one file of at most most bytes.
func (s *Store) text(ctx context.Context, p *Path, most int) ([]byte, error) {
	b, err := content.ReadText(ctx, p.Info.Manifest, s, most)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Info.Path, err)
	}
	return b, nil
}
