package entry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/p2p"
)

const (
	leaveTime   = 15 * time.Second
	rpcProtocol = "/flox/rpc/1"
)

// Left is what became of a machine that left.
type Left struct {
	Storehouse string `json:"storehouse"`
	Peer       string `json:"peer"`
	// Told says that the storehouse has taken it out of its list; Reason why not.
	Told   bool   `json:"told"`
	Reason string `json:"reason,omitempty"`
}

// Leave takes this machine out of the storehouse it is an agent or worker of, and
// forgets what it was told when it joined. It leaves also if nobody answers; the
// storehouse lists it on then. Nothing of this machine may run. ErrNotFound if it
// never joined.
func (s *Step) Leave(ctx context.Context) (*Left, error) {
	name := filepath.Join(s.StateDir, AgentDir, InviteName)
	if _, err := os.Lstat(name); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("this machine is in no storehouse (%s does not exist): %w", name, flox.ErrNotFound)
	}
	p, err := openPlace(s.StateDir, RoleAgent)
	if err != nil {
		return nil, err
	}
	left := &Left{Storehouse: p.before.Name, Peer: string(p.peer), Told: true}
	if err := p.tellLeave(ctx, s.User); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		left.Told, left.Reason = false, err.Error()
	}
	return left, os.Remove(name)
}

// tellLeave asks any server to take this machine out of the list.
func (p *place) tellLeave(ctx context.Context, user string) (err error) {
	h, err := p2p.New(p2p.Config{Key: p.key, Listen: []string{"127.0.0.1:0"}, Secret: p.before.Secret, NoMDNS: true, DHTClient: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	ctx, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	var failed error
	for _, server := range p.before.Storehouse {
		// What comes back may be lost as this machine is cut off; asked again, it
		// is no member any more.
		for try := range 2 {
			err := askLeave(ctx, h, server, user)
			if err == nil || errors.Is(err, flox.ErrNotFound) || try > 0 && errors.Is(err, flox.ErrDenied) {
				return nil
			}
			failed = err
		}
	}
	return failed
}

func askLeave(ctx context.Context, h *p2p.Host, server api.InvitePeer, user string) error {
	id := p2p.PeerID(server.ID)
	if err := h.AddPeer(p2p.PeerAddr{ID: id, Addrs: server.Addrs}); err != nil {
		return err
	}
	transport := &http.Transport{
		DisableCompression: true,
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return h.Dial(ctx, id, rpcProtocol) },
	}
	defer transport.CloseIdleConnections()
	client := floxv1connect.NewMembershipClient(&http.Client{Transport: transport}, "http://storehouse")
	_, err := client.Leave(ctx, connect.NewRequest(&floxv1.LeaveRequest{User: user}))
	if errors.Is(err, flox.ErrDenied) { // in the handshake: this machine is no member
		return err
	}
	return api.FromConnect(err)
}
