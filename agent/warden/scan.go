package warden

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// scanEvery is how long the result of a scan is good for.
const scanEvery = time.Second

// usage is which inodes of the mount are in use.
type usage struct {
	open   map[uint64]struct{} // open, or somebody's current or root directory
	mapped map[uint64]struct{} // mapped or executed
	// unread are the processes that do not tell what they have mapped now; mapped
	// has what they had when they did.
	unread []uint32
}

// scanner finds out which inodes of one file system processes use. It never
// asks the file system itself, whose server may be the one who wants to know.
type scanner struct {
	major, minor uint32
	proc         string
	log          *slog.Logger // nil = nobody wants to know

	memory reads               // what processes have mapped
	seen   map[string][]uint64 // what that was in the last scan, by process

	mu      sync.Mutex
	running chan struct{} // closed when the scan under way ends; nil = none is
	last    usage
	err     error
	at      time.Time // when the last scan began
}

// newScanner makes a scanner for a device number "major:minor".
func newScanner(device string) (*scanner, error) {
	s := &scanner{proc: "/proc", memory: reads{share: maxStuckProcesses}}
	if _, err := fmt.Sscanf(device, "%d:%d", &s.major, &s.minor); err != nil {
		return nil, fmt.Errorf("device number %q: %w: %w", device, err, flox.ErrBadInput)
	}
	return s, nil
}

// get gives the result of a scan that began at most scanEvery ago. Only one
// runs at a time.
func (s *scanner) get(ctx context.Context) (usage, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if s.running == nil {
			if !s.at.IsZero() && time.Since(s.at) < scanEvery {
				return s.last, s.err
			}
			s.start()
		}
		done := s.running
		s.mu.Unlock()
		select {
		case <-done:
			s.mu.Lock()
		case <-ctx.Done():
			s.mu.Lock()
			return usage{}, context.Cause(ctx)
		}
	}
}

// start begins a scan; s.mu is held. A scan ends by itself: what may wait is
// left behind.
func (s *scanner) start() {
	done, began := make(chan struct{}), time.Now()
	s.running = done
	go func() {
		found, err := s.scan()
		s.tell(found.unread)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.last, s.err, s.at, s.running = found, err, began, nil
		close(done)
	}()
}

// tell logs which processes did not answer that did in the scan before.
func (s *scanner) tell(unread []uint32) {
	s.mu.Lock()
	before := s.last.unread
	s.mu.Unlock()
	for _, pid := range unread {
		if s.log != nil && !slices.Contains(before, pid) {
			program, _ := exe(pid)
			s.log.Warn("a process does not tell what it has mapped, as it waits for bytes; what it had mapped counts on", "pid", pid, "program", program)
		}
	}
}

// scan looks at every process. One that ends meanwhile is no error.
func (s *scanner) scan() (usage, error) {
	u := usage{open: make(map[uint64]struct{}), mapped: make(map[uint64]struct{})}
	l := look{scanner: s, usage: &u, seen: make(map[string][]uint64)}
	defer func() { s.seen = l.seen }()
	dir, err := os.Open(s.proc)
	if err != nil {
		return u, err
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(256)
		for _, name := range names {
			pid, err := strconv.ParseUint(name, 10, 32)
			if err != nil {
				continue
			}
			l.process(filepath.Join(s.proc, name), uint32(pid))
			if len(u.open)+len(u.mapped) > maxUsed {
				return u, fmt.Errorf("more than %d inodes in use: %w", maxUsed, flox.ErrFull)
			}
		}
		if errors.Is(err, io.EOF) {
			return u, nil
		}
		if err != nil {
			return u, err
		}
	}
}

// look is one scan.
type look struct {
	*scanner
	*usage
	seen   map[string][]uint64
	listed int // in seen
	round  round
}

func (l *look) process(dir string, pid uint32) {
	u, s := l.usage, l.scanner
	s.add(dir+"/exe", u.mapped)
	s.add(dir+"/cwd", u.open)
	s.add(dir+"/root", u.open)
	if fds, err := os.Open(dir + "/fd"); err == nil {
		defer fds.Close()
		for {
			names, err := fds.Readdirnames(256)
			for _, name := range names {
				s.add(dir+"/fd/"+name, u.open)
			}
			if err != nil {
				break
			}
		}
	}
	nodes, ok := inRound(&l.round, &s.memory, dir, processOwner(dir), func() []uint64 {
		file, err := os.Open(dir + "/maps")
		if err != nil {
			return nil
		}
		defer file.Close()
		mapped := make(map[uint64]struct{})
		s.maps(file, mapped)
		return slices.Collect(maps.Keys(mapped))
	})
	if !ok {
		nodes = s.seen[dir]
		u.unread = append(u.unread, pid)
	}
	for _, node := range nodes {
		u.mapped[node] = struct{}{}
	}
	if l.listed += len(nodes); len(nodes) > 0 && l.listed <= maxUsed {
		l.seen[dir] = nodes
	}
}

// uses reports whether an inode is mapped, or may be by a process that does not
// tell and that a thread belongs to; 0 is a thread of nobody knows whom. Each
// process reads what it faults on itself, so that others need not wait with it.
func (s *scanner) uses(u usage, node uint64, thread uint32) bool {
	if _, ok := u.mapped[node]; ok {
		return true
	}
	return slices.ContainsFunc(u.unread, func(pid uint32) bool {
		_, err := os.Lstat(fmt.Sprintf("%s/%d/task/%d", s.proc, pid, thread))
		return thread == 0 || err == nil
	})
}

// add adds the inode behind a link of /proc if it is on the file system. Such a
// link leads to the inode itself, and with AT_STATX_DONT_SYNC nobody is asked
// what the kernel knows already, so that this cannot wait.
func (s *scanner) add(link string, to map[uint64]struct{}) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, link, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, unix.STATX_INO, &st)
	if err == nil && st.Dev_major == s.major && st.Dev_minor == s.minor {
		to[st.Ino] = struct{}{}
	}
}

// maps adds the inodes of a /proc/PID/maps that are on the file system.
func (s *scanner) maps(r io.Reader, to map[uint64]struct{}) {
	device := fmt.Appendf(nil, "%02x:%02x", s.major, s.minor)
	lines := bufio.NewReader(r)
	whole := true // the last piece ended a line
	for {
		line, err := lines.ReadSlice('\n')
		if whole {
			if node, ok := mapped(line, device); ok {
				to[node] = struct{}{}
			}
		}
		whole = err == nil
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

// mapped gives the inode of a line of /proc/PID/maps if its device is the one:
//
//	7f2a4c000000-7f2a4c021000 r--p 00000000 00:2f 4294967299   /nix/store/…
func mapped(line, device []byte) (uint64, bool) {
	fields := bytes.Fields(line)
	if len(fields) < 5 || !bytes.Equal(fields[3], device) {
		return 0, false
	}
	node, err := strconv.ParseUint(string(fields[4]), 10, 64)
	return node, err == nil
}
