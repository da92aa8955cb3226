package nix

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// writeTree makes the tree on disk with the plain functions of package os.
func writeTree(t *testing.T, root string, nodes []node) {
	t.Helper()
	for _, n := range nodes {
		p := filepath.Join(root, n.Path)
		var err error
		switch {
		case n.Kind == flox.Directory:
			err = os.Mkdir(p, 0o755)
		case n.Kind == flox.Symlink:
			err = os.Symlink(n.Target, p)
		case n.Executable:
			err = os.WriteFile(p, []byte(n.content), 0o700)
		default:
			// Only the owner's execute bit counts.
			if err = os.WriteFile(p, []byte(n.content), 0o600); err == nil {
				err = os.Chmod(p, 0o611)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func dump(t *testing.T, path string) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := DumpPath(t.Context(), &out, path); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestDumpAndRestore(t *testing.T) {
	for name, nodes := range map[string][]node{
		"tree": sorted(sampleTree()), "file": {file("", "x")}, "executable": {executable(file("", ""))}, "symlink": {link("", "/nowhere")}, "empty": {dir("")},
		"not UTF-8": {dir(""), file("\xe4", "latin1")},
	} {
		t.Run(name, func(t *testing.T) {
			tmp := t.TempDir()
			writeTree(t, filepath.Join(tmp, "in"), nodes)
			nar := encode(t, nodes)
			if got := dump(t, filepath.Join(tmp, "in")); !bytes.Equal(got, nar) {
				t.Error("the dump differs from the tree")
			}
			src := bytes.NewReader(append(nar, "tail"...))
			if err := RestorePath(t.Context(), src, filepath.Join(tmp, "out")); err != nil {
				t.Fatal(err)
			}
			if rest, _ := io.ReadAll(src); string(rest) != "tail" {
				t.Errorf("behind the NAR %q was left, want the tail", rest)
			}
			if got := dump(t, filepath.Join(tmp, "out")); !bytes.Equal(got, nar) {
				t.Error("what was unpacked dumps to other bytes")
			}
			checkSealed(t, filepath.Join(tmp, "out"))
		})
	}
}

// checkSealed wants the modes and times Nix gives to what is in its store.
func checkSealed(t *testing.T, root string) {
	t.Helper()
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		// Which files are executable the dump has shown already.
		mode := info.Mode().Perm()
		if info.IsDir() && mode != 0o555 || info.Mode().IsRegular() && mode != 0o444 && mode != 0o555 {
			t.Errorf("%s: mode %v", p, info.Mode())
		}
		if info.ModTime().Unix() != 1 {
			t.Errorf("%s: time %v, want 1", p, info.ModTime().Unix())
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestDumpRefuses(t *testing.T) {
	tmp := t.TempDir()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(tmp, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if err := syscall.Mkfifo(filepath.Join(tmp, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	deep := filepath.Join(tmp, "deep")
	if err := os.MkdirAll(deep+strings.Repeat("/d", MaxNarDepth), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"socket", "pipe", "deep", "."} {
		err := DumpPath(t.Context(), io.Discard, filepath.Join(tmp, name))
		if !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), tmp) {
			t.Errorf("%s: got %v, want ErrBadInput with the path", name, err)
		}
	}
	if err := DumpPath(t.Context(), io.Discard, filepath.Join(tmp, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := DumpPath(ctx, io.Discard, deep); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// listAll names everything below root.
func listAll(t *testing.T, root string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		names = append(names, strings.TrimPrefix(p, root))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestRestoreLeavesNothingBehind(t *testing.T) {
	good := encode(t, sorted(sampleTree()))
	escape := raw("( type directory entry ( name", str("a"), "node ( type symlink target", str("../outside"), ") ) entry ( name", str("a"), "node ( type directory entry ( name x node ( type regular contents y ) ) ) ) )")
	for name, nar := range map[string][]byte{
		"truncated":        good[:len(good)*2/3],
		"no end":           good[:len(good)-1],
		"empty":            nil,
		"through symlink":  escape,
		"dot dot":          inDir(".."),
		"slash":            inDir("../x"),
		"unsorted":         twoInDir("b", "a"),
		"wrong last close": append(bytes.Clone(good[:len(good)-8]), "x\x00\x00\x00\x00\x00\x00\x00"...),
	} {
		t.Run(name, func(t *testing.T) {
			tmp := t.TempDir()
			if err := os.Mkdir(filepath.Join(tmp, "outside"), 0o755); err != nil {
				t.Fatal(err)
			}
			err := RestorePath(t.Context(), bytes.NewReader(nar), filepath.Join(tmp, "out"))
			if !errors.Is(err, flox.ErrBadInput) {
				t.Errorf("got %v", err)
			}
			if got := listAll(t, tmp); len(got) != 2 || got[1] != "/outside" {
				t.Errorf("left behind: %q", got)
			}
		})
	}
}

func TestRestoreKeepsWhatIsThere(t *testing.T) {
	tmp := t.TempDir()
	nar := encode(t, sorted(sampleTree()))
	for _, put := range []func(string) error{
		func(p string) error { return os.Mkdir(p, 0o755) },
		func(p string) error { return os.WriteFile(p, []byte("mine"), 0o600) },
		func(p string) error { return os.Symlink("nowhere", p) },
	} {
		out := filepath.Join(tmp, "out")
		if err := put(out); err != nil {
			t.Fatal(err)
		}
		if err := RestorePath(t.Context(), bytes.NewReader(nar), out); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("got %v", err)
		}
		if got := listAll(t, tmp); len(got) != 2 {
			t.Errorf("now there is %q", got)
		}
		if err := os.Remove(out); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRestoreCancelled(t *testing.T) {
	tmp := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	nar := encode(t, sorted(sampleTree()))
	// A reader that gives nothing once is asked again.
	once := false
	src := io.MultiReader(bytes.NewReader(nar[:len(nar)/2]), readerFunc(func([]byte) (int, error) {
		if once {
			return 0, io.EOF
		}
		once = true
		cancel()
		return 0, nil
	}), bytes.NewReader(nar[len(nar)/2:]))
	if err := RestorePath(ctx, src, filepath.Join(tmp, "out")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if got := listAll(t, tmp); len(got) != 1 {
		t.Errorf("left behind: %q", got)
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// An owner who is not root must be able to clean up directories already sealed.
func TestRestoreCleansUpWithoutPrivileges(t *testing.T) {
	tmp := t.TempDir() // removed after the capabilities are back
	if os.Getuid() == 0 {
		dropCapabilities(t)
	}
	nar := encode(t, []node{dir(""), dir("a"), dir("a/\xff"), file("a/\xff/f", "x"), file("b", "y")})
	if err := RestorePath(t.Context(), bytes.NewReader(nar[:len(nar)-20]), filepath.Join(tmp, "out")); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("got %v", err)
	}
	if got := listAll(t, tmp); len(got) != 1 {
		t.Errorf("left behind: %q", got)
	}
}

// dropCapabilities makes the test's own thread an ordinary one, so that
// permissions hold for it even as root.
func dropCapabilities(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		t.Fatal(err)
	}
	none := caps
	none[0].Effective, none[1].Effective = 0, 0
	if err := unix.Capset(&header, &none[0]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Capset(&header, &caps[0]); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	})
}

func BenchmarkDumpAndRestore(b *testing.B) {
	nar := smallFilesNar(b, 5000)
	tmp := b.TempDir()
	n := 0
	b.Run("restore", func(b *testing.B) {
		for b.Loop() {
			n++
			if err := RestorePath(b.Context(), bytes.NewReader(nar), filepath.Join(tmp, strconv.Itoa(n))); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(5000*b.N)/b.Elapsed().Seconds(), "files/s")
	})
	b.Run("dump", func(b *testing.B) {
		for b.Loop() {
			if err := DumpPath(b.Context(), io.Discard, filepath.Join(tmp, "1")); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(5000*b.N)/b.Elapsed().Seconds(), "files/s")
	})
}
