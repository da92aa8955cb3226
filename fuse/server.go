package fuse

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"github.com/floxctl/flox"
)

// ServerConfig is what a Server needs. Device, Init, Store and NodeTable are
// required; the zero value of everything else is a default.
type ServerConfig struct {
	// Device and Init are those of the mount's Device.
	Device *os.File
	Init   []byte

	// Store is what is shown. Its methods must return soon after their context
	// is done; work that others can use (a fetch under way) should go on behind.
	Store flox.Store

	// NodeTable is the file that remembers which store path got which node ids.
	// It belongs to one mount and must live as long: on a tmpfs such as /run.
	NodeTable string

	// LookupTimeout is how long a look-up in the store directory may wait; 0 = 5 s.
	LookupTimeout time.Duration
	// ReadTimeout is how long everything else may wait; 0 = 30 s.
	ReadTimeout time.Duration
	// Mapped reports whether a running process has the inode mapped or executes
	// it. A READ of such an inode is never given up, because an error would kill
	// the process (SIGBUS); Mapped is asked again after each ReadTimeout. nil = never.
	Mapped func(ctx context.Context, node uint64) bool

	// MaxInFlight is how many requests may be worked on at once; 0 = 1024. At
	// the limit nothing more is read from the kernel until one ends.
	MaxInFlight int

	// Log; nil discards.
	Log *slog.Logger
}

// Server serves one mount.
type Server struct{}

// NewServer prepares to serve and reads the node table. It does not touch the
// mount. Errors: ErrBadInput (configuration, foreign INIT), ErrCorrupt (node table).
func NewServer(cfg ServerConfig) (*Server, error) { return nil, errors.ErrUnsupported }

// Run serves until the file system is unmounted (nil) or ctx is done (its
// error). Requests that were not answered when ctx ended stay with the kernel,
// for the next server of the mount. The process must never touch the mount itself.
func (s *Server) Run(ctx context.Context) error { return errors.ErrUnsupported }

// Stats counts since NewServer.
type Stats struct {
	// Requests counts what the kernel asked, by operation ("LOOKUP", "READ").
	Requests map[string]uint64
	// Total is the sum of Requests without FORGET, BATCH_FORGET and INTERRUPT,
	// which want no answer.
	Total uint64
	// Errors counts answers EIO; Interrupted those of killed processes (EINTR).
	Errors, Interrupted uint64
	// ReadBytes is what READs were answered with.
	ReadBytes uint64
	// InFlight is how many requests are being worked on now.
	InFlight int
	// Dropped counts inodes whose pages DropPages removed.
	Dropped uint64
}

// Stats gives the counters.
func (s *Server) Stats() Stats { return Stats{} }

// Wait is a request somebody waits for.
type Wait struct {
	PID   uint32 // thread id of who asked, 0 = the kernel
	Node  uint64 // inode number
	Op    string // "LOOKUP", "READ", …
	Name  string // LOOKUP: the name
	Since time.Time
}

// Waiting lists the requests being worked on, oldest first.
func (s *Server) Waiting() []Wait { return nil }

// DropPages makes the kernel forget the cached pages of nodes, so that the
// next use of one is seen as a READ. Nodes the kernel does not know, or is
// reading right now, are left alone. Returns when it is done or ctx is.
func (s *Server) DropPages(ctx context.Context, nodes []uint64) error { return errors.ErrUnsupported }

// Node gives the inode number of an entry; false if nothing of that manifest
// was looked up in this mount.
func (s *Server) Node(manifest flox.CID, index uint32) (uint64, bool) { return 0, false }

// Resolve is the inverse of Node; false for the root and for foreign numbers.
func (s *Server) Resolve(node uint64) (manifest flox.CID, index uint32, ok bool) {
	return flox.CID{}, 0, false
}
