package staging

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
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

// careless is a store that does not look whether there is room: others take it right after.
func careless(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(Config{Dir: filepath.Join(dir, "staged"), StoreDir: storeDir, Reserve: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.ready(true); err != nil {
		t.Fatal(err)
	}
	s.cfg.Reserve = -1 << 40
	return s
}

func addText(s *Store, n int) error {
	_, err := s.AddText(context.Background(), fmt.Sprint("text", n), random(uint64(n), 4000), nil)
	return err
}

// wantTexts are those of n, whole.
func wantTexts(t *testing.T, s *Store, n int) {
	t.Helper()
	have := make(map[string]*Path)
	if err := s.List(t.Context(), "", func(p *Path) bool { have[p.Info.Path.Name()] = p; return true }); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		p, ok := have[fmt.Sprint("text", i)]
		if !ok {
			t.Fatalf("text %d of %d is gone", i, n)
		}
		whole(t, s, p)
	}
}

// wantFull is the error of what is added on a full disk.
func wantFull(t *testing.T, s *Store, err error) {
	t.Helper()
	for _, err := range []error{err, s.Full()} {
		if !errors.Is(err, flox.ErrFull) || !strings.Contains(err.Error(), "free some space") || !strings.Contains(err.Error(), s.cfg.Dir) {
			t.Errorf("%v, want what to do on the disk of %s", err, s.cfg.Dir)
		}
	}
}

// Others take the last byte of the disk while paths are added: that is an error that says what
// to do, what was added is read on, also by the next process, and with room again it goes on.
func TestAddOnADiskThatIsFullToTheLastByte(t *testing.T) {
	const env = "FLOXD_TEST_FULL_STAGING"
	if role := os.Getenv(env); role != "" {
		var name, dir string
		var n int
		if _, err := fmt.Sscan(role, &name, &n, &dir); err != nil {
			t.Fatal(err)
		}
		if name == "fill" {
			n = fillUnderAdds(t, dir)
		} else {
			n = nextOnTheFullDisk(t, dir, n)
		}
		_, _ = fmt.Printf("added: %d\n", n)
		if t.Failed() {
			os.Exit(1)
		}
		os.Exit(0)
	}
	dir := t.TempDir()
	if err := unix.Mount("small", dir, "tmpfs", 0, "size=48m"); err != nil {
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
	n := 0
	for _, role := range []string{"fill", "next"} { // what Pebble leaves behind ends with its process
		cmd := exec.Command(os.Args[0], "-test.run=^TestAddOnADiskThatIsFullToTheLastByte$", "-test.v", "-test.timeout=40s")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %s", env, role, n, dir))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", role, err, out)
		}
		_, count, _ := strings.Cut(string(out), "added: ")
		if _, err := fmt.Sscan(count, &n); err != nil || n < 100 {
			t.Fatalf("%s: %v: %s", role, err, out)
		}
	}
	s := open(t, filepath.Join(dir, "staged"), nil)
	wantTexts(t, s, n)
	if err := addText(s, n); err != nil {
		t.Error(err)
	}
}

// fillUnderAdds gives how many texts were added when the disk is full.
func fillUnderAdds(t *testing.T, dir string) (n int) {
	s := careless(t, dir)
	var err error
	for ; err == nil; n++ {
		if n >= 100 {
			if err := os.Truncate(filepath.Join(dir, "staged", "ballast"), 0); err != nil {
				t.Fatal(err)
			}
			fillDisk(t, dir) // what was set aside, too
		}
		err = addText(s, n)
	}
	n--
	if s.db.Broken() == nil {
		t.Error("the index is not broken: this test shows nothing")
	}
	wantFull(t, s, err)
	_, err = s.AddAddressed(t.Context(), "large", nix.CAFlat, nix.SHA256, nil, bytes.NewReader(random(1, 3<<20)))
	wantFull(t, s, err)
	wantTexts(t, s, n)
	if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); !errors.Is(err, flox.ErrFull) {
		t.Errorf("%v, want that the process starts anew once there is room", err)
	}
	return n
}

// nextOnTheFullDisk is the next process: it reads the n texts, and gives how many there are at its end.
func nextOnTheFullDisk(t *testing.T, dir string, before int) (n int) {
	fillDisk(t, dir)
	s := careless(t, dir)
	var err error
	for n = before; err == nil; n++ { // Pebble gives room back a while after it was opened: what is added in it stays
		if n > before+100 {
			t.Fatal("texts are added without room")
		}
		fillDisk(t, dir)
		wantTexts(t, s, n)
		err = addText(s, n)
	}
	n--
	wantFull(t, s, err)
	wantTexts(t, s, n)
	if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
	if err := s.db.Broken(); err == nil {
		return n
	}
	if err := s.Run(t.Context()); !errors.Is(err, flox.ErrFull) {
		t.Errorf("%v, want that the process starts anew once there is room", err)
	}
	return n
}
