package storehouse

import (
	"cmp"
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
	"github.com/floxctl/flox/content/pack/bucket"
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

// sourceOptions say how a cache is asked.
type sourceOptions struct {
	jobs            int           // at once
	stall           time.Duration // given up when nothing is sent for so long
	login, password string        // S3: access and secret key; "" = none, S3: those of the AWS tools
	dir             flox.StoreDir // this storehouse's
	ssh             string        // the program; "" = ssh
}

// openSource finds out what kind of cache from is. Its errors name it.
func openSource(from string, opts sourceOptions) (cacheSource, error) {
	u, err := url.Parse(from)
	switch {
	case err != nil || from == "":
		return nil, fmt.Errorf("%q: want http://…, https://…, s3://…, ssh-ng://… or a directory on the server: %w", from, flox.ErrBadInput)
	case u.Scheme == "http" || u.Scheme == "https":
		transport := http.DefaultTransport.(*http.Transport).Clone() //nolint:forcetypeassert // it is one
		transport.MaxIdleConnsPerHost, transport.ResponseHeaderTimeout = opts.jobs, opts.stall
		transport.DisableCompression = true // a NAR is what its name says
		u.Path = strings.TrimSuffix(u.Path, "/") + "/"
		u.RawQuery, u.Fragment = "", ""
		return &webSource{base: u, client: &http.Client{Transport: transport}, opts: opts}, nil
	case u.Scheme == "s3":
		where, err := bucketURL(u)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", from, err)
		}
		b, err := bucket.OpenAs(context.Background(), where, bucket.Keys{Access: opts.login, Secret: opts.password})
		if err != nil {
			return nil, err
		}
		return &bucketSource{b, opts.stall}, nil
	case u.Scheme == "ssh-ng":
		return newSSHSource(u, opts)
	case u.Scheme == "file":
		from = u.Path
	case !strings.HasPrefix(from, "/"):
		return nil, fmt.Errorf("%q: want http://…, https://…, s3://…, ssh-ng://… or the absolute path of a directory on the server: %w", from, flox.ErrBadInput)
	}
	root, err := os.OpenRoot(from)
	if err != nil {
		if errors.Is(err, iofs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", err, flox.ErrNotFound)
		}
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	return &dirSource{root}, nil
}

// bucketURL is an s3:// URL as Nix has it, for package bucket: the endpoint of Nix is
// HOST:PORT, with its scheme apart.
func bucketURL(u *url.URL) (string, error) {
	q := u.Query()
	for name := range q {
		switch name {
		case "region", "endpoint", "scheme", "profile", "use_path_style", "anonymous":
		default:
			return "", fmt.Errorf("parameter %q: want region, endpoint, scheme, profile, use_path_style or anonymous: %w", name, flox.ErrBadInput)
		}
	}
	if u.Host == "" || strings.Trim(u.Path, "/") != "" {
		return "", fmt.Errorf("want s3://BUCKET, with parameters behind ?: %w", flox.ErrBadInput)
	}
	if e := q.Get("endpoint"); e != "" {
		if !strings.Contains(e, "://") {
			q.Set("endpoint", cmp.Or(q.Get("scheme"), "https")+"://"+e)
		}
		if !q.Has("use_path_style") {
			q.Set("use_path_style", "true")
		}
	}
	if !q.Has("region") {
		q.Set("region", "us-east-1") // as Nix has it
	}
	q.Del("scheme")
	q.Set("response_checksum_validation", "when_required") // hashes are checked, and else every answer is warned of
	return (&url.URL{Scheme: "s3", Host: u.Host, RawQuery: q.Encode()}).String(), nil
}

// bucketSource is a binary cache in an S3 bucket.
type bucketSource struct {
	bucket *bucket.Bucket
	stall  time.Duration
}

func (b *bucketSource) open(ctx context.Context, name string) (io.ReadCloser, error) {
	if strings.Contains(name, "://") {
		return nil, fmt.Errorf("%q is no name in %s: %w", name, b.bucket, flox.ErrBadInput)
	}
	return stalling(ctx, b.stall, "get "+name+" from "+b.bucket.String(), func(ctx context.Context) (io.ReadCloser, error) {
		return b.bucket.Get(ctx, name, 0, -1)
	})
}

func (b *bucketSource) list(ctx context.Context, yield func(hashPart string) error) error {
	return b.bucket.List(ctx, "", func(name string, _ int64, _ time.Time) error {
		hashPart, ok := strings.CutSuffix(name, ".narinfo")
		if !ok || !flox.ValidHashPart(hashPart) {
			return nil
		}
		return yield(hashPart)
	})
}

func (b *bucketSource) close() error { return b.bucket.Close() }

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
	opts   sourceOptions
}

func (w *webSource) open(ctx context.Context, name string) (io.ReadCloser, error) {
	u, err := w.base.Parse(name)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("%q is no name in %s: %w", name, w.base, flox.ErrBadInput)
	}
	return stalling(ctx, w.opts.stall, "GET "+u.Redacted(), func(ctx context.Context) (io.ReadCloser, error) {
		return w.get(ctx, u)
	})
}

func (w *webSource) get(ctx context.Context, u *url.URL) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	// A narinfo may name another host, which is not told.
	if w.opts.login != "" && u.Scheme == w.base.Scheme && u.Host == w.base.Host {
		req.SetBasicAuth(w.opts.login, w.opts.password)
	}
	resp, err := w.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, flox.ErrUnreachable)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
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
	return nil, errors.Join(err, resp.Body.Close())
}

func (w *webSource) list(context.Context, func(string) error) error {
	return fmt.Errorf("import from %s: a cache cannot be listed over HTTP: name the paths to import, or give its directory: %w", w.base, flox.ErrBadInput)
}

func (w *webSource) close() error {
	w.client.CloseIdleConnections()
	return nil
}

// errStalled is why something was given up that sent nothing for too long.
var errStalled = errors.New("nothing was sent for too long")

// stalling opens something and gives it up when it sends nothing for too long.
func stalling(ctx context.Context, most time.Duration, name string, open func(context.Context) (io.ReadCloser, error)) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	body := &stallingBody{ctx: ctx, cancel: cancel, name: name, most: most}
	body.timer = time.AfterFunc(most, func() { cancel(errStalled) })
	r, err := open(ctx)
	if err != nil {
		err = body.explain(err)
		body.timer.Stop()
		cancel(nil)
		return nil, err
	}
	body.timer.Stop()
	body.ReadCloser = r
	return body, nil
}

// stallingBody gives a response up that sends nothing for too long.
type stallingBody struct {
	io.ReadCloser
	timer  *time.Timer
	ctx    context.Context //nolint:containedctx // of the response
	cancel context.CancelCauseFunc
	name   string
	most   time.Duration
}

// explain says that it was given up, if so.
func (b *stallingBody) explain(err error) error {
	if errors.Is(context.Cause(b.ctx), errStalled) {
		return fmt.Errorf("%s: %w (%s): %w", b.name, errStalled, b.most, flox.ErrUnreachable)
	}
	return err
}

// Read is io.Reader.
func (b *stallingBody) Read(p []byte) (int, error) {
	b.timer.Reset(b.most) // who reads may take his time
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	if err != nil && !errors.Is(err, io.EOF) {
		if stalled := b.explain(err); errors.Is(stalled, errStalled) {
			return n, stalled
		}
		err = fmt.Errorf("%s: %w: %w", b.name, err, flox.ErrUnreachable)
	}
	return n, err
}

// Close is io.Closer.
func (b *stallingBody) Close() error {
	b.timer.Stop()
	b.cancel(nil)
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
