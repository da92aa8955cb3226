// Package warden is the small privileged parent of an agent and the agent's
// end of the line to it.
//
// The parent mounts, keeps the FUSE device so that the mount outlives its
// server, starts the unprivileged child that serves, starts it again when it
// dies, and answers a fixed list of questions that need root. It must not know
// of stores, networks or caches; no byte from the network reaches it as a path.
package warden

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/fuse"
)

const (
	// nobody is who the child is where there is no user floxd.
	nobody = 65534
	// staleTimeout is how long the mount of a warden that was killed may take to
	// be seen as dead: its child dies with it, but not in the same moment.
	staleTimeout = 3 * time.Second
	// maxDelay is the longest pause before a child that keeps dying is started
	// again. One is started at once that lived for settled, or was ready for
	// useful: it is of use to its readers, who wait for the next one.
	maxDelay = 10 * time.Second
	settled  = 10 * time.Second
	useful   = 250 * time.Millisecond
)

// Config is what the parent needs. MountDir, RunDir and Child are required.
type Config struct {
	// MountDir is where the store is mounted. It is made if missing.
	MountDir string
	// StoreDir is the store directory that paths are made for, where it is not
	// MountDir: that is what roots name.
	StoreDir string
	// LinksDir is where links are mounted (fuse.Links), with a connection of their own; ""
	// = nowhere. It is made if missing. LinksOptional: where it cannot be mounted, that
	// is said in the log, and it is done without.
	LinksDir      string
	LinksOptional bool
	// RunDir is a directory on a tmpfs for the node table and what else the
	// child keeps there; it is made if missing and given to the child's user.
	RunDir string
	// Child is the command line of the child, an absolute program first. That
	// file is held: whatever becomes of its name, it is what is started again. One
	// in a FUSE file system is copied to memory: nobody may serve that just then.
	Child []string
	// Program is the file that a reload puts in its place; "" = Child[0].
	Program string
	// VersionArgs are the arguments with which a program writes its version, as a
	// JSON object with a "version"; nil = it is not asked before a reload.
	VersionArgs []string
	// Control is the socket for root's commands (Reload), in a directory only root
	// can write to; "" = there is none.
	Control string
	// ReadyTimeout is how long a reloaded program may take to serve; 0 = 20 s.
	ReadyTimeout time.Duration
	// WithoutResend belongs to fuse.MountConfig: it is for tests.
	WithoutResend bool
	// Env is the child's environment beside what it needs for FromEnv; nil = os.Environ().
	Env []string
	// UID and GID are who the child runs as; 0 = the user floxd, or 65534 if
	// there is none.
	UID, GID uint32
	// Unprivileged says that this process is root of a user namespace of its own
	// only, as one user of the machine. Nothing is then given to anybody, and the
	// child runs in a namespace below, where it has no capabilities and UID and
	// GID, as they are, are that same user's.
	Unprivileged bool
	// ReadAheadKiB is the kernel's read-ahead on the mount, 0 = 16. Programs are
	// read in few places, and each costs that much from the network.
	ReadAheadKiB int
	// StopTimeout is how long the child may take to end; 0 = 5 s.
	StopTimeout time.Duration
	// Silence is how long the child may say nothing and stand still before it is
	// killed and the next one started; 0 = 1 min. Sleep of the machine does not
	// count, nor does a debugger.
	Silence time.Duration
	// Output is where the child's standard output and error go; nil = this process's.
	Output *os.File
	// Log; nil discards.
	Log *slog.Logger
}

