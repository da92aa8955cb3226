package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
)

const (
	// writtenAtOnce is how many store paths are written as files at once.
	writtenAtOnce = 8
	// writeWindow is how many bytes of chunks each of them asks for at once.
	writeWindow = 4 << 20
	// marksDir, in the directory written to, says which paths of it are whole. No
	// store path can have its name.
	marksDir = ".floxd"
	// marksPoll is how often it is looked whether another process is done with a path.
	marksPoll = 100 * time.Millisecond
)

// Materialize says what to write as ordinary files, and where.
type Materialize struct {
	// Path is written with all it refers to.
	Path flox.StorePath
	// Dir is the directory that gets one entry per store path; it is made.
	Dir string
	// Trust takes for whole what an earlier call left in Dir as such, without
	// reading it again: for a directory that nobody else writes to.
	Trust bool
	// Progress is called now and then, by one goroutine at a time; nil = never.
	Progress func(Materialized)
}

// Materialized is how far it is.
type Materialized struct {
	Paths, TotalPaths uint32
	Bytes, TotalBytes uint64 // of their NARs, roughly while a path is being written
	Fetched           uint64 // bytes of content that came from elsewhere
}

// Materialize writes a store path and its closure as ordinary files, as Nix has
// them: modes 0444 and 0555, times 1. Every path is checked against its NAR
// hash before it gets its name, so that under a store path's name there is
// never a part of one. What was begun earlier is gone on with; what is there and
// right is left alone. Nothing is ever overwritten.
//
// The agent must run. Errors: ErrCorrupt (what came, or what is there, is not
// what the signed hash says), ErrFull (the disk), ErrNotFound, ErrUnreachable.
func (a *Agent) Materialize(ctx context.Context, m Materialize) (Materialized, error) {
	return a.materialize(ctx, m, 100*time.Millisecond)
}

func (a *Agent) materialize(ctx context.Context, m Materialize, every time.Duration) (Materialized, error) {
	w := &writer{a: a, Materialize: m, every: every}
	err := w.run(ctx)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		err = fmt.Errorf("%w: free some space and call again, which goes on from here: %w", err, flox.ErrFull)
	}
	return w.sofar, err
}

// writer writes one closure.
type writer struct {
	Materialize
	a     *Agent
	every time.Duration // between two calls of Progress
	root  *os.Root      // Dir

	mu    sync.Mutex
	sofar Materialized
	said  time.Time
	fresh []flox.StorePath // to be marked once they are on the disk
}

func (w *writer) run(ctx context.Context) error {
	info, err := w.a.lookup(ctx, w.Path)
	if err != nil {
		return err
	}
	infos, err := w.a.closure(ctx, []*flox.PathInfo{info})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(w.Dir, marksDir), 0o755); err != nil {
		return fmt.Errorf("write to %s: %w", w.Dir, err)
	}
	if w.root, err = os.OpenRoot(w.Dir); err != nil {
		return fmt.Errorf("write to %s: %w", w.Dir, err)
	}
	defer w.root.Close()
	w.sofar.TotalPaths = uint32(len(infos)) //nolint:gosec // a closure
	for _, info := range infos {
		w.sofar.TotalBytes += info.NarSize
	}
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(writtenAtOnce)
	for _, info := range infos {
		group.Go(func() error {
			if err := w.path(groupCtx, info); err != nil {
				return fmt.Errorf("write %s: %w", filepath.Join(w.Dir, string(info.Path)), err)
			}
			return nil
		})
	}
	if err = group.Wait(); ctx.Err() != nil {
		return err // who wants to stop does not wait for a disk
	}
	return errors.Join(err, w.mark()) // also what is whole of a closure that is not
}

// path writes one store path, unless it is there.
func (w *writer) path(ctx context.Context, info *flox.PathInfo) error {
	lock, err := w.lock(ctx, info.Path)
	if err != nil {
		return err
	}
	defer lock.Close()
	name := string(info.Path)
	draft := marksDir + "-" + name // beside it, because a sealed directory cannot move to another
	if _, err := w.root.Lstat(name); err == nil {
		there, err := w.there(ctx, info, lock, draft)
		if there || err != nil {
			return err
		}
	}
	t, err := w.a.open(ctx, info)
	if err != nil {
		return err
	}
	bytes, err := w.write(ctx, t, draft)
	if err != nil {
		return err
	}
	if err := w.check(ctx, info, draft); err != nil {
		return errors.Join(err, removeSealed(w.root, draft))
	}
	_ = lock.Chmod(modeRisky) // where it cannot be, a crash is for the user to clear away
	if err := w.rename(draft, name); err != nil {
		return err
	}
	w.done(info, bytes, true)
	return nil
}

