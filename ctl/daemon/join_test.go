package daemon

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/ctl/entry"
)

// anInvite is one of a storehouse that this machine has a way to, itself.
func anInvite(role string) *api.JoinInvite {
	return &api.JoinInvite{
		ID: "ABCDEFGHIJ", Secret: make([]byte, 20), Role: role, Name: "acme", StoreDir: "/flox/store", TrustList: flox.CID{1},
		Storehouse: []api.InvitePeer{{ID: "12D3KooWtest", Addrs: []string{"/ip4/127.0.0.1/tcp/7781"}}}, Expires: time.Now().Add(time.Hour),
	}
}

// configured is a join up to where it would speak to the storehouse, with flags
// of the command line for the general settings.
func configured(t *testing.T, role, text string, opts joinFlags, args ...string) (*join, error) {
	t.Helper()
	opts.noStart = true
	file := filepath.Join(t.TempDir(), "config.toml")
	if text != "" {
		write(t, file, text)
	}
	set := pflag.NewFlagSet("join", pflag.ContinueOnError)
	flags := bindFlags(set)
	if err := set.Parse(args); err != nil {
		t.Fatal(err)
	}
	j := &join{joinFlags: opts, invite: anInvite(role)}
	if err := j.load(file, flags); err != nil {
		return nil, err
	}
	return j, j.configure(t.Context(), flags)
}

// What an invite makes of a machine, and what was said beside it, is what its
// configuration says afterwards.
func TestJoinConfigures(t *testing.T) {
	j, err := configured(t, entry.RoleServer, "", joinFlags{entryFlags: entryFlags{name: "s2", consensus: "0.0.0.0:7783", consensusAdvertise: "10.0.0.2:9"}, http: "none"}, "--state-dir", "/srv/flox")
	if err != nil {
		t.Fatal(err)
	}
	const server = configHead + "store-dir = \"/flox/store\"\nstate-dir = \"/srv/flox\"\n\n[storehouse]\nhttp = \"none\"\nserver-name = \"s2\"\nconsensus = \"0.0.0.0:7783\"\nconsensus-advertise = \"10.0.0.2:9\"\n"
	if j.text != server || j.cfg.Storehouse.advertised() != "10.0.0.2:9" {
		t.Errorf("a server is told %s and configured:\n%s", j.cfg.Storehouse.advertised(), j.text)
	}
	if j, err = configured(t, entry.RoleWorker, "", joinFlags{site: "berlin", listen: []string{"10.0.0.3:1"}}); err != nil {
		t.Fatal(err)
	}
	if want := configHead + "store-dir = \"/flox/store\"\n\n[agent]\nlisten = [\"10.0.0.3:1\"]\nsite = \"berlin\"\n"; j.text != want {
		t.Errorf("a worker is configured:\n%s", j.text)
	}
}

// What cannot be is said before the invite is used.
func TestJoinRefusesBeforeTheInviteIsUsed(t *testing.T) {
	for name, c := range map[string]struct {
		role, text string
		opts       joinFlags
		args       []string
		kind       error
		words      string
	}{
		"a server's flag":       {role: entry.RoleAgent, opts: joinFlags{entryFlags: entryFlags{consensus: "10.0.0.1:1"}}, kind: flox.ErrBadInput, words: "--consensus is for servers"},
		"another store":         {role: entry.RoleAgent, text: "store-dir = '/nix/store'", kind: flox.ErrBadInput, words: "--store-dir /flox/store"},
		"another store, a flag": {role: entry.RoleAgent, args: []string{"--store-dir", "/nix/store"}, kind: flox.ErrBadInput, words: "--store-dir /flox/store"},
		"another name":          {role: entry.RoleServer, text: "[storehouse]\nserver-name = 's1'", opts: joinFlags{entryFlags: entryFlags{name: "s2", consensus: "10.0.0.1:1"}}, kind: flox.ErrBusy, words: `server-name = "s2"`},
		"no port":               {role: entry.RoleServer, opts: joinFlags{entryFlags: entryFlags{consensus: "10.0.0.1"}}, kind: flox.ErrBadInput, words: "want host:port"},
		"only itself in reach":  {role: entry.RoleServer, kind: flox.ErrBadInput, words: "--consensus HOST:7783"},
		"any address":           {role: entry.RoleServer, opts: joinFlags{entryFlags: entryFlags{consensus: ":7783"}}, kind: flox.ErrBadInput, words: "--consensus-advertise"},
	} {
		_, err := configured(t, c.role, c.text, c.opts, c.args...)
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want %v saying %q", name, err, c.kind, c.words)
		}
	}
}

// An agent is not started with an invite that makes a server of its machine.
func TestAgentTakesNoServersInvite(t *testing.T) {
	line, err := anInvite(entry.RoleServer).Encode()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "invite")
	if err := os.WriteFile(file, []byte(line+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, given := range []string{line, file} {
		cfg := DefaultConfig()
		cfg.StateDir, cfg.Agent.Invite = t.TempDir(), given
		if err := takeInvite(t.Context(), cfg, somebody, slog.New(slog.DiscardHandler)); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "floxd join") {
			t.Errorf("%.10s: %v", given, err)
		}
	}
}
