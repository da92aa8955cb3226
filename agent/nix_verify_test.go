package agent

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/worker"
)

// damage flips a byte in the middle of every large file below dir.
func damage(t *testing.T, dir string) {
	t.Helper()
	n := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil || st.Size() < 500_000 {
			return err
		}
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, st.Size()/2); err != nil {
			return err
		}
		b[0] ^= 1
		n++
		_, err = f.WriteAt(b, st.Size()/2)
		return err
	})
	if err != nil || n == 0 {
		t.Fatalf("damaged %d files below %s: %v", n, dir, err)
	}
}

// What is damaged on this machine is found by Nix's own commands. Bytes of the
// storehouse come again, so that a repair leaves nothing wrong; what only this machine
// has is said to be lost.
func TestStockNixVerifiesAndRepairs(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	tool, _ := world(t, h)
	a := runNixAgent(t, h)
	n := newNixClient(t, a)
	c := client(t, a)
	bring := func() {
		t.Helper()
		if _, err := all(c.Download(within(t, time.Minute), connect.NewRequest(&floxv1.DownloadRequest{Paths: []string{string(tool.Path)}, Closure: true}))); err != nil {
			t.Fatal(err)
		}
	}
	verify := func(wrong bool, say string, args ...string) {
		t.Helper()
		_, said, err := n.try(append([]string{"nix-store", "--verify", "--check-contents"}, args...)...)
		if (err != nil) != wrong || !strings.Contains(said, say) || say == "" && strings.Contains(said, "dropped") {
			t.Errorf("verify %q: %v, want an error: %v, and %q:\n%s", args, err, wrong, say, said)
		}
	}
	cached := filepath.Join(a.cfg.StateDir, "cache")
	bring()
	verify(false, "")
	damage(t, cached)
	verify(true, "are dropped")
	verify(false, "")
	bring()
	damage(t, cached)
	verify(false, "are dropped", "--repair")
	bring()
	verify(false, "")

	// The same of what a build in repair mode names.
	damage(t, cached)
	var shown []string
	root := nixDial(t, a, worker.Trusted, func(f worker.LogFrame) { shown = append(shown, f.Text) })
	if _, err := root.BuildResults(t.Context(), []worker.DerivedPath{{Path: tool.Path}}, worker.BuildRepair); err != nil || !strings.Contains(strings.Join(shown, "\n"), "are dropped") {
		t.Errorf("repair: %v, the client saw %q", err, shown)
	}
	verify(false, "")

	// And of a path that is added with Repair: it is valid, so what is sent is not looked at.
	for who, repairs := range map[worker.Trust]bool{worker.Trusted: true, worker.NotTrusted: false} {
		bring()
		damage(t, cached)
		shown = nil
		adds := nixDial(t, a, who, func(f worker.LogFrame) { shown = append(shown, f.Text) })
		info := worker.Info{PathInfo: *tool}
		info.CA = "fixed:r:sha256:0000000000000000000000000000000000000000000000000000" // needs nobody's signature
		err := adds.AddNar(t.Context(), &info, strings.NewReader("another NAR"), worker.AddOptions{Repair: true})
		if err != nil || strings.Contains(strings.Join(shown, "\n"), "are dropped") != repairs {
			t.Errorf("trust %d: %v, the client saw %q", who, err, shown)
		}
		verify(!repairs, map[bool]string{false: "are dropped"}[repairs])
	}

	// And of content that is added with Repair, which the storehouse has by now.
	text := randomBytes(78, 900_000)
	content := worker.Content{Name: "added", Method: nix.CAFlat, Algo: nix.SHA256}
	add := func() *worker.Info {
		t.Helper()
		shown = nil
		info, err := root.AddContent(t.Context(), content, bytes.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	added := add()
	if _, err := a.PublishStaged(within(t, time.Minute), added.Path); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.tidyStaged(within(t, time.Minute)), a.staged.Sweep(t.Context())); err != nil {
		t.Fatal(err)
	}
	if _, err := all(c.Download(within(t, time.Minute), connect.NewRequest(&floxv1.DownloadRequest{Paths: []string{string(added.Path)}}))); err != nil {
		t.Fatal(err)
	}
	damage(t, cached)
	if add(); strings.Contains(strings.Join(shown, "\n"), "are dropped") {
		t.Errorf("adding it again looked at what is here: %q", shown)
	}
	content.Repair = true
	if add(); !strings.Contains(strings.Join(shown, "\n"), "are dropped") {
		t.Errorf("adding it with Repair: the client saw %q", shown)
	}
	verify(false, "")

	if err := os.WriteFile(filepath.Join(n.tmp, "source"), randomBytes(77, 3_000_000), 0o644); err != nil {
		t.Fatal(err)
	}
	source := n.run("nix-store", "--add", filepath.Join(n.tmp, "source"))
	verify(false, "")
	damage(t, filepath.Join(a.cfg.StateDir, "staged"))
	verify(true, "path '"+source+"' was modified!", "--repair")
	if _, err := a.staged.Path(flox.StorePath(filepath.Base(source))); err != nil {
		t.Errorf("damaged, but still there to be seen: %v", err)
	}
}
