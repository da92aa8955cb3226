package warden

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// mapPages maps a file of so many pages and uses some of them.
func mapPages(t *testing.T, file string, pages int, used ...int) (sum int) {
	t.Helper()
	size := os.Getpagesize()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := unix.Mmap(int(f.Fd()), 0, pages*size, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(b); err != nil {
			t.Error(err)
		}
	})
	for _, i := range used {
		sum += int(b[i*size])
	}
	return sum
}

// The page tables tell which parts of a file a process used, and nothing of other
// file systems, over the line as well.
func TestPagesOfAProcess(t *testing.T) {
	const pages, far = 16 << 10, 8000
	size := int64(os.Getpagesize())
	file := filepath.Join(t.TempDir(), "file")
	if err := errors.Join(os.WriteFile(file, []byte{1}, 0o600), os.Truncate(file, pages*size)); err != nil {
		t.Fatal(err)
	}
	if sum := mapPages(t, file, pages, 0, far); sum != 1 {
		t.Fatalf("read %d", sum)
	}
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	scans := &scanner{major: unix.Major(st.Dev), minor: unix.Minor(st.Dev), proc: "/proc"}
	c := line(t, &clerk{mountDir: "/nix/store", log: slog.New(slog.DiscardHandler), scans: scans})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	runs, err := c.Pages(ctx, uint32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	has := func(page int64) bool {
		return slices.ContainsFunc(runs, func(r PageRun) bool {
			return r.Node == st.Ino && r.Off <= page*size && page*size < r.Off+r.Len
		})
	}
	if !has(0) || !has(far) {
		t.Errorf("pages that were used are not told: %v", runs)
	}
	// The kernel maps what is beside a page as well, up to 2 MiB, but not all.
	if has(far/2) || has(far+(pages-far)/2) {
		t.Errorf("pages that were not used are told: %v", runs)
	}
	scans.minor++
	if runs, err := scans.pages(uint32(os.Getpid())); err != nil || slices.ContainsFunc(runs, func(r PageRun) bool { return r.Node == st.Ino }) {
		t.Errorf("pages of another file system: %v %v", runs, err)
	}
	if _, err := c.Pages(ctx, 1<<22-1); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("no such process: %v", err)
	}
	if _, err := c.Pages(ctx, 1<<30); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("an impossible process: %v", err)
	}
}

// A program run from the mount is told of without a question to the file system.
func TestPagesOfAProgram(t *testing.T) {
	h := newHost(t)
	h.start(t)
	h.report(t, 1)
	prog := exec.Command(h.path("sleep"), "60")
	if err := prog.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = prog.Process.Kill()
		_ = prog.Wait()
	}()
	time.Sleep(200 * time.Millisecond) // until it is past exec
	before := h.ask(t, query{Ask: askReadAhead, KiB: 32})
	got := h.ask(t, query{Ask: askPages, PID: uint32(prog.Process.Pid)})
	if diff := cmp.Diff([]string{"sleep"}, got.Mapped); diff != "" || got.Err != "" {
		t.Errorf("mapped (-want +got): %s %s", diff, got.Err)
	}
	if got.Fetched != before.Fetched {
		t.Errorf("the file system was asked %d times", got.Fetched-before.Fetched)
	}
}

// Long answers come in parts, and their size is bounded.
func TestManyPageRuns(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "7")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	size := os.Getpagesize()
	// One mapping of 3*maxRuns pages, of which every other is present.
	table := fmt.Sprintf("0-%x r--p 00001000 00:2f 4294967299 /nix/store/x\n", 3*maxRuns*size)
	pagemap := make([]byte, 3*maxRuns*8)
	for i := 0; i < len(pagemap); i += 16 {
		pagemap[i+7] = 0x80
	}
	for name, b := range map[string][]byte{"maps": []byte(table), "pagemap": pagemap} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := line(t, &clerk{mountDir: "/nix/store", log: slog.New(slog.DiscardHandler), scans: &scanner{minor: 0x2f, proc: filepath.Dir(dir)}})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	runs, err := c.Pages(ctx, 7)
	if err != nil || len(runs) != maxRuns {
		t.Fatalf("%d runs, want %d: %v", len(runs), maxRuns, err)
	}
	for i, r := range runs {
		if want := (PageRun{4294967299, 4096 + int64(2*i*size), int64(size)}); r != want {
			t.Fatalf("run %d is %v, want %v", i, r, want)
		}
	}
}

func FuzzParseMapping(f *testing.F) {
	f.Add("7f00-7f01 r--p 00001000 00:2f 12 /nix/store/x\n")
	f.Fuzz(func(t *testing.T, text string) {
		if m, ok := parseMapping([]byte(text), []byte("00:2f")); ok && (m.from >= m.to || m.off < 0) {
			t.Errorf("%q is %+v", text, m)
		}
	})
}
