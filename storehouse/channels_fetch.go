package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/profile/tarball"
)

const (
	// fetchWait bounds fetching one tarball and taking it in, fetchStall how long nothing
	// of it may come.
	fetchWait  = 15 * time.Minute
	fetchStall = time.Minute
	// maxTarball bounds a tarball as it is sent, in bytes.
	maxTarball   = 512 << 20
	maxRedirects = 5
	// fetchStep is how many bytes come between two words about how far it is.
	fetchStep = 1 << 20
	// maxValidator bounds what a server names a version by.
	maxValidator = 256
)

// unpackLimits bound a tarball that is unpacked: nixpkgs has some 50,000 files of 400 MB.
var unpackLimits = tarball.Limits{Files: 500_000, Bytes: 2 << 30}

// fetchedTarball is a tarball that was fetched and taken in.
type fetchedTarball struct {
	source         flox.StorePath // "" = it is as it was
	from           string         // where redirects led
	etag, modified string         // what its server names this version by
}

// fetch brings what a channel tracks into the storehouse, if it is another than last time.
// Errors: ErrUnreachable if it cannot be had, ErrBadInput if it is no tarball that may be
// taken in, ErrFull.
func (c *channels) fetch(ctx context.Context, t *floxv1.ChannelTracking, tell func(*floxv1.TrackChannelProgress)) (*fetchedTarball, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, fetchWait, fmt.Errorf("it was not fetched within %s: %w", fetchWait, flox.ErrUnreachable))
	defer cancel()
	client := tarballClient()
	defer client.CloseIdleConnections()
	var resp *http.Response
	body, err := stalling(ctx, fetchStall, "fetch "+t.GetUrl(), func(ctx context.Context) (_ io.ReadCloser, err error) {
		resp, err = getTarball(ctx, client, t) //nolint:bodyclose // body closes it
		if err != nil {
			return nil, err
		}
		return resp.Body, nil
	})
	if err != nil {
		return nil, err
	}
	defer body.Close()
	got := &fetchedTarball{from: resp.Request.URL.Redacted(), etag: validator(resp, "ETag"), modified: validator(resp, "Last-Modified")}
	if resp.StatusCode == http.StatusNotModified {
		return got, nil
	}
	if resp.ContentLength > maxTarball {
		return nil, fmt.Errorf("fetch %s: %d bytes, want at most %d: %w", got.from, resp.ContentLength, maxTarball, flox.ErrBadInput)
	}
	paced, err := c.s.disk.upload(ctx, &countedBody{r: body, from: got.from, all: uint64(max(resp.ContentLength, 0)), tell: tell}) //nolint:gosec // not negative
	if err == nil {
		got.source, err = c.takeIn(ctx, strings.ToLower(t.GetChannel()), paced, tell)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = errors.Join(context.Cause(ctx), err)
		}
		return nil, fmt.Errorf("fetch %s: %w", got.from, err)
	}
	return got, nil
}

// takeIn makes what is in a tarball a store path.
func (c *channels) takeIn(ctx context.Context, name string, r io.Reader, tell func(*floxv1.TrackChannelProgress)) (flox.StorePath, error) {
	dir := filepath.Join(c.s.cfg.StateDir, "tarball") // one is fetched at a time; a killed server leaves it
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return "", err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // the next fetch says it
	top, err := tarball.Unpack(ctx, r, dir, unpackLimits)
	if err != nil {
		return "", err
	}
	tell(&floxv1.TrackChannelProgress{Doing: "takes in what was fetched"})
	var info *flox.PathInfo
	err = piped(func(w io.Writer) error { return nix.DumpPath(ctx, w, top) }, func(nar io.Reader) (err error) {
		info, _, err = c.s.PublishSource(ctx, name, nar, "channel "+name)
		return err
	})
	if err != nil {
		return "", err
	}
	return info.Path, nil
}

