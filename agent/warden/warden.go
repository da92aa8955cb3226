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
	"log/slog"
	"os"
	"time"
)

// Config is what the parent needs. MountDir, RunDir and Child are required.
type Config struct {
	// MountDir is where the store is mounted. It is made if missing.
	MountDir string
	// RunDir is a directory on a tmpfs for the lock and the node table; it is
	// made if missing and given to the child's user.
	RunDir string
	// Child is the command line of the child, an absolute program first.
	Child []string
	// Env is the child's environment beside what it needs for FromEnv; nil = os.Environ().
	Env []string
	// UID and GID are who the child runs as; 0 = the user floxd, or 65534 if
	// there is none.
	UID, GID uint32
	// ReadAheadKiB is the kernel's read-ahead on the mount; 0 = 64.
	ReadAheadKiB int
	// StopTimeout is how long the child may take to end; 0 = 5 s.
	StopTimeout time.Duration
	// Log; nil discards.
	Log *slog.Logger
}

// Run mounts, supervises the child and unmounts when ctx is done (nil). The
// child is started again whenever it dies, ever more slowly if it keeps dying.
// Errors are those of fuse.Mount, ErrBusy when another warden owns RunDir, and
// ErrClosed when somebody else unmounted the file system.
func Run(ctx context.Context, cfg Config) error { return errors.ErrUnsupported }

// Conn is the child's line to its warden. Its methods may be called at once by
// many and need a running Run.
type Conn struct {
	// Device and Init belong to the mount: see fuse.ServerConfig.
	Device *os.File
	Init   []byte
	// MountDir and RunDir are the parent's.
	MountDir, RunDir string
}

// FromEnv finds the line in the environment of a process that a warden
// started, and takes it out of the environment. ErrNotFound: no warden started it.
func FromEnv() (*Conn, error) { return nil, errors.ErrUnsupported }

// NodeTable is the path of the mount's node table.
func (c *Conn) NodeTable() string { return "" }

// Run receives answers until ctx is done (its error) or the warden is gone
// (ErrClosed): the child should then end.
func (c *Conn) Run(ctx context.Context) error { return errors.ErrUnsupported }

// Exe gives the program a process (or thread) runs, as the kernel writes it.
// ErrNotFound: there is no such process, or it is the kernel's own.
func (c *Conn) Exe(ctx context.Context, pid uint32) (string, error) {
	return "", errors.ErrUnsupported
}

// InUse lists the inodes of the mount that any process has open, mapped, runs,
// or stands in. One scan serves everybody who asks within a second.
func (c *Conn) InUse(ctx context.Context) (map[uint64]struct{}, error) {
	return nil, errors.ErrUnsupported
}

// Mapped reports whether any process has the inode mapped or executes it. When
// that cannot be found out it says true: waiting is safer than killing.
func (c *Conn) Mapped(ctx context.Context, node uint64) bool { return false }

// RootTarget reads the symlink of an indirect root. ErrNotFound: there is no
// such link, or it does not point below the mount.
func (c *Conn) RootTarget(ctx context.Context, link string) (string, error) {
	return "", errors.ErrUnsupported
}

// SetReadAhead sets the kernel's read-ahead on the mount, 0 to 4096 KiB.
func (c *Conn) SetReadAhead(ctx context.Context, kib int) error { return errors.ErrUnsupported }
