package fuse

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/floxctl/flox"
)

// ServerConfig is what a Server needs. Device, Init, and Store with NodeTable, or Links,
// are required; the zero value of everything else is a default.
type ServerConfig struct {
	// Device and Init are those of the mount's Device.
	Device *os.File
	Init   []byte

	// Store is what is shown. Its methods must return soon after their context
	// is done; work that others can use (a fetch under way) should go on behind.
	Store flox.Store
	// Links is what is shown in place of a store. Of what is below it needs no node
	// table, and LookupTimeout bounds what is not known.
	Links Links

	// NodeTable is the file that remembers which store path got which node ids.
	// It belongs to one mount and must live as long: on a tmpfs such as /run.
	NodeTable string

	// Journal is a file beside the node table for what the last server was asked
	// and did not answer, where the kernel cannot send that again (before Linux
	// 6.9); elsewhere it is not used. "" = what was in flight is lost there.
	Journal string

	// LookupTimeout is how long a look-up in the store directory may wait; 0 = 5 s.
	LookupTimeout time.Duration
	// ReadTimeout is how long everything else may wait; 0 = 30 s.
	ReadTimeout time.Duration
	// Mapped reports whether a running process has the inode mapped or executes
	// it. A READ of such an inode is never given up, because an error would kill
	// the process (SIGBUS); Mapped is asked again after each ReadTimeout, and must
	// return soon after its context is done. nil = never.
	Mapped func(ctx context.Context, node uint64, thread uint32) bool

	// MaxInFlight is how many requests may be worked on at once; 0 = 1024. At
	// the limit nothing more is read from the kernel until one ends. A READ
	// holds its bytes meanwhile, usually 64 KiB, at most 1 MiB.
	// It is not shared among callers: whose a request is, is known once it is read, and
	// the kernel takes none back; to refuse one would be an error in a program. So
	// that many threads whose files all hang stop the mount until a deadline.
	MaxInFlight int

	// Passing reports whether a manifest is one of a store path that may go, or
	// become another: then the kernel asks for the name again after passingTime.
	// nil = none does.
	Passing func(manifest flox.CID) bool

	// Serving is called once, by Run, when requests are being read; nil = nobody
	// wants to know.
	Serving func()

	// Log; nil discards.
	Log *slog.Logger
}

func (c *ServerConfig) setDefaults() error {
	bad := func(what string) error {
		return fmt.Errorf("FUSE server: %s: %w", what, flox.ErrBadInput)
	}
	switch {
	case c.Device == nil:
		return bad("Device is missing, want the file of Mount")
	case c.Store == nil && c.Links == nil:
		return bad("Store is missing")
	case c.Store != nil && c.Links != nil:
		return bad("Store and Links, want one of them")
	case c.NodeTable == "" && c.Links == nil:
		return bad("NodeTable is missing, want a file on a tmpfs")
	case c.LookupTimeout < 0 || c.ReadTimeout < 0 || c.MaxInFlight < 0:
		return bad("LookupTimeout, ReadTimeout and MaxInFlight must not be negative")
	}
	if c.LookupTimeout == 0 {
		c.LookupTimeout = 5 * time.Second
	}
	if c.ReadTimeout == 0 {
		c.ReadTimeout = 30 * time.Second
	}
	if c.MaxInFlight == 0 {
		c.MaxInFlight = 1024
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Server serves one mount.
type Server struct {
	cfg      ServerConfig
	log      *slog.Logger
	proto    *fuse.ProtocolServer
	nodes    *nodeTable
	links    *linkNames // nil: it shows a store
	requests *requests
	gaveUp   deadReads
	noAnswer deadNames
	warned   seldom
	drops    chan drop
	counts   counts
	resends  bool     // the kernel does, after a NOTIFY_RESEND
	journal  *journal // nil when resends, and when there could be none
	takeover Takeover

	running atomic.Bool
	stopped chan struct{} // closed when Run ends
	cancel  context.CancelCauseFunc
}

// counts are what Stats shows.
type counts struct {
	requests                                [opCount]atomic.Uint64
	errors, interrupted, readBytes, dropped atomic.Uint64
}

// NewServer prepares to serve and reads the node table. It does not touch the
// mount. Errors: ErrBadInput (configuration, foreign INIT), ErrCorrupt (node table).
func NewServer(cfg ServerConfig) (*Server, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	init, _, err := splitInit(cfg.Init)
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg: cfg, log: cfg.Log, requests: newRequests(),
		drops: make(chan drop, dropQueue), stopped: make(chan struct{}),
	}
	fs := fuse.RawFileSystem(&files{RawFileSystem: fuse.NewDefaultRawFileSystem(), s: s})
	if cfg.Links != nil {
		s.links = newLinkNames(cfg.Links)
		fs = &linkFiles{files: files{RawFileSystem: fuse.NewDefaultRawFileSystem(), s: s}, names: s.links}
	}
	opts := options(cfg.Log)
	opts.PanicHandler = func(v any) fuse.Status {
		s.log.Error("panic while serving", "panic", fmt.Sprint(v))
		return fuse.EIO
	}
	s.proto = fuse.NewProtocolServer(fs, opts)
	if _, err := handleInit(s.proto, init); err != nil {
		return nil, err
	}
	s.nodes = &nodeTable{first: 1}
	if cfg.Links == nil {
		if s.nodes, err = openNodeTable(cfg.NodeTable); err != nil {
			return nil, err
		}
	}
	if s.resends = resends(init); s.resends {
		s.takeover.Resend = true
	} else {
		s.openJournal()
	}
	return s, nil
}

// openJournal opens the journal. Without one new requests are served as well.
func (s *Server) openJournal() {
	t := &s.takeover
	if s.cfg.Journal == "" {
		t.Problem = "there is no journal"
		return
	}
	j, why, err := openJournal(s.cfg.Journal, s.nodes.first, s.cfg.MaxInFlight+1)
	if why != nil {
		s.log.Error("what the last server was asked and did not answer is lost", "error", why)
		t.Problem = why.Error()
	}
	if err != nil {
		s.log.Error("what is asked of this server will not survive it", "error", err)
		t.Problem = err.Error()
		return
	}
	s.journal, t.Journal, t.Resumed = j, true, len(j.left)
}

// Run serves until the file system is unmounted (nil) or ctx is done (its
// error). Requests that were not answered when ctx ended stay with the kernel,
// for the next server of the mount. The process must never touch the mount
// itself. A Server runs once.
func (s *Server) Run(ctx context.Context) error {
	if s.running.Swap(true) {
		return fmt.Errorf("FUSE server: Run was called before, make a new Server: %w", flox.ErrBusy)
	}
	defer close(s.stopped)
	dev, err := openDevice(s.cfg.Device)
	if err != nil {
		return fmt.Errorf("FUSE server: %w", err)
	}
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	s.cancel = cancel
	defer context.AfterFunc(ctx, func() {
		cancel(errStopping)
		_ = dev.file.SetReadDeadline(time.Unix(1, 0)) // wakes the readers
	})()

	if s.resends { // what an earlier server was sent and did not answer
		if err := dev.write(resend()); err != nil && !errors.Is(err, syscall.ENODEV) {
			s.log.Warn("the kernel does not send again what the last server left", "error", err)
		}
	}
	var helpers sync.WaitGroup
	helpers.Go(func() { s.requests.watch(work) })
	helpers.Go(func() { s.notify(work, dev) })
	p := &pool{s: s, dev: dev, ctx: work}
	if s.journal != nil {
		p.resume(s.journal.left)
	}
	p.start()
	if s.cfg.Serving != nil {
		s.cfg.Serving()
	}
	p.wg.Wait()
	s.journal.close()
	cancel(errStopping)
	s.finish(&helpers, dev)

	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if errors.Is(p.err, syscall.ENODEV) {
		return nil
	}
	return fmt.Errorf("FUSE server: read a request: %w", p.err)
}

// finish waits for the helpers and closes the device. A notification can be held
// up in the kernel by a page whose READ was left to the next server; that one
// will free it, but not before this one is out of the way.
func (s *Server) finish(helpers *sync.WaitGroup, dev *device) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		helpers.Wait()
		dev.file.Close()
	}()
	timer := time.NewTimer(time.Second)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		s.log.Warn("a notification is still inside the kernel")
	}
}

