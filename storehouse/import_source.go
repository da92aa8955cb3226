package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/floxctl/flox"
)

// importStall is how long a cache may send nothing before it is given up.
const importStall = 2 * time.Minute

// importTries is how often a cache is asked for the same thing that it fails to send.
const importTries = 3

// cacheSource is an existing binary cache: nix-cache-info, HASH.narinfo, and NARs.
type cacheSource interface {
	// open reads a file by its name as a narinfo has it. ErrNotFound.
	open(ctx context.Context, name string) (io.ReadCloser, error)
	// list calls yield with the hash parts of all its paths, until it fails.
	list(ctx context.Context, yield func(hashPart string) error) error
	close() error
}

// openSource finds out what kind of cache from is.
func openSource(from string, jobs int) (cacheSource, error) {
	switch u, err := url.Parse(from); {
	case err != nil || from == "":
		return nil, fmt.Errorf("import from %q: want http://…, https://… or a directory on the server: %w", from, flox.ErrBadInput)
	case u.Scheme == "http" || u.Scheme == "https":
		transport := http.DefaultTransport.(*http.Transport).Clone() //nolint:forcetypeassert // it is one
		transport.MaxIdleConnsPerHost, transport.ResponseHeaderTimeout = jobs, importStall
		transport.DisableCompression = true // a NAR is what its name says
		u.Path = strings.TrimSuffix(u.Path, "/") + "/"
		u.RawQuery, u.Fragment = "", ""
		return &webSource{base: u, client: &http.Client{Transport: transport}}, nil
	case u.Scheme == "file":
		from = u.Path
	case !strings.HasPrefix(from, "/"):
		return nil, fmt.Errorf("import from %q: want http://…, https://… or the absolute path of a directory on the server: %w", from, flox.ErrBadInput)
	}
	root, err := os.OpenRoot(from)
	if err != nil {
		if errors.Is(err, iofs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", err, flox.ErrNotFound)
		}
		return nil, fmt.Errorf("import from %s: %w", from, err)
	}
	return &dirSource{root}, nil
}

// dirSource is a directory as nix copy --to file://DIR leaves it.
type dirSource struct{ root *os.Root }

func (d *dirSource) open(_ context.Context, name string) (io.ReadCloser, error) {
	f, err := d.root.Open(name)
	if errors.Is(err, iofs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", err, flox.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (d *dirSource) list(ctx context.Context, yield func(hashPart string) error) error {
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		entries, err := f.ReadDir(1024)
		for _, e := range entries {
			hashPart, ok := strings.CutSuffix(e.Name(), ".narinfo")
			if !ok || !flox.ValidHashPart(hashPart) {
				continue
			}
			if err := yield(hashPart); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
	}
}

func (d *dirSource) close() error { return d.root.Close() }

// webSource is a binary cache over HTTP.
type webSource struct {
	base   *url.URL
	client *http.Client
}

func (w *webSource) open(ctx context.Context, name string) (io.ReadCloser, error) {
	u, err := w.base.Parse(name)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("%q is no name in %s: %w", name, w.base, flox.ErrBadInput)
	}
	ctx, cancel := context.WithCancel(ctx)
	body := &stallingBody{cancel: cancel, name: u.Redacted()}
	body.timer = time.AfterFunc(importStall, cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		cancel()
		return nil, err
	}
	resp, err := w.client.Do(req) //nolint:bodyclose // by stallingBody
	if err != nil {
		cancel()
		return nil, fmt.Errorf("%w: %w", err, flox.ErrUnreachable)
	}
	body.ReadCloser = resp.Body
	if resp.StatusCode == http.StatusOK {
		return body, nil
	}
	err = fmt.Errorf("GET %s: %s", u.Redacted(), resp.Status)
	switch {
	case resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusGone:
		err = fmt.Errorf("%w: %w", err, flox.ErrNotFound)
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden:
		err = fmt.Errorf("%w: %w", err, flox.ErrDenied)
	default:
		err = fmt.Errorf("%w: %w", err, flox.ErrUnreachable)
	}
	return nil, errors.Join(err, body.Close())
}

func (w *webSource) list(context.Context, func(string) error) error {
	return fmt.Errorf("import from %s: a cache cannot be listed over HTTP: name the paths to import, or give its directory: %w", w.base, flox.ErrBadInput)
}

func (w *webSource) close() error {
	w.client.CloseIdleConnections()
	return nil
}

// stallingBody gives a response up that sends nothing for too long.
type stallingBody struct {
	io.ReadCloser
	timer  *time.Timer
	cancel context.CancelFunc
	name   string
}

// Read is io.Reader.
func (b *stallingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.timer.Reset(importStall)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("GET %s: %w: %w", b.name, err, flox.ErrUnreachable)
	}
	return n, err
}

// Close is io.Closer.
func (b *stallingBody) Close() error {
	b.timer.Stop()
	b.cancel()
	return b.ReadCloser.Close()
}

// again calls f until it does not fail for want of the cache.
func again(ctx context.Context, f func() error) error {
	for try := 1; ; try++ {
		err := f()
		if err == nil || !errors.Is(err, flox.ErrUnreachable) || try == importTries {
			return err
		}
		timer := time.NewTimer(time.Duration(try) * time.Second)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return err
		}
	}
}
