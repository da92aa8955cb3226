package warden

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// envName is the variable that tells a child what it was given; the
// descriptors have fixed numbers.
const (
	envName  = "FLOXD_WARDEN"
	deviceFD = 3
	lineFD   = 4
	lifeFD   = 5
	linksFD  = 7 // behind spareFD
)

// inheritance is what the variable says.
type inheritance struct {
	Init             []byte
	MountDir, RunDir string

	Beat   time.Duration `json:",omitempty"` // how often to tell that it lives; an older parent does not want to know
	Before *Ended        `json:",omitempty"`

	LinksInit []byte `json:",omitempty"` // none: there are no links, or the parent is older
	LinksDir  string `json:",omitempty"`
}

const (
	// maxUsed bounds how many inodes an answer may list in all.
	maxUsed = 1 << 20
	// askTimeout is how long the warden may leave a question unread.
	askTimeout = 5 * time.Second
)

// Conn is the child's line to its warden. Its methods may be called at once by
// many and need a running Run. They wait for the warden until ctx is done.
type Conn struct {
	// Device and Init belong to the mount: see fuse.ServerConfig.
	Device *os.File
	Init   []byte
	// Links and LinksInit are the same of the mount of links; nil = there is none.
	Links     *os.File
	LinksInit []byte
	// LinksDir is where that is.
	LinksDir string
	// MountDir and RunDir are the parent's; the child may write in RunDir.
	MountDir, RunDir string
	// StateFormat is the version of what this process writes into its state, told
	// with Serving: a program that says of itself that it knows only less is not
	// put in its place. 0 = 1. It is set before Run.
	StateFormat int

	beat   time.Duration
	before *Ended
	line   *net.UnixConn
	life   *os.File // closed by the end of this process, which the warden sees

	gone    chan struct{} // closed when Run ends
	writing chan struct{} // has room for the one that writes

	mu     sync.Mutex
	lastID uint64
	asked  map[uint64]*pending
}

// pending is a question without an answer.
type pending struct {
	sofar answer
	done  chan struct{}
}

// FromEnv finds the line in the environment of a process that a warden
// started, and takes it out of the environment. ErrNotFound: no warden started it.
func FromEnv() (*Conn, error) {
	value, ok := os.LookupEnv(envName)
	if !ok {
		return nil, fmt.Errorf("no warden started this process (%s is not set); start floxd agent instead: %w", envName, flox.ErrNotFound)
	}
	_ = os.Unsetenv(envName)
	var in inheritance
	if err := json.Unmarshal([]byte(value), &in); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", envName, err, flox.ErrBadInput)
	}
	for fd := deviceFD; fd <= lifeFD; fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("descriptor %d from the warden: %w", fd, err)
		}
	}
	c := &Conn{
		Device: os.NewFile(deviceFD, "/dev/fuse"), Init: in.Init, MountDir: in.MountDir, RunDir: in.RunDir,
		life: os.NewFile(lifeFD, "life"), beat: in.Beat, before: in.Before,
	}
	if len(in.LinksInit) > 0 {
		if _, err := unix.FcntlInt(linksFD, unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("descriptor %d from the warden: %w", linksFD, err)
		}
		c.Links, c.LinksInit, c.LinksDir = os.NewFile(linksFD, "/dev/fuse"), in.LinksInit, in.LinksDir
	}
	line := os.NewFile(lineFD, "warden")
	defer line.Close()
	return c, c.attach(line)
}

// attach makes c talk over a socket, of which it takes a duplicate.
func (c *Conn) attach(line *os.File) error {
	conn, err := net.FileConn(line)
	if err != nil {
		return fmt.Errorf("line to the warden: %w", err)
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return fmt.Errorf("line to the warden is %T: %w", conn, flox.ErrBadInput)
	}
	c.line, c.gone, c.asked = unixConn, make(chan struct{}), make(map[uint64]*pending)
	c.writing = make(chan struct{}, 1)
	return nil
}

// NodeTable is the path of the mount's node table (fuse.ServerConfig).
func (c *Conn) NodeTable() string { return nodeTable(c.RunDir) }

