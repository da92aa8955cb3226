package warden

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Profiles, links below gcroots and what processes use or name are told over the
// line, in as many parts as they take; nothing else is.
func TestRootsOfTheMachine(t *testing.T) {
	const hash = "0123456789abcdfghijklmnpqrsvwxyz"
	tmp := t.TempDir()
	store, state, proc := "/nix/store", filepath.Join(tmp, "state"), filepath.Join(tmp, "proc")
	in := func(name string) string { return store + "/" + hash + "-" + name }
	var want []string
	file := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	link := func(name, target string, by ...string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, name); err != nil {
			t.Fatal(err)
		}
		for _, b := range by {
			want = append(want, name+" "+hash+"-"+b)
		}
	}
	link(filepath.Join(state, "profiles/per-user/me/profile-1-link"), in("generation"), "generation")
	link(filepath.Join(state, "profiles/per-user/me/profile"), "profile-1-link") // relative, and found twice
	link(filepath.Join(state, "gcroots/direct"), in("direct")+"/bin/x", "direct")
	link(filepath.Join(tmp, "home/result"), in("result"), "result")
	link(filepath.Join(state, "gcroots/auto/abc"), filepath.Join(tmp, "home/result"))
	link(filepath.Join(state, "gcroots/auto/gone"), filepath.Join(tmp, "home/nothing"))
	link(filepath.Join(state, "gcroots/store"), store)
	link(filepath.Join(state, "gcroots/profiles"), filepath.Join(state, "profiles"))
	link(filepath.Join(state, "gcroots/outside"), "/etc/shadow")
	file(filepath.Join(state, "gcroots", hash+"-named"), "")
	want = append(want, filepath.Join(state, "gcroots", hash+"-named")+" "+hash+"-named")
	link(filepath.Join(proc, "17/exe"), in("git")+"/bin/git (deleted)", "git")
	link(filepath.Join(proc, "17/cwd"), "/root")
	link(filepath.Join(proc, "17/fd/3"), in("open")+" (deleted)", "open")
	file(filepath.Join(proc, "17/maps"), "7f2a4c000000-7f2a4c021000 r--p 00000000 00:2f 4294967299   "+in("glibc")+"/lib/libc.so\n7f2a4c0-7f2a4c1 rw-p 0 00:00 0 [heap]\n")
	file(filepath.Join(proc, "17/environ"), "A="+in("one")+"/bin:"+in("two")+"\x00B="+store+"/x\x00SECRET=abc\x00")
	for name, file := range map[string]string{"glibc": "maps", "one": "environ", "two": "environ"} {
		want = append(want, filepath.Join(proc, "17", file)+" "+hash+"-"+name)
	}
	file(filepath.Join(proc, "self-not-a-process/environ"), in("nobody"))
	for i := range 400 { // more than one part
		link(filepath.Join(state, "gcroots", strings.Repeat("x", 100), strings.Repeat("y", i%200+1)+string(rune('a'+i/200))), in("many"), "many")
	}
	c := line(t, &clerk{mountDir: store, log: slog.New(slog.DiscardHandler), roots: &rootFinder{storeDir: store, stateDir: state, proc: proc, memory: &reads{}}})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	roots, unread, err := c.Roots(ctx)
	if err != nil || len(unread) > 0 {
		t.Fatal(unread, err)
	}
	var got []string
	for _, r := range roots {
		got = append(got, r.Link+" "+r.Name)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%d roots, want %d", len(got), len(want))
		for _, g := range got {
			if !slices.Contains(want, g) {
				t.Errorf("found %s", g)
			}
		}
		for _, w := range want {
			if !slices.Contains(got, w) {
				t.Errorf("missed %s", w)
			}
		}
	}
}

