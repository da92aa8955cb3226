package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// cachePriority is what nix-cache-info says; lower is asked first
// (cache.nixos.org says 40).
const cachePriority = 30

// manifestPages bounds the memory the cache's readers take for decoded manifests.
const manifestPages = 64 << 20

// maxDownloads is how many NARs are sent at once, each from about 12 MiB of
// memory; other readers wait.
const maxDownloads = 128

// maxListings is how many file listings are made and sent at once, half of them for
// one address: each is held whole, a few hundred bytes for every file of a path.
const maxListings = 8

// clientStall is how long a client may neither send nor take a byte before it is
// given up.
const clientStall = 2 * time.Minute

// leftoverStall is the same for what is left of a request that was answered.
const leftoverStall = 5 * time.Second

// backend is what the binary cache needs of a Server.
type backend interface {
	Info(ctx context.Context, hashPart string) (*flox.PathInfo, error)
	Stage(ctx context.Context, publisher, key string, nar io.Reader) (*Staged, error)
	Staged(publisher, key string) (*Staged, error)
	NarFile(ctx context.Context, name string) (*flox.PathInfo, error)
	Commit(ctx context.Context, key string, info *flox.PathInfo, publisher string) (*flox.PathInfo, bool, error)
	CheckToken(token string) (publisher string, err error)
	PublicKey() string // of our signatures
	Used(ctx context.Context, hashParts ...string) error
	Reading(ctx context.Context, info *flox.PathInfo) (done func(), err error)
}

// httpCache is the binary cache stock Nix speaks to, for reading and writing
// (Nix 2.8 src/libstore/http-binary-cache-store.cc). NARs are rebuilt from
// chunks; nothing is kept as a NAR.
type httpCache struct {
	backend
	built  madeHere
	dir    flox.StoreDir
	name   string
	blocks flox.Blocks
	stored content.StoredBlock
	pages  *content.PageCache
	log    *slog.Logger

	mux       *http.ServeMux
	uploads   *shares       // NARs that are taken in at once
	downloads *shares       // and sent
	listings  *shares       // that are made at once
	maxNar    uint64        // most bytes of an uploaded NAR, unpacked
	stall     time.Duration // how long a client may neither send nor take a byte
}

// newHTTP makes the handler of the binary cache.
func newHTTP(b interface {
	backend
	madeHere
}, cfg Config, blocks flox.Blocks, stored content.StoredBlock,
) *httpCache {
	mux := http.NewServeMux()
	c := &httpCache{
		backend: b, built: b, dir: cfg.StoreDir, name: cfg.Name, blocks: blocks, stored: stored,
		pages: content.NewPageCache(manifestPages), log: cfg.Log,
		mux: mux, uploads: newShares(maxUploads, maxUploads/2), downloads: newShares(maxDownloads, maxDownloads/2),
		listings: newShares(maxListings, maxListings/2), maxNar: maxNarBytes, stall: clientStall,
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	mux.HandleFunc("GET /{$}", c.welcome)
	mux.HandleFunc("GET /nix-cache-info", c.cacheInfo)
	mux.HandleFunc("GET /{file}", c.getFile)
	mux.HandleFunc("PUT /{file}", c.putFile)
	mux.HandleFunc("GET /nar/{file}", c.getNar)
	mux.HandleFunc("PUT /nar/{file}", c.putNar)
	mux.HandleFunc("GET /log/{drv}", c.getLog)
	mux.HandleFunc("GET /realisations/{id}", c.getRealisation)
	mux.HandleFunc("/", c.other)
	return c
}

// ServeHTTP implements http.Handler.
func (c *httpCache) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	conn := http.NewResponseController(w)
	// What is buffered goes out behind us.
	defer func() { _ = conn.SetWriteDeadline(time.Now().Add(c.stall + leftoverStall)) }()
	if r.ContentLength != 0 {
		// net/http reads what a handler leaves of a body, and would wait for it for ever.
		_ = conn.SetReadDeadline(time.Now().Add(c.stall)) // not every connection has one
		defer func() { _ = conn.SetReadDeadline(time.Now().Add(min(c.stall, leftoverStall))) }()
	}
	c.mux.ServeHTTP(&patient{w, conn, c.stall}, r)
}

// patient gives up on a client that takes nothing of the answer.
type patient struct {
	http.ResponseWriter
	conn  *http.ResponseController
	stall time.Duration
}

// Write implements io.Writer.
func (p *patient) Write(b []byte) (int, error) {
	_ = p.conn.SetWriteDeadline(time.Now().Add(p.stall)) // not every connection has one
	return p.ResponseWriter.Write(b)
}

