package storehouse

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// maxNarBytes bounds one uploaded NAR, unpacked: what compresses well must not
// keep a core busy for ever.
const maxNarBytes = 256 << 30

// errNoToken: an upload without a token, or with a wrong one.
var errNoToken = errors.New("uploads need the storehouse's token: it is in the file upload-token of the storehouse's state directory; " +
	"put \"machine HOST password TOKEN\" into a netrc file and pass --option netrc-file FILE")

// publisher authenticates an upload: Bearer, or Basic with the token as
// password, which is what netrc gives.
func (c *httpCache) publisher(r *http.Request) (string, error) {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		_, token, ok = r.BasicAuth()
	}
	if !ok || token == "" {
		return "", errNoToken
	}
	publisher, err := c.CheckToken(token)
	if errors.Is(err, flox.ErrUnreachable) {
		return "", err // nothing is wrong with the token
	}
	if err != nil {
		return "", fmt.Errorf("%w: %w", errNoToken, err)
	}
	return publisher, nil
}

// putNar takes in a NAR in any compression Nix writes; its path info follows by
// itself. The file name is the hash of the compressed file, where the client says
// so, and is checked.
func (c *httpCache) putNar(w http.ResponseWriter, r *http.Request) {
	publisher, err := c.publisher(r)
	if err != nil {
		c.refuse(w, r, maxUnproven, err)
		return
	}
	leave, err := c.uploads.take(r.Context(), clientOf(r))
	if err != nil {
		return
	}
	defer leave()
	file := r.PathValue("file")
	if err := c.stageNar(w, r, publisher, file); err != nil {
		c.refuse(w, r, maxRefused, fmt.Errorf("upload of nar/%s: %w", file, err))
		return
	}
	w.WriteHeader(http.StatusCreated)
}

func (c *httpCache) stageNar(w http.ResponseWriter, r *http.Request, publisher, file string) error {
	body := &hashed{r: c.body(w, r), h: sha256.New()}
	head := bufio.NewReaderSize(body, len(narMagic))
	nar, err := nix.Decompressor(compressionOf(file, head), head, c.maxNar)
	if err != nil {
		return err
	}
	_, err = c.Stage(r.Context(), publisher, "nar/"+file, &checked{ReadCloser: nar, body: body, file: file})
	return errors.Join(err, nar.Close())
}

// maxUnproven is how much of an upload is read before it is refused for want of
// a token.
const maxUnproven = 64 << 20

// maxRefused is the same for an upload with a token.
const maxRefused = 4 << 30

// refuse answers an upload with an error. A client that is still sending when
// the connection closes may never see the answer, so up to most bytes are read
// first, unless the client waits to be told to send.
func (c *httpCache) refuse(w http.ResponseWriter, r *http.Request, most int64, err error) {
	waits := r.Header.Get("Expect") != "" && most <= maxUnproven
	if !waits && !errors.Is(err, errBrokenOff) {
		_, _ = io.CopyN(io.Discard, c.body(w, r), most)
	}
	c.fail(w, r, err)
}

// body is the request's body, given up when it stalls.
func (c *httpCache) body(w http.ResponseWriter, r *http.Request) io.Reader {
	return &uploadBody{r: r, conn: http.NewResponseController(w), stall: c.stall}
}

// errBrokenOff: the client did not send all it announced.
var errBrokenOff = fmt.Errorf("the upload broke off, send it again: %w", flox.ErrBadInput)

// uploadBody tells a client's failure to send from ours to take in.
type uploadBody struct {
	r     *http.Request
	conn  *http.ResponseController
	stall time.Duration
	n     int64 // bytes read
}

// Read implements io.Reader.
func (b *uploadBody) Read(p []byte) (int, error) {
	_ = b.conn.SetReadDeadline(time.Now().Add(b.stall)) // not every connection has one
	n, err := b.r.Body.Read(p)
	b.n += int64(n)
	if err == nil {
		return n, nil
	}
	if errors.Is(err, io.EOF) {
		// A deadline left behind would end the request while we work on it.
		_ = b.conn.SetReadDeadline(time.Time{})
		return n, io.EOF
	}
	// Not wrapped: behind it, an early end would be taken for that of the NAR.
	return n, fmt.Errorf("%d of %s bytes came, then: %v: %w", b.n, b.announced(), err, errBrokenOff) //nolint:errorlint // see above
}

func (b *uploadBody) announced() string {
	if b.r.ContentLength < 0 {
		return "an unknown number of"
	}
	return strconv.FormatInt(b.r.ContentLength, 10)
}

// narMagic is how a NAR begins.
const narMagic = "\x0d\x00\x00\x00\x00\x00\x00\x00nix-archive-1"