func (c *Config) setDefaults() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("warden: %s: %w", fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	for name, path := range map[string]string{"MountDir": c.MountDir, "RunDir": c.RunDir} {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			return bad("%s %q: want an absolute directory without a trailing slash", name, path)
		}
	}
	if d := c.LinksDir; d != "" && (!filepath.IsAbs(d) || filepath.Clean(d) != d || d == "/" || strings.HasPrefix(c.MountDir+"/", d+"/") || strings.HasPrefix(d+"/", c.MountDir+"/")) {
		return bad("LinksDir %q: want an absolute directory beside MountDir, without a trailing slash", d)
	}
	switch {
	case len(c.Child) == 0 || !filepath.IsAbs(c.Child[0]):
		return bad("Child %q: want a command line that begins with an absolute path", c.Child)
	case c.ReadAheadKiB < 0 || c.ReadAheadKiB > maxReadAhead:
		return bad("ReadAheadKiB %d: want 0 to %d", c.ReadAheadKiB, maxReadAhead)
	case c.StopTimeout < 0 || c.ReadyTimeout < 0 || c.Silence < 0:
		return bad("StopTimeout %v, ReadyTimeout %v, Silence %v: want 0 or more", c.StopTimeout, c.ReadyTimeout, c.Silence)
	case c.Program != "" && !filepath.IsAbs(c.Program):
		return bad("Program %q: want an absolute path", c.Program)
	}
	if c.StoreDir == "" {
		c.StoreDir = c.MountDir
	}
	if c.Program == "" {
		c.Program = c.Child[0]
	}
	if c.ReadyTimeout == 0 {
		c.ReadyTimeout = 20 * time.Second
	}
	if c.Env == nil {
		c.Env = os.Environ()
	}
	if !c.Unprivileged && (c.UID == 0 || c.GID == 0) {
		uid, gid := DefaultUser()
		if c.UID == 0 {
			c.UID = uid
		}
		if c.GID == 0 {
			c.GID = gid
		}
	}
	if c.ReadAheadKiB == 0 {
		c.ReadAheadKiB = 16
	}
	if c.StopTimeout == 0 {
		c.StopTimeout = 5 * time.Second
	}
	if c.Silence == 0 {
		c.Silence = silence
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// DefaultUser is who a child runs as unless Config says otherwise: the user
// floxd, or 65534 where there is none. What the child is to write must be theirs.
func DefaultUser() (uid, gid uint32) {
	u, err := user.Lookup("floxd")
	if err != nil {
		return nobody, nobody
	}
	n, uidErr := strconv.ParseUint(u.Uid, 10, 32)
	g, gidErr := strconv.ParseUint(u.Gid, 10, 32)
	if uidErr != nil || gidErr != nil || n == 0 || g == 0 {
		return nobody, nobody
	}
	return uint32(n), uint32(g)
}

// warden is a running parent.
type warden struct {
	cfg   Config
	log   *slog.Logger
	dev   *fuse.Device
	links *fuse.Device // nil: there are none
	clerk *clerk

	program   *program     // what is started next; supervise's
	spare     *spare       // waits to be the next child, nil = none; supervise's
	before    *Ended       // the last child, if it was killed for its silence; supervise's
	changes   chan *change // reloads, to supervise
	reloading sync.Mutex   // held by the one there may be
}

// Run mounts, supervises the child and unmounts when ctx is done (nil). The
// child is started again whenever it dies, ever more slowly if it keeps dying.
// Errors are those of fuse.Mount, ErrBusy when another warden has RunDir, and
// ErrClosed when somebody else unmounted the file system.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.setDefaults(); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("mount %s: only root can mount; run it with sudo: %w", cfg.MountDir, flox.ErrDenied)
	}
	w := &warden{cfg: cfg, log: cfg.Log, changes: make(chan *change)}
	lock, err := w.prepare(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	if w.program, err = w.open(ctx, cfg.Child[0]); err != nil {
		return err
	}
	defer func() { w.program.close() }()
	if w.dev, err = fuse.Mount(w.mountConfig()); err != nil {
		return err
	}
	defer w.dev.File.Close()
	defer w.unmount()
	if err := w.mountLinks(ctx); err != nil {
		return err
	}
	if w.links != nil {
		defer w.links.File.Close()
	}
	if err := setReadAhead(w.dev.BDI, cfg.ReadAheadKiB); err != nil && !cfg.Unprivileged {
		w.log.Warn("the kernel keeps its own read-ahead", "error", err)
	}
	scans, err := newScanner(w.dev.BDI)
	if err != nil {
		return err
	}
	scans.log = cfg.Log
	roots := &rootFinder{
		storeDir: cfg.StoreDir, stateDir: filepath.Join(filepath.Dir(cfg.StoreDir), "var/nix"), proc: scans.proc, memory: &scans.memory,
	}
	w.clerk = &clerk{mountDir: cfg.MountDir, bdi: w.dev.BDI, scans: scans, roots: roots, log: cfg.Log}
	ctx, cancel := context.WithCancel(ctx)
	var orders sync.WaitGroup
	defer orders.Wait()
	defer cancel()
	if cfg.Control != "" {
		if l, err := listenControl(cfg.Control); err != nil {
			w.log.Warn("a reload will not be possible", "error", err)
		} else {
			orders.Go(func() { w.obey(ctx, l) })
		}
	}
	return w.supervise(ctx)
}

