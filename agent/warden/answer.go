package warden

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

const (
	// askedAtOnce bounds the questions of one child being answered, slowAtOnce
	// beside them those for which other file systems may be waited for.
	askedAtOnce, slowAtOnce = 8, 64
	// writeTimeout is how long a child may leave answers unread.
	writeTimeout = 5 * time.Second
)

// clerk answers the questions of children.
type clerk struct {
	mountDir string
	bdi      string
	scans    *scanner
	roots    *rootFinder
	log      *slog.Logger

	mu      sync.Mutex
	targets map[string]string // of indirect roots, as they were when they could be read
}

// serve answers until the child is gone. All it says goes to heard.
func (k *clerk) serve(ctx context.Context, line *net.UnixConn, heard func(question)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var handlers sync.WaitGroup
	defer handlers.Wait()
	defer func() { _ = line.Close() }()
	defer context.AfterFunc(ctx, func() { _ = line.SetReadDeadline(time.Unix(1, 0)) })()
	quick, slow := make(chan struct{}, askedAtOnce), make(chan struct{}, slowAtOnce)
	b := make([]byte, maxMessage)
	for {
		n, err := line.Read(b)
		if err != nil || n == 0 {
			cancel()
			return
		}
		q, err := parseQuestion(b[:n])
		if err != nil {
			k.log.Warn("refused a question", "error", err)
			k.send(line, refusal(q.ID, err))
			continue
		}
		heard(q)
		if q.Ask == tellServing || q.Ask == tellReady || q.Ask == tellBeat {
			continue
		}
		room := quick
		if slices.Contains([]string{askRoots, askRoot, askProfile, askNixProfile, askMoveNix}, q.Ask) {
			if room = slow; len(room) == cap(room) {
				k.send(line, refusal(q.ID, fmt.Errorf("%d questions for roots wait already: %w", slowAtOnce, flox.ErrBusy)))
				continue
			}
		}
		if !enter(ctx, room, func() { heard(q) }) { // it speaks, only we do not listen
			return
		}
		handlers.Go(func() {
			defer func() { <-room }()
			k.answer(ctx, line, q)
		})
	}
}

// enter waits for a place in room, calling meanwhile every second; false: ctx is
// done.
func enter(ctx context.Context, room chan struct{}, meanwhile func()) bool {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case room <- struct{}{}:
			return true
		case <-tick.C:
			meanwhile()
		case <-ctx.Done():
			return false
		}
	}
}

func (k *clerk) send(line *net.UnixConn, a answer) {
	b, err := json.Marshal(a)
	if err != nil {
		k.log.Error("encode an answer", "error", err)
		return
	}
	_ = line.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := line.Write(b); err != nil && !errors.Is(err, net.ErrClosed) {
		k.log.Debug("answer a question", "error", err)
	}
}

func (k *clerk) answer(ctx context.Context, line *net.UnixConn, q question) {
	a := answer{ID: q.ID}
	var err error
	switch q.Ask {
	case askExe:
		a.Text, err = exe(q.PID)
	case askRoot:
		a.Text, a.Unread, err = k.rootTarget(q.Link)
	case askProfile:
		a.Text, err = k.profiles().Read(q.Link)
	case askNixProfile, askMoveNix:
		a.Nix, err = k.nixProfile(q)
	case askRoots:
		if err = k.sendRoots(func(a answer) { k.send(line, a) }, q.ID); err == nil {
			return
		}
	case askReadAhead:
		err = setReadAhead(k.bdi, q.KiB)
	case askWaiting:
		a.Count, err = waiting(k.bdi)
	case askMapped:
		var u usage
		if u, err = k.scans.get(ctx); err == nil {
			a.Yes = k.scans.uses(u, q.Node, q.PID)
		}
	case askPages:
		var runs []PageRun
		if runs, err = k.scans.pages(q.PID); err == nil {
			for part := range slices.Chunk(runs, maxRunsPart) {
				k.send(line, answer{ID: q.ID, Runs: flatten(part), More: true})
			}
		}
	case askInUse:
		var u usage
		if u, err = k.scans.get(ctx); err == nil {
			k.sendUsage(line, q.ID, u)
			return
		}
	}
	if err != nil {
		a = refusal(q.ID, err)
	}
	k.send(line, a)
}

