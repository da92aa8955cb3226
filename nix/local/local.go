// Package local reads a Nix store that this machine has on its disk, beside ours:
// which of its paths are valid, as its own daemon says, and their files. Nothing
// of it is ever changed, and nothing is taken for valid that its daemon does not
// know, such as what a build writes just now.
//
// It must not know who is shown these files, or what the storehouse has.
package local

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nix-community/go-nix/pkg/nixbase32"
	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/nix/worker"
)

const (
	// maxFound bounds the paths that are remembered to be valid.
	maxFound = 65_536
	// foundAge is how long a path is believed valid whose files are the same: to
	// forget a path, a daemon first takes it out of its database.
	foundAge = time.Minute
	// maxNames bounds the names of the directory.
	maxNames = 1 << 20
	// namesAge is how long a listing is good while the directory's time is the same.
	namesAge = time.Second
)

// Config says where a store is. All of it is needed.
type Config struct {
	// Dir is the store's directory, as its paths say.
	Dir flox.StoreDir
	// Root is the directory where it is found; = Dir unless something covers that.
	Root string
	// Socket is its daemon's.
	Socket string
}

// Store is a local Nix store. It is safe for many goroutines.
type Store struct {
	cfg    Config
	root   *os.File
	daemon *daemon
	trees  trees

	mu    sync.Mutex
	found map[flox.StorePath]found
	names names
}

// Path is a valid path of the local store.
type Path struct {
	Info *worker.Info
	// ID names this content of the path: see IsID.
	ID flox.CID

	kind flox.Kind
}

// found is a path that was valid while its own entry was the same.
type found struct {
	*Path
	id identity
	at time.Time
}

// identity tells one file from another at the same place.
type identity struct {
	dev, ino uint64
	ctime    unix.Timespec
}

func identify(st *unix.Stat_t) identity { return identity{st.Dev, st.Ino, st.Ctim} }

// Open opens the directory; the daemon is asked when somebody looks for a path.
func Open(cfg Config) (*Store, error) {
	root, err := os.Open(cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("local Nix store: %w", err)
	}
	s := &Store{cfg: cfg, root: root, daemon: newDaemon(cfg.Socket, cfg.Dir), found: make(map[flox.StorePath]found)}
	s.trees.init()
	return s, nil
}

// Run closes what nobody uses any more until ctx ends.
func (s *Store) Run(ctx context.Context) error {
	s.daemon.run(ctx)
	return nil
}

// Close closes the directory. Nobody may use the store any more.
func (s *Store) Close() error {
	s.daemon.close(time.Now().Add(time.Hour))
	return s.root.Close()
}

// Dir is the store's directory.
func (s *Store) Dir() flox.StoreDir { return s.cfg.Dir }

// Err says why the daemon did not answer the last question; nil = it did.
func (s *Store) Err() error {
	s.daemon.mu.Lock()
	defer s.daemon.mu.Unlock()
	return s.daemon.err
}

// Known is how many paths are remembered to be valid.
func (s *Store) Known() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.found)
}

// Find finds a valid path. ErrNotFound: there is none, or what is there is not
// valid, or there is no daemon to say so. ErrUnreachable: the daemon does not answer.
func (s *Store) Find(ctx context.Context, p flox.StorePath) (*Path, error) {
	st, err := s.stat(p)
	if err != nil {
		return nil, err
	}
	id := identify(st)
	s.mu.Lock()
	f, ok := s.found[p]
	s.mu.Unlock()
	if ok && f.id == id && time.Since(f.at) < foundAge {
		return f.Path, nil
	}
	var info *worker.Info
	err = s.daemon.ask(ctx, func(ctx context.Context, c *worker.Client) (err error) {
		info, err = c.Info(ctx, p)
		return err
	})
	if absent(err) {
		err = fmt.Errorf("%s is on the disk, and no Nix daemon says whether it is valid: %w", p, flox.ErrNotFound)
	}
	if err != nil {
		s.forget(p)
		return nil, err
	}
	path := &Path{Info: info, ID: idOf(info), kind: kindOf(st)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.found) >= maxFound {
		for other := range s.found { // any one: its daemon is asked again
			delete(s.found, other)
			break
		}
	}
	s.found[p] = found{path, id, time.Now()}
	return path, nil
}

