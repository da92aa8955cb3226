package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httputil"
	"os/user"
	"strconv"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
)

// userHeader tells the storehouse on whose behalf this machine calls.
const userHeader = "Flox-User"

const (
	// maxPassed is how many calls are passed on at once; more are refused, so that
	// nobody here takes the storehouse's streams from what the store itself needs.
	maxPassed = 64
	// maxPassedBody bounds the request of a call in bytes, as the storehouse does.
	maxPassedBody = 4 << 20
)

// passAdmin passes calls of the control socket on to the storehouse, unread.
// What the caller may do is for the storehouse to say; this machine says who it is.
type passAdmin struct {
	proxy  *httputil.ReverseProxy
	slots  chan struct{}
	errors *connect.ErrorWriter
}

func newPassAdmin(a *Agent) *passAdmin {
	p := &passAdmin{slots: make(chan struct{}, maxPassed), errors: connect.NewErrorWriter()}
	p.proxy = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", "peer"
			r.Out.Host = "peer"
			r.Out.Header.Del("Connection")
			r.Out.Header.Del("Upgrade") // nothing but calls passes here
			r.Out.Header.Set(userHeader, callerName(r.In.Context()))
		},
		Transport:     p2pTransport{a},
		FlushInterval: -1, // every message of a stream at once
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if errors.Is(err, context.Canceled) {
				return // the caller has left
			}
			p.refuse(w, r, fmt.Errorf("ask the storehouse: %w: %w", err, flox.ErrUnreachable))
		},
	}
	return p
}

// p2pTransport carries requests to the storehouse the agent follows.
type p2pTransport struct{ a *Agent }

// RoundTrip implements http.RoundTripper.
func (t p2pTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	return t.a.calls.client(t.a.follower.house).Transport.RoundTrip(r)
}

// ServeHTTP implements http.Handler.
func (p *passAdmin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if callerName(r.Context()) == "" {
		p.refuse(w, r, fmt.Errorf("the system does not say who calls: %w", flox.ErrDenied))
		return
	}
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	default:
		p.refuse(w, r, fmt.Errorf("%d calls to the storehouse are under way on this machine: try again when one has ended: %w", maxPassed, flox.ErrBusy))
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxPassedBody)
	p.proxy.ServeHTTP(w, r)
}

// refuse answers in the protocol of the call; what is no call is a bad request.
func (p *passAdmin) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if !p.errors.IsSupported(r) {
		http.Error(w, err.Error(), api.HTTPStatus(err))
		return
	}
	_ = p.errors.Write(w, r, api.ToConnect(err)) // the caller has left
}

// callerName is the name of the user at the other end of the control socket, as
// the kernel knows it; "" when it does not.
func callerName(ctx context.Context) string {
	uid, ok := ctx.Value(callerKey{}).(int)
	if !ok || uid < 0 {
		return ""
	}
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return u.Username
	}
	return "uid " + strconv.Itoa(uid) // no user name has a blank
}
