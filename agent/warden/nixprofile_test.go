package warden

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/floxctl/flox"
)

// nixLinksIn lists the links of a directory, and where they lead.
func nixLinksIn(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var words []string
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		words = append(words, e.Name()+" "+filepath.Base(to)[:1]+filepath.Base(to)[max(1, len(filepath.Base(to))-4):])
	}
	return strings.Join(words, ", ")
}

// A profile of stock Nix is read, and moved as Nix does it: to a new generation, or to
// another one in the place of the newest.
func TestNixProfilesAreMoved(t *testing.T) {
	dir := t.TempDir()
	at := filepath.Join(dir, "p")
	path := func(c string) string { return strings.Repeat(c, 32) + "-env" + c }
	p := NewProfiles("/nix/store")
	link := func(to, name string) {
		t.Helper()
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if is, err := p.NixProfile(at); err != nil || is.Number != 0 || int(is.User) != os.Geteuid() {
		t.Errorf("one that is not there: %+v, %v", is, err)
	}
	link("/nix/store/"+path("0"), "p-9-link")
	link("/nix/store/"+path("1"), "p-2-link")
	link(filepath.Join(dir, "p-2-link"), "p") // as Nix once wrote them
	is, err := p.NixProfile(at)
	if err != nil || is.Number != 2 || is.Path != path("1") {
		t.Fatalf("it is %+v, %v", is, err)
	}
	move := func(m NixMove, number uint64) {
		t.Helper()
		now, err := p.MoveNixProfile(at, m)
		if err != nil || now.Number != number || now.Path != m.To {
			t.Fatalf("moved to %+v, %v, want generation %d", now, err, number)
		}
		if again, err := p.NixProfile(at); err != nil || again != now {
			t.Errorf("it is %+v, %v after it was moved to %+v", again, err, now)
		}
		is = now
	}
	move(NixMove{Was: is, To: path("2"), Again: true}, 10) // 2 is not the newest
	move(NixMove{Was: is, To: path("3"), Again: true}, 10)
	move(NixMove{Was: is, To: path("4")}, 11)
	if got, want := nixLinksIn(t, dir), "p plink, p-10-link 3env3, p-11-link 4env4, p-2-link 1env1, p-9-link 0env0"; got != want {
		t.Errorf("links are %s, want %s", got, want)
	}
	if _, err := p.MoveNixProfile(at, NixMove{Was: NixProfile{User: is.User, Number: 10, Path: path("3")}, To: path("5")}); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("one that leads elsewhere meanwhile: %v", err)
	}
}

// What is no profile of Nix's, or not of the one it is moved for, is left alone.
func TestOnlyNixProfilesAreMoved(t *testing.T) {
	dir := t.TempDir()
	p, path := NewProfiles("/nix/store"), strings.Repeat("0", 32)+"-env"
	for name, to := range map[string]string{
		"direct": "/nix/store/" + path, "other": "direct-1-link", "astray": "astray-1-link", "astray-1-link": "/etc", "inside": "inside-1-link", "inside-1-link": "/nix/store/" + path + "/bin",
	} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"direct", "other", "astray", "inside", "file"} {
		if is, err := p.NixProfile(filepath.Join(dir, name)); !errors.Is(err, flox.ErrBadInput) || is.Number != 0 {
			t.Errorf("%s is %+v, %v", name, is, err)
		}
	}
	if _, err := p.NixProfile("/nix/store/p"); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("in the store: %v", err)
	}
	link := filepath.Join(t.TempDir(), "link") // its owner could have it lead to somebody else's directory
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if _, err := p.NixProfile(filepath.Join(link, "p")); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "without links") {
		t.Errorf("over a link: %v", err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := p.NixProfile(filepath.Join(dir, "p")); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "everybody") {
		t.Errorf("where everybody may write: %v", err)
	}
}

// A profile is moved with the rights of whose directory it is.
func TestNixProfilesAreMovedForTheirOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root acts for others")
	}
	top := t.TempDir()
	dir := filepath.Join(top, "home")
	path := strings.Repeat("0", 32) + "-env"
	for name, to := range map[string]string{"p": "p-1-link", "p-1-link": "/nix/store/" + path} {
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.Symlink(to, filepath.Join(dir, name))); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Chown(dir, 1234, 1234), os.Chmod(top, 0o755), os.Chmod(filepath.Dir(top), 0o755)); err != nil {
		t.Fatal(err)
	}
	p, at := NewProfiles("/nix/store"), filepath.Join(dir, "p")
	is, err := p.NixProfile(at)
	if err != nil || is.User != 1234 {
		t.Fatalf("it is %+v, %v", is, err)
	}
	if _, err := p.MoveNixProfile(at, NixMove{Was: NixProfile{User: 0, Number: 1, Path: path}, To: path}); err == nil {
		t.Error("root's rights for another's directory")
	}
	if now, err := p.MoveNixProfile(at, NixMove{Was: is, To: path}); err != nil || now.Number != 2 {
		t.Fatalf("moved to %+v, %v", now, err)
	}
	info, err := os.Lstat(filepath.Join(dir, "p-2-link"))
	if err != nil {
		t.Fatal(err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != 1234 {
		t.Errorf("the new link is %+v", info.Sys())
	}
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	is.Number = 2
	if _, err := p.MoveNixProfile(at, NixMove{Was: is, To: path}); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("where its owner may not write: %v", err)
	}
}
