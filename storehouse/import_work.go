package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// importPublisher is who publishes what is imported, for the log.
const importPublisher = "import"

// work does one task of an import.
func (im *importing) work(ctx context.Context, t *importTask) {
	if t.offer == nil {
		if t.offer, t.valid, t.err = im.look(ctx, t.node.hashPart); t.err != nil || t.valid != "" {
			return
		}
	}
	if t.fetch {
		t.err = im.from.bring(ctx, t.offer)
	}
}

// look reads and checks what is said of a path; valid says that it is valid here,
// so that nothing of its closure is missing.
func (im *importing) look(ctx context.Context, hashPart string) (o *offer, valid flox.StorePath, err error) {
	var have *flox.PathInfo
	if im.dry { // as of when it began: no round trip for each of thousands
		have, err = im.infoAsOf(ctx, cluster.Local, hashPart)
	} else {
		have, err = im.Info(ctx, hashPart)
	}
	switch {
	case err == nil && im.dry:
		return nil, have.Path, nil
	case err == nil:
		return nil, have.Path, im.touch(ctx, have)
	case !errors.Is(err, flox.ErrNotFound):
		return nil, "", err
	}
	o, err = im.from.find(ctx, hashPart)
	return o, "", err
}

// importedCache is the one cache of an import.
type importedCache struct {
	*Server
	source cacheSource
	keys   nix.KeyRing
}

// find is importFrom.
func (c *importedCache) find(ctx context.Context, hashPart string) (o *offer, err error) {
	err = again(ctx, func() error {
		info, err := readNarInfo(ctx, c.source, c.cfg.StoreDir, hashPart)
		if info != nil {
			o = &offer{NarInfo: info}
		}
		return err
	})
	if err != nil {
		return o, err
	}
	return o, trusted(c.cfg.StoreDir, c.keys, &o.Info)
}

// bring is importFrom.
func (c *importedCache) bring(ctx context.Context, o *offer) error {
	return again(ctx, func() error {
		r, err := c.source.open(ctx, o.URL)
		if err != nil {
			return err
		}
		defer r.Close()
		nar, err := o.open(r)
		if err != nil {
			return err
		}
		_, _, err = c.Publish(ctx, &o.Info, nar, importPublisher)
		return errors.Join(err, nar.Close())
	})
}

// open reads the NAR out of the file at URL.
func (o *offer) open(r io.Reader) (io.ReadCloser, error) {
	return nix.Decompressor(o.Compression, r, o.Info.NarSize)
}

// readNarInfo reads what a cache says of a path.
func readNarInfo(ctx context.Context, source cacheSource, dir flox.StoreDir, hashPart string) (*nix.NarInfo, error) {
	b, err := readSmall(ctx, source, hashPart+".narinfo")
	if err != nil {
		return nil, err
	}
	info, err := nix.ParseNarInfo(dir, b)
	if err != nil {
		return nil, err
	}
	if info.Info.Path.HashPart() != hashPart {
		return nil, fmt.Errorf("%s.narinfo describes %s: %w", hashPart, info.Info.Path, flox.ErrBadInput)
	}
	return info, nil
}

// trusted says whether a path may enter: an accepted key signed it, or its name
// says what its NAR has to be.
func trusted(dir flox.StoreDir, keys nix.KeyRing, info *flox.PathInfo) error {
	if _, ok := keys.Verify([]byte(nix.Fingerprint(dir, info)), info.Signatures); ok {
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

// checkCache refuses a cache of another store directory.
func (c *importedCache) checkCache(ctx context.Context) error {
	return again(ctx, func() error {
		_, err := readCacheInfo(ctx, c.source, c.cfg.StoreDir)
		return err
	})
}

// cacheInfo is what a cache says of itself in nix-cache-info.
type cacheInfo struct {
	storeDir string // "" = it does not say
	priority string
}

// readCacheInfo reads it; ErrBadInput for a cache of another store directory.
func readCacheInfo(ctx context.Context, source cacheSource, dir flox.StoreDir) (info cacheInfo, err error) {
	b, err := readSmall(ctx, source, "nix-cache-info")
	if errors.Is(err, flox.ErrNotFound) { // some have none; every narinfo says it as well
		return info, nil
	}
	if err != nil {
		return info, err
	}
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		switch value = strings.TrimSpace(value); key {
		case "StoreDir":
			info.storeDir = value
		case "Priority":
			info.priority = value
		}
	}
	if info.storeDir != "" && info.storeDir != string(dir) {
		return info, fmt.Errorf("it is a cache of store directory %.200q, this storehouse has %s, and paths do not go from one to the other: %w", info.storeDir, dir, flox.ErrBadInput)
	}
	return info, nil
}

// readSmall reads a file of no more than a narinfo's size.
func readSmall(ctx context.Context, source cacheSource, name string) ([]byte, error) {
	r, err := source.open(ctx, name)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(r, nix.MaxNarInfo+1))
	return bytes.Clone(b), errors.Join(err, r.Close())
}