// mountConfig says how to mount. Who may not set a device's read-ahead can still
// keep the kernel from having more.
func (w *warden) mountConfig() fuse.MountConfig {
	c := fuse.MountConfig{Dir: w.cfg.MountDir, WithoutResend: w.cfg.WithoutResend, Log: w.cfg.Log}
	if w.cfg.Unprivileged {
		c.MaxReadAheadKiB = w.cfg.ReadAheadKiB
	}
	return c
}

// mountLinks mounts at LinksDir, if there is one.
func (w *warden) mountLinks(ctx context.Context) (err error) {
	dir := w.cfg.LinksDir
	if dir == "" {
		return nil
	}
	if err = w.clearStale(ctx, dir); err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		w.links, err = fuse.Mount(fuse.MountConfig{Dir: dir, Source: fuse.LinksSource, WithoutResend: w.cfg.WithoutResend, Log: w.cfg.Log})
	}
	if err != nil && w.cfg.LinksOptional {
		w.log.Warn("profiles are not shown", "dir", dir, "error", err)
		return nil
	}
	return err
}

// prepare makes the directories, makes sure that this is the only warden, and
// clears away what one that was killed left. The lock lasts until it is closed.
func (w *warden) prepare(ctx context.Context) (lock *os.File, err error) {
	if err := os.MkdirAll(w.cfg.RunDir, 0o755); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	// Nothing in there is opened for writing by root: it belongs to the child.
	lock, err = os.OpenFile(w.cfg.RunDir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("run directory %s: another agent uses it; stop that one or give this one its own: %w", w.cfg.RunDir, flox.ErrBusy)
	}
	if !w.cfg.Unprivileged {
		if err := lock.Chown(int(w.cfg.UID), int(w.cfg.GID)); err != nil {
			return nil, fmt.Errorf("run directory: %w", err)
		}
	}
	if err := w.clearStale(ctx, w.cfg.MountDir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(w.cfg.MountDir, 0o755); err != nil {
		return nil, fmt.Errorf("mount directory: %w", err)
	}
	// Those of another mount.
	for _, file := range []string{nodeTable(w.cfg.RunDir), journal(w.cfg.RunDir), linksJournal(w.cfg.RunDir)} {
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("old node table or journal: %w", err)
		}
	}
	return lock, nil
}

// clearStale unmounts what a warden left that could not do so itself. A mount
// that somebody serves is left alone, for fuse.Mount to refuse.
func (w *warden) clearStale(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, staleTimeout)
	defer cancel()
	for {
		m, err := fuse.FindMount(dir)
		if err != nil {
			return fmt.Errorf("look for an old mount: %w", err)
		}
		if m == nil || m.FSType != fuse.FSType {
			return nil
		}
		if dead(ctx, dir) {
			w.log.Info("unmounting what an earlier agent left", "dir", dir)
			if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				return fmt.Errorf("unmount what an earlier agent left at %s: %w", dir, err)
			}
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// dead reports whether the connection of the mount at dir is gone: the one
// question the kernel always passes on is statfs(2). It may wait for ever if
// nobody serves, so it is asked by a goroutine that may be left behind.
func dead(ctx context.Context, dir string) bool {
	answer := make(chan error, 1)
	go func() {
		var st unix.Statfs_t
		answer <- unix.Statfs(dir, &st)
	}()
	select {
	case err := <-answer:
		return errors.Is(err, syscall.ENOTCONN) || errors.Is(err, syscall.ECONNABORTED)
	case <-ctx.Done():
		return false
	}
}

// connected reports whether the connection of the mount still is. The device
// is asked, because the mount could wait for the child that is not there.
func (w *warden) connected() bool {
	fds := []unix.PollFd{{Fd: int32(w.dev.File.Fd())}}
	_, err := unix.Poll(fds, 0)
	return err != nil || fds[0].Revents&unix.POLLERR == 0
}

// unmount takes the mounts out of the tree, if they are still in it.
func (w *warden) unmount() {
	for _, dev := range []*fuse.Device{w.links, w.dev} {
		if dev == nil {
			continue
		}
		m, err := fuse.FindMount(dev.Dir)
		if err == nil && (m == nil || m.Device != dev.BDI) {
			continue
		}
		if err := fuse.Unmount(dev.Dir); err != nil {
			w.log.Error("unmount", "error", err)
		}
	}
}
