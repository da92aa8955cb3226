package storehouse

import (
	"context"
	"errors"
	"net"
	"testing"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/content"
)

// A machine tells over the wire what it holds on to: whole once, then by the name
// of the set, and it is a root as the machine that its connection proved it to be.
func TestMachineTellsItsRootsOverTheWire(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	p := makePath(t, "held", 1000)
	publish(t, s, p)
	m := join(t, s.Invite())
	house := floxv1connect.NewMembershipClient(httpOver(t, func(ctx context.Context) (net.Conn, error) {
		return m.host.Dial(ctx, m.house, rpcProtocol)
	}), "http://house")
	set, err := content.MakeRootSet([]flox.StorePath{p.info.Path})
	if err != nil {
		t.Fatal(err)
	}
	id := set.ID()
	renew := func() bool {
		t.Helper()
		resp, err := house.RenewRoots(within(t), connect.NewRequest(&floxv1.RenewRootsRequest{Set: id[:]}))
		if err != nil {
			t.Fatal(err)
		}
		return resp.Msg.GetUnknown()
	}
	isRoot := func() bool {
		roots, _, err := s.Roots(within(t), p.info.Path)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range roots {
			if r.GetKind() == rootMachine && r.GetName() == string(m.host.ID()) {
				return true
			}
		}
		return false
	}
	if !renew() || isRoot() {
		t.Error("a set that was never sent is known")
	}
	sent, err := house.SetRoots(within(t), connect.NewRequest(&floxv1.SetRootsRequest{Hashes: set}))
	if err != nil || string(sent.Msg.GetSet()) != string(id[:]) {
		t.Fatalf("set roots: %v, %v", sent, err)
	}
	if renew() || !isRoot() {
		t.Error("a set that was sent is unknown, or not a root")
	}
	if _, err := house.SetRoots(within(t), connect.NewRequest(&floxv1.SetRootsRequest{Hashes: []byte("no set")})); !errors.Is(api.FromConnect(err), flox.ErrBadInput) {
		t.Errorf("what is no set: %v", err)
	}
	if _, err := house.RenewRoots(within(t), connect.NewRequest(&floxv1.RenewRootsRequest{Set: []byte("x")})); !errors.Is(api.FromConnect(err), flox.ErrBadInput) {
		t.Errorf("what is no name of a set: %v", err)
	}
	if _, err := house.SetRoots(within(t), connect.NewRequest(&floxv1.SetRootsRequest{})); err != nil || isRoot() {
		t.Errorf("forgotten: %v", err)
	}
}