// Unwrap is for http.ResponseController.
func (p *patient) Unwrap() http.ResponseWriter { return p.ResponseWriter }

// welcome is for the person who opens the URL in a browser.
func (c *httpCache) welcome(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = fmt.Fprintf(w, `This is %s, a flox storehouse: a Nix binary cache for %s.

Read from it with stock Nix:
  nix-store -r PATH --option substituters URL --option trusted-public-keys %s
Write to it with stock Nix (the token is in the storehouse's state directory, upload-token):
  echo "machine HOST password TOKEN" > netrc
  nix copy --to URL --option netrc-file $PWD/netrc PATH
`, c.name, c.dir, c.PublicKey())
}

// other answers what a binary cache may have and this one has not.
func (c *httpCache) other(w http.ResponseWriter, r *http.Request) {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodPut:
		c.refuse(w, r, maxUnproven, fmt.Errorf("%s: this cache has nix-cache-info, HASH.narinfo, HASH.ls, nar/…, and of its own builds log/… and realisations/…; it takes in HASH.narinfo and nar/…: %w",
			r.URL.Path, flox.ErrNotFound))
	default:
		w.Header().Set("Allow", "GET, HEAD, PUT")
		http.Error(w, r.Method+" is not served here: want GET, HEAD or PUT", http.StatusMethodNotAllowed)
	}
}

func (c *httpCache) cacheInfo(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/x-nix-cache-info")
	_, _ = fmt.Fprintf(w, "StoreDir: %s\nWantMassQuery: 1\nPriority: %d\n", c.dir, cachePriority)
}

// getFile serves <hash>.narinfo and <hash>.ls.
func (c *httpCache) getFile(w http.ResponseWriter, r *http.Request) {
	file := r.PathValue("file")
	hash, ext, _ := strings.Cut(file, ".")
	if !flox.ValidHashPart(hash) || (ext != "narinfo" && ext != "ls") {
		c.fail(w, r, fmt.Errorf("%s: want HASH.narinfo, HASH.ls, nar/… or nix-cache-info: %w", file, flox.ErrNotFound))
		return
	}
	info, err := c.Info(r.Context(), hash)
	if err == nil {
		err = c.Used(r.Context(), hash)
	}
	if err != nil {
		c.fail(w, r, err)
		return
	}
	if ext == "narinfo" {
		c.narInfo(w, info)
		return
	}
	if err := c.listing(w, r, info); err != nil {
		c.fail(w, r, err)
	}
}

// narInfo describes the NAR as we serve it: zstd made of the stored frames. Its
// size and hash are not known before it is sent, so they are left out, as Nix
// allows.
func (c *httpCache) narInfo(w http.ResponseWriter, info *flox.PathInfo) {
	n := nix.NarInfo{Info: *info, URL: "nar/" + narName(info) + ".nar.zst", Compression: "zstd"}
	w.Header().Set("Content-Type", "text/x-nix-narinfo")
	_, _ = w.Write(n.Marshal(c.dir))
}

// narName is the file name of a path's NAR without extension: the hash part finds
// the path, the NAR hash makes the name change with the content.
func narName(info *flox.PathInfo) string {
	return info.Path.HashPart() + "-" + nix.EncodeBase32(info.NarHash[:])
}

func (c *httpCache) listing(w http.ResponseWriter, r *http.Request, info *flox.PathInfo) error {
	leave, err := c.listings.take(r.Context(), clientOf(r))
	if err != nil {
		return err
	}
	defer leave()
	m, err := c.open(r.Context(), info)
	if err != nil {
		return err
	}
	l, err := m.Listing(r.Context())
	if err != nil {
		return err
	}
	b, err := nix.MarshalListing(l)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(b)
	return nil
}

func (c *httpCache) open(ctx context.Context, info *flox.PathInfo) (*content.Manifest, error) {
	m, err := c.pages.Open(ctx, info.Manifest, c.blocks)
	if errors.Is(err, flox.ErrNotFound) {
		// Not wrapped: the path is there, its content is what should be.
		return nil, fmt.Errorf("the manifest of %s is lost: %v", info.Path, err) //nolint:errorlint // see above
	}
	if err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", info.Path, err)
	}
	return m, nil
}

// fail answers with the status of the error and its text, which says what to do.
func (c *httpCache) fail(w http.ResponseWriter, r *http.Request, err error) {
	status := api.HTTPStatus(err)
	if errors.Is(err, errNoToken) {
		w.Header().Set("WWW-Authenticate", `Basic realm="flox storehouse: the upload token as password"`)
		status = http.StatusUnauthorized
	}
	if status >= http.StatusInternalServerError {
		c.log.Warn("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	http.Error(w, err.Error(), status)
}