// there reports whether the path that has its name already is what it must be.
// One that a crash of the machine kept from getting to the disk becomes a draft
// again.
func (w *writer) there(ctx context.Context, info *flox.PathInfo, lock *os.File, draft string) (bool, error) {
	if w.Trust && marked(lock) {
		w.done(info, 0, false)
		return true, nil
	}
	err := w.check(ctx, info, string(info.Path))
	switch {
	case err == nil:
		w.done(info, 0, true)
		return true, nil
	case errors.Is(err, flox.ErrCorrupt) && risky(lock):
		if _, err := w.root.Lstat(draft); err == nil {
			return false, removeSealed(w.root, string(info.Path))
		}
		return false, w.rename(string(info.Path), draft)
	}
	return false, fmt.Errorf("it is there and differs from what it must be; move it away: %w", err)
}

// rename gives something in Dir a name that nothing has.
func (w *writer) rename(from, to string) error {
	dir, err := w.root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	fd := int(dir.Fd())
	err = renameat2(fd, from, fd, to, unix.RENAME_NOREPLACE)
	// Some file systems cannot promise not to replace. Who else writes paths here
	// waits for the lock.
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		if _, err := w.root.Lstat(to); err == nil {
			return &os.LinkError{Op: "rename", Old: from, New: to, Err: unix.EEXIST}
		}
		err = unix.Renameat(fd, from, fd, to)
	}
	return os.NewSyscallError("rename", err)
}

// renameat2 is replaced in tests by that of a poorer file system.
var renameat2 = unix.Renameat2

// The modes of a path's mark. A mode changes before the path gets its name, also
// on the disk, where what is in a file may come later than either.
const (
	modeMark  = 0o644
	modeRisky = 0o744 // the path is one that we wrote, and may not be on the disk
)

func risky(lock *os.File) bool {
	info, err := lock.Stat()
	return err == nil && info.Mode().Perm() == modeRisky && info.Size() == 0
}

// lock makes sure that one process at a time writes a path. The file is also
// its mark: it is empty until the path is known to be on the disk.
func (w *writer) lock(ctx context.Context, p flox.StorePath) (*os.File, error) {
	f, err := w.root.OpenFile(filepath.Join(marksDir, string(p)), os.O_RDWR|os.O_CREATE, modeMark)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(os.NewSyscallError("flock", err), f.Close())
		}
		select {
		case <-time.After(marksPoll):
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), f.Close())
		}
	}
}

func marked(lock *os.File) bool {
	info, err := lock.Stat()
	return err == nil && info.Size() > 0
}

// mark marks what was written or checked, after it is on the disk.
func (w *writer) mark() error {
	if len(w.fresh) == 0 {
		return nil
	}
	dir, err := w.root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return os.NewSyscallError("syncfs", err)
	}
	for _, p := range w.fresh {
		mark := filepath.Join(marksDir, string(p))
		if err := w.root.WriteFile(mark, []byte("whole\n"), modeMark); err != nil {
			return err
		}
		_ = w.root.Chmod(mark, modeMark) // it has content, which is enough
	}
	return nil
}

// done counts a path, so many bytes of which were counted already.
func (w *writer) done(info *flox.PathInfo, counted uint64, fresh bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sofar.Bytes += info.NarSize - min(counted, info.NarSize)
	if fresh {
		w.fresh = append(w.fresh, info.Path)
	}
	w.sofar.Paths++
	w.say(true)
}

// wrote counts bytes of content.
func (w *writer) wrote(n int, fetched bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sofar.Bytes += uint64(n) //nolint:gosec // a length
	if fetched {
		w.sofar.Fetched += uint64(n) //nolint:gosec // a length
	}
	w.say(false)
}

// say tells the progress, now and then; w.mu is held.
func (w *writer) say(now bool) {
	if w.Progress == nil || !now && time.Since(w.said) < w.every {
		return
	}
	w.said = time.Now()
	w.Progress(w.sofar)
}
