package ctl

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Names of files and processes are anybody's: they must not steer a terminal.
func TestCleanShowsWhatTerminalsObey(t *testing.T) {
	tests := map[string]string{
		"plain-1.0": "plain-1.0", "grün ☃": "grün ☃", "a\x1b[2Jb": `a\x1b[2Jb`, "a\nb": `a\x0ab`,
		"bad\xffutf8": `bad\xffutf8`, "right\u202eleft": `right\u202eleft`, "real \uFFFD": "real \uFFFD", "c1\u009b": `c1\u009b`,
	}
	for s, want := range tests {
		if got := clean(s); got != want {
			t.Errorf("clean(%q) = %q, want %q", s, got, want)
		}
	}
}

// Paths a user has: names, absolute paths, links to them; never a look into the store.
func TestStoreArg(t *testing.T) {
	const name = "00000000000000000000000000000000-git-2.39"
	dir := t.TempDir()
	for link, target := range map[string]string{
		"result": "/nix/store/" + name, "profile": "result", "loop": "loop2", "loop2": "loop", "away": "/etc",
	} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	good := map[string]string{
		name: name, "/nix/store/" + name: "/nix/store/" + name, "/flox/store/" + name + "/bin": "/flox/store/" + name + "/bin",
		dir + "/result": "/nix/store/" + name, dir + "/profile/bin/git": "/nix/store/" + name + "/bin/git",
		"/nix/store/" + name + "/../" + name: "/nix/store/" + name,
	}
	for arg, want := range good {
		if got, err := storeArg(arg); err != nil || got != want {
			t.Errorf("storeArg(%q) = %q, %v, want %q", arg, got, err, want)
		}
	}
	for _, arg := range []string{"", dir, dir + "/loop", dir + "/away", dir + "/missing", "/nix/store", "hello"} {
		if got, err := storeArg(arg); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("storeArg(%q) = %q, %v, want bad input", arg, got, err)
		}
	}
}

func TestProgressWords(t *testing.T) {
	s := step{done: 12 << 20, total: 48 << 20, bytesPerSecond: 4 << 20, what: "git", extra: "1 of 3 paths"}
	if diff := cmp.Diff("25 % (12.0 MiB of 48.0 MiB), 4.00 MiB/s, 9.0 s left, 1 of 3 paths: git", s.words()); diff != "" {
		t.Error(diff)
	}
	if got := (step{done: 5}).words(); got != "5 B" {
		t.Errorf("without a total: %q", got)
	}
	// A total that turns out too small must not show more than all of it.
	if got := (step{done: 9, total: 3, bytesPerSecond: 1}).words(); got != "100 % (9 B of 3 B), 1 B/s" {
		t.Errorf("more done than expected: %q", got)
	}
	for width := 1; width < 120; width++ {
		if n := utf8.RuneCountInString(s.line(width)); n > width {
			t.Errorf("a line of %d columns for a terminal of %d", n, width)
		}
	}
}

// Whatever the agent says and however small the terminal, the view fits it.
func TestViewFitsTheScreen(t *testing.T) {
	now := time.UnixMilli(1_700_000_010_000)
	m := &floxv1.WatchReads{Full: "the mount is full: " + strings.Repeat("1024 requests ", 20)}
	for i := range 40 {
		m.Reads = append(m.Reads, &floxv1.WaitingRead{
			Pid: 4194304, Command: "a-very-long-command-name", Path: "/nix/store/" + strings.Repeat("long/", i) + "end",
			SinceUnixMs: 1_700_000_000_000, DoneBytes: 1, TotalBytes: 1 << 40, BytesPerSecond: 1 << 40, EtaMs: -1,
			Source: "peer with a long name", Reason: strings.Repeat("why ", 100),
		})
	}
	states := map[string]watchState{
		"nothing yet": {}, "idle": {last: &floxv1.WatchReads{}}, "busy": {last: m},
		"gone": {last: m, err: errors.New(strings.Repeat("agent gone ", 30))},
	}
	for name, state := range states {
		for _, size := range [][2]int{{10, 5}, {40, 10}, {80, 24}, {200, 60}} {
			lines := viewLines(&output{}, state, size[0], size[1], now)
			for _, line := range lines {
				if n := utf8.RuneCountInString(line); n > size[0] && size[0] >= 40 {
					t.Errorf("%s at %v: %d columns: %q", name, size, n, line)
				}
			}
			if len(lines) > size[1] && size[1] >= 10 {
				t.Errorf("%s at %v: %d lines", name, size, len(lines))
			}
		}
	}
	busy := strings.Join(viewLines(&output{}, states["busy"], 120, 24, now), "\n")
	for _, want := range []string{"…", "the mount is full", "end", "and ", "10 s", "1.00 TiB/s"} {
		if !strings.Contains(busy, want) {
			t.Errorf("the view lacks %q:\n%s", want, busy)
		}
	}
}

// A table's columns line up whatever stands in them.
func TestTable(t *testing.T) {
	var b bytes.Buffer
	(&output{w: &b}).table([][]string{{"A", "NUMBER", "C"}, {"…x", "1", "c"}, {"long cell", "22", ""}}, map[int]bool{1: true})
	want := "A          NUMBER  C\n…x              1  c\nlong cell      22\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}
