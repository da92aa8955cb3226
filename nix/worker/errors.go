package worker

import (
	"errors"
	"fmt"

	"github.com/floxctl/flox"
)

// Error is an error whose text is meant for a client as it is: Nix's wording,
// where people and scripts look for it. Cause is what errors.Is finds.
type Error struct {
	Message string
	Cause   error // a sentinel of package flox, or nil
}

func (e *Error) Error() string { return e.Message }

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Cause }

func errorf(cause error, format string, args ...any) *Error {
	return &Error{Message: fmt.Sprintf(format, args...), Cause: cause}
}

// NotValid is Nix's error about a path that is not valid; ErrNotFound.
func NotValid(dir flox.StoreDir, p flox.StorePath) error {
	return errorf(flox.ErrNotFound, "path '%s' is not valid", dir.Join(p))
}

// CannotMake is Nix's error of EnsurePath and BuildPaths about a path that
// nobody has; ErrNotFound.
func CannotMake(dir flox.StoreDir, p flox.StorePath) error {
	return errorf(flox.ErrNotFound, "path '%s' does not exist and cannot be created", dir.Join(p))
}

// text is what a client reads of err.
func text(err error) string {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Message
	}
	return err.Error()
}

// shorten keeps a stranger's text from filling a message.
func shorten(s string) string {
	const most = 160
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
