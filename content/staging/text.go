package staging

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// AddText adds a text file (builtins.toFile, a .drv) that refers to refs. Errors
// as of Add.
func (s *Store) AddText(ctx context.Context, name string, text []byte, refs []flox.StorePath) (*Path, error) {
	ca := nix.ContentAddress{Method: nix.CAText, Hash: nix.SHA256Hash(sha256.Sum256(text))}
	info, err := s.addressed(name, ca, refs)
	if err != nil {
		return nil, err
	}
	if p, err := s.Path(info.Path); err == nil {
		return p, nil
	}
	nar, err := nix.FileNar(uint64(len(text)), bytes.NewReader(text))
	if err != nil {
		return nil, fmt.Errorf("add %s: %w", info.Path, err)
	}
	return s.Add(ctx, info, nar, AddOptions{})
}

// addressed is the info of a path with a content address and no reference to itself.
func (s *Store) addressed(name string, ca nix.ContentAddress, refs []flox.StorePath) (*flox.PathInfo, error) {
	refs = slices.Clone(refs)
	slices.Sort(refs)
	refs = slices.Compact(refs)
	p, err := ca.Path(s.cfg.StoreDir, name, refs, false)
	if err != nil {
		return nil, err
	}
	return &flox.PathInfo{Path: p, CA: ca.String(), References: refs}, nil
}

// AddAddressed adds content whose path is not known before it was read: the NAR
// of a tree (nix.CANar), or the bytes of one file (nix.CAFlat, nix.CAText), hashed
// with algo. It is AddToStore of the worker protocol. Errors as of Add.
func (s *Store) AddAddressed(ctx context.Context, name string, method nix.CAMethod, algo nix.HashAlgo, refs []flox.StorePath, r io.Reader) (*Path, error) {
	// The name alone may be wrong: said before anything is read.
	if algo.Size() == 0 {
		return nil, fmt.Errorf("add %q: hash algorithm %q, want md5, sha1, sha256 or sha512: %w", name, algo, flox.ErrBadInput)
	}
	blank := nix.ContentAddress{Method: method, Hash: nix.Hash{Algo: algo, Sum: make([]byte, algo.Size())}}
	if _, err := s.addressed(name, blank, refs); err != nil {
		return nil, err
	}
	sum := algo.New()
	r = io.TeeReader(r, sum)
	if method != nix.CANar {
		spool, err := s.spool(r)
		if err != nil {
			return nil, fmt.Errorf("add %q: %w", name, err)
		}
		defer func() { _ = spool.close() }()
		// All of it was read, so its path is known: an evaluation adds most of what it
		// adds again and again, and that costs no more.
		info, err := s.addressed(name, nix.ContentAddress{Method: method, Hash: nix.Hash{Algo: algo, Sum: sum.Sum(nil)}}, refs)
		if err != nil {
			return nil, err
		}
		if p, err := s.Path(info.Path); err == nil {
			return p, nil
		}
		if r, err = nix.FileNar(spool.size, spool); err != nil {
			return nil, fmt.Errorf("add %q: %w", name, err)
		}
	}
	t, err := s.take(ctx, r, false)
	if err != nil {
		return nil, fmt.Errorf("add %q: %w", name, err)
	}
	defer s.release(t)
	info, err := s.addressed(name, nix.ContentAddress{Method: method, Hash: nix.Hash{Algo: algo, Sum: sum.Sum(nil)}}, refs)
	if err != nil {
		return nil, err
	}
	info.NarHash, info.NarSize = t.NarHash, t.NarSize
	return s.commit(ctx, info, t, false)
}

// spool is the content of a file whose size must be known before its NAR begins: in
// memory if it is small, else in a file without a name.
type spool struct {
	io.Reader
	size uint64
	file *os.File
}

func (s *Store) spool(r io.Reader) (*spool, error) {
	const most = 1 << 20
	var head bytes.Buffer
	_, err := io.CopyN(&head, r, most)
	if errors.Is(err, io.EOF) {
		return &spool{Reader: &head, size: uint64(head.Len())}, nil
	}
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(s.cfg.Dir, "spool-*")
	if err != nil {
		return nil, err
	}
	sp := &spool{Reader: f, file: f}
	// Without a name nothing is left of it after a crash.
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, sp.close())
	}
	n, err := io.Copy(roomy{f, s}, io.MultiReader(&head, r))
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, sp.close())
	}
	sp.size = uint64(n)
	return sp, nil
}

func (sp *spool) close() error {
	if sp.file == nil {
		return nil
	}
	return sp.file.Close()
}

// roomy writes while there is room.
type roomy struct {
	w io.Writer
	s *Store
}

// Write is io.Writer.
func (r roomy) Write(p []byte) (int, error) {
	if err := r.s.room(int64(len(p))); err != nil {
		return 0, err
	}
	return r.w.Write(p)
}
