package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// Stock Nix keeps the narinfo it uploaded in a cache of its own for 30 days and
// goes by that one when it reads the path back: it asks for the NAR under the name
// it gave it. So these names are facts.

// maxNarFiles bounds the names of one path. It is part of the state machine.
const maxNarFiles = 16

// narFileName is what stock Nix calls a NAR: SHA-256 of the compressed file, and
// an extension for some compressions.
var narFileName = regexp.MustCompile(`^[0-9a-z]{52}\.nar(\.[0-9a-z]{1,8})?$`)

// addFile records the name of a NAR, unless the path is valid with another one.
func (a *applying) addFile(f *floxv1.NarFile) error {
	path, err := flox.ParseStorePath(f.GetPath())
	if err != nil {
		return err
	}
	if !narFileName.MatchString(f.GetName()) {
		return fmt.Errorf("NAR file %.100q of %s: want HASH.nar and an extension: %w", f.GetName(), path, flox.ErrBadInput)
	}
	valid, err := readInfo(a.tx, path.HashPart())
	if errors.Is(err, flox.ErrNotFound) || err == nil && !bytes.Equal(valid.GetNarHash(), f.GetNarHash()) {
		return nil
	}
	if err != nil {
		return err
	}
	switch _, err := a.tx.Get(fileNameKey(f.GetName())); {
	case err == nil:
		return nil // equal files hold equal NARs
	case !errors.Is(err, flox.ErrNotFound):
		return err
	}
	names, err := fileNames(a.tx, path.HashPart())
	if err != nil || len(names) >= maxNarFiles {
		return err
	}
	return errors.Join(
		a.tx.Set(fileNameKey(f.GetName()), []byte(path.HashPart())),
		a.tx.Set(append(hashKey(uploadKey, path.HashPart()), f.GetName()...), nil))
}

// removeFiles forgets the names of a path that is removed.
func (a *applying) removeFiles(p flox.StorePath) error {
	names, err := fileNames(a.tx, p.HashPart())
	for _, name := range names {
		err = errors.Join(err, a.tx.Delete(fileNameKey(name)),
			a.tx.Delete(append(hashKey(uploadKey, p.HashPart()), name...)))
	}
	return err
}

func fileNameKey(name string) []byte { return append([]byte{fileKey}, name...) }

// fileNames gives the names recorded for a path.
func fileNames(g getter, hashPart string) (names []string, err error) {
	prefix := hashKey(uploadKey, hashPart)
	err = g.Iterate(prefix, nil, func(key, _ []byte) bool {
		names = append(names, string(key[len(prefix):]))
		return true
	})
	return names, err
}

// NarFile gives the path whose NAR was uploaded under a name; ErrNotFound. Another
// path may have been uploaded with the same NAR.
func (s *Server) NarFile(ctx context.Context, name string) (*flox.PathInfo, error) {
	hashPart := ""
	if narFileName.MatchString(name) {
		look := func(r *cluster.Reader) error {
			b, err := r.Get(fileNameKey(name))
			hashPart = string(b)
			return err
		}
		err := s.read(ctx, cluster.Local, look)
		if errors.Is(err, flox.ErrNotFound) {
			err = s.read(ctx, cluster.Linearizable, look)
		}
		if err != nil && !errors.Is(err, flox.ErrNotFound) {
			return nil, err
		}
	}
	if hashPart == "" {
		return nil, fmt.Errorf("no NAR was uploaded as %.100q: %w", name, flox.ErrNotFound)
	}
	return s.Info(ctx, hashPart)
}

// narFile is the part of a key that readers ask for later, "" if they will not.
func narFile(key string) string {
	name, ok := strings.CutPrefix(key, "nar/")
	if !ok || !narFileName.MatchString(name) {
		return ""
	}
	return name
}

// uploaded gives the NAR of a path uploaded under key as if it were staged.
func (s *Server) uploaded(ctx context.Context, key string, missing error) (*pending, error) {
	name := narFile(key)
	if name == "" {
		return nil, missing
	}
	info, err := s.NarFile(ctx, name)
	if errors.Is(err, flox.ErrNotFound) {
		return nil, missing
	}
	if err != nil {
		return nil, err
	}
	return &pending{Staged: Staged{Key: key, NarHash: info.NarHash, NarSize: info.NarSize, Manifest: info.Manifest}}, nil
}

// addName records one more name of a valid path's NAR.
func (s *Server) addName(ctx context.Context, valid *flox.PathInfo, p *pending, publisher string) error {
	name := narFile(p.Key)
	if name == "" || p.NarHash != valid.NarHash {
		return nil
	}
	if _, err := s.NarFile(ctx, name); !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	_, err := s.batch.add(ctx, valid, name, publisher, nil)
	return err
}
