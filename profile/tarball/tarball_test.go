package tarball

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"

	"github.com/floxctl/flox"
)

// entry is one of a tarball: a file unless it says something else.
type entry struct {
	name, text string
	kind       byte
	mode       int64
}

func tarOf(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Mode: e.mode, Format: tar.FormatPAX}
		switch e.kind {
		case 0, tar.TypeReg:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(e.text))
		case tar.TypeXGlobalHeader:
			h = &tar.Header{Typeflag: e.kind, PAXRecords: map[string]string{"comment": e.text}}
		default:
			h.Linkname = e.text
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(w, e.text); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// compressed gives a tarball in each way that it may be published.
func compressed(t *testing.T, plain []byte) map[string][]byte {
	t.Helper()
	var z, x bytes.Buffer
	zw := gzip.NewWriter(&z)
	xw, err := xz.NewWriter(&x)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []io.WriteCloser{zw, xw} {
		if _, err := w.Write(plain); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return map[string][]byte{"plain": plain, "gzip": z.Bytes(), "xz": x.Bytes()}
}

var usual = Limits{Files: 100, Bytes: 1000}

func unpack(t *testing.T, tarball []byte, limits Limits) (dir, top string, err error) {
	t.Helper()
	dir = t.TempDir()
	top, err = Unpack(t.Context(), bytes.NewReader(tarball), dir, limits)
	return dir, top, err
}

// listOf gives what is in a directory: "NAME" of a file, "NAME*" of an executable one,
// "NAME>TARGET" of a link.
func listOf(t *testing.T, dir string) string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, d iofs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		info, err := d.Info()
		if err == nil && info.Mode()&0o100 != 0 {
			name += "*"
		}
		if d.Type() == os.ModeSymlink {
			target, _ := os.Readlink(path)
			name = strings.TrimSuffix(name, "*") + ">" + target
		}
		all = append(all, name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, " ")
}

// A tarball is unpacked however it is compressed; the only directory at its top is left out.
func TestUnpack(t *testing.T) {
	t.Parallel()
	one := tarOf(t,
		entry{kind: tar.TypeXGlobalHeader, text: "a commit"}, entry{name: "nixos-1/", kind: tar.TypeDir, mode: 0o555}, entry{name: "nixos-1/default.nix", text: "{ }"},
		entry{name: "nixos-1/pkgs/x/builder.sh", text: "exit", mode: 0o755}, entry{name: "nixos-1/again", text: "nixos-1/default.nix", kind: tar.TypeLink},
		entry{name: "nixos-1/here", text: ".", kind: tar.TypeSymlink}, entry{name: "nixos-1/pkgs/up", text: "../default.nix", kind: tar.TypeSymlink},
		entry{name: "nixos-1/pkgs/nowhere", text: "missing/file", kind: tar.TypeSymlink},
	)
	for how, tarball := range compressed(t, one) {
		dir, top, err := unpack(t, tarball, usual)
		if err != nil || top != filepath.Join(dir, "nixos-1") {
			t.Fatalf("%s: %s, %v", how, top, err)
		}
		if got, want := listOf(t, top), "again default.nix here>. pkgs/nowhere>missing/file pkgs/up>../default.nix pkgs/x/builder.sh*"; got != want {
			t.Errorf("%s: %s, want %s", how, got, want)
		}
	}
	for _, several := range [][]entry{{{name: "./default.nix", text: "1"}, {name: "./x/y", text: "2"}}, {{name: "default.nix", text: "1"}}} {
		if dir, top, err := unpack(t, tarOf(t, several...), usual); err != nil || top != dir {
			t.Errorf("without a directory at its top: %s, %v", top, err)
		}
	}
}

