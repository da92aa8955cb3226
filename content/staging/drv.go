package staging

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// Hasher hashes derivations, staged ones and those of the storehouse.
func (s *Store) Hasher() *nix.DrvHasher { return s.hasher }

// Derivation reads a derivation, staged or valid elsewhere. Errors: ErrNotFound,
// ErrBadInput, what Config.Derivation returns.
func (s *Store) Derivation(ctx context.Context, p flox.StorePath) (*nix.Derivation, error) {
	return s.readDerivation(ctx, p)
}

func (s *Store) readDerivation(ctx context.Context, p flox.StorePath) (*nix.Derivation, error) {
	staged, err := s.Path(p)
	var text []byte
	switch {
	case err == nil:
		text, err = s.text(ctx, staged, nix.MaxDerivation)
	case errors.Is(err, flox.ErrNotFound):
		text, err = s.cfg.Derivation(ctx, p)
	}
	if err != nil {
		return nil, err
	}
	return nix.ParseDerivation(s.cfg.StoreDir, strings.TrimSuffix(p.Name(), nix.DrvExtension), text)
}

// checkDerivation says whether a .drv is one, and claims only outputs that are
// its own (as Nix does when it registers one): else a build of it could put what
// it likes at the path of another.
func (s *Store) checkDerivation(ctx context.Context, info *flox.PathInfo, t *taken) error {
	blocks := flox.Blocks(s)
	if t.blocks != nil {
		blocks = inMemory(t.blocks)
	}
	text, err := content.ReadText(ctx, info.Manifest, blocks, nix.MaxDerivation)
	if err != nil {
		return fmt.Errorf("%s: %w", info.Path, err)
	}
	d, err := nix.ParseDerivation(s.cfg.StoreDir, strings.TrimSuffix(info.Path.Name(), nix.DrvExtension), text)
	if err != nil {
		return fmt.Errorf("%s: %w", info.Path, err)
	}
	if err := d.CheckOutputs(s.cfg.StoreDir, s.hasher.Resolver(ctx)); err != nil {
		return fmt.Errorf("%s: %w", info.Path, err)
	}
	return nil
}
