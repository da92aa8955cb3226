package daemon

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/floxctl/flox"
)

func testNixClient(t *testing.T) *nixClient {
	dir := t.TempDir()
	return &nixClient{
		conf: filepath.Join(dir, "etc/nix/nix.conf"), state: filepath.Join(dir, "var"),
		socket: "/run/floxd/nix.socket", keys: "/run/floxd/nix.conf",
	}
}

// What join writes is added to what is there, once, and taken out again to the byte.
func TestNixIsSetUpAndBack(t *testing.T) {
	for name, before := range map[string]string{
		"none": "not there", "empty": "", "some": "max-jobs = 3\n", "no newline": "max-jobs = 3", "store is auto": "store = auto # so\n", "a comment": "# store = /elsewhere\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := testNixClient(t)
			there := before != "not there"
			if there {
				writeConf(t, c, before)
			} else {
				before = ""
			}
			for range 2 {
				f, err := c.install()
				if err != nil || f.Reason != "" {
					t.Fatal(f, err)
				}
			}
			b, err := os.ReadFile(c.conf)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(b), "store = daemon\n!include /run/floxd/nix.conf\n"); n != 1 || !strings.HasPrefix(string(b), before) {
				t.Errorf("%d times ours in:\n%s", n, b)
			}
			if to, err := os.Readlink(filepath.Join(c.state, "daemon-socket/socket")); err != nil || to != c.socket {
				t.Errorf("the socket leads to %q, %v", to, err)
			}
			if info, err := os.Stat(filepath.Join(c.state, "profiles/per-user")); err != nil || info.Mode()&os.ModeSticky == 0 || info.Mode().Perm() != 0o777 {
				t.Errorf("users' profiles: %v, %v", info, err)
			}
			for range 2 {
				if err := c.remove(); err != nil {
					t.Fatal(err)
				}
			}
			b, err = os.ReadFile(c.conf)
			if string(b) != before || there == os.IsNotExist(err) {
				t.Errorf("afterwards it is %q, %v", b, err)
			}
			if _, err := os.Lstat(filepath.Join(c.state, "daemon-socket/socket")); !os.IsNotExist(err) {
				t.Errorf("the socket is still there: %v", err)
			}
		})
	}
}

// A nix.conf that is a link stays one, and the file it leads to whose it was.
func TestNixConfMayBeALink(t *testing.T) {
	c := testNixClient(t)
	writeConf(t, c, "max-jobs = 3\n")
	file := filepath.Join(t.TempDir(), "there")
	if err := errors.Join(os.Rename(c.conf, file), os.Symlink(file, c.conf)); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(file, 65533, 65532); err != nil {
			t.Fatal(err)
		}
	}
	before, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := c.install(); err != nil || f.Reason != "" {
		t.Fatal(f, err)
	}
	if b, err := os.ReadFile(file); err != nil || !strings.Contains(string(b), blockBegin) {
		t.Errorf("the file it leads to: %q, %v", b, err)
	}
	if err := c.remove(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "max-jobs = 3\n" {
		t.Errorf("afterwards it is %q, %v", b, err)
	}
	if to, err := os.Readlink(c.conf); err != nil || to != file {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	after, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	was, is := before.Sys().(*syscall.Stat_t), after.Sys().(*syscall.Stat_t)
	if was.Uid != is.Uid || was.Gid != is.Gid || before.Mode() != after.Mode() {
		t.Errorf("it was %d:%d %v, and is %d:%d %v", was.Uid, was.Gid, before.Mode(), is.Uid, is.Gid, after.Mode())
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := c.install(); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a link to nothing: %v", err)
	}
}

func writeConf(t *testing.T, c *nixClient, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(c.conf), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// A Nix that somebody set up otherwise stays so, and it is said.
func TestSomebodysNixStays(t *testing.T) {
	for name, c := range map[string]struct {
		make func(t *testing.T, c *nixClient)
		want string
	}{
		"another store": {func(t *testing.T, c *nixClient) { writeConf(t, c, "a = b\nstore = ssh-ng://builder\n") }, "nix.conf:2 says store = ssh-ng://builder"},
		"another daemon": {func(t *testing.T, c *nixClient) {
			dir := filepath.Join(c.state, "daemon-socket")
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Chdir(dir) // the whole name may be too long for a socket
			ln, err := net.Listen("unix", "socket")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { ln.Close() })
		}, "is another daemon's"},
		"a link elsewhere": {func(t *testing.T, c *nixClient) {
			if err := os.MkdirAll(filepath.Join(c.state, "daemon-socket"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("/elsewhere", c.link()); err != nil {
				t.Fatal(err)
			}
		}, "leads to /elsewhere"},
	} {
		t.Run(name, func(t *testing.T) {
			client := testNixClient(t)
			c.make(t, client)
			before, _ := os.ReadFile(client.conf)
			f, err := client.install()
			if err != nil || !strings.Contains(f.Reason, c.want) {
				t.Fatalf("%+v, %v; want %q", f, err, c.want)
			}
			if err := client.remove(); err != nil {
				t.Fatal(err)
			}
			if after, _ := os.ReadFile(client.conf); string(after) != string(before) {
				t.Errorf("nix.conf became %q", after)
			}
			if _, err := os.Lstat(client.link()); name != "another store" && err != nil {
				t.Errorf("the socket: %v", err)
			}
		})
	}
}
