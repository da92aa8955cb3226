package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent"
	"github.com/floxctl/flox/ctl/cli"
)

// The values of the key mount beside "", with which this machine decides.
const (
	mountSession = "session"
	mountSystem  = "system"
)

// sessionDir is where below the state directory the store is mounted, for sessions
// only: everybody may pass, as through the usual place.
const sessionDir = "mount"

// place decides where the store is mounted, for good: cfg.Mount is session then,
// or "" for the store directory itself. A machine with a Nix store of its own
// keeps it, and has ours in sessions. What is in the way is ErrBusy.
func (c *Config) place(command string) error {
	if c.Mount == mountSession {
		return nil
	}
	own, err := ownStore(c.StoreDir)
	switch {
	case err != nil:
		return err
	case own && c.Mount == mountSystem:
		return cli.Explain(flox.ErrBusy, `mount = system: %s is a Nix store of this machine, and its paths would be served by the agent alone: %s.
%s has changed nothing. Have ours in sessions beside it, with --mount session, and floxctl nix -- COMMAND`,
			c.StoreDir, needsStore("/", c.StoreDir), command)
	case own:
		c.Mount = mountSession
		return nil
	}
	c.Mount = ""
	return checkStoreDir(c.StoreDir, command)
}

// mountDir is where the store is mounted, once place has decided.
func (c *Config) mountDir() string {
	if c.Mount == mountSession {
		return filepath.Join(c.StateDir, sessionDir)
	}
	return c.StoreDir
}

// noProfiles is the value of profiles-dir for nowhere.
const noProfiles = "none"

// profilesDir is where profiles are mounted, "" = nowhere; optional says that nobody
// asked for that place.
func (c *Config) profilesDir() (dir string, optional bool) {
	switch {
	case c.Profiles == noProfiles:
		return "", false
	case c.Profiles != "":
		return c.Profiles, false
	case c.RunDir != cli.DefaultRunDir || c.overlaps(cli.DefaultProfilesDir) != "": // another agent of this machine, and a store in there
		return "", false
	}
	return cli.DefaultProfilesDir, true
}

// overlaps names the key of a directory that a mount at dir would hide, or that would
// hide it.
func (c *Config) overlaps(dir string) string {
	for _, d := range []struct{ key, dir string }{{"store-dir", c.StoreDir}, {"state-dir", c.StateDir}, {"run-dir", c.RunDir}} {
		if strings.HasPrefix(d.dir+"/", dir+"/") || strings.HasPrefix(dir+"/", d.dir+"/") {
			return d.key
		}
	}
	return ""
}

func (c *Config) checkProfilesDir() error {
	if c.Profiles == "" || c.Profiles == noProfiles {
		return nil
	}
	if _, err := flox.ParseStoreDir(c.Profiles); err != nil { // the same rule: absolute, clean, not "/"
		return cli.Explain(flox.ErrBadInput, "profiles-dir %q: want an absolute directory without a trailing slash, or none", c.Profiles)
	}
	if key := c.overlaps(c.Profiles); key != "" {
		return cli.Explain(flox.ErrBadInput, "profiles-dir %s and %s lie in each other: one would be covered by the other's mount", c.Profiles, key)
	}
	return nil
}

// ownStore reports whether a Nix store of this machine is at dir. It asks the
// kernel's table first, as checkStoreDir does.
func ownStore(dir string) (bool, error) {
	mounted, err := mountedType(dir)
	if err != nil || mounted == cli.FilesystemType {
		return false, err
	}
	own, err := cli.IsNixStore(dir)
	if err != nil {
		return false, fmt.Errorf("store directory: %w: %w", err, flox.ErrBusy)
	}
	return own, nil
}

// showLocal has the agent show the Nix store of this machine with ours, if there is
// one: in the sessions nothing else is at its place.
func (c *Config) showLocal(to *agent.Config) {
	if own, err := ownStore(c.StoreDir); err == nil && own {
		to.LocalStore = c.StoreDir
		to.LocalSocket = filepath.Join(filepath.Dir(c.StoreDir), "var/nix/daemon-socket/socket")
	}
}

// mostNeeds is how many of those who need a store are named.
const mostNeeds = 5

// needsStore says what of the running system comes from a store directory: the
// system itself, where that is NixOS, and programs that run. Root is "/".
func needsStore(root, storeDir string) string {
	var all []string
	add := func(link, word string) {
		if to, err := os.Readlink(link); err == nil && strings.HasPrefix(to, storeDir+"/") {
			all = append(all, fmt.Sprintf("%s %s", word, to))
		}
	}
	for _, system := range []string{"run/current-system", "run/booted-system"} {
		add(filepath.Join(root, system), "/"+system+" is")
	}
	links, _ := filepath.Glob(filepath.Join(root, "proc/[0-9]*/exe")) // the pattern is the one above
	for _, link := range links {
		add(link, "process "+filepath.Base(filepath.Dir(link))+" runs")
	}
	switch n := len(all); {
	case n == 0:
		return "its own Nix could write nothing more there"
	case n > mostNeeds:
		all = append(all[:mostNeeds], fmt.Sprintf("and %d more", n-mostNeeds))
	}
	return strings.Join(all, ", ") + ", which would stop without it"
}

// linkSession leaves word in the run directory of where the store is mounted for
// sessions: floxctl shellenv asks nobody.
func (c *Config) linkSession() error {
	link := filepath.Join(c.RunDir, cli.SessionLink)
	if err := removeFile(link); err != nil || c.Mount != mountSession {
		return err
	}
	return os.Symlink(c.mountDir(), link)
}
