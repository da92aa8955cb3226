package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/floxctl/flox/ctl/cli"
)

// What stock Nix looks at by itself, where it was built for the usual store.
const (
	nixStoreDir = "/nix/store"
	nixStateDir = "/nix/var/nix"
	nixConfFile = "/etc/nix/nix.conf"
)

// nixClient makes stock Nix of this machine a client of the agent, without any
// variable being set: also in cron, in units, and through sudo. It is for machines
// that have no Nix store of their own.
type nixClient struct {
	conf, state string // nixConfFile and nixStateDir
	socket      string // the agent's
	keys        string // file of the agent's that says which keys sign
}

// nixKeysFile is where the agent tells stock Nix which keys sign.
func nixKeysFile(cfg *Config) string { return filepath.Join(cfg.RunDir, cli.NixConfName) }

// newNixClient gives nil where stock Nix cannot be a client: the store is at a
// place it was not built for, it has one of its own, or the agent has no socket for it.
func newNixClient(cfg *Config) *nixClient {
	if cfg.StoreDir != nixStoreDir || nixSocket(cfg) == "" || cfg.Mount == mountSession {
		return nil
	}
	return &nixClient{conf: nixConfFile, state: nixStateDir, socket: nixSocket(cfg), keys: nixKeysFile(cfg)}
}

// nixFacts is what join says about stock Nix.
type nixFacts struct {
	Conf   string `json:"conf"`
	Socket string `json:"socket"`
	Reason string `json:"reason,omitempty"` // why nothing was changed
}

func (c *nixClient) link() string { return filepath.Join(c.state, "daemon-socket", "socket") }

// with gives nix.conf with our block. The keys are in a file of their own, since
// they are rotated; it is missing until the agent has run.
func (c *nixClient) with(theirs string, there bool) string {
	return withBlock(theirs, there, "store = daemon", "!include "+c.keys)
}

// install changes nothing if this machine's Nix was set up otherwise by somebody,
// which the facts say. It may be called again.
func (c *nixClient) install() (*nixFacts, error) {
	f := &nixFacts{Conf: c.conf, Socket: c.link()}
	old, err := readBlockFile(c.conf)
	if err != nil {
		return nil, fmt.Errorf("configuration of Nix: %w", err)
	}
	theirs, there, _ := old.withoutBlock()
	if f.Reason = c.otherwise(theirs); f.Reason != "" {
		return f, nil
	}
	// What stock Nix expects of a daemon's machine: users make their profiles in the
	// last two.
	for dir, mode := range map[string]fs.FileMode{
		"daemon-socket": 0o755, "profiles": 0o755, "gcroots": 0o755,
		"profiles/per-user": 0o1777, "gcroots/per-user": 0o1777,
	} {
		if err := makeNixDir(filepath.Join(c.state, dir), mode); err != nil {
			return nil, err
		}
	}
	if err := os.Remove(c.link()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("socket of stock Nix: %w", err)
	}
	if err := os.Symlink(c.socket, c.link()); err != nil {
		return nil, fmt.Errorf("socket of stock Nix: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(c.conf), 0o755); err != nil { //nolint:gosec // everybody's programs read it
		return nil, err
	}
	return f, old.replace(c.with(theirs, there))
}

// makeNixDir makes a directory, and those above it, unless it is there: then it
// stays what somebody made it.
func makeNixDir(dir string, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil { //nolint:gosec // as stock Nix has them
		return err
	}
	err := os.Mkdir(dir, 0o755) //nolint:gosec // as above
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil && mode&0o1000 != 0 {
		err = os.Chmod(dir, 0o777|fs.ModeSticky)
	}
	return err
}

// otherwise says why stock Nix here is somebody else's: "" if it is not.
func (c *nixClient) otherwise(conf string) string {
	for i, line := range strings.Split(conf, "\n") {
		line, _, _ = strings.Cut(line, "#")
		key, value, ok := strings.Cut(line, "=")
		value = strings.TrimSpace(value)
		if ok && strings.TrimSpace(key) == "store" && !slices.Contains([]string{"", "auto", "daemon"}, value) {
			return fmt.Sprintf("%s:%d says store = %s", c.conf, i+1, value)
		}
	}
	switch info, err := os.Lstat(c.link()); {
	case errors.Is(err, fs.ErrNotExist):
		return ""
	case err != nil:
		return err.Error()
	case info.Mode().Type() != fs.ModeSymlink:
		return fmt.Sprintf("%s is another daemon's", c.link())
	}
	if to, err := os.Readlink(c.link()); err != nil || to != c.socket {
		return fmt.Sprintf("%s leads to %s", c.link(), to)
	}
	return ""
}

// remove takes out what install put in, and nothing else.
func (c *nixClient) remove() error {
	if to, err := os.Readlink(c.link()); err == nil && to == c.socket {
		if err := os.Remove(c.link()); err != nil {
			return fmt.Errorf("socket of stock Nix: %w", err)
		}
	}
	if err := removeBlock(c.conf); err != nil {
		return fmt.Errorf("configuration of Nix: %w", err)
	}
	return nil
}