func (s *Store) forget(p flox.StorePath) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.found, p)
}

// stat looks at a path's own entry.
func (s *Store) stat(p flox.StorePath) (*unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(s.root.Fd()), string(p), &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("%s is not in the local store: %w", p, flox.ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("local store: %w", &os.PathError{Op: "stat", Path: string(p), Err: err})
	case kindOf(&st) == 0:
		return nil, fmt.Errorf("%s in the local store is no file, directory or symlink: %w", p, flox.ErrNotFound)
	}
	return &st, nil
}

func kindOf(st *unix.Stat_t) flox.Kind {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return flox.Regular
	case unix.S_IFDIR:
		return flox.Directory
	case unix.S_IFLNK:
		return flox.Symlink
	}
	return 0
}

// An ID stands where the CID of a manifest does: idMagic, the hash part, which finds
// the path again in another process, and the beginning of the NAR's hash. A CID is
// no ID but with a chance of 1 in 2^64.
var idMagic = [8]byte{'f', 'l', 'o', 'x', 'l', 'o', 'c', '1'}

const hashPartBytes = 20

func idOf(info *worker.Info) (id flox.CID) {
	n := copy(id[:], idMagic[:])
	hash, err := nixbase32.DecodeString(info.Path.HashPart())
	if err != nil || len(hash) != hashPartBytes {
		panic("local: " + string(info.Path) + " is no store path") // it was parsed as one
	}
	n += copy(id[n:], hash)
	copy(id[n:], info.NarHash[:])
	return id
}

// IsID reports whether a manifest's CID is none but names a local path.
func IsID(id flox.CID) bool { return [8]byte(id[:8]) == idMagic }

// byID finds the path that an ID was given for. ErrNotFound: it has other content
// now, or is gone.
func (s *Store) byID(ctx context.Context, id flox.CID) (*Path, error) {
	if !IsID(id) {
		return nil, fmt.Errorf("%s names no local path: %w", id, flox.ErrNotFound)
	}
	hash := nixbase32.EncodeToString(id[len(idMagic) : len(idMagic)+hashPartBytes])
	p, err := s.ByHashPart(ctx, hash)
	if err == nil && p.ID != id {
		err = fmt.Errorf("%s has other content now: %w", p.Info.Path, flox.ErrNotFound)
	}
	return p, err
}

// ByHashPart is Find for who does not know the name.
func (s *Store) ByHashPart(ctx context.Context, hash string) (*Path, error) {
	var path flox.StorePath
	err := s.daemon.ask(ctx, func(ctx context.Context, c *worker.Client) (err error) {
		path, err = c.ByHashPart(ctx, hash)
		return err
	})
	switch {
	case absent(err), err == nil && path == "":
		return nil, fmt.Errorf("no path with hash part %s in the local store: %w", hash, flox.ErrNotFound)
	case err != nil:
		return nil, err
	}
	return s.Find(ctx, path)
}

// Named is a valid path in a listing.
type Named struct {
	Path flox.StorePath
	Kind flox.Kind // 0 = not looked at
	ID   flox.CID  // zero = not looked at
}

// names are the names of the directory at a time.
type names struct {
	list  []flox.StorePath // sorted
	mtime unix.Timespec
	at    time.Time
}

