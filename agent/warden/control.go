package warden

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

const (
	// ordersAtOnce bounds the connections of root's commands.
	ordersAtOnce = 8
	// orderTimeout is how long one may take to say what it wants.
	orderTimeout = 5 * time.Second
	// maxOrder is in bytes.
	maxOrder = 8 << 10
)

// order is what a command of root's asks of the warden, a JSON object; outcome
// is the answer to it. A connection carries one of each.
type order struct {
	Do      string // "reload"
	Program string `json:",omitempty"`
}

type outcome struct {
	Error string `json:",omitempty"` // a key of errorKinds
	Why   string `json:",omitempty"`
	Reloaded
}

// listenControl makes the socket for root's commands. Who is not root does not
// get past its mode, nor past admitted.
func listenControl(path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode()&iofs.ModeSocket != 0 {
		_ = os.Remove(path) // of a warden that was killed: this one has the lock
	}
	var l net.Listener
	err := through(path, func(name string) (err error) {
		old := unix.Umask(0o177)
		defer unix.Umask(old)
		l, err = net.Listen("unix", name) //nolint:noctx // does not wait
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // by the name it was made with, which is gone
	}
	return l, nil
}

// through calls do with a name of path that is short enough for a socket.
func through(path string, do func(name string) error) error {
	const most = 100 // sun_path has 108
	if len(path) <= most {
		return do(path)
	}
	dir, err := os.OpenFile(filepath.Dir(path), os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	return do(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)))
}

// obey takes orders until ctx is done.
func (w *warden) obey(ctx context.Context, l net.Listener) {
	defer os.Remove(w.cfg.Control)
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	var orders sync.WaitGroup
	defer orders.Wait()
	room := make(chan struct{}, ordersAtOnce)
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		select {
		case room <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		orders.Go(func() {
			defer func() { _ = conn.Close(); <-room }()
			stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
			defer stop()
			w.obeyOne(ctx, conn)
		})
	}
}

func (w *warden) obeyOne(ctx context.Context, conn net.Conn) {
	var out outcome
	err := admitted(conn)
	if err == nil {
		_ = conn.SetReadDeadline(time.Now().Add(orderTimeout))
		var o order
		err = json.NewDecoder(io.LimitReader(conn, maxOrder)).Decode(&o)
		switch {
		case err != nil:
			err = fmt.Errorf("order: %w: %w", err, flox.ErrBadInput)
		case o.Do != "reload":
			err = fmt.Errorf("order %q is none of those there are: %w", printable(o.Do), flox.ErrBadInput)
		case o.Program != "" && (!filepath.IsAbs(o.Program) || strings.ContainsRune(o.Program, 0)):
			err = fmt.Errorf("program %q: want an absolute path: %w", o.Program, flox.ErrBadInput)
		default:
			out.Reloaded, err = w.reload(ctx, o.Program)
		}
	}
	if err != nil {
		a := refusal(0, err)
		out.Error, out.Why = a.Error, a.Why
	}
	_ = conn.SetWriteDeadline(time.Now().Add(orderTimeout))
	if err := json.NewEncoder(conn).Encode(out); err != nil {
		w.log.Debug("answer an order", "error", err)
	}
}

// admitted makes sure that the other end is root.
func admitted(conn net.Conn) error {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("a connection of type %T: %w", conn, flox.ErrBadInput)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return err
	}
	var who *unix.Ucred
	ctlErr := raw.Control(func(fd uintptr) {
		who, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(ctlErr, err); err != nil {
		return err
	}
	if who.Uid != 0 {
		return fmt.Errorf("the other end is user %d, and must be root: %w", who.Uid, flox.ErrDenied)
	}
	return nil
}

// Reload tells the warden behind a Control socket to put another program in the
// place of its child: the file of an absolute name, "" = the one the warden was
// started from, as it is now. It returns when that serves, or an error when the
// old one serves on. ErrUnreachable: no warden is there. ErrNotFound: no such file. ErrBusy: another reload is
// under way. ErrDenied: not root. ErrBadInput: it is no program that can serve.
func Reload(ctx context.Context, control, program string) (Reloaded, error) {
	var conn net.Conn
	err := through(control, func(name string) (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, "unix", name)
		return err
	})
	switch {
	case errors.Is(err, iofs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return Reloaded{}, fmt.Errorf("nobody listens at %s: %w", control, flox.ErrUnreachable)
	case errors.Is(err, iofs.ErrPermission):
		return Reloaded{}, fmt.Errorf("%s is root's: %w", control, flox.ErrDenied)
	case err != nil:
		return Reloaded{}, fmt.Errorf("control socket: %w", err)
	}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if err := admitted(conn); err != nil {
		return Reloaded{}, err
	}
	if err := json.NewEncoder(conn).Encode(order{Do: "reload", Program: program}); err != nil {
		return Reloaded{}, fmt.Errorf("control socket: %w", err)
	}
	var out outcome
	if err := json.NewDecoder(io.LimitReader(conn, maxMessage)).Decode(&out); err != nil {
		if ctx.Err() != nil {
			return Reloaded{}, context.Cause(ctx)
		}
		return Reloaded{}, fmt.Errorf("the agent ended before it answered: %w", flox.ErrClosed)
	}
	return out.Reloaded, answer{Error: out.Error, Why: out.Why}.err()
}
