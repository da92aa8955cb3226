// Package ledger writes small store paths into a storehouse of several servers
// through its HTTP door, as stock Nix does, and remembers what was acknowledged:
// that must be there for ever, the same on every server.
//
// A writer that a server fails goes on at the next one and tries until its
// context ends; a refusal is an error. The package must not know what is done to
// the servers meanwhile.
package ledger

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
	"github.com/floxctl/flox/nix"
)

const (
	// patience is how long one server is given to answer a request.
	patience = 5 * time.Second
	// longPatience is the same for a Patient ledger.
	longPatience = 2 * time.Minute
	// maxFailures is how many failures are remembered.
	maxFailures = 10000
	// retryPause is what a writer waits before it goes to the next server.
	retryPause = 20 * time.Millisecond
	// checkers is how many paths of one server are checked at once.
	checkers = 8
	// Most files have at most smallBytes, so that they are written fast, every
	// largeEvery'th has up to maxBytes, which are several chunks.
	smallBytes, maxBytes = 8 << 10, 256 << 10
	largeEvery           = 16
)

// Path is one that was acknowledged.
type Path struct {
	Info  flox.PathInfo
	File  string // its only file
	Begun time.Time
	Acked time.Time

	content string // what it is made of
}

// Config is what a Ledger needs.
type Config struct {
	StoreDir flox.StoreDir
	Token    string              // of uploads
	Client   *netns.Host         // where the writers and readers are
	Servers  []*hosts.Storehouse // in the order in which they are tried
	// Prefix begins the names of paths; another ledger of the same storehouse must
	// have another one.
	Prefix string
}

// Ledger is a set of acknowledged paths.
type Ledger struct {
	cfg     Config
	clients []*http.Client
	next    atomic.Int64
	patient atomic.Bool

	mu     sync.Mutex
	acked  []Path
	failed []Failure
}

// Failure is a write that a server did not take.
type Failure struct {
	Server     int
	Begun, End time.Time
	Err        error
}

// New makes an empty one. Close must be called.
func New(cfg Config) *Ledger {
	l := &Ledger{cfg: cfg}
	for range cfg.Servers {
		l.clients = append(l.clients, &http.Client{Transport: &http.Transport{
			DialContext: cfg.Client.Dial, MaxIdleConnsPerHost: checkers, DisableCompression: true,
		}})
	}
	return l
}

// Close ends idle connections.
func (l *Ledger) Close() {
	for _, c := range l.clients {
		c.CloseIdleConnections()
	}
}

// Acked is everything acknowledged from number from on, in the order in which it was.
func (l *Ledger) Acked(from int) []Path {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.acked[from:])
}

// Len is how many paths were acknowledged.
func (l *Ledger) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.acked)
}

// Failures are the writes that servers did not take, the first maxFailures: a
// writer went on at another server then.
func (l *Ledger) Failures() []Failure {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.failed)
}

// Patient has writers wait as long for an answer as stock clients do, rather than
// go to the next server soon. It is for servers that end: one that is cut off
// never says so.
func (l *Ledger) Patient(on bool) { l.patient.Store(on) }

// After waits for a write that was begun after a moment and gives when it was
// acknowledged.
func (l *Ledger) After(ctx context.Context, moment time.Time) (time.Time, error) {
	for {
		l.mu.Lock()
		i := slices.IndexFunc(l.acked, func(p Path) bool { return p.Begun.After(moment) })
		var at time.Time
		if i >= 0 {
			at = l.acked[i].Acked
		}
		l.mu.Unlock()
		if i >= 0 {
			return at, nil
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return at, fmt.Errorf("no write is acknowledged any more: %w", err)
		}
	}
}

// Write runs so many writers until ctx ends, each with a pause between two
// writes. A path names the one before as a reference.
func (l *Ledger) Write(ctx context.Context, writers int, rest time.Duration) error {
	group, ctx := errgroup.WithContext(ctx)
	for w := range writers {
		group.Go(func() error {
			var before []flox.StorePath
			for ctx.Err() == nil {
				p, err := l.write(ctx, w, before)
				if ctx.Err() != nil {
					return nil // it may be valid, nobody was told
				}
				if err != nil {
					return err
				}
				before = []flox.StorePath{p.Info.Path}
				_ = pause(ctx, rest) // its error is ctx's
			}
			return nil
		})
	}
	return group.Wait()
}

