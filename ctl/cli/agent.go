package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"

	"connectrpc.com/connect"

	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
)

// Agent gives a client of the agent that listens at a unix socket. Nothing is
// dialled before the first call; a call that cannot dial fails with a
// *DialError. Done frees idle connections.
func Agent(socket string) (client floxv1connect.AgentClient, done func()) {
	transport := unixTransport(socket)
	client = floxv1connect.NewAgentClient(&http.Client{Transport: transport}, anyHost, uncompressed())
	return client, transport.CloseIdleConnections
}

// Admin gives a client of the storehouse, by way of the first of these unix
// sockets that can be opened. It is otherwise like Agent.
func Admin(sockets ...string) (client floxv1connect.AdminClient, done func()) {
	transport := unixTransport(sockets...)
	client = floxv1connect.NewAdminClient(&http.Client{Transport: transport}, anyHost, uncompressed())
	return client, transport.CloseIdleConnections
}

// anyHost is never looked up.
const anyHost = "http://agent"

// uncompressed: compressing what a socket of this machine carries would only
// cost time.
func uncompressed() connect.ClientOption { return connect.WithAcceptCompression("gzip", nil, nil) }

// unixTransport opens the first socket that can be opened. Of several that
// cannot, the error is of the first that the user may not open, else of the last.
func unixTransport(sockets ...string) *http.Transport {
	return &http.Transport{
		DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var failed *DialError
			for _, socket := range sockets {
				var d net.Dialer
				conn, err := d.DialContext(ctx, "unix", socket)
				if err == nil {
					return conn, nil
				}
				if failed == nil || !errors.Is(failed, fs.ErrPermission) {
					failed = &DialError{Socket: socket, Err: err}
				}
			}
			return nil, failed
		},
	}
}

// DialError says that a control socket could not be opened.
type DialError struct {
	Socket string
	Err    error
}

// Error names the socket and the operating system's reason.
func (e *DialError) Error() string { return fmt.Sprintf("open %s: %v", e.Socket, e.Err) }

// Unwrap gives the operating system's error.
func (e *DialError) Unwrap() error { return e.Err }