// Roots in a file system that does not answer keep what they kept, and keep
// nobody from seeing the others.
func TestRootsThatHang(t *testing.T) {
	t.Parallel()
	const hash = "0123456789abcdfghijklmnpqrsvwxyz"
	h := newHost(t)
	h.start(t)
	h.report(t, 1)
	tmp := t.TempDir()
	store, state := "/nix/store", filepath.Join(tmp, "state")
	link := func(name, target string) string {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.RemoveAll(name), os.Symlink(target, name)); err != nil {
			t.Fatal(err)
		}
		return name
	}
	in := func(name string) string { return store + "/" + hash + "-" + name }
	home, away := filepath.Join(tmp, "home"), filepath.Join(h.cfg.MountDir, hungPath)
	result := link(filepath.Join(tmp, "real/result"), in("result"))
	link(home, filepath.Dir(result))
	auto := link(filepath.Join(state, "gcroots/auto/one"), home+"/result")
	link(filepath.Join(state, "gcroots/direct"), in("direct"))
	proc := filepath.Join(tmp, "proc")
	link(filepath.Join(proc, "17/exe"), in("git")+"/bin/git")
	finder := &rootFinder{storeDir: store, stateDir: state, proc: proc, reads: reads{patience: 300 * time.Millisecond}, memory: &reads{}}
	c := line(t, &clerk{mountDir: store, log: slog.New(slog.DiscardHandler), roots: finder})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	search := func(wantUnread []string, want ...string) {
		t.Helper()
		roots, unread, err := c.Roots(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, r := range roots {
			got = append(got, strings.TrimPrefix(r.Name, hash+"-"))
		}
		slices.Sort(got)
		if !slices.Equal(got, want) || !slices.Equal(unread, wantUnread) {
			t.Errorf("roots %q, unread %q; want %q and %q", got, unread, want, wantUnread)
		}
	}
	indirect := home + "/result"
	asked := func(wantUnread bool) {
		t.Helper()
		if target, unread, err := c.RootTarget(ctx, indirect); err != nil || target != in("result") || unread != wantUnread {
			t.Errorf("the link points to %q, unread %v, %v", target, unread, err)
		}
	}
	profile := link(filepath.Join(tmp, "profile"), "home/result")
	search(nil, "direct", "git", "result")
	asked(false)
	if name, err := c.Profile(ctx, profile); err != nil || name != hash+"-result" {
		t.Errorf("the profile leads to %q, %v", name, err)
	}

	link(home, away) // it hangs from here on
	link(filepath.Join(state, "gcroots/new"), in("new"))
	link(filepath.Join(state, "gcroots/auto/other"), filepath.Join(away, "other"))
	others := []string{auto, filepath.Join(state, "gcroots/auto/other")}
	search(others, "direct", "git", "new", "result")
	asked(true)
	for range 2 { // it hangs, and is known to
		if name, err := c.Profile(ctx, profile); !errors.Is(err, ErrUnread) {
			t.Errorf("a profile that hangs leads to %q, %v", name, err)
		}
	}
	if _, _, err := c.RootTarget(ctx, filepath.Join(away, "never")); !errors.Is(err, ErrUnread) {
		t.Errorf("a link that never could be read: %v", err)
	}
	for i := range slowAtOnce + askedAtOnce { // and none of them takes a place of others for long
		_, _, err := c.RootTarget(ctx, filepath.Join(away, fmt.Sprint(i)))
		if !errors.Is(err, ErrUnread) {
			t.Errorf("link %d: %v", i, err)
		}
	}
	search(others, "direct", "git", "new", "result")

	link(home, filepath.Dir(result))
	if err := os.WriteFile(filepath.Join(h.cfg.RunDir, "release"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ { // when the reads that were left behind end
		_, left, targetErr := c.RootTarget(ctx, indirect) // which others read than those of all roots
		_, unread, err := c.Roots(ctx)
		if err = errors.Join(err, targetErr); err == nil && len(unread) == 0 && !left {
			break
		}
		if i == 600 {
			t.Fatalf("unread %q and, alone, %v: %v", unread, left, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	search(nil, "direct", "git", "new", "result")
	asked(false)
}