// write writes one path and remembers that it was acknowledged.
func (l *Ledger) write(ctx context.Context, first int, refs []flox.StorePath) (Path, error) {
	p, nar, err := l.make(refs)
	if err != nil {
		return p, err
	}
	for i := first; ; i++ {
		wait := patience
		if l.patient.Load() {
			wait = longPatience
		}
		begun := time.Now()
		limited, cancel := context.WithTimeout(ctx, wait)
		err = l.put(limited, i%len(l.clients), &p, nar)
		cancel()
		var no *refused
		if err == nil || errors.As(err, &no) || ctx.Err() != nil {
			break
		}
		l.fail(Failure{i % len(l.clients), begun, time.Now(), err})
		if pause(ctx, retryPause) != nil {
			break
		}
	}
	if err != nil {
		return p, fmt.Errorf("write %s: %w", p.Info.Path, err)
	}
	p.Acked = time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.acked = append(l.acked, p)
	return p, nil
}

func (l *Ledger) fail(f Failure) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.failed) < maxFailures {
		l.failed = append(l.failed, f)
	}
}

// make makes a path of random content that can be made again of a few bytes.
func (l *Ledger) make(refs []flox.StorePath) (p Path, nar []byte, err error) {
	name := fmt.Sprintf("%s-%d", l.cfg.Prefix, l.next.Add(1))
	p = Path{content: name, Begun: time.Now()}
	if nar, err = narOf(name); err != nil {
		return p, nil, err
	}
	hash := sha256.Sum256([]byte(name))
	store := flox.StorePath(nix.EncodeBase32(nix.CompressHash(hash[:], 20)) + "-" + name)
	p.Info = flox.PathInfo{Path: store, NarHash: sha256.Sum256(nar), NarSize: uint64(len(nar)), References: refs}
	p.File = l.cfg.StoreDir.Join(store) + "/file"
	return p, nar, nil
}

// Content is what the path's file holds.
func (p Path) Content() []byte {
	seed := sha256.Sum256([]byte(p.content))
	rng := rand.NewChaCha8(seed)
	most := uint64(smallBytes)
	if seed[0]%largeEvery == 0 {
		most = maxBytes
	}
	b := make([]byte, 1+rng.Uint64()%most)
	_, _ = rng.Read(b) // never fails
	return b
}

func narOf(name string) ([]byte, error) {
	content := Path{content: name}.Content()
	var b bytes.Buffer
	w := nix.NewNarWriter(&b)
	err := w.Entry(nix.NarEntry{Kind: flox.Directory})
	if err == nil {
		err = w.Entry(nix.NarEntry{Path: "file", Kind: flox.Regular, Size: uint64(len(content))})
	}
	if err == nil {
		_, err = w.Write(content)
	}
	err = errors.Join(err, w.Close()) // it holds some back until then
	return b.Bytes(), err
}

// refused is an answer that another server would give as well.
type refused struct{ status, words string }

func (r *refused) Error() string { return r.status + ": " + r.words }

// put uploads a NAR and its path info to one server.
func (l *Ledger) put(ctx context.Context, server int, p *Path, nar []byte) error {
	name := "nar/" + nix.EncodeBase32(p.Info.NarHash[:]) + ".nar"
	info := nix.NarInfo{Info: p.Info, URL: name, Compression: "none"}
	for _, upload := range []struct {
		name string
		body []byte
	}{{name, nar}, {p.Info.Path.HashPart() + ".narinfo", info.Marshal(l.cfg.StoreDir)}} {
		if _, err := l.do(ctx, server, http.MethodPut, upload.name, bytes.NewReader(upload.body)); err != nil {
			return err
		}
	}
	return nil
}

// do makes one request to a server and gives the body of its answer.
func (l *Ledger) do(ctx context.Context, server int, method, name string, body io.Reader) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, l.cfg.Servers[server].URL()+"/"+name, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+l.cfg.Token)
	resp, err := l.clients[server].Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	switch {
	case resp.StatusCode >= http.StatusInternalServerError:
		return nil, fmt.Errorf("%s %s: %s: %s", method, name, resp.Status, b)
	case resp.StatusCode >= http.StatusMultipleChoices:
		return nil, &refused{resp.Status, method + " " + name + ": " + strings.TrimSpace(string(b))}
	}
	return b, nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
