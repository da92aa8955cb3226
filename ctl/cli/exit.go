package cli

import (
	"context"
	"errors"
	"fmt"

	flox "github.com/floxctl/flox"
)

// Exit codes of floxctl and floxd. They are part of the interface: scripts
// depend on them.
const (
	CodeOK          = 0
	CodeFailed      = 1
	CodeUsage       = 2
	CodeNotFound    = 3
	CodeUnreachable = 4
	CodeDenied      = 5
	CodeCorrupt     = 6
	CodeFull        = 7
	CodeBusy        = 8
	CodeInterrupted = 130 // what a shell gives a program ended by Ctrl-C
)

// ExitCodes is the table for --help.
const ExitCodes = `Exit codes:
  0    success
  1    failed for a reason not listed here, or a check found an error
  2    bad input: flags, arguments, configuration, malformed names
  3    not found
  4    unreachable: no agent, or nobody who answers within the deadline
  5    denied or untrusted: no permission, a bad token, signature or key
  6    corrupt: bytes are not what their name says
  7    full: no room on a disk or in a budget
  8    busy: a lock, directory, mount point or port is in use
  130  interrupted`

// ErrInterrupted says that the user ended the command.
var ErrInterrupted = errors.New("interrupted")

// errSaid marks an error whose explanation is on the screen already.
var errSaid = errors.New("already said")

// Said wraps err so that it sets the exit code and prints nothing: for
// commands whose output is itself the explanation.
func Said(err error) error { return fmt.Errorf("%w: %w", errSaid, err) }

// exits pairs errors with codes; the first that fits decides.
var exits = []struct {
	err  error
	code int
}{
	{ErrInterrupted, CodeInterrupted},
	{flox.ErrBadInput, CodeUsage},
	{flox.ErrUntrusted, CodeDenied},
	{flox.ErrDenied, CodeDenied},
	{flox.ErrNotFound, CodeNotFound},
	{flox.ErrCorrupt, CodeCorrupt},
	{flox.ErrFull, CodeFull},
	{flox.ErrBusy, CodeBusy},
	{flox.ErrUnreachable, CodeUnreachable},
	{flox.ErrClosed, CodeUnreachable},
	{context.DeadlineExceeded, CodeUnreachable},
	{context.Canceled, CodeInterrupted},
}

// ExitCode translates an error into the exit code of the process; nil is CodeOK.
func ExitCode(err error) int {
	if err == nil {
		return CodeOK
	}
	var exited *exitedError
	if errors.As(err, &exited) && exited.code > 0 {
		return exited.code
	}
	for _, e := range exits {
		if errors.Is(err, e.err) {
			return e.code
		}
	}
	return CodeFailed
}

// Exited makes an error with the exit code of a process that has explained
// itself already; message adds who it was.
func Exited(code int, message string) error { return &exitedError{code, message} }

// exitedError carries the exit code of another process.
type exitedError struct {
	code    int
	message string
}

func (e *exitedError) Error() string { return e.message }