func (k *clerk) profiles() *Profiles {
	return &Profiles{storeDir: k.roots.storeDir, mountDir: k.mountDir, reads: &k.roots.reads}
}

func (k *clerk) nixProfile(q question) (*NixProfile, error) {
	if q.Ask == askMoveNix {
		is, err := k.profiles().MoveNixProfile(q.Link, *q.Move)
		return &is, err
	}
	is, err := k.profiles().NixProfile(q.Link)
	return &is, err
}

// sendUsage answers in as many parts as it takes.
func (k *clerk) sendUsage(line *net.UnixConn, id uint64, u usage) {
	open := slices.Collect(maps.Keys(u.open))
	used := slices.Collect(maps.Keys(u.mapped))
	for part := range slices.Chunk(open, maxNodes) {
		k.send(line, answer{ID: id, Open: part, More: true})
	}
	for part := range slices.Chunk(used, maxNodes) {
		k.send(line, answer{ID: id, Mapped: part, More: true})
	}
	k.send(line, answer{ID: id})
}

func exe(pid uint32) (string, error) {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if errors.Is(err, iofs.ErrNotExist) {
		return "", fmt.Errorf("process %d: %w", pid, flox.ErrNotFound)
	}
	return path, err
}

// rootTarget reads a link somebody made a garbage collector root of. It tells
// only of links into the store: what else root can read is nobody's business. One
// in a file system that does not answer cannot be read, and points where it did.
func (k *clerk) rootTarget(link string) (target string, unread []string, err error) {
	missing := fmt.Errorf("root %s: no link into %s: %w", link, k.mountDir, flox.ErrNotFound)
	if link == k.mountDir || strings.HasPrefix(link, k.mountDir+"/") {
		return "", nil, missing // would be asked of whom it is asked for
	}
	read, ok := patiently(&k.roots.reads, link, rootOwner(link, link), func() linkRead { return readLink(link) })
	ok = ok && !read.failed
	target = read.target
	if len(target) >= maxLink || filepath.Clean(target) != target || !strings.HasPrefix(target, k.mountDir+"/") {
		target = ""
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	known := k.targets[link]
	switch {
	case !ok && known == "":
		return "", nil, fmt.Errorf("root %s: its file system does not answer, or refuses: %w", link, ErrUnread)
	case !ok:
		return known, []string{link}, nil
	case target == "":
		delete(k.targets, link)
		return "", nil, missing
	}
	if k.targets == nil {
		k.targets = make(map[string]string)
	}
	if _, had := k.targets[link]; had || len(k.targets) < maxRoots {
		k.targets[link] = target
	}
	return target, nil, nil
}

// waiting reads how many requests of a mount are not answered (Linux
// Documentation/filesystems/fuse: the directory is named after the device). The
// kernel's control file system need not be mounted anywhere for that.
func waiting(bdi string) (int, error) {
	_, minor, _ := strings.Cut(bdi, ":")
	b, err := os.ReadFile(filepath.Join("/sys/fs/fuse/connections", minor, "waiting"))
	if err != nil {
		if b, err = readControl(minor + "/waiting"); err != nil {
			return 0, fmt.Errorf("the kernel's list of FUSE connections: %w", err)
		}
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// readControl reads a file of a fusectl that is mounted for nobody else.
func readControl(name string) ([]byte, error) {
	fs, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, os.NewSyscallError("fsconfig", err)
	}
	top, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fsmount", err)
	}
	defer unix.Close(top)
	fd, err := unix.Openat(top, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("open", err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 64))
}

// setReadAhead sets how much the kernel reads at once on a device.
func setReadAhead(bdi string, kib int) error {
	path := filepath.Join("/sys/class/bdi", bdi, "read_ahead_kb")
	if err := os.WriteFile(path, []byte(strconv.Itoa(kib)), 0); err != nil {
		return fmt.Errorf("set the read-ahead to %d KiB: %w", kib, err)
	}
	return nil
}
