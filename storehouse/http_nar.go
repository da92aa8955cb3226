package storehouse

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// getNar serves a NAR we rebuild, nar/<hash part>-<NAR hash>.nar[.zst], and tells
// an uploader by HEAD whether a NAR it is about to send waits here already.
func (c *httpCache) getNar(w http.ResponseWriter, r *http.Request) {
	file := r.PathValue("file")
	name, zstd := strings.CutSuffix(file, ".nar.zst")
	name, plain := strings.CutSuffix(name, ".nar")
	hash, narHash, ok := strings.Cut(name, "-")
	if !ok || zstd == plain || !flox.ValidHashPart(hash) {
		c.headStaged(w, r, file)
		return
	}
	info, err := c.Info(r.Context(), hash)
	if err == nil && nix.EncodeBase32(info.NarHash[:]) != narHash {
		err = fmt.Errorf("nar/%s: the NAR of %s has another hash now: %w", file, info.Path, flox.ErrNotFound)
	}
	if err != nil {
		c.fail(w, r, err)
		return
	}
	m, err := c.open(r.Context(), info)
	if err != nil {
		c.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-nix-nar")
	w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	if zstd {
		c.sendZstd(w, r, m)
		return
	}
	c.sendPlain(w, r, m)
}

// sendZstd sends the stored frames one behind the other: nothing is compressed
// again. A failure in the middle breaks the connection, so that nobody takes
// half a NAR for a whole one.
func (c *httpCache) sendZstd(w http.ResponseWriter, r *http.Request, m *content.Manifest) {
	if r.Method == http.MethodHead {
		return
	}
	if err := m.WriteNarZstd(r.Context(), w, c.stored); err != nil {
		c.abort(r, err)
	}
}

// sendPlain sends the NAR or one range of it.
func (c *httpCache) sendPlain(w http.ResponseWriter, r *http.Request, m *content.Manifest) {
	size := int64(m.NarSize()) //nolint:gosec // a NAR fits
	w.Header().Set("Accept-Ranges", "bytes")
	off, n, err := parseRange(r.Header.Get("Range"), size)
	switch {
	case errors.Is(err, errRange):
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
		http.Error(w, err.Error(), http.StatusRequestedRangeNotSatisfiable)
		return
	case err != nil: // a form we do not serve: the whole, as HTTP allows
		off, n = 0, size
	}
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	if n != size || (off == 0 && r.Header.Get("Range") != "" && err == nil) {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, size))
		w.WriteHeader(http.StatusPartialContent)
	}
	if r.Method == http.MethodHead {
		return
	}
	if err := m.WriteNar(r.Context(), w, c.blocks, off, n); err != nil {
		c.abort(r, err)
	}
}

// abort ends a response that cannot be finished.
func (c *httpCache) abort(r *http.Request, err error) {
	if r.Context().Err() == nil {
		c.log.Warn("NAR not sent whole", "path", r.URL.Path, "error", err)
	}
	panic(http.ErrAbortHandler)
}

var (
	errRange     = errors.New("range not satisfiable")
	errRangeForm = errors.New("range form not served")
)

// parseRange reads a Range header of one range; without one it is the whole.
func parseRange(header string, size int64) (off, n int64, err error) {
	if header == "" {
		return 0, size, nil
	}
	spec, ok := strings.CutPrefix(header, "bytes=")
	first, last, dash := strings.Cut(strings.TrimSpace(spec), "-")
	if !ok || !dash || strings.Contains(spec, ",") {
		return 0, 0, errRangeForm
	}
	if first == "" { // the last so many bytes
		n, err = strconv.ParseInt(last, 10, 64)
		if err != nil || n < 0 {
			return 0, 0, errRangeForm
		}
		n = min(n, size)
		if n == 0 {
			return 0, 0, fmt.Errorf("%s of %d bytes: %w", header, size, errRange)
		}
		return size - n, n, nil
	}
	off, err = strconv.ParseInt(first, 10, 64)
	if err != nil || off < 0 {
		return 0, 0, errRangeForm
	}
	end := size - 1
	if last != "" {
		if end, err = strconv.ParseInt(last, 10, 64); err != nil || end < off {
			return 0, 0, errRangeForm
		}
	}
	if off >= size {
		return 0, 0, fmt.Errorf("%s of %d bytes: %w", header, size, errRange)
	}
	return off, min(end, size-1) - off + 1, nil
}

// headStaged answers an uploader who asks whether a NAR is here already. Whoever
// has no token, or asks for the bytes of a staged NAR, gets "not found".
func (c *httpCache) headStaged(w http.ResponseWriter, r *http.Request, file string) {
	publisher, err := c.publisher(r)
	if err == nil && r.Method == http.MethodHead {
		if _, err = c.Staged(publisher, "nar/"+file); err == nil {
			w.WriteHeader(http.StatusOK)
			return
		}
	}
	c.fail(w, r, fmt.Errorf("nar/%s: want nar/HASH-NARHASH.nar or .nar.zst, as the narinfo says: %w", file, flox.ErrNotFound))
}

// drain reads what is left of a refused upload, up to a bound, so that the client
// gets to read the answer.
func drain(r io.Reader) { _, _ = io.CopyN(io.Discard, r, 1<<20) }
