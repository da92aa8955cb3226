package entry

import (
	"context"
	"fmt"
	"strings"
	"time"
	"unicode"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/p2p"
)

const (
	maxLooked  = 8  // storehouses of a LAN that are looked at
	maxShown   = 64 // characters of a name
	windowTime = 24 * time.Hour
)

// Found is a storehouse of this LAN that lets machines in without a secret now.
type Found struct {
	// Invite is made of what it said; its fingerprint is to be compared by a person.
	Invite  *api.JoinInvite `json:"invite"`
	Address string          `json:"address"` // at which it answered
	// Problem says why it cannot be joined; "" = it can.
	Problem string `json:"problem"`
}

// Find looks for storehouses on the LAN and asks each what it is. Errors:
// ErrUnreachable if there is no network to look in.
func (s *Step) Find(ctx context.Context) ([]Found, error) {
	p, err := openPlace(s.StateDir, RoleAgent)
	if err != nil {
		return nil, err
	}
	there, err := p2p.FindStorehouses(ctx)
	if err != nil {
		return nil, err
	}
	list := make([]Found, min(len(there), maxLooked))
	group, ctx := errgroup.WithContext(ctx)
	for i := range list {
		group.Go(func() error {
			list[i] = look(ctx, p, there[i])
			return nil
		})
	}
	return list, group.Wait()
}

// look asks one storehouse what it is.
func look(ctx context.Context, p *place, at p2p.Found) Found {
	f := Found{Invite: &api.JoinInvite{
		LAN: true, Role: RoleAgent, Name: shown(at.Name), Storehouse: []api.InvitePeer{{ID: string(at.ID), Addrs: at.Addrs}},
		Expires: time.Now().Add(windowTime), // the storehouse knows when
	}}
	if len(at.Addrs) > 0 {
		f.Address = at.Addrs[0]
	}
	err := f.ask(ctx, &door{key: p.key, invite: f.Invite})
	if err != nil {
		f.Problem = err.Error()
	}
	return f
}

func (f *Found) ask(ctx context.Context, d *door) error {
	conn, err := d.knock(ctx, p2p.Guest{})
	if err != nil {
		return err
	}
	said, err := call(ctx, conn, func(ctx context.Context, c floxv1connect.JoinClient) (*floxv1.LookResponse, error) {
		resp, err := c.Look(ctx, connect.NewRequest(&floxv1.LookRequest{}))
		if err != nil {
			return nil, err
		}
		return resp.Msg, nil
	})
	if err != nil {
		return err
	}
	if len(said.GetTrustList()) != len(f.Invite.TrustList) {
		return fmt.Errorf("it says a fingerprint of %d bytes: %w", len(said.GetTrustList()), flox.ErrCorrupt)
	}
	copy(f.Invite.TrustList[:], said.GetTrustList())
	if f.Invite.StoreDir, err = flox.ParseStoreDir(said.GetStoreDir()); err != nil {
		return err
	}
	f.Invite.Name = shown(said.GetName())
	return nil
}

// shown is a name that anybody may have said, as it can be printed.
func shown(name string) string {
	name = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, name)
	if r := []rune(name); len(r) > maxShown {
		name = string(r[:maxShown])
	}
	if name == "" {
		return "?"
	}
	return name
}
