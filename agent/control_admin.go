package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"os/user"
	"strconv"
	"sync/atomic"

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

// p2pTransport carries requests to the first server of the storehouse that can be
// reached.
type p2pTransport struct{ a *Agent }

// RoundTrip implements http.RoundTripper. Of a request that failed before
// anything of it was sent, the next server hears.
func (t p2pTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	body := &untouched{}
	if r.Body != nil && r.Body != http.NoBody {
		body.ReadCloser = r.Body
		defer func() {
			if !body.used.Load() {
				_ = body.ReadCloser.Close() // it was never read
			}
		}()
	}
	var failed []error
	for _, house := range t.a.houses.order() {
		try := r.WithContext(r.Context()) // a copy
		if body.ReadCloser != nil {
			try.Body = body
		}
		response, err := t.a.calls.Client(house).Transport.RoundTrip(try)
		if err == nil {
			t.a.houses.answered(house)
			return response, nil
		}
		failed = append(failed, err)
		if r.Context().Err() != nil || body.used.Load() {
			break
		}
		t.a.houses.failed(house)
	}
	return nil, because(failed...)
}

// untouched is the body of a request that may be sent again until it was read.
type untouched struct {
	io.ReadCloser
	used atomic.Bool
}

// Read implements io.Reader.
func (u *untouched) Read(p []byte) (int, error) {
	u.used.Store(true)
	return u.ReadCloser.Read(p)
}

// Close closes what was read from; the rest may still be sent.
func (u *untouched) Close() error {
	if u.used.Load() {
		return u.ReadCloser.Close()
	}
	return nil
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
	return nameOf(uid)
}

// nameOf is the name of a user of this machine.
func nameOf(uid int) string {
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return u.Username
	}
	return "uid " + strconv.Itoa(uid) // no user name has a blank
}