// What would be outside, or lead there, is refused, and so is what is too much.
func TestUnpackRefuses(t *testing.T) {
	t.Parallel()
	file := entry{name: "a/f", text: "x"}
	big := strings.Repeat("x", 600)
	for what, c := range map[string]struct {
		entries []entry
		words   string
	}{
		"absolute":                {[]entry{{name: "/etc/f", text: "x"}}, "would be outside"},
		"upwards":                 {[]entry{{name: "a/../../f", text: "x"}}, "would be outside"},
		"upwards dir":             {[]entry{{name: "../x/", kind: tar.TypeDir}}, "would be outside"},
		"absolute link":           {[]entry{file, {name: "a/l", text: "/etc/passwd", kind: tar.TypeSymlink}}, `is a link to "/etc/passwd", outside`},
		"link upwards":            {[]entry{file, {name: "a/l", text: "../../f", kind: tar.TypeSymlink}}, "outside"},
		"link out of the top":     {[]entry{file, {name: "a/l", text: "..", kind: tar.TypeSymlink}}, "outside"},
		"over another link":       {[]entry{file, {name: "a/p/q", text: "..", kind: tar.TypeSymlink}, {name: "a/l", text: "p/q/../..", kind: tar.TypeSymlink}}, "leads outside"},
		"in circles":              {[]entry{file, {name: "a/l", text: "l", kind: tar.TypeSymlink}}, "in circles"},
		"through a link":          {[]entry{{name: "a/l", text: ".", kind: tar.TypeSymlink}, {name: "a/l/f", text: "x"}}, "already as something else"},
		"through a file":          {[]entry{file, {name: "a/f/g", text: "x"}}, "already as something else"},
		"twice":                   {[]entry{file, file}, "already as something else"},
		"hard link outside":       {[]entry{file, {name: "a/l", text: "../../etc/passwd", kind: tar.TypeLink}}, "outside"},
		"hard link to nothing":    {[]entry{file, {name: "a/l", text: "a/g", kind: tar.TypeLink}}, "no file before it"},
		"hard link to a link":     {[]entry{file, {name: "a/l", text: "f", kind: tar.TypeSymlink}, {name: "a/m", text: "a/l", kind: tar.TypeLink}}, "no file before it"},
		"device":                  {[]entry{{name: "a/null", kind: tar.TypeChar}}, "files, directories and links only"},
		"pipe":                    {[]entry{{name: "a/pipe", kind: tar.TypeFifo}}, "files, directories and links only"},
		"too deep":                {[]entry{{name: strings.Repeat("d/", maxDepth) + "f", text: "x"}}, "directories in each other"},
		"too many bytes":          {[]entry{{name: "a/x", text: big}, {name: "a/y", text: big}}, "more than 1000 bytes"},
		"too many bytes of links": {[]entry{{name: "a/x", text: big}, {name: "a/y", text: "a/x", kind: tar.TypeLink}}, "more than 1000 bytes"},
		"nothing":                 {[]entry{{name: "./", kind: tar.TypeDir}}, "nothing in it"},
	} {
		_, _, err := unpack(t, tarOf(t, c.entries...), usual)
		if !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want ErrBadInput with %q", what, err, c.words)
		}
	}
	var many []entry
	for i := range 99 {
		many = append(many, entry{name: fmt.Sprint("a/", i)})
	}
	if _, _, err := unpack(t, tarOf(t, many...), usual); err != nil {
		t.Errorf("as many as may be: %v", err)
	}
	if _, _, err := unpack(t, tarOf(t, append(many, entry{name: "b/x"})...), usual); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "more than 100 files") {
		t.Errorf("too many: %v", err)
	}
}

// What is no tarball, or is cut short, is said to be that; a read that fails is no fault of
// the tarball.
func TestUnpackBroken(t *testing.T) {
	t.Parallel()
	whole := compressed(t, tarOf(t, entry{name: "a/f", text: strings.Repeat("x", 900)}))
	bad := map[string][]byte{"a page": []byte("<html>" + strings.Repeat("not found ", 100)), "nothing": nil, "zeros": make([]byte, 4096)}
	for how, tarball := range whole {
		bad[how+" cut short"] = tarball[:len(tarball)/2]
	}
	for what, tarball := range bad {
		if _, _, err := unpack(t, tarball, usual); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v, want ErrBadInput", what, err)
		}
	}
	lost := errors.New("the line is cut")
	_, err := Unpack(t.Context(), io.MultiReader(bytes.NewReader(whole["plain"][:700]), failing{lost}), t.TempDir(), usual)
	if !errors.Is(err, lost) || errors.Is(err, flox.ErrBadInput) {
		t.Errorf("a read that fails: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(lost)
	if _, err := Unpack(ctx, bytes.NewReader(whole["plain"]), t.TempDir(), usual); !errors.Is(err, lost) {
		t.Errorf("given up: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestCheckURL(t *testing.T) {
	t.Parallel()
	for _, good := range []string{Nixpkgs, "http://127.0.0.1:80/x.tar?rev=1"} {
		if err := CheckURL(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "file:///etc/passwd", "ftp://x/y", "/x", "http://", "http://u:p@x/y", "http://x/y#z", "http://x y/", "http://x/" + strings.Repeat("x", maxURL)} {
		if err := CheckURL(bad); !errors.Is(err, flox.ErrBadInput) || strings.Contains(err.Error(), "u:p") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
