package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// maxSignatures bounds the signatures a path may come with.
const maxSignatures = 64

// Publish takes in one store path: its NAR is chunked, checked against info,
// signed and made valid, durably, before Publish returns. wasValid says that
// the path was valid before with the same NAR; the info returned is the one
// in force. ErrBadInput when NAR and info differ, a reference is not valid or
// another NAR is valid under that name; ErrFull when the disk is full.
func (s *Server) Publish(ctx context.Context, info *flox.PathInfo, nar io.Reader, publisher string) (valid *flox.PathInfo, wasValid bool, err error) {
	// What it counts on stays until it is valid, however long its upload takes.
	release, err := s.Hold(ctx, append(slices.Clone(info.References), info.Path)...)
	if err != nil {
		return nil, false, err
	}
	defer release()
	if valid, err = s.known(ctx, info); valid != nil || err != nil {
		return valid, valid != nil, err
	}
	// Nothing is read of a NAR that will be refused anyway.
	if err := s.checkInfo(ctx, info); err != nil {
		return nil, false, err
	}
	if nar, err = s.disk.upload(ctx, nar); err != nil {
		return nil, false, fmt.Errorf("publish %s: %w", info.Path, err)
	}
	session := s.packs.Session()
	defer session.Close()
	got, err := content.Ingest(ctx, nar, session, content.IngestOptions{})
	if err != nil {
		return nil, false, fmt.Errorf("publish %s: %w", info.Path, err)
	}
	return s.validate(ctx, info, got, "", publisher)
}

// piped calls read with what write writes, such as a NAR, and waits for both to end. A
// failure of write is what read reads last; nothing else is told of it.
func piped(write func(io.Writer) error, read func(io.Reader) error) error {
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		_ = w.CloseWithError(write(w)) // gives none
	}()
	err := errors.Join(read(r), r.Close()) // which ends a writer that is not read to its end
	<-written
	return err
}

// PublishSource takes in a NAR without path info, as `nix-store --add` does: the
// path is named by the NAR's hash and has no references.
func (s *Server) PublishSource(ctx context.Context, name string, nar io.Reader, publisher string) (valid *flox.PathInfo, wasValid bool, err error) {
	// The name alone may be wrong: said before the NAR is read.
	if _, err := nix.SourcePath(s.cfg.StoreDir, name, [32]byte{}, nil, false); err != nil {
		return nil, false, err
	}
	if nar, err = s.disk.upload(ctx, nar); err != nil {
		return nil, false, fmt.Errorf("publish %s: %w", name, err)
	}
	session := s.packs.Session()
	defer session.Close()
	got, err := content.Ingest(ctx, nar, session, content.IngestOptions{})
	if err != nil {
		return nil, false, fmt.Errorf("publish %s: %w", name, err)
	}
	path, err := nix.SourcePath(s.cfg.StoreDir, name, got.NarHash, nil, false)
	if err != nil {
		return nil, false, err
	}
	ca := nix.ContentAddress{Method: nix.CANar, Hash: nix.SHA256Hash(got.NarHash)}
	info := &flox.PathInfo{Path: path, NarHash: got.NarHash, NarSize: got.NarSize, CA: ca.String()}
	if valid, err = s.known(ctx, info); valid != nil || err != nil {
		return valid, valid != nil, err
	}
	return s.validate(ctx, info, got, "", publisher)
}

// known gives the info in force if the path is valid with the same NAR already.
// That counts as publishing it now.
func (s *Server) known(ctx context.Context, info *flox.PathInfo) (*flox.PathInfo, error) {
	valid, err := s.Info(ctx, info.Path.HashPart())
	switch {
	case errors.Is(err, flox.ErrNotFound):
		return nil, nil
	case err != nil:
		return nil, err
	case valid.Path != info.Path:
		return nil, fmt.Errorf("%s: the hash part belongs to %s already: %w", info.Path, valid.Path, flox.ErrBadInput)
	case valid.NarHash != info.NarHash:
		// The log is asked all the same: it records the attempt.
		return nil, nil
	}
	return valid, s.touch(ctx, valid)
}

// touch has the log note that a valid path is published again, unless it did so lately.
func (s *Server) touch(ctx context.Context, valid *flox.PathInfo) error {
	lately := false
	err := s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		last, err := lastUse(r, api.FromPathInfo(valid))
		lately = time.Since(time.UnixMilli(last)) < s.touchEvery()
		return err
	})
	if err != nil || lately {
		return err
	}
	_, err = s.batch.add(ctx, valid, "", "", nil)
	if errors.Is(err, flox.ErrFull) {
		// It is valid, which is what was asked.
		s.cfg.Log.Warn("a use of a path is not noted", "path", string(valid.Path), "error", err)
		return nil
	}
	return err
}

