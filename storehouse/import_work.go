package storehouse

import (
	"context"
	"errors"
	"fmt"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// importPublisher is who publishes what is imported, for the log.
const importPublisher = "import"

// work does one task of an import.
func (im *importing) work(ctx context.Context, t *importTask) {
	if !t.fetch {
		t.info, t.valid, t.err = im.look(ctx, t.node.hashPart)
		return
	}
	info := t.info
	if info == nil {
		if info, t.valid, t.err = im.look(ctx, t.node.hashPart); t.err != nil || t.valid {
			return
		}
	}
	t.err = again(ctx, func() error { return im.bring(ctx, info) })
}

// look reads and checks what the cache says of a path; valid says that the path is
// valid here, so that nothing of its closure is missing.
func (im *importing) look(ctx context.Context, hashPart string) (info *nix.NarInfo, valid bool, err error) {
	have, err := im.Info(ctx, hashPart)
	if err == nil {
		return nil, true, im.touch(ctx, have)
	}
	if !errors.Is(err, flox.ErrNotFound) {
		return nil, false, err
	}
	b, err := im.small(ctx, hashPart+".narinfo")
	if err != nil {
		return nil, false, err
	}
	info, err = nix.ParseNarInfo(im.cfg.StoreDir, b)
	if err != nil {
		return nil, false, err
	}
	if info.Info.Path.HashPart() != hashPart {
		return nil, false, fmt.Errorf("%s.narinfo describes %s: %w", hashPart, info.Info.Path, flox.ErrBadInput)
	}
	return info, false, im.trusted(&info.Info)
}

// trusted says whether a path may enter: an accepted key signed it, or its name
// says what its NAR has to be.
func (im *importing) trusted(info *flox.PathInfo) error {
	if _, ok := im.keys.Verify([]byte(nix.Fingerprint(im.cfg.StoreDir, info)), info.Signatures); ok {
		return nil
	}
	if info.CA != "" && len(info.References) == 0 {
		ca, err := nix.ParseContentAddress(info.CA)
		// Publish checks that the name follows from this hash, and that it is the NAR's.
		if err == nil && ca.Method == nix.CANar && ca.Hash.Algo == nix.SHA256 {
			return nil
		}
	}
	return fmt.Errorf("none of its %d signatures is by an accepted key; name the cache's public key if you trust it: %w", len(info.Signatures), flox.ErrUntrusted)
}

// bring fetches a path's NAR and makes the path valid.
func (im *importing) bring(ctx context.Context, info *nix.NarInfo) error {
	r, err := im.source.open(ctx, info.URL)
	if err != nil {
		return err
	}
	defer r.Close()
	nar, err := nix.Decompressor(info.Compression, r, info.Info.NarSize)
	if err != nil {
		return err
	}
	_, _, err = im.Publish(ctx, &info.Info, nar, importPublisher)
	return errors.Join(err, nar.Close())
}