// Journal is the path of the mount's journal (fuse.ServerConfig).
func (c *Conn) Journal() string { return journal(c.RunDir) }

// LinksJournal is Journal for the mount of links.
func (c *Conn) LinksJournal() string { return linksJournal(c.RunDir) }

func linksJournal(runDir string) string { return filepath.Join(runDir, "links-journal") }

func journal(runDir string) string { return filepath.Join(runDir, "journal") }

func nodeTable(runDir string) string { return filepath.Join(runDir, "nodes") }

// Run receives answers until ctx is done (its error) or the warden is gone
// (ErrClosed): the child should then end, since its mount does.
func (c *Conn) Run(ctx context.Context) error {
	defer close(c.gone)
	defer func() { _ = c.line.Close() }()
	defer context.AfterFunc(ctx, func() { _ = c.line.SetReadDeadline(time.Unix(1, 0)) })()
	b := make([]byte, maxMessage)
	for {
		n, err := c.line.Read(b)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil || n == 0 {
			return fmt.Errorf("the warden is gone: %w", flox.ErrClosed)
		}
		var a answer
		if err := json.Unmarshal(b[:n], &a); err != nil {
			return fmt.Errorf("answer of the warden: %w: %w", err, flox.ErrBadInput)
		}
		c.take(a)
	}
}

// take adds a part of an answer to what there is of it.
func (c *Conn) take(a answer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.asked[a.ID]
	if p == nil {
		return // nobody waits for it any more
	}
	a.Open = append(p.sofar.Open, a.Open...)
	a.Mapped = append(p.sofar.Mapped, a.Mapped...)
	a.Runs = append(p.sofar.Runs, a.Runs...)
	a.Roots = append(p.sofar.Roots, a.Roots...)
	a.Unread = append(p.sofar.Unread, a.Unread...)
	p.sofar = a
	if !a.More || len(a.Open)+len(a.Mapped)+len(a.Runs)+len(a.Roots)+len(a.Unread) > maxUsed {
		delete(c.asked, a.ID)
		close(p.done)
	}
}

// ask sends a question and waits for the answer.
func (c *Conn) ask(ctx context.Context, q question) (answer, error) {
	p := &pending{done: make(chan struct{})}
	c.mu.Lock()
	c.lastID++
	q.ID = c.lastID
	c.asked[q.ID] = p
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.asked, q.ID)
	}()
	b, err := json.Marshal(q)
	if err != nil {
		return answer{}, err
	}
	if len(b) > maxMessage {
		return answer{}, fmt.Errorf("question to the warden of %d bytes, at most %d: %w", len(b), maxMessage, flox.ErrBadInput)
	}
	if err := c.write(ctx, b); err != nil {
		return answer{}, err
	}
	select {
	case <-p.done:
		return p.sofar, p.sofar.err()
	case <-c.gone:
		return answer{}, fmt.Errorf("the warden is gone: %w", flox.ErrClosed)
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	}
}

// Exe gives the program a process (or thread) runs, as the kernel writes it.
// ErrNotFound: there is no such process, or it is the kernel's own.
func (c *Conn) Exe(ctx context.Context, pid uint32) (string, error) {
	a, err := c.ask(ctx, question{Ask: askExe, PID: pid})
	return a.Text, err
}

// Pages lists what of the mount's files a process has in its page tables, that
// is, what it used of them by mapping, whether or not it was read for it.
// ErrNotFound: there is no such process. ErrUnread: it does not tell now.
func (c *Conn) Pages(ctx context.Context, pid uint32) ([]PageRun, error) {
	a, err := c.ask(ctx, question{Ask: askPages, PID: pid})
	return unflatten(a.Runs), err
}

// InUse lists the inodes of the mount that any process has open, mapped, runs,
// or stands in. One scan serves everybody who asks within a second.
func (c *Conn) InUse(ctx context.Context) (map[uint64]struct{}, error) {
	a, err := c.ask(ctx, question{Ask: askInUse})
	if err != nil {
		return nil, err
	}
	used := make(map[uint64]struct{}, len(a.Open)+len(a.Mapped))
	for _, list := range [][]uint64{a.Open, a.Mapped} {
		for _, node := range list {
			used[node] = struct{}{}
		}
	}
	return used, nil
}

