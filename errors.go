package flox

import "errors"

// Sentinel errors. They are wrapped with what was being done to what; each
// edge (fuse: errno, api: HTTP and Connect codes, ctl: exit codes) has one
// place that translates them.
var (
	// ErrBadInput: what was given is malformed or not allowed; trying again does not help.
	ErrBadInput = errors.New("bad input")
	// ErrNotFound: nobody who could know has it. Final for now.
	ErrNotFound = errors.New("not found")
	// ErrUnreachable: nobody could be asked, or nobody answered by the deadline.
	ErrUnreachable = errors.New("unreachable")
	// ErrUntrusted: a signature or a trust rule does not hold.
	ErrUntrusted = errors.New("untrusted")
	// ErrCorrupt: bytes do not match what names them.
	ErrCorrupt = errors.New("corrupt")
	// ErrFull: no room on a disk, or a budget is used up.
	ErrFull = errors.New("full")
	// ErrBusy: somebody else holds what is wanted (a lock, a directory, a port).
	ErrBusy = errors.New("busy")
	// ErrDenied: the caller may not do this.
	ErrDenied = errors.New("denied")
	// ErrClosed: the object was shut down.
	ErrClosed = errors.New("closed")
)
