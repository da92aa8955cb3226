package api

import (
	"context"
	"errors"
	"net/http"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
)

// codes pairs each sentinel with what it is called on the wire: a Connect code
// and an HTTP status. The order matters where an error wraps two of them.
var codes = []struct {
	err  error
	code connect.Code
	http int
}{
	{flox.ErrBadInput, connect.CodeInvalidArgument, http.StatusBadRequest},
	{flox.ErrUntrusted, connect.CodeUnauthenticated, http.StatusUnauthorized},
	{flox.ErrDenied, connect.CodePermissionDenied, http.StatusForbidden},
	{flox.ErrNotFound, connect.CodeNotFound, http.StatusNotFound},
	{flox.ErrCorrupt, connect.CodeDataLoss, http.StatusUnprocessableEntity},
	{flox.ErrFull, connect.CodeResourceExhausted, http.StatusInsufficientStorage},
	{flox.ErrBusy, connect.CodeAborted, http.StatusConflict},
	{flox.ErrUnreachable, connect.CodeUnavailable, http.StatusServiceUnavailable},
	{flox.ErrClosed, connect.CodeUnavailable, http.StatusServiceUnavailable},
	{context.Canceled, connect.CodeCanceled, 499},
	{context.DeadlineExceeded, connect.CodeDeadlineExceeded, http.StatusGatewayTimeout},
}

// ToConnect gives err the Connect code of the sentinel it wraps; nil stays nil.
func ToConnect(err error) error {
	if err == nil {
		return nil
	}
	var already *connect.Error
	if errors.As(err, &already) {
		return err
	}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return connect.NewError(c.code, err)
		}
	}
	return connect.NewError(connect.CodeInternal, err)
}

// FromConnect turns an error of a call back into one that wraps a sentinel. The
// message is kept.
func FromConnect(err error) error {
	var remote *connect.Error
	if err == nil || !errors.As(err, &remote) {
		return err
	}
	for _, c := range codes {
		if remote.Code() == c.code {
			return &remoteError{message: remote.Message(), kind: c.err}
		}
	}
	return err
}

// HTTPStatus gives the status code for err; 500 for what has none of its own.
func HTTPStatus(err error) int {
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return c.http
		}
	}
	return http.StatusInternalServerError
}

// remoteError is an error another process reported, in its own words.
type remoteError struct {
	message string
	kind    error
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.kind }
