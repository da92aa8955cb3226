package fuse

import (
	"context"
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/floxctl/flox"
)

var (
	// errKilled ends a request whose caller has SIGKILL pending.
	errKilled = errors.New("the caller was killed")
	// errStopping ends requests when the server stops; they are left unanswered.
	errStopping = errors.New("the server stops")
	// errUnmounted ends requests when nobody waits for an answer any more.
	errUnmounted = errors.New("unmounted")
)

// errno is the one place where errors become what a program sees. It is EIO for
// everything that may be different the next time: ENOENT is believed for ever,
// by programs as by the kernel, so only those who know that a name is missing
// answer it, and not through here. EINTR goes to the dying only.
func errno(err error) fuse.Status {
	switch {
	case err == nil:
		return fuse.OK
	case errors.Is(err, errKilled):
		return fuse.EINTR
	case errors.Is(err, flox.ErrDenied):
		return fuse.EACCES
	case errors.Is(err, flox.ErrBadInput):
		return fuse.EINVAL
	}
	return fuse.EIO
}

// transient reports whether waiting may help.
func transient(err error) bool {
	return errors.Is(err, flox.ErrUnreachable) || errors.Is(err, context.DeadlineExceeded)
}
