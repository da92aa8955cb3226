// Package tarball unpacks published tarballs of Nix expressions, such as nixpkgs' channels,
// into a directory of its own, whatever they hold.
//
// It knows nothing of channels, stores and the network.
package tarball

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Nixpkgs is where the newest nixpkgs that passed its tests is published.
const Nixpkgs = "https://channels.nixos.org/nixos-unstable/nixexprs.tar.xz"

const (
	maxURL   = 400  // bytes
	maxName  = 4096 // bytes of a name in a tarball
	maxDepth = 64   // directories in each other
)

// CheckURL refuses what is no place to fetch a tarball from. ErrBadInput.
func CheckURL(text string) error {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		err = errors.Unwrap(err) // the rest of it is the URL
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		err = errors.New("want http://… or https://…")
	case u.User != nil:
		return fmt.Errorf("URL %.80q: it must not have a password, which everybody would see: %w", u.Redacted(), flox.ErrBadInput)
	case u.Fragment != "":
		err = errors.New("want it without #…")
	case len(text) > maxURL:
		err = fmt.Errorf("%d bytes, want at most %d", len(text), maxURL)
	}
	if err != nil {
		return fmt.Errorf("URL %.80q: %w: %w", text, err, flox.ErrBadInput)
	}
	return nil
}

// Limits bound what is unpacked.
type Limits struct {
	Files int    // with directories and links
	Bytes uint64 // of files
}

// Unpack unpacks a tarball, compressed or not, into an empty directory, and gives the
// directory in it that has the expressions: the only one at its top, or dir itself.
// Nothing of it is outside or leads there, or it is refused; of permissions only
// executability stays. Errors: ErrBadInput with the name of what is wrong, else those of r
// and the disk; what was unpacked until then stays.
func Unpack(ctx context.Context, r io.Reader, dir string, limits Limits) (top string, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	in := bufio.NewReaderSize(&stopping{ctx, r}, 64<<10)
	head, err := in.Peek(262)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	compression := "of a tarball" // it shows itself
	if len(head) == 262 && string(head[257:]) == "ustar" {
		compression = "none"
	}
	plain, err := nix.Decompressor(compression, in, limits.Bytes+uint64(limits.Files)*2048) //nolint:gosec // not negative
	if err != nil {
		return "", err
	}
	u := &unpacking{root: root, limits: limits, dirs: map[string]bool{".": true}}
	err = errors.Join(u.all(ctx, tar.NewReader(&stopping{ctx, plain})), plain.Close())
	if err != nil {
		return "", err
	}
	below, err := u.finish()
	return filepath.Join(dir, below), err
}

// stopping reads until a context ends.
type stopping struct {
	ctx context.Context //nolint:containedctx // an io.Reader has no other way to it
	r   io.Reader
}

// Read implements io.Reader.
func (s *stopping) Read(p []byte) (int, error) {
	if s.ctx.Err() != nil {
		return 0, context.Cause(s.ctx)
	}
	return s.r.Read(p)
}

type unpacking struct {
	root   *os.Root
	limits Limits
	files  int
	bytes  uint64
	dirs   map[string]bool // that were made
	tops   []string        // at most two
	links  []link
}

type link struct{ at, target string }

func refused(name, format string, args ...any) error {
	return fmt.Errorf("tarball: %.200q: %s: %w", name, fmt.Sprintf(format, args...), flox.ErrBadInput)
}

func (u *unpacking) all(ctx context.Context, r *tar.Reader) error {
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return ctx.Err()
		}
		if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("tarball: it is damaged or cut short: %w: %w", err, flox.ErrBadInput)
		}
		if err == nil {
			err = u.entry(h, r)
		}
		if err != nil {
			return err
		}
	}
}

