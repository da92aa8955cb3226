package cli

import (
	"context"
	"fmt"
	"net"
	"net/http"

	"connectrpc.com/connect"

	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
)

// Agent gives a client of the agent that listens at a unix socket. Nothing is
// dialled before the first call; a call that cannot dial fails with a
// *DialError. Done frees idle connections.
func Agent(socket string) (client floxv1connect.AgentClient, done func()) {
	transport := &http.Transport{
		DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, "unix", socket)
			if err != nil {
				return nil, &DialError{Socket: socket, Err: err}
			}
			return conn, nil
		},
	}
	// The host of the URL is never looked up. Compressing what a socket of this
	// machine carries would only cost time.
	client = floxv1connect.NewAgentClient(&http.Client{Transport: transport}, "http://agent",
		connect.WithAcceptCompression("gzip", nil, nil))
	return client, transport.CloseIdleConnections
}

// DialError says that the agent's control socket could not be opened.
type DialError struct {
	Socket string
	Err    error
}

// Error names the socket and the operating system's reason.
func (e *DialError) Error() string { return fmt.Sprintf("open %s: %v", e.Socket, e.Err) }

// Unwrap gives the operating system's error.
func (e *DialError) Unwrap() error { return e.Err }
