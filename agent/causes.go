package agent

import (
	"slices"
	"strings"

	flox "github.com/floxctl/flox"
)

// causes are several reasons for one failure, in one line for people. A bare
// sentinel among them is there for errors.Is and is not printed when another
// reason says more.
type causes []error

// because joins reasons; nil ones are left out.
func because(reasons ...error) error {
	c := causes(slices.DeleteFunc(reasons, func(err error) bool { return err == nil }))
	switch len(c) {
	case 0:
		return nil
	case 1:
		return c[0]
	}
	return c
}

// Error implements error.
func (c causes) Error() string {
	var said []string
	for _, err := range c {
		if err != flox.ErrUnreachable && !slices.Contains(said, err.Error()) { //nolint:errorlint // the bare sentinel itself
			said = append(said, err.Error())
		}
	}
	if len(said) == 0 {
		return flox.ErrUnreachable.Error()
	}
	return strings.Join(said, "; ")
}

// Unwrap lets errors.Is and errors.As see every reason.
func (c causes) Unwrap() []error { return c }

// unreachable is a failure to get something from others: in their words, but
// ErrUnreachable whatever they said. Above all it is never ErrNotFound: a block
// nobody has, or a call nobody answers, does not mean that a name does not
// exist, and the kernel would believe that for ever.
type unreachable struct{ reason error }

// Error implements error.
func (u *unreachable) Error() string {
	if u.reason == nil {
		return flox.ErrUnreachable.Error()
	}
	return u.reason.Error()
}

// Unwrap shows the one sentinel that callers may act on.
func (u *unreachable) Unwrap() error { return flox.ErrUnreachable }

// oneLine is an error's text in one line: libraries write lists of what they tried.
func oneLine(err error) string {
	if err == nil {
		return "no reason known yet"
	}
	return strings.Join(strings.Fields(err.Error()), " ")
}
