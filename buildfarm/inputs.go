package buildfarm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// draft begins the name of what is still being written.
const draft = "draft-"

// inputs keeps what builds have in common: the content of store paths, each under its
// NAR hash and in one copy. No build can write there: rooms show it read-only, and
// nothing that a build has made is moved in, only copied, because a file that a build
// made may still be open somewhere.
type inputs struct {
	dir string

	mu   sync.Mutex
	used uint64 // bytes of NARs
	uses uint64 // counts
	kept map[[32]byte]*input
}

// input is the content of a store path.
type input struct {
	hash [32]byte
	size uint64 // of its NAR
	file string

	lock chan struct{} // who holds its token may look into file, and make it
	sure bool          // file has the hash; needs the token

	// Guarded by inputs.mu.
	users int
	last  uint64 // use
	here  bool   // it counts as used
}

// openInputs finds what an earlier process has left. It is not believed: who needs it
// hashes it first.
func openInputs(dir string) (*inputs, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	s := &inputs{dir: dir, kept: map[[32]byte]*input{}}
	for _, e := range entries {
		digits, size, _ := strings.Cut(e.Name(), "-")
		hash, err := nix.DecodeBase32(digits)
		n, errSize := strconv.ParseUint(size, 10, 63)
		if err != nil || errSize != nil || len(hash) != sha256.Size {
			if err := remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, err
			}
			continue
		}
		in := s.get([32]byte(hash), n)
		in.here, in.users = true, 0
		s.used += n
	}
	return s, nil
}

// get gives an input, made or not, that stays until done. It needs s.mu, but in openInputs.
func (s *inputs) get(hash [32]byte, size uint64) *input {
	in := s.kept[hash]
	if in == nil {
		name := nix.EncodeBase32(hash[:]) + "-" + strconv.FormatUint(size, 10)
		in = &input{hash: hash, size: size, file: filepath.Join(s.dir, name), lock: make(chan struct{}, 1)}
		s.kept[hash] = in
	}
	s.uses++
	in.users++
	in.last = s.uses
	return in
}

// done lets go of an input.
func (s *inputs) done(in *input) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if in.users--; in.users == 0 && !in.here {
		delete(s.kept, in.hash)
	}
}

// hold gives the content of a path, which write fetches if it is not here. It stays
// until done. Errors: ErrCorrupt when what was fetched is something else.
func (s *inputs) hold(ctx context.Context, info *flox.PathInfo, write func(io.Writer) error) (*input, error) {
	s.mu.Lock()
	in := s.get(info.NarHash, info.NarSize)
	s.mu.Unlock()
	err := s.make(ctx, in, func() error {
		file, hash, size, err := s.copy(ctx, write)
		if err == nil && (hash != info.NarHash || size != info.NarSize) {
			err = errors.Join(fmt.Errorf("%s: its NAR has %d bytes and the hash %s, want %d and %s: %w", info.Path,
				size, nix.SHA256Hash(hash), info.NarSize, nix.SHA256Hash(info.NarHash), flox.ErrCorrupt), remove(file))
		}
		if err != nil {
			return err
		}
		return os.Rename(file, in.file)
	})
	if err != nil {
		s.done(in)
		return nil, err
	}
	return in, nil
}

// make has an input be what its hash says, one caller at a time. fetch puts it in its
// place.
func (s *inputs) make(ctx context.Context, in *input, fetch func() error) error {
	select {
	case in.lock <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-in.lock }()
	if in.sure {
		return nil
	}
	_, err := os.Lstat(in.file)
	if err == nil {
		hash, size := sha256.New(), &counter{}
		if err := nix.DumpPath(ctx, io.MultiWriter(hash, size), in.file); ctx.Err() != nil {
			return ctx.Err()
		} else if in.sure = err == nil && size.n == in.size && [32]byte(hash.Sum(nil)) == in.hash; in.sure {
			return nil
		}
		err = remove(in.file) // of a power cut, or somebody wrote there
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = fetch()
	}
	if err != nil {
		return err
	}
	in.sure = true
	s.mu.Lock()
	defer s.mu.Unlock()
	if !in.here {
		in.here = true
		s.used += in.size
	}
	return nil
}

// adopt copies a file that a build has made, and gives the copy, which stays until done.
func (s *inputs) adopt(ctx context.Context, made string) (*input, error) {
	file, hash, size, err := s.copy(ctx, func(w io.Writer) error { return nix.DumpPath(ctx, w, made) })
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	in := s.get(hash, size)
	s.mu.Unlock()
	err = s.make(ctx, in, func() error { return os.Rename(file, in.file) })
	if err = errors.Join(err, remove(file)); err != nil {
		s.done(in)
		return nil, err
	}
	return in, nil
}

// copy makes a file of a NAR that write gives, and says what that was.
func (s *inputs) copy(ctx context.Context, write func(io.Writer) error) (file string, hash [32]byte, size uint64, err error) {
	s.mu.Lock()
	s.uses++
	file = filepath.Join(s.dir, draft+strconv.FormatUint(s.uses, 10)) // goes with the next start if this process ends
	s.mu.Unlock()
	sum, count := sha256.New(), &counter{}
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		w.CloseWithError(write(io.MultiWriter(w, sum, count)))
	}()
	err = nix.RestorePath(ctx, r, file)
	if err == nil {
		if _, more := io.Copy(io.Discard, r); more != nil {
			err = errors.Join(more, remove(file))
		}
	}
	_ = r.CloseWithError(errors.New("not read to the end")) // ends the writer
	<-written
	if err != nil {
		return "", hash, 0, err
	}
	return file, [32]byte(sum.Sum(nil)), count.n, nil
}

// trim deletes what was not used for longest, and by nobody now, until at most most
// bytes are left or nothing more can go.
func (s *inputs) trim(most uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.used > most {
		var oldest *input
		last := uint64(math.MaxUint64)
		for _, in := range s.kept {
			if in.users == 0 && in.last < last {
				oldest, last = in, in.last
			}
		}
		if oldest == nil {
			return nil
		}
		if err := remove(oldest.file); err != nil {
			return err
		}
		delete(s.kept, oldest.hash)
		s.used -= oldest.size
	}
	return nil
}

// counter counts what is written.
type counter struct{ n uint64 }

func (c *counter) Write(b []byte) (int, error) {
	c.n += uint64(len(b))
	return len(b), nil
}
