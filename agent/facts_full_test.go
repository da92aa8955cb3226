package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// fillDisk takes all room of the disk of dir.
func fillDisk(t *testing.T, dir string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "filler"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; size /= 2 {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
}

// infoOf is a path with a manifest of its own.
func infoOf(t *testing.T, n int) *flox.PathInfo {
	t.Helper()
	info := testInfo(t, n, n)
	info.Manifest = content.Hash(fmt.Append(nil, n))
	return info
}

// wantFacts are those of n paths, and none of the one that could not be written.
func wantFacts(t *testing.T, f *facts, n int) {
	t.Helper()
	for i := range n {
		want := infoOf(t, i)
		if info, ok := f.get(want.Path.HashPart()); !ok || info.Manifest != want.Manifest {
			t.Fatalf("path %d of %d is %v", i, n, info)
		}
	}
	last := infoOf(t, n)
	_, known := f.get(last.Path.HashPart())
	_, path := f.path(last.Path.HashPart())
	if _, by := f.byManifest(last.Manifest); known || path || by || f.has(last.Path.HashPart()) {
		t.Error("what was not written is known")
	}
	names, err := f.names(t.Context(), "", 2*n+2)
	if err != nil || len(names) != n || f.known() != uint64(n) {
		t.Errorf("%d paths listed and %d known, want %d: %v", len(names), f.known(), n, err)
	}
}

// Others take the last byte of the disk while facts are written: that is an error that
// says what to do, what is known stays known, also to the next process, and with room
// again it goes on.
func TestFactsOnADiskThatIsFullToTheLastByte(t *testing.T) {
	const env = "FLOXD_TEST_FULL_FACTS"
	if role := os.Getenv(env); role != "" {
		var name, dir string
		var n int
		if _, err := fmt.Sscan(role, &name, &n, &dir); err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(name, "fill") {
			n = fillUnderFacts(t, dir, name == "fill-robbed")
		} else {
			factsAreFull(t, dir, n)
		}
		_, _ = fmt.Printf("known: %d\n", n)
		if t.Failed() {
			os.Exit(1)
		}
		os.Exit(0)
	}
	for _, fill := range []string{"fill", "fill-robbed"} { // of the ballast before it is needed
		t.Run(fill, func(t *testing.T) {
			factsOnAFullDisk(t, func(role string, n int, dir string) *exec.Cmd {
				if n == 0 {
					role = fill
				}
				cmd := exec.Command(os.Args[0], "-test.run=^TestFactsOnADiskThatIsFullToTheLastByte$", "-test.v", "-test.timeout=2m")
				cmd.Env = append(os.Environ(), env+"="+fmt.Sprintf("%s %d %s", role, n, dir))
				return cmd
			})
		})
	}
}

func factsOnAFullDisk(t *testing.T, process func(role string, n int, dir string) *exec.Cmd) {
	dir := t.TempDir()
	if err := unix.Mount("small", dir, "tmpfs", 0, "size=32m"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("needs root: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	// Processes of their own: what Pebble leaves behind cannot be ended.
	n := 0
	for _, role := range []string{"fill", "next"} {
		out, err := process(role, n, dir).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", role, err, out)
		}
		_, count, _ := strings.Cut(string(out), "known: ")
		if _, err := fmt.Sscan(count, &n); err != nil || n < 300 {
			t.Fatalf("%s: %v: %s", role, err, out)
		}
	}
	f := openTestFacts(t, filepath.Join(dir, "facts"), flox.CID{})
	wantFacts(t, f, n)
	if err := f.put(infoOf(t, n)); err != nil {
		t.Error(err)
	}
}

// fillUnderFacts gives how many paths are known when the disk is full.
func fillUnderFacts(t *testing.T, dir string, robbed bool) (n int) {
	f, err := openFacts(filepath.Join(dir, "facts"), testStore, flox.CID{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for ; err == nil; n++ {
		if n >= 300 {
			if robbed {
				if err := os.Truncate(filepath.Join(dir, "facts", "ballast"), 0); err != nil {
					t.Fatal(err)
				}
			}
			fillDisk(t, dir) // the ballast, too
		}
		err = f.put(infoOf(t, n))
	}
	n--
	if robbed && f.db.Broken() == nil {
		t.Error("the database is not broken: this test shows nothing")
	}
	wantFull(t, f, err)
	wantFacts(t, f, n)
	return n
}

func wantFull(t *testing.T, f *facts, err error) {
	t.Helper()
	var here *unkept
	if !errors.As(err, &here) || !errors.Is(err, flox.ErrFull) || !strings.Contains(err.Error(), "free some space") || f.full() == nil {
		t.Errorf("%v, and %v", err, f.full())
	}
}

// factsAreFull is the next process on the full disk.
func factsAreFull(t *testing.T, dir string, n int) {
	fillDisk(t, dir)
	f, err := openFacts(filepath.Join(dir, "facts"), testStore, flox.CID{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	fillDisk(t, dir)
	wantFacts(t, f, n)
	if f.db.Broken() != nil {
		wantFull(t, f, f.put(infoOf(t, n)))
	}
	if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
	if f.db.Broken() != nil {
		if err := f.run(t.Context()); !errors.Is(err, flox.ErrFull) {
			t.Errorf("with room again: %v, want that the process starts anew", err)
		}
	}
	if err := f.close(); err != nil {
		t.Error(err)
	}
}
