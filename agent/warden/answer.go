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
	// askedAtOnce bounds the questions of one child being answered.
	askedAtOnce = 8
	// writeTimeout is how long a child may leave answers unread.
	writeTimeout = 5 * time.Second
)

// clerk answers the questions of children.
type clerk struct {
	mountDir string
	bdi      string
	scans    *scanner
	log      *slog.Logger
}

// serve answers until the child is gone. What it tells of itself goes to heard.
func (k *clerk) serve(ctx context.Context, line *net.UnixConn, heard func(question)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var handlers sync.WaitGroup
	defer handlers.Wait()
	defer func() { _ = line.Close() }()
	defer context.AfterFunc(ctx, func() { _ = line.SetReadDeadline(time.Unix(1, 0)) })()
	room := make(chan struct{}, askedAtOnce)
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
		if q.Ask == tellServing || q.Ask == tellReady {
			heard(q)
			continue
		}
		select {
		case room <- struct{}{}:
		case <-ctx.Done():
			return
		}
		handlers.Go(func() {
			defer func() { <-room }()
			k.answer(ctx, line, q)
		})
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
		a.Text, err = rootTarget(q.Link, k.mountDir)
	case askReadAhead:
		err = setReadAhead(k.bdi, q.KiB)
	case askWaiting:
		a.Count, err = waiting(k.bdi)
	case askMapped:
		var u usage
		if u, err = k.scans.get(ctx); err == nil {
			_, a.Yes = u.mapped[q.Node]
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
// only of links into the store: what else root can read is nobody's business.
func rootTarget(link, mountDir string) (string, error) {
	missing := fmt.Errorf("root %s: no link into %s: %w", link, mountDir, flox.ErrNotFound)
	if link == mountDir || strings.HasPrefix(link, mountDir+"/") {
		return "", missing // would be asked of whom it is asked for
	}
	target, err := os.Readlink(link)
	if err != nil || len(target) >= maxLink || filepath.Clean(target) != target || !strings.HasPrefix(target, mountDir+"/") {
		return "", missing
	}
	return target, nil
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
