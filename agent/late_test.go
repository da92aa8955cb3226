package agent

import (
	"context"
	"errors"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p"
)

// Who is there before the network waits for it, for as long as it likes.
func TestLateHost(t *testing.T) {
	t.Parallel()
	l := newLateHost()
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := l.Fetch(short, nil, p2p.Hints{}, nil); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("a fetch before there is a network: %v", err)
	}
	if _, err := l.dial(short, "peer", rpcProtocol); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("a call: %v", err)
	}
	if _, err := l.FindProviders(short, flox.CID{}, 1); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("a search: %v", err)
	}
	if err := l.AddPeer(p2p.PeerAddr{}); !errors.Is(err, flox.ErrUnreachable) || len(l.Peers()) > 0 {
		t.Errorf("peers: %v, %v", err, l.Peers())
	}
	l.Holding(flox.CID{1})

	h := newHouse(t)
	host, err := p2p.New(p2p.Config{
		Key: machineKey(t), Listen: []string{"127.0.0.1:0"}, Secret: testSecret, NoMDNS: true,
		Bootstrap: []p2p.PeerAddr{{ID: h.host.ID(), Addrs: h.host.Addrs()}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	dialled := make(chan error)
	go func() {
		conn, err := l.dial(within(t, 40*time.Second), h.host.ID(), rpcProtocol)
		if err == nil {
			err = conn.Close()
		}
		dialled <- err
	}()
	select {
	case err := <-dialled:
		t.Fatalf("a call that should wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	l.open(host)
	if err := <-dialled; err != nil {
		t.Errorf("a call that waited for the network: %v", err)
	}
}
