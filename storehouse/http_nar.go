package storehouse

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/andybalholm/brotli"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// getNar serves a NAR we rebuild: nar/<hash part>-<NAR hash>.nar[.zst] as our
// narinfo says, or the name it was uploaded under. It tells an uploader by HEAD
// whether a NAR it is about to send waits here already.
func (c *httpCache) getNar(w http.ResponseWriter, r *http.Request) {
	file := r.PathValue("file")
	name, ext, _ := strings.Cut(file, ".nar")
	hash, narHash, ok := strings.Cut(name, "-")
	if !ok || (ext != "" && ext != ".zst") || !flox.ValidHashPart(hash) {
		c.getUploaded(w, r, file)
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
	c.send(w, r, info, ext)
}

// send sends a path's NAR, compressed as the extension says: "", ".zst", ".br".
func (c *httpCache) send(w http.ResponseWriter, r *http.Request, info *flox.PathInfo, ext string) {
	leave, err := c.downloads.take(r.Context(), clientOf(r))
	if err != nil {
		return
	}
	defer leave()
	done, err := c.Reading(r.Context(), info)
	if err != nil {
		c.fail(w, r, err)
		return
	}
	defer done()
	m, err := c.open(r.Context(), info)
	if err != nil {
		c.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-nix-nar")
	w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	switch ext {
	case "":
		c.sendPlain(w, r, m)
	case ".br":
		c.sendBrotli(w, r, m)
	default:
		c.sendZstd(w, r, m)
	}
}

// getUploaded serves a NAR under the name a client uploaded it by. It is another
// file than the one uploaded, and no client notices: Nix takes "none" and brotli
// at their word and looks at the bytes for every other compression.
func (c *httpCache) getUploaded(w http.ResponseWriter, r *http.Request, file string) {
	info, err := c.NarFile(r.Context(), file)
	if errors.Is(err, flox.ErrNotFound) {
		c.headStaged(w, r, file)
		return
	}
	if err != nil {
		c.fail(w, r, err)
		return
	}
	ext := ".zst"
	switch {
	case strings.HasSuffix(file, ".br"):
		ext = ".br"
	case file == nix.EncodeBase32(info.NarHash[:])+".nar": // gzip has no extension either
		ext = ""
	}
	c.send(w, r, info, ext)
}

// sendBrotli compresses the NAR on the way: fast rather than small.
func (c *httpCache) sendBrotli(w http.ResponseWriter, r *http.Request, m *content.Manifest) {
	if r.Method == http.MethodHead {
		return
	}
	b := brotli.NewWriterLevel(w, 1)
	err := m.WriteNar(r.Context(), b, c.blocks, 0, -1)
	if err == nil {
		err = b.Close()
	}
	if err != nil {
		c.abort(r, err)
	}
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
	header := r.Header.Get("Range")
	if r.Method != http.MethodGet || r.Header.Get("If-Range") != "" {
		header = "" // ranges are of GET (RFC 9110 14.2), and we give no validator to compare
	}
	off, n, err := parseRange(header, size)
	switch {
	case errors.Is(err, errRange):
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
		http.Error(w, err.Error(), http.StatusRequestedRangeNotSatisfiable)
		return
	case err != nil: // a form we do not serve: the whole, as HTTP allows
		header, off, n = "", 0, size
	}
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	if header != "" {
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
		n, err = parseSize(last)
		if err != nil {
			return 0, 0, errRangeForm
		}
		n = min(n, size)
		if n == 0 {
			return 0, 0, fmt.Errorf("%s of %d bytes: %w", header, size, errRange)
		}
		return size - n, n, nil
	}
	off, err = parseSize(first)
	if err != nil {
		return 0, 0, errRangeForm
	}
	end := size - 1
	if last != "" {
		if end, err = parseSize(last); err != nil || end < off {
			return 0, 0, errRangeForm
		}
	}
	if off >= size {
		return 0, 0, fmt.Errorf("%s of %d bytes: %w", header, size, errRange)
	}
	return off, min(end, size-1) - off + 1, nil
}

// parseSize reads digits only.
func parseSize(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err //nolint:gosec // 63 bits
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