// MappedNodes lists the inodes of the mount that any process has mapped or runs,
// from the same scan as InUse.
func (c *Conn) MappedNodes(ctx context.Context) ([]uint64, error) {
	a, err := c.ask(ctx, question{Ask: askInUse})
	return a.Mapped, err
}

// Mapped reports whether any process has the inode mapped or executes it, or
// did at most a second ago; so fuse.ServerConfig.ReadTimeout must be more than
// that. When it cannot be found out it says true, unless nobody is left to ask:
// waiting is safer than killing.
//
// thread is who reads it, 0 = not known: for a process that does not tell what it
// has mapped the answer is true.
func (c *Conn) Mapped(ctx context.Context, node uint64, thread uint32) bool {
	a, err := c.ask(ctx, question{Ask: askMapped, Node: node, PID: thread})
	if err != nil {
		return !errors.Is(err, flox.ErrClosed)
	}
	return a.Yes
}

// RootTarget reads the symlink of an indirect root. unread says that it lies in a
// file system that does not answer, and pointed there when it last did; ErrUnread
// that it never did. ErrNotFound: there is no such link, or it does not point
// below the mount.
func (c *Conn) RootTarget(ctx context.Context, link string) (target string, unread bool, err error) {
	a, err := c.ask(ctx, question{Ask: askRoot, Link: link})
	return a.Text, len(a.Unread) > 0, err
}

// Roots lists the garbage collector roots of this machine: links below gcroots,
// profiles, and what processes use or name, in no order. unread are those that
// units lie in file systems that do not answer: roots has what they pointed to
// when they last did while this parent ran. ErrBadInput: the parent is older
// and cannot tell.
func (c *Conn) Roots(ctx context.Context) (roots []Root, unread []string, err error) {
	a, err := c.ask(ctx, question{Ask: askRoots})
	return a.Roots, a.Unread, err
}

// Waiting is how many requests of the mount the kernel waits for, those it has
// not sent yet included.
func (c *Conn) Waiting(ctx context.Context) (int, error) {
	a, err := c.ask(ctx, question{Ask: askWaiting})
	return a.Count, err
}

// Serving tells the warden that requests are being read, Ready that everything
// of this process runs. A child that does not come so far is, after a reload,
// replaced by the one before.
func (c *Conn) Serving(version string) error { return c.tell(tellServing, version) }

// Ready belongs to Serving.
func (c *Conn) Ready(version string) error { return c.tell(tellReady, version) }

func (c *Conn) tell(what, version string) error {
	b, err := json.Marshal(question{Ask: what, Version: version, StateFormat: c.StateFormat})
	if err != nil {
		return err
	}
	return c.write(context.Background(), b)
}

// write sends a message, one after the other, until ctx is done. A warden that
// reads none for askTimeout is as good as unreachable.
func (c *Conn) write(ctx context.Context, b []byte) error {
	ctx, cancel := context.WithTimeoutCause(ctx, askTimeout, fmt.Errorf("the warden takes no questions: %w", flox.ErrUnreachable))
	defer cancel()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	select {
	case c.writing <- struct{}{}:
	case <-c.gone:
		return fmt.Errorf("the warden is gone: %w", flox.ErrClosed)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-c.writing }()
	_ = c.line.SetWriteDeadline(time.Time{})
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		_ = c.line.SetWriteDeadline(time.Unix(1, 0))
	})
	_, err := c.line.Write(b)
	if !stop() {
		<-ended // not to end what the next one writes
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return context.Cause(ctx)
	}
	return fmt.Errorf("the warden is gone: %w", flox.ErrClosed)
}

// SetReadAhead sets the kernel's read-ahead on the mount, 0 to 4096 KiB.
func (c *Conn) SetReadAhead(ctx context.Context, kib int) error {
	_, err := c.ask(ctx, question{Ask: askReadAhead, KiB: kib})
	return err
}
