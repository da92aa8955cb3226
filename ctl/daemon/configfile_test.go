package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
)

// edited writes a configuration file, has keys added to it, and gives its text.
func edited(t *testing.T, text string, change func(*Config), sections ...string) (string, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if text != "" {
		write(t, path, text)
	}
	f, err := openConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	want := *f.has
	change(&want)
	out, err := f.with(&want, sections...)
	if err != nil {
		return "", err
	}
	if err := f.save(out); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil && text+out != "" {
		t.Fatal(err)
	}
	return string(b), nil
}

// What join writes does not lose a word of what somebody wrote.
func TestConfigIsAddedTo(t *testing.T) {
	change := func(c *Config) {
		c.StoreDir, c.Storehouse.Server, c.Storehouse.Consensus, c.Storehouse.MDNS = "/flox/store", `s"2`, "10.0.0.2:7783", false
		c.Storehouse.Listen, c.Storehouse.Reserve = []string{"10.0.0.2:7781", "[::1]:7781"}, 1<<30
		c.Agent.Site = "not of this role"
	}
	const keys = `server-name = "s\"2"
consensus = "10.0.0.2:7783"
`
	for name, c := range map[string]struct{ text, want string }{
		"no file": {"", configHead + "store-dir = \"/flox/store\"\n\n[storehouse]\nlisten = [\"10.0.0.2:7781\", \"[::1]:7781\"]\n" + keys + "mdns = false\nreserve = \"1GiB\"\n"},
		"commented": {
			"# mine\nuser = \"x\" # so\n\n[agent] # here\nsite = \"b\"\n[storehouse]\n# name\nname = 'acme'\nmdns = false\n",
			"# mine\nuser = \"x\" # so\n\nstore-dir = \"/flox/store\"\n\n[agent] # here\nsite = \"b\"\n[storehouse]\nlisten = [\"10.0.0.2:7781\", \"[::1]:7781\"]\n" + keys + "reserve = \"1GiB\"\n# name\nname = 'acme'\nmdns = false\n",
		},
		"agreeing": {
			"store-dir='/flox/store'\n[storehouse]\n" + keys + "listen=['10.0.0.2:7781','[::1]:7781']\nmdns=false\nreserve='1024MiB'",
			"store-dir='/flox/store'\n[storehouse]\n" + keys + "listen=['10.0.0.2:7781','[::1]:7781']\nmdns=false\nreserve='1024MiB'",
		},
	} {
		got, err := edited(t, c.text, change, "storehouse")
		if diff := cmp.Diff(c.want, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
	}
}

// What the file says otherwise is not changed, and what cannot be edited is said.
func TestConfigIsNotContradicted(t *testing.T) {
	change := func(c *Config) { c.Storehouse.Server, c.Storehouse.HTTP = "s2", "none" }
	for text, want := range map[string]struct {
		kind  error
		words []string
	}{
		"# x\n[storehouse]\nserver-name = \"s1\"\n": {flox.ErrBusy, []string{`config.toml:3: storehouse.server-name is "s1", wanted is: server-name = "s2"`}},
		"storehouse.site = 'x'\n":                   {flox.ErrBadInput, []string{"by hand", "[storehouse]\n", `http = "none"`, `server-name = "s2"`}},
		"storehouse = { site = 'x' }\n":             {flox.ErrBadInput, []string{"by hand"}},
		"[agent]\nsite = '''\n[storehouse]\n'''\n":  {flox.ErrBadInput, []string{"by hand"}},
	} {
		_, err := edited(t, text, change, "storehouse")
		if !errors.Is(err, want.kind) {
			t.Errorf("%q: %v, want %v", text, err, want.kind)
			continue
		}
		for _, words := range want.words {
			if !strings.Contains(err.Error(), words) {
				t.Errorf("%q: %v, want it to say %q", text, err, words)
			}
		}
	}
}

// A file behind a link is changed where it is, and its mode is kept.
func TestConfigKeepsLinkAndMode(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/real.toml", "user = 'x'\n")
	if err := errors.Join(os.Chmod(dir+"/real.toml", 0o640), os.Symlink("real.toml", dir+"/config.toml")); err != nil {
		t.Fatal(err)
	}
	f, err := openConfig(dir + "/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.save(f.text + "log-level = 'debug'\n"); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(dir + "/real.toml")
	if err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("the file: %v, %v, want mode 0640", info, err)
	}
	if link, err := os.Lstat(dir + "/config.toml"); err != nil || link.Mode().Type() != os.ModeSymlink {
		t.Errorf("the link: %v, %v", link, err)
	}
	if b, err := os.ReadFile(dir + "/real.toml"); err != nil || string(b) != "user = 'x'\nlog-level = 'debug'\n" {
		t.Errorf("%q, %v", b, err)
	}
}
