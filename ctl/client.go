package ctl

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/ctl/cli"
)

// socketPath is where the agent is asked: the flag, the environment, the default.
func (g *globals) socketPath() string {
	if g.socket != "" {
		return g.socket
	}
	if s := os.Getenv(cli.EnvSocket); s != "" {
		return s
	}
	return cli.DefaultSocket
}

// agent gives a client of the agent. Nothing is dialled before the first call;
// errors of calls go through explain.
func (g *globals) agent() floxv1connect.AgentClient {
	client, _ := cli.Agent(g.socketPath()) // its connections end with the command
	return client
}

// explain turns the error of a call into one a person can act on, wrapping the
// sentinel that sets the exit code.
func explain(err error) error {
	if err == nil {
		return nil
	}
	var dial *cli.DialError
	if errors.As(err, &dial) && !errors.Is(err, context.Canceled) {
		return explainDial(dial)
	}
	var call *connect.Error
	if !errors.As(err, &call) {
		return err
	}
	if call.Code() == connect.CodeUnavailable && !connect.IsWireError(err) {
		return cli.Explain(flox.ErrUnreachable, "the agent stopped answering (%s); see whether it is being restarted with: floxctl status", call.Message())
	}
	if call.Code() == connect.CodeUnimplemented {
		return cli.Explain(flox.ErrBadInput, "the agent does not know this request: it is another version than this floxctl (%s); compare: floxctl version, floxctl status",
			cli.ReadVersion().Version)
	}
	translated := api.FromConnect(err)
	if errors.As(translated, &call) { // a code without a sentinel: its words are enough
		return errors.New(call.Message())
	}
	return translated
}

// explainDial tells apart what calls for different steps: no right to ask, no
// socket, a socket nobody serves.
func explainDial(e *cli.DialError) error {
	if errors.Is(e.Err, fs.ErrPermission) {
		return cli.Explain(flox.ErrDenied, "you may not open the agent's socket %s: ask with sudo, or as a member of the group that owns it", e.Socket)
	}
	what := "nothing answers"
	if errors.Is(e.Err, fs.ErrNotExist) {
		what = "there is no socket"
	}
	return cli.Explain(flox.ErrUnreachable, `no agent is running: %s at %s.
Start one:
  sudo floxd up                      everything on this machine
  sudo floxd agent --invite FILE     with the storehouse that made the invite
Or name its socket with --socket or %s.`, what, e.Socket, cli.EnvSocket)
}

// storeDir asks the agent which store directory it serves.
func storeDir(ctx context.Context, agent floxv1connect.AgentClient) (flox.StoreDir, error) {
	resp, err := agent.Status(ctx, connect.NewRequest(&floxv1.StatusRequest{}))
	if err != nil {
		return "", explain(err)
	}
	return flox.ParseStoreDir(resp.Msg.GetStoreDir())
}
