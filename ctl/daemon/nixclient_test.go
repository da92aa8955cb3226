package daemon

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
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
		"none": "", "some": "max-jobs = 3\n", "no newline": "max-jobs = 3", "store is auto": "store = auto # so\n", "a comment": "# store = /elsewhere\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := testNixClient(t)
			if before != "" {
				writeConf(t, c, before)
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
			if after := strings.TrimSuffix(string(b), "\n"); after != strings.TrimSuffix(before, "\n") || (before == "") != os.IsNotExist(err) {
				t.Errorf("afterwards it is %q, %v", b, err)
			}
			if _, err := os.Lstat(filepath.Join(c.state, "daemon-socket/socket")); !os.IsNotExist(err) {
				t.Errorf("the socket is still there: %v", err)
			}
		})
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
