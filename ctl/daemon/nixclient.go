package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// What stock Nix looks at by itself, where it was built for the usual store.
const (
	nixStoreDir = "/nix/store"
	nixStateDir = "/nix/var/nix"
	nixConfFile = "/etc/nix/nix.conf"
)

// The lines of nix.conf between which everything is ours.
const (
	nixConfBegin = "# floxd join wrote this; floxd leave removes it."
	nixConfEnd   = "# Here ends what floxd join wrote."
	// What the file was before, where the rest of it does not show that.
	nixConfOpen  = "# The line before had no end."
	nixConfEmpty = "# The file was empty."
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
	block := []string{nixConfBegin}
	switch {
	case theirs == "" && there:
		block = append(block, nixConfEmpty)
	case theirs != "" && !strings.HasSuffix(theirs, "\n"):
		theirs += "\n"
		block = append(block, nixConfOpen)
	}
	block = append(block, "store = daemon", "!include "+c.keys, nixConfEnd, "")
	return theirs + strings.Join(block, "\n")
}

// install changes nothing if this machine's Nix was set up otherwise by somebody,
// which the facts say. It may be called again.
func (c *nixClient) install() (*nixFacts, error) {
	f := &nixFacts{Conf: c.conf, Socket: c.link()}
	old, err := c.read()
	if err != nil {
		return nil, err
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
	old, err := c.read()
	if err != nil {
		return err
	}
	theirs, there, had := old.withoutBlock()
	switch {
	case !had:
		return nil
	case !there: // install made it
		return removeFile(old.name)
	}
	return old.replace(theirs)
}

// nixConf is a nix.conf as it is on the disk.
type nixConf struct {
	name  string // of the file itself, where its usual name is a link
	text  string
	there bool
	mode  fs.FileMode
	owner *syscall.Stat_t // nil: it is to be made
}

func (c *nixClient) read() (*nixConf, error) {
	name, err := filepath.EvalSymlinks(c.conf)
	if errors.Is(err, fs.ErrNotExist) {
		if to, linkErr := os.Readlink(c.conf); linkErr == nil {
			return nil, fmt.Errorf("configuration of Nix: %s leads to %s, which is not there: make it, or remove the link: %w", c.conf, to, flox.ErrNotFound)
		}
		return &nixConf{name: c.conf, mode: 0o644}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("configuration of Nix: %w", err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("configuration of Nix: %w", err)
	}
	info, err := os.Stat(name)
	if err != nil {
		return nil, fmt.Errorf("configuration of Nix: %w", err)
	}
	owner, _ := info.Sys().(*syscall.Stat_t)
	return &nixConf{name: name, text: string(b), there: true, mode: info.Mode().Perm(), owner: owner}, nil
}

// replace writes the file anew, for whom it belonged to.
func (f *nixConf) replace(text string) error {
	if err := replaceFile(f.name, text, f.mode); err != nil || f.owner == nil {
		return err
	}
	return os.Lchown(f.name, int(f.owner.Uid), int(f.owner.Gid))
}

// withoutBlock gives what a nix.conf was before join wrote to it, whether it was
// there, and whether join did write.
func (f *nixConf) withoutBlock() (theirs string, there, had bool) {
	before, after, ok := strings.Cut(f.text, nixConfBegin+"\n")
	if !ok {
		return f.text, f.there, false
	}
	ours, after, ok := strings.Cut(after, nixConfEnd+"\n")
	if !ok {
		return f.text, f.there, false // somebody changed it: it is theirs now
	}
	if strings.HasPrefix(ours, nixConfOpen+"\n") && after == "" {
		before = strings.TrimSuffix(before, "\n")
	}
	theirs = before + after
	return theirs, theirs != "" || strings.HasPrefix(ours, nixConfEmpty+"\n"), true
}