// Names lists valid paths, sorted, beginning behind after, at most limit of them.
func (s *Store) Names(ctx context.Context, after string, limit int) ([]Named, error) {
	list, err := s.list()
	if err != nil {
		return nil, err
	}
	from, ok := slices.BinarySearch(list, flox.StorePath(after))
	if ok {
		from++
	}
	var out []Named
	for part := range slices.Chunk(list[from:], max(limit, 1)) {
		var valid []flox.StorePath
		err := s.daemon.ask(ctx, func(ctx context.Context, c *worker.Client) (err error) {
			valid, err = c.ValidPaths(ctx, part, false)
			return err
		})
		if absent(err) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		slices.Sort(valid)
		s.mu.Lock()
		for _, p := range valid {
			one := Named{Path: p}
			if f, ok := s.found[p]; ok {
				one.Kind, one.ID = f.kind, f.ID
			}
			out = append(out, one)
		}
		s.mu.Unlock()
		if len(out) >= limit {
			return out[:limit], nil
		}
	}
	return out, nil
}

// list reads the directory, unless that was done a moment ago.
func (s *Store) list() ([]flox.StorePath, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(s.root.Fd()), &st); err != nil {
		return nil, fmt.Errorf("local store: %w", err)
	}
	s.mu.Lock()
	had := s.names
	s.mu.Unlock()
	if had.mtime == st.Mtim && time.Since(had.at) < namesAge {
		return had.list, nil
	}
	dir, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", s.root.Fd())) // with an offset of its own
	if err != nil {
		return nil, fmt.Errorf("local store: %w", err)
	}
	defer dir.Close()
	now := names{mtime: st.Mtim, at: time.Now()}
	for len(now.list) < maxNames {
		some, err := dir.Readdirnames(4096)
		for _, name := range some {
			if p, err := flox.ParseStorePath(name); err == nil && !strings.HasSuffix(name, ".lock") {
				now.list = append(now.list, p)
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("local store: %w", err)
		}
	}
	slices.Sort(now.list)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names = now
	return now.list, nil
}

// Has reports whether something of that name is there, valid or not.
func (s *Store) Has(p flox.StorePath) bool {
	_, err := s.stat(p)
	return err == nil
}

// Nar writes the NAR of a path, as its daemon makes it.
func (s *Store) Nar(ctx context.Context, p *Path, w io.Writer) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", s.cfg.Socket)
	if err != nil {
		return fmt.Errorf("the local Nix daemon: %w: %w", err, flox.ErrUnreachable)
	}
	c, err := worker.NewClient(ctx, conn, worker.ClientConfig{Dir: s.cfg.Dir})
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Nar(ctx, p.Info.Path, w)
}

// Read fills b from what lies at off in a file of a path, inside = "" for the path
// itself. Whether the path is valid is not asked: who reads knows what the bytes
// must be. ErrNotFound: there is no such file, or it ends before.
func (s *Store) Read(p flox.StorePath, inside string, b []byte, off int64) error {
	f, _, err := s.open(p, inside)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := f.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%s/%s of the local store ends before %d: %w", p, inside, off+int64(len(b)), flox.ErrNotFound)
	}
	return fmt.Errorf("local store: %w", err)
}

// open opens a regular file, never through a symlink.
func (s *Store) open(p flox.StorePath, inside string) (*os.File, int64, error) {
	name := string(p)
	if inside != "" {
		name += "/" + inside
	}
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	fd, err := unix.Openat2(int(s.root.Fd()), name, &how)
	if err != nil {
		kind := flox.ErrCorrupt
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			kind = flox.ErrNotFound
		}
		return nil, 0, fmt.Errorf("local store: %w: %w", &os.PathError{Op: "open", Path: name, Err: err}, kind)
	}
	f := os.NewFile(uintptr(fd), name)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || kindOf(&st) != flox.Regular {
		f.Close()
		return nil, 0, fmt.Errorf("local store: %s is no file: %w", name, flox.ErrNotFound)
	}
	return f, st.Size, nil
}

// digest is what tells trees of the same path apart, for messages.
func digest(id flox.CID) uint32 { return binary.BigEndian.Uint32(id[len(idMagic)+hashPartBytes:]) }
