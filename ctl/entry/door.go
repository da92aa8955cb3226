package entry

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/p2p"
	"github.com/floxctl/flox/storehouse"
)

const (
	// knockTime is how long servers are tried, and knockNext after what time the
	// next address is tried beside those that have not answered yet.
	knockTime = 15 * time.Second
	knockNext = time.Second
	// askTime is longer than a server waits for the others before it says so.
	askTime   = 40 * time.Second
	maxAnswer = 4 << 20
	maxTold   = 6 // failures that are named
)

// door is where machines that are no members speak to a storehouse.
type door struct {
	key    ed25519.PrivateKey
	invite *api.JoinInvite
}

// join redeems the invite. Already says that this machine was a member, which
// needs none any more.
func (d *door) join(ctx context.Context, asked *floxv1.JoinRequest) (resp *floxv1.JoinResponse, already bool, err error) {
	g := p2p.Guest{}
	if !d.invite.LAN {
		g.InviteID = d.invite.ID
		if g.Secret, err = d.invite.Proof(); err != nil {
			return nil, false, err
		}
	}
	resp, err = d.ask(ctx, g, asked)
	if err == nil && resp.GetMachine().GetRaftAddress() != asked.GetMachine().GetRaftAddress() {
		// This machine used the invite before, and that is what it was answered then. A
		// member says what is new of it without one.
		if again, other := d.ask(ctx, p2p.Guest{}, asked); other == nil {
			return again, true, nil
		}
	}
	if !errors.Is(err, flox.ErrDenied) || d.invite.LAN {
		return resp, false, err
	}
	// The invite may be used up because this machine used it.
	if again, other := d.ask(ctx, p2p.Guest{}, asked); other == nil {
		return again, true, nil
	}
	if at := d.invite.Expires; time.Now().After(at) {
		err = fmt.Errorf("the invite ended at %s: ask for a new one, floxctl invite makes it: %w", at.Local().Format("2006-01-02 15:04:05"), flox.ErrDenied)
	}
	return nil, false, err
}

func (d *door) ask(ctx context.Context, g p2p.Guest, asked *floxv1.JoinRequest) (*floxv1.JoinResponse, error) {
	conn, err := d.knock(ctx, g)
	if err != nil {
		return nil, err
	}
	return call(ctx, conn, func(ctx context.Context, c floxv1connect.JoinClient) (*floxv1.JoinResponse, error) {
		resp, err := c.Join(ctx, connect.NewRequest(asked))
		if err != nil {
			return nil, err
		}
		return resp.Msg, nil
	})
}

// call asks something over a guest's connection, and closes it.
func call[T any](ctx context.Context, conn net.Conn, do func(context.Context, floxv1connect.JoinClient) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	free := make(chan net.Conn, 1)
	free <- conn
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true, DisableCompression: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			select {
			case c := <-free:
				return c, nil
			default:
				return nil, fmt.Errorf("the storehouse closed the connection: %w", flox.ErrUnreachable)
			}
		},
	}}
	answer, err := do(ctx, floxv1connect.NewJoinClient(client, "http://storehouse", connect.WithReadMaxBytes(maxAnswer)))
	var wire *connect.Error
	if errors.As(err, &wire) {
		err = api.FromConnect(err)
	}
	return answer, err
}

// knock opens a connection to whichever server answers first. An address that
// does not answer holds the others back for a second only.
func (d *door) knock(ctx context.Context, g p2p.Guest) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, knockTime)
	defer cancel()
	var at []p2p.PeerAddr
	for _, s := range d.invite.Storehouse {
		for _, addr := range s.Addrs {
			at = append(at, p2p.PeerAddr{ID: p2p.PeerID(s.ID), Addrs: []string{addr}})
		}
	}
	results := make(chan knocked, len(at))
	begun, open := 0, 0
	next := time.NewTimer(0)
	defer next.Stop()
	var failed []error
	for begun < len(at) || open > 0 {
		select {
		case <-next.C:
			if begun < len(at) {
				to := at[begun]
				begun, open = begun+1, open+1
				go func() { // ends with ctx
					conn, err := p2p.DialGuest(ctx, d.key, to, g, storehouse.JoinProtocol)
					results <- knocked{conn, err}
				}()
				next.Reset(knockNext)
			}
		case r := <-results:
			open--
			if r.err == nil {
				go closeLate(results, open)
				return r.conn, nil
			}
			failed = append(failed, r.err)
			next.Reset(0)
		}
	}
	return nil, d.explain(failed)
}

// knocked is what became of one address.
type knocked struct {
	conn net.Conn
	err  error
}

// closeLate closes what was opened too late; the context of those dials ends now.
func closeLate(results <-chan knocked, n int) {
	for range n {
		if r := <-results; r.err == nil {
			_ = r.conn.Close()
		}
	}
}

// explain gives the reason that says most: a refusal of the right machine, else
// that it is too full, else why each address fails.
func (d *door) explain(failed []error) error {
	for _, kind := range []error{flox.ErrDenied, flox.ErrBusy} {
		for _, err := range failed {
			if errors.Is(err, kind) {
				return err
			}
		}
	}
	var lines []string
	for _, err := range failed[:min(len(failed), maxTold)] {
		lines = append(lines, strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return fmt.Errorf("no server of the storehouse %s answers here within %s; is it running, and may this machine reach it? (%s): %w",
		d.invite.Name, knockTime, strings.Join(lines, " | "), flox.ErrUnreachable)
}