// getTarball asks for what a channel tracks, unless it is as it was.
func getTarball(ctx context.Context, client *http.Client, t *floxv1.ChannelTracking) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.GetUrl(), nil)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w: %w", t.GetUrl(), err, flox.ErrBadInput)
	}
	if last := t.GetLast(); last.GetSource() != "" {
		for header, value := range map[string]string{"If-None-Match": last.GetEtag(), "If-Modified-Since": last.GetLastModified()} {
			if value != "" {
				req.Header.Set(header, value)
			}
		}
	}
	resp, err := client.Do(req)
	switch {
	case err != nil && (errors.Is(err, flox.ErrBadInput) || errors.Is(err, flox.ErrDenied)):
		return nil, fmt.Errorf("fetch: %w", err)
	case err != nil:
		return nil, fmt.Errorf("fetch: %w: %w", err, flox.ErrUnreachable)
	case resp.StatusCode == http.StatusOK, resp.StatusCode == http.StatusNotModified && t.GetLast().GetSource() != "":
		return resp, nil
	}
	err = fmt.Errorf("fetch %s: its server answers %s: %w", resp.Request.URL.Redacted(), resp.Status, flox.ErrUnreachable)
	return nil, errors.Join(err, resp.Body.Close())
}

// validator is what a server names a version by.
func validator(resp *http.Response, header string) string {
	if v := resp.Header.Get(header); len(v) <= maxValidator {
		return v
	}
	return ""
}

// tarballClient makes a client for one fetch.
func tarballClient() *http.Client {
	transport := http.DefaultTransport.(*http.Transport).Clone() //nolint:forcetypeassert // it is one
	transport.DisableCompression = true                          // a tarball is what its bytes say
	transport.ResponseHeaderTimeout = fetchStall
	transport.DialContext = (&net.Dialer{Timeout: 30 * time.Second, Control: (&insideGuard{}).control}).DialContext
	return &http.Client{Transport: transport, CheckRedirect: checkRedirect}
}

// checkRedirect bounds where a server may lead.
func checkRedirect(req *http.Request, via []*http.Request) error {
	to := req.URL.Redacted()
	switch {
	case len(via) > maxRedirects:
		return fmt.Errorf("more than %d redirects, the last to %s: %w", maxRedirects, to, flox.ErrBadInput)
	case req.URL.Scheme != "https" && (req.URL.Scheme != "http" || via[0].URL.Scheme == "https"):
		return fmt.Errorf("a redirect to %s, want one that is no less secure: %w", to, flox.ErrBadInput)
	}
	return nil
}

// insideGuard keeps servers outside from leading a fetch to addresses that only this machine
// or its network reaches: those are had if the tracked URL is one itself.
type insideGuard struct {
	mu     sync.Mutex
	begun  bool
	inside bool // where it began
}

// control is that of net.Dialer.
func (g *insideGuard) control(_, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("address %s: %w: %w", address, err, flox.ErrBadInput)
	}
	ip := at.Addr().Unmap()
	inside := ip.IsLoopback() || ip.IsPrivate() || ip.IsLinkLocalUnicast() || ip.IsUnspecified() || ip.IsMulticast()
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.begun {
		g.begun, g.inside = true, inside
	}
	if inside && !g.inside {
		return fmt.Errorf("a server outside leads to %s, inside: track that URL itself if it is meant: %w", ip, flox.ErrDenied)
	}
	return nil
}

// countedBody is a tarball that is being fetched.
type countedBody struct {
	r            io.Reader
	from         string
	n, told, all uint64 // bytes; all 0 = not known
	tell         func(*floxv1.TrackChannelProgress)
}

// Read implements io.Reader.
func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.n += uint64(n) //nolint:gosec // not negative
	if b.n > maxTarball {
		return 0, fmt.Errorf("more than %d bytes: %w", maxTarball, flox.ErrBadInput)
	}
	if b.n >= b.told+fetchStep || b.told == 0 {
		b.told = b.n
		b.tell(&floxv1.TrackChannelProgress{Doing: "fetches " + b.from, Done: b.n, All: b.all, Bytes: true})
	}
	return n, err
}