// checkInfo says what is wrong with info whatever its NAR is.
func (s *Server) checkInfo(ctx context.Context, info *flox.PathInfo) error {
	return s.checkInfoBeside(ctx, info, nil)
}

// checkInfoBeside is checkInfo of a path that becomes valid together with others,
// behind them.
func (s *Server) checkInfoBeside(ctx context.Context, info *flox.PathInfo, others map[flox.StorePath]flox.CID) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("path info of %s: %s: %w", info.Path, fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	if _, err := flox.ParseStorePath(string(info.Path)); err != nil {
		return err
	}
	if !slices.IsSorted(info.References) || len(slices.Compact(slices.Clone(info.References))) != len(info.References) {
		return bad("references are not sorted, or one stands twice")
	}
	if len(info.Signatures) > maxSignatures {
		return bad("%d signatures, want at most %d", len(info.Signatures), maxSignatures)
	}
	if info.CA != "" {
		if err := s.checkCA(info); err != nil {
			return err
		}
	}
	return s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		for _, ref := range info.References {
			if _, beside := others[ref]; beside || ref == info.Path {
				continue
			}
			m, err := readInfo(r, ref.HashPart())
			if errors.Is(err, flox.ErrNotFound) || (err == nil && m.GetPath() != string(ref)) {
				return missingReference(info.Path, ref)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// checkCA checks that a content address leads to the path it stands by, and
// to the NAR where it is a hash of that.
func (s *Server) checkCA(info *flox.PathInfo) error {
	ca, err := content.CheckAddressPath(s.cfg.StoreDir, info)
	if err != nil {
		return err
	}
	_, self := content.SplitReferences(info)
	if ca.Method == nix.CANar && ca.Hash.Algo == nix.SHA256 && !self && [32]byte(ca.Hash.Sum) != info.NarHash {
		return fmt.Errorf("path info of %s: its content address %s is not the hash of its NAR: %w", info.Path, info.CA, flox.ErrBadInput)
	}
	return nil
}

// validate checks what was taken in against info, signs and makes it valid. Its
// blocks are durable and held by an open session. narFile is the name its NAR was
// uploaded under, or "".
func (s *Server) validate(ctx context.Context, info *flox.PathInfo, got *content.Ingested, narFile, publisher string) (*flox.PathInfo, bool, error) {
	if err := content.Check(info, got); err != nil {
		return nil, false, err
	}
	have, err := s.id.ring.get()
	if err != nil {
		return nil, false, fmt.Errorf("publish %s: %w", info.Path, err)
	}
	if err := s.takesFacts(ctx); err != nil {
		return nil, false, fmt.Errorf("publish %s: %w", info.Path, err)
	}
	signed := have.sign(s.cfg.StoreDir, info, got.Manifest)
	placed, err := s.place(ctx, got.Manifest)
	if err != nil {
		return nil, false, fmt.Errorf("publish %s: %w", info.Path, err)
	}
	reply, err := s.batch.add(ctx, signed, narFile, publisher, placed)
	if err != nil {
		return nil, false, fmt.Errorf("publish %s: %w", info.Path, err)
	}
	for _, d := range reply.GetDifferences() {
		if d.GetPath() == string(info.Path) && [32]byte(d.GetOfferedNarHash()) == info.NarHash {
			return nil, false, s.differs(info, d, publisher)
		}
	}
	valid, err := s.Info(ctx, info.Path.HashPart())
	if err != nil {
		return nil, false, fmt.Errorf("publish %s: %w", info.Path, err)
	}
	return valid, !slices.Contains(reply.GetAdded(), string(info.Path)), nil
}

// differs says that a path is valid with another NAR, and that this one is not taken.
func (s *Server) differs(info *flox.PathInfo, d *floxv1.Difference, publisher string) error {
	valid := nix.SHA256Hash([32]byte(d.GetValidNarHash()))
	s.cfg.Log.Warn("a different NAR was offered for a valid path", "path", string(info.Path),
		"valid", valid.String(), "offered", nix.SHA256Hash(info.NarHash).String(), "publisher", publisher)
	return fmt.Errorf("%s is valid with NAR hash %s; the NAR offered has %s and is not taken, the first one stays: %w",
		info.Path, valid, nix.SHA256Hash(info.NarHash), errDiffers)
}

// errDiffers: another NAR is valid under that name.
var errDiffers = fmt.Errorf("it has other content: %w", flox.ErrBadInput)

// appendNew appends a signature unless it is there.
func appendNew(sigs []string, sig string) []string {
	if slices.Contains(sigs, sig) {
		return sigs
	}
	return append(sigs, sig)
}