// unmounted lets go of everybody who waits for requests nobody wants answered.
func (s *Server) unmounted() { s.cancel(errUnmounted) }

// Stats counts since NewServer.
type Stats struct {
	// Requests counts what the kernel asked, by operation ("LOOKUP", "READ").
	Requests map[string]uint64
	// Total is the sum of Requests without FORGET, BATCH_FORGET and INTERRUPT,
	// which want no answer.
	Total uint64
	// Errors counts answers EIO; Interrupted those to killed processes (EINTR).
	Errors, Interrupted uint64
	// ReadBytes is what READs were answered with.
	ReadBytes uint64
	// InFlight is how many requests are being worked on now.
	InFlight int
	// Dropped counts inodes whose pages DropPages removed.
	Dropped uint64
}

// Stats gives the counters.
func (s *Server) Stats() Stats {
	st := Stats{
		Requests: make(map[string]uint64), InFlight: s.requests.len(),
		Errors: s.counts.errors.Load(), Interrupted: s.counts.interrupted.Load(),
		ReadBytes: s.counts.readBytes.Load(), Dropped: s.counts.dropped.Load(),
	}
	for op := range s.counts.requests {
		n := s.counts.requests[op].Load()
		if n == 0 {
			continue
		}
		st.Requests[opNames[op]] = n
		if op != opForget && op != opBatchForget && op != opInterrupt {
			st.Total += n
		}
	}
	return st
}

// Takeover says what becomes of requests in flight when a server dies.
type Takeover struct {
	// Resend: the kernel sends them again to the next one.
	Resend bool
	// Journal: it cannot, and the next one finds them in the journal.
	Journal bool
	// Resumed is how many this server found there when it began.
	Resumed int
	// Problem says why some of the last server's, or of this one's if Journal is
	// false too, are lost; "" = none.
	Problem string
}

// Takeover says how this server took over, and can be taken over from.
func (s *Server) Takeover() Takeover { return s.takeover }

// Wait is a request somebody waits for.
type Wait struct {
	PID   uint32 // thread id of who asked, 0 = the kernel
	Node  uint64 // inode number; of the directory for a LOOKUP
	Op    string // "LOOKUP", "READ", …
	Name  string // LOOKUP: the name
	Since time.Time
}

// Waiting lists the requests being worked on, oldest first.
func (s *Server) Waiting() []Wait { return s.requests.waiting() }

// Full reports whether as many requests are worked on as may be (MaxInFlight): none
// is read from the kernel before one of them ends, or, if they are all READs, the
// kernel holds further ones back itself (MountConfig.MaxBackground).
func (s *Server) Full() (limit int, full bool) {
	return s.cfg.MaxInFlight, s.requests.isFull(s.cfg.MaxInFlight)
}

// Node gives the inode number of an entry; false if nothing of that manifest
// was looked up in this mount.
func (s *Server) Node(manifest flox.CID, index uint32) (uint64, bool) {
	return s.nodes.node(manifest, index)
}

// Resolve is the inverse of Node; false for the root and for foreign numbers.
func (s *Server) Resolve(node uint64) (manifest flox.CID, index uint32, ok bool) {
	return s.nodes.resolve(node)
}
