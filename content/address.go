package content

import (
	"context"
	"fmt"
	"hash"
	"slices"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// SplitReferences gives a path's references without the path itself, and whether
// that was among them: the form in which they are part of a content address.
func SplitReferences(info *flox.PathInfo) (others []flox.StorePath, self bool) {
	others = slices.DeleteFunc(slices.Clone(info.References), func(r flox.StorePath) bool { return r == info.Path })
	return others, len(others) != len(info.References)
}

// CheckAddressPath says whether the content address of info leads to its path in
// the store at dir. The error is ErrBadInput.
func CheckAddressPath(dir flox.StoreDir, info *flox.PathInfo) (nix.ContentAddress, error) {
	ca, err := nix.ParseContentAddress(info.CA)
	if err != nil {
		return ca, fmt.Errorf("path info of %s: %w", info.Path, err)
	}
	others, self := SplitReferences(info)
	want, err := ca.Path(dir, info.Path.Name(), others, self)
	if err != nil {
		return ca, fmt.Errorf("path info of %s: %w", info.Path, err)
	}
	if want != info.Path {
		return ca, fmt.Errorf("path info of %s: its content address %s belongs to %s: %w", info.Path, info.CA, want, flox.ErrBadInput)
	}
	return ca, nil
}

// CheckAddress says whether a path is what its content address says: that leads
// to its name, and what lies there has the hash. Nobody needs to be trusted
// then. Info must have been checked against the NAR (Check); m is its manifest,
// whose blocks are read. Errors: ErrBadInput, those of blocks.
func CheckAddress(ctx context.Context, dir flox.StoreDir, info *flox.PathInfo, m *Manifest, blocks flox.Blocks) error {
	ca, err := CheckAddressPath(dir, info)
	if err != nil {
		return err
	}
	var got nix.Hash
	_, self := SplitReferences(info)
	switch {
	case ca.Method == nix.CANar && ca.Hash.Algo == nix.SHA256 && !self:
		got = nix.SHA256Hash(info.NarHash)
	case ca.Method == nix.CANar:
		hashPart := ""
		if self {
			hashPart = info.Path.HashPart()
		}
		h := nix.NewModuloHash(ca.Hash.Algo, hashPart)
		if err := m.WriteNar(ctx, h, blocks, 0, -1); err != nil {
			return fmt.Errorf("content address of %s: %w", info.Path, err)
		}
		got = h.Sum()
	default:
		h := ca.Hash.Algo.New()
		if err := hashFile(ctx, h, info, m, blocks); err != nil {
			return err
		}
		got = nix.Hash{Algo: ca.Hash.Algo, Sum: h.Sum(nil)}
	}
	if !got.Equal(ca.Hash) {
		return fmt.Errorf("%s: its content has the hash %s, its content address is %s: %w", info.Path, got, info.CA, flox.ErrBadInput)
	}
	return nil
}

// hashFile hashes the bytes of a path that is one plain file.
func hashFile(ctx context.Context, h hash.Hash, info *flox.PathInfo, m *Manifest, blocks flox.Blocks) error {
	e, err := m.Entry(ctx, 0)
	if err != nil {
		return err
	}
	if e.Kind != flox.Regular || e.Executable {
		return fmt.Errorf("%s: its content address %s is that of a plain file, and it is none: %w", info.Path, info.CA, flox.ErrBadInput)
	}
	data, inline, err := m.Inline(ctx, 0)
	if err != nil || inline {
		h.Write(data)
		return err
	}
	var failed error
	err = m.Chunks(ctx, 0, 0, -1, func(_ int64, c flox.Chunk) bool {
		var b []byte
		if b, failed = blocks.Get(ctx, c.ID); failed == nil {
			h.Write(b)
		}
		return failed == nil
	})
	if failed != nil {
		err = failed
	}
	return err
}
