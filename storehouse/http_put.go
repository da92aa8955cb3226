package storehouse

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"path"
	"slices"
	"strings"

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
		drain(r.Body)
		c.fail(w, r, err)
		return
	}
	file := r.PathValue("file")
	body := &hashed{r: r.Body, h: sha256.New()}
	nar, err := nix.Decompressor(compressionOf(file), body, maxNarBytes)
	if err == nil {
		_, err = c.Stage(r.Context(), publisher, "nar/"+file, &checked{ReadCloser: nar, body: body, file: file})
		err = errors.Join(err, nar.Close())
	}
	if err != nil {
		drain(r.Body)
		c.fail(w, r, fmt.Errorf("upload of nar/%s: %w", file, err))
		return
	}
	w.WriteHeader(http.StatusCreated)
}

// compressionOf guesses from the extension; the decompressor looks at the bytes.
func compressionOf(file string) string {
	switch path.Ext(file) {
	case ".xz":
		return "xz"
	case ".zst":
		return "zstd"
	case ".bz2":
		return "bzip2"
	case ".gz":
		return "gzip"
	case ".br":
		return "br"
	case ".lz4":
		return "lz4"
	}
	return "none"
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
		drain(r.Body)
		c.fail(w, r, err)
		return
	}
	file := r.PathValue("file")
	hash, ext, _ := strings.Cut(file, ".")
	switch {
	case ext == "ls" && flox.ValidHashPart(hash):
		drain(r.Body)
		w.WriteHeader(http.StatusOK)
	case ext == "narinfo" && flox.ValidHashPart(hash):
		if err := c.putInfo(r, hash, publisher); err != nil {
			c.fail(w, r, fmt.Errorf("upload of %s: %w", file, err))
			return
		}
		w.WriteHeader(http.StatusOK)
	default:
		drain(r.Body)
		c.fail(w, r, fmt.Errorf("upload of %s: want HASH.narinfo, HASH.ls or nar/…: %w", file, flox.ErrBadInput))
	}
}

func (c *httpCache) putInfo(r *http.Request, hash, publisher string) error {
	b, err := io.ReadAll(io.LimitReader(r.Body, nix.MaxNarInfo+1))
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
		return c.resign(r, n)
	}
	_, _, err = c.Commit(r.Context(), key, &n.Info, publisher)
	if errors.Is(err, flox.ErrNotFound) {
		return fmt.Errorf("its NAR %s was not uploaded before, or waited too long; upload it first, then the narinfo: %w", n.URL, errors.Join(err, flox.ErrBadInput))
	}
	return err
}

// resign answers a narinfo of ours that comes back, which is how stock Nix adds
// signatures to a path.
func (c *httpCache) resign(r *http.Request, n *nix.NarInfo) error {
	info, err := c.Info(r.Context(), n.Info.Path.HashPart())
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