// compressionOf tells a plain NAR and brotli, which cannot be told from its
// bytes; the decompressor looks at the bytes for all others, whatever the name
// says: Nix gives gzip and others no extension.
func compressionOf(file string, head *bufio.Reader) string {
	b, _ := head.Peek(len(narMagic)) // an error comes again
	ext := path.Ext(file)
	switch {
	case string(b) == narMagic:
		return "none"
	case ext == ".br":
		return "br"
	case ext == ".nar":
		return "unnamed"
	}
	return strings.TrimPrefix(ext, ".")
}

// hashed hashes what is read.
type hashed struct {
	r io.Reader
	h hash.Hash
}

// Read implements io.Reader.
func (h *hashed) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.h.Write(p[:n])
	return n, err
}

// checked compares, at the end of the NAR, the hash of the compressed file with
// the one in its name.
type checked struct {
	io.ReadCloser
	body *hashed
	file string
	done error
}

// Read implements io.Reader.
func (c *checked) Read(p []byte) (int, error) {
	if c.done != nil {
		return 0, c.done
	}
	n, err := c.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) {
		err = c.check()
		c.done = err
	}
	return n, err
}

func (c *checked) check() error {
	if _, err := io.Copy(io.Discard, c.body); err != nil {
		return err
	}
	name, _, _ := strings.Cut(c.file, ".")
	want, err := nix.DecodeBase32(name)
	if err != nil || len(want) != sha256.Size {
		return io.EOF // named otherwise: the narinfo's NAR hash is what counts
	}
	if got := c.body.h.Sum(nil); string(got) != string(want) {
		return fmt.Errorf("the file hashes to %s, its name says %s: it was damaged on the way, send it again: %w",
			nix.EncodeBase32(got), name, flox.ErrCorrupt)
	}
	return io.EOF
}

// putFile takes <hash>.narinfo, which makes the path valid, and <hash>.ls, which
// we make ourselves from the content.
func (c *httpCache) putFile(w http.ResponseWriter, r *http.Request) {
	publisher, err := c.publisher(r)
	if err != nil {
		c.refuse(w, r, maxUnproven, err)
		return
	}
	file := r.PathValue("file")
	hash, ext, _ := strings.Cut(file, ".")
	switch {
	case ext == "ls" && flox.ValidHashPart(hash):
		_, err = io.CopyN(io.Discard, c.body(w, r), maxRefused)
		if errors.Is(err, io.EOF) {
			err = nil
		}
	case ext == "narinfo" && flox.ValidHashPart(hash):
		err = c.putInfo(r.Context(), c.body(w, r), hash, publisher)
	default:
		err = fmt.Errorf("want HASH.narinfo, HASH.ls or nar/…: %w", flox.ErrBadInput)
	}
	if err != nil {
		c.refuse(w, r, maxRefused, fmt.Errorf("upload of %s: %w", file, err))
		return
	}
	w.WriteHeader(http.StatusOK)
}

func (c *httpCache) putInfo(ctx context.Context, body io.Reader, hash, publisher string) error {
	b, err := io.ReadAll(io.LimitReader(body, nix.MaxNarInfo+1))
	if err != nil {
		return err
	}
	n, err := nix.ParseNarInfo(c.dir, b)
	if err != nil {
		return err
	}
	if n.Info.Path.HashPart() != hash {
		return fmt.Errorf("it describes %s: %w", n.Info.Path, flox.ErrBadInput)
	}
	key := strings.TrimPrefix(n.URL, "/")
	if strings.HasPrefix(key, "nar/"+narName(&n.Info)) { // our own narinfo again, with signatures added
		return c.resign(ctx, n)
	}
	_, _, err = c.Commit(ctx, key, &n.Info, publisher)
	if errors.Is(err, flox.ErrNotFound) {
		return fmt.Errorf("its NAR %s was not uploaded before, or waited too long; upload it first, then the narinfo: %w", n.URL, errors.Join(err, flox.ErrBadInput))
	}
	return err
}

// resign answers a narinfo of ours that comes back, which is how stock Nix adds
// signatures to a path.
func (c *httpCache) resign(ctx context.Context, n *nix.NarInfo) error {
	info, err := c.Info(ctx, n.Info.Path.HashPart())
	if err != nil {
		return err
	}
	for _, sig := range n.Info.Signatures {
		if !slices.Contains(info.Signatures, sig) {
			return fmt.Errorf("%s is valid already; signatures are added before a path is uploaded (nix store sign, then nix copy): %w", info.Path, flox.ErrBadInput)
		}
	}
	return nil
}
