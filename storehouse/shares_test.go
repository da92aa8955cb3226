package storehouse

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
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

// holdAll takes all places that one can have.
func holdAll(t *testing.T, s *shares, who string) (leave func()) {
	t.Helper()
	held := make([]func(), s.each)
	for i := range held {
		var err error
		if held[i], err = s.take(within(t), who); err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		for _, leave := range held {
			leave()
		}
	}
}

// At every door that has places, one who holds all it can have is in nobody's way but
// its own.
func TestDoorsHaveSharesOfTheirPlaces(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	p := makePath(t, "p", 1000)
	publish(t, s, p)
	calls, cache := newRPC(s, t.Context()), newHTTP(s, s.cfg, s.packs, s.packs.Stored)
	mux := http.NewServeMux()
	mux.Handle(floxv1connect.NewStorehouseHandler(calls))
	mux.Handle(floxv1connect.NewUpstreamsHandler(calls))
	mux.Handle("/", cache)
	const who = "192.0.2.1" // RemoteAddr, which over /flox/rpc/1 is a peer ID
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.RemoteAddr = who
		mux.ServeHTTP(w, r)
	}))
	defer web.Close()
	get := func(path string) func(context.Context) error {
		return func(ctx context.Context) error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, web.URL+path, nil)
			if err != nil {
				return err
			}
			resp, err := web.Client().Do(req)
			if err == nil {
				err = resp.Body.Close()
			}
			return err
		}
	}
	for name, door := range map[string]struct {
		places *shares
		call   func(context.Context) error
	}{
		"listings": {cache.listings, get("/" + p.info.Path.HashPart() + ".ls")},
		"logs":     {cache.listings, get("/log/" + string(p.info.Path))},
		"takes": {calls.takes, func(ctx context.Context) error {
			stream := floxv1connect.NewStorehouseClient(web.Client(), web.URL).TakePaths(ctx)
			err := stream.Send(&floxv1.TakePathsRequest{})
			_, failed := stream.CloseAndReceive()
			return errors.Join(err, api.FromConnect(failed))
		}},
		"substitutions": {calls.substitutions, func(ctx context.Context) error {
			stream, err := floxv1connect.NewUpstreamsClient(web.Client(), web.URL).Substitute(ctx, connect.NewRequest(&floxv1.SubstituteRequest{Dry: true}))
			if err != nil {
				return api.FromConnect(err)
			}
			for stream.Receive() { //nolint:revive // to its end
			}
			return errors.Join(api.FromConnect(stream.Err()), stream.Close())
		}},
	} {
		for holder, waits := range map[string]bool{"greedy": false, who: true} {
			patience := 10 * time.Second
			if waits {
				patience = 200 * time.Millisecond
			}
			leave := holdAll(t, door.places, holder)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			if err := door.call(ctx); errors.Is(err, context.DeadlineExceeded) != waits {
				t.Errorf("%s: %s holds all it can have, and a call of %s gives %v", name, holder, who, err)
			}
			cancel()
			leave()
		}
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
