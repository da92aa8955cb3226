package agent

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox/nix/worker"
)

// A user has so many connections and no more; who is turned away reads why, and
// another user still comes in, until all places are taken.
func TestConnectionsOfNixClientsAreBounded(t *testing.T) {
	t.Parallel()
	p := nixPlaces{most: 5, each: 3}
	for range 3 {
		if err := p.take(1000); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.take(1000); err == nil || !strings.Contains(err.Error(), "user 1000 has 3 connections") {
		t.Errorf("the fourth of one user: %v", err)
	}
	for range 2 {
		if err := p.take(0); err != nil {
			t.Errorf("another user: %v", err)
		}
	}
	if err := p.take(7); err == nil || !strings.Contains(err.Error(), "the agent has 5 connections") {
		t.Errorf("the sixth of all: %v", err)
	}
	p.leave(1000)
	if err := p.take(7); err != nil {
		t.Errorf("when one has ended: %v", err)
	}
	for _, uid := range []uint32{1000, 1000, 0, 0, 7} {
		p.leave(uid)
	}
	if p.all != 0 || len(p.of) != 0 {
		t.Errorf("when all have ended: %d, %v", p.all, p.of)
	}

	// Over the socket.
	h := newHouse(t)
	a, _ := runAgent(t, h, func(c *Config) { c.NixSocket = filepath.Join(filepath.Dir(c.Socket), "nix.socket") }, func(a *Agent) {
		a.nix.places = nixPlaces{most: 5, each: 3}
	})
	until(t, "somebody listens at the socket for Nix", func() bool {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", a.cfg.NixSocket)
		if err != nil {
			return false
		}
		defer conn.Close()
		_, err = worker.NewClient(t.Context(), conn, worker.ClientConfig{Dir: testStore}) // it has its place when it is greeted
		return err == nil
	})
	until(t, "its place is free again", func() bool {
		a.nix.places.mu.Lock()
		defer a.nix.places.mu.Unlock()
		return a.nix.places.all == 0
	})
	dial := func() (*worker.Client, error) {
		conn, err := (&net.Dialer{}).DialContext(within(t, time.Minute), "unix", a.cfg.NixSocket)
		if err != nil {
			return nil, err
		}
		return worker.NewClient(t.Context(), conn, worker.ClientConfig{Dir: testStore})
	}
	var clients []*worker.Client
	for range 3 {
		c, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
	}
	if _, err := dial(); err == nil || !strings.Contains(err.Error(), "has 3 connections to the agent, at most 3 are allowed") {
		t.Errorf("one more than a user may have: %v", err)
	}
	if _, bad, err := newNixClient(t, a).try("nix-store", "--gc", "--print-roots"); err == nil || !strings.Contains(bad, "at most 3 are allowed") {
		t.Errorf("stock Nix reads %v, %s", err, bad)
	}
	if _, err := clients[0].ValidPaths(within(t, time.Minute), nil, false); err != nil {
		t.Errorf("one that was there before: %v", err)
	}
	for _, c := range clients {
		c.Close()
	}
	until(t, "there is room again", func() bool {
		c, err := dial()
		if err != nil {
			return false
		}
		c.Close()
		return true
	})
}
