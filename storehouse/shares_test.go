package storehouse

import (
	"context"
	"errors"
	"net"
	"net/http"
	"testing"
)

// Whoever takes all places it gets leaves others theirs, and waits for its own; who
// gives up while it waits holds nothing.
func TestSharesLeaveOthersTheirs(t *testing.T) {
	t.Parallel()
	s := newShares(3, 2)
	take := func(who string) func() {
		t.Helper()
		leave, err := s.take(within(t), who)
		if err != nil {
			t.Fatal(err)
		}
		return leave
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	full := func(who string) {
		t.Helper()
		if _, err := s.take(over, who); !errors.Is(err, context.Canceled) {
			t.Errorf("%s gets a place: %v", who, err)
		}
	}
	first, second := take("greedy"), take("greedy")
	full("greedy")
	other := take("other")
	full("third")
	second()
	third := take("third")
	full("greedy") // of its own one is free, of all none
	for _, leave := range []func(){first, other, third} {
		leave()
	}
	if len(s.held) != 0 || len(s.places) != 0 {
		t.Errorf("%d clients remembered, %d places held, want none", len(s.held), len(s.places))
	}
}

// One address cannot have all connections, and an address without any is forgotten.
func TestOneAddressHasItsPart(t *testing.T) {
	t.Parallel()
	state := atMost(3, 2)
	open := func(ip string) *closing {
		c := &closing{addr: &net.TCPAddr{IP: net.ParseIP(ip), Port: 1}}
		state(c, http.StateNew)
		return c
	}
	a, b, c := open("192.0.2.1"), open("192.0.2.1"), open("192.0.2.1")
	other := open("192.0.2.2")
	if a.closed || b.closed || !c.closed {
		t.Errorf("closed of one address: %v %v %v, want the third", a.closed, b.closed, c.closed)
	}
	state(c, http.StateClosed)
	state(other, http.StateClosed)
	if again := open("192.0.2.2"); !other.closed || again.closed {
		t.Errorf("of another address, when all are taken: closed %v; later: %v", other.closed, again.closed)
	}
}

type closing struct {
	net.Conn
	addr   net.Addr
	closed bool
}

func (c *closing) RemoteAddr() net.Addr { return c.addr }
func (c *closing) Close() error         { c.closed = true; return nil }