// entry unpacks one entry.
func (u *unpacking) entry(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil // such as git's, with the commit
	}
	name := path.Clean(h.Name)
	switch {
	case name == "." && h.Typeflag == tar.TypeDir:
		return nil
	case len(name) > maxName || strings.Count(name, "/") >= maxDepth:
		return refused(name, "a name of more than %d bytes, or more than %d directories in each other", maxName, maxDepth)
	case name == "." || !filepath.IsLocal(name) || strings.Contains(name, "\x00"):
		return refused(h.Name, "it would be outside of the directory that it is unpacked into")
	}
	if h.Typeflag == tar.TypeDir {
		return u.mkdir(name)
	}
	if err := u.mkdir(path.Dir(name)); err != nil {
		return err
	}
	if err := u.count(name); err != nil {
		return err
	}
	var err error
	switch h.Typeflag {
	case tar.TypeReg:
		err = u.file(name, h, content)
	case tar.TypeSymlink:
		u.links = append(u.links, link{name, h.Linkname})
		err = u.root.Symlink(h.Linkname, name)
	case tar.TypeLink:
		err = u.hardLink(name, path.Clean(h.Linkname))
	default:
		return refused(name, "want files, directories and links only, this is of type %q", h.Typeflag)
	}
	return u.twice(name, err)
}

// twice explains that something is there already.
func (u *unpacking) twice(name string, err error) error {
	if errors.Is(err, iofs.ErrExist) || errors.Is(err, syscall.ENOTDIR) {
		return refused(name, "it, or what it is in, is there already as something else")
	}
	return err
}

// count notes that there is one more.
func (u *unpacking) count(name string) error {
	if u.files++; u.files > u.limits.Files {
		return refused(name, "more than %d files", u.limits.Files)
	}
	if !strings.Contains(name, "/") && len(u.tops) < 2 {
		u.tops = append(u.tops, name)
	}
	return nil
}

// weigh notes that there are so many bytes more.
func (u *unpacking) weigh(name string, size int64) error {
	if u.bytes += uint64(max(size, 0)); size < 0 || u.bytes > u.limits.Bytes { //nolint:gosec // not negative
		return refused(name, "more than %d bytes of files", u.limits.Bytes)
	}
	return nil
}

// mkdir makes a directory with those it is in, unless it is there.
func (u *unpacking) mkdir(name string) error {
	if u.dirs[name] {
		return nil
	}
	if err := u.mkdir(path.Dir(name)); err != nil {
		return err
	}
	if err := u.count(name); err != nil {
		return err
	}
	if err := u.root.Mkdir(name, 0o700); err != nil {
		return u.twice(name, err)
	}
	u.dirs[name] = true
	return nil
}

func (u *unpacking) file(name string, h *tar.Header, content io.Reader) error {
	if err := u.weigh(name, h.Size); err != nil {
		return err
	}
	mode := os.FileMode(0o600)
	if h.Mode&0o100 != 0 {
		mode = 0o700
	}
	f, err := u.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = refused(name, "the tarball is cut short in it")
	}
	return errors.Join(err, f.Close())
}

// hardLink unpacks another name of a file.
func (u *unpacking) hardLink(name, of string) error {
	if !filepath.IsLocal(of) {
		return refused(name, "it is a link to %.200q, outside", of)
	}
	st, err := u.root.Lstat(of)
	if err != nil || !st.Mode().IsRegular() {
		return refused(name, "it is another name of %.200q, which is no file before it", of)
	}
	if err := u.weigh(name, st.Size()); err != nil {
		return err
	}
	return u.root.Link(of, name)
}

// finish gives the directory with the expressions, and looks where links lead.
func (u *unpacking) finish() (top string, err error) {
	if top = "."; len(u.tops) == 1 && u.dirs[u.tops[0]] {
		top = u.tops[0]
	}
	if u.files == 0 {
		return "", fmt.Errorf("tarball: there is nothing in it: %w", flox.ErrBadInput)
	}
	below, err := u.root.OpenRoot(top)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, below.Close()) }()
	for _, l := range u.links {
		at, err := filepath.Rel(top, l.at)
		if err != nil {
			return "", err
		}
		if path.IsAbs(l.target) || !filepath.IsLocal(path.Join(path.Dir(at), l.target)) {
			return "", refused(l.at, "it is a link to %.200q, outside", l.target)
		}
		// What it leads to over other links is known only now.
		if _, err := below.Stat(at); err != nil && !errors.Is(err, iofs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
			return "", refused(l.at, "it is a link to %.200q, which leads outside or around in circles", l.target)
		}
	}
	return top, nil
}
