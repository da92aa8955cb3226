package world

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Nix is a directory that stock Nix commands see as /nix, in a mount namespace
// that lives as long as the command. The zero value is not usable: Dir must be
// set. Copies are independent.
type Nix struct {
	// Dir holds store/ and var/; it is created by the first command. With Lower
	// it holds only what differs from there.
	Dir string
	// Lower, if set, is a directory that is only read.
	Lower string
	// NetNS, if set, is the file of the network namespace to run in, for example
	// /run/netns/NAME.
	NetNS string
}

// settings keep Nix from looking at the machine's own configuration: no build
// users, no sandbox, no substituters but those a command names. Unpacking
// Debian packages meets setuid bits, which Nix's system call filter refuses.
const settings = `build-users-group =
sandbox = false
filter-syscalls = false
substituters =
require-sigs = false
experimental-features = nix-command
max-jobs = auto
keep-derivations = false
fsync-metadata = false
`

// enter mounts $1 (over $2, unless that is empty) at /nix and runs the rest.
const enter = `set -e
dir=$1 lower=$2
shift 2
if [ -n "$lower" ]; then
	mount -t overlay -o "lowerdir=$lower,upperdir=$dir/upper,workdir=$dir/work" overlay /nix
else
	mount --bind "$dir" /nix
fi
exec "$@"`

// Command prepares a command, for example "nix", "copy", "--to", url, path. It
// runs as root with stdin, stdout and stderr unset and its own environment;
// what the caller appends to Env wins. Cancelling ctx interrupts it and, ten
// seconds later, kills it. Errors of preparing show when it is started.
func (n Nix) Command(ctx context.Context, args ...string) *exec.Cmd {
	argv := []string{"unshare", "--mount", "--propagation", "private", "--", "sh", "-c", enter, "enter", n.Dir, n.Lower}
	if n.NetNS != "" {
		argv = append([]string{"nsenter", "--net=" + n.NetNS, "--"}, argv...)
	}
	cmd := exec.CommandContext(ctx, argv[0], append(argv[1:], args...)...)
	cmd.Env = append(plainEnv(),
		"NIX_REMOTE=local", "NIX_STORE_DIR=/nix/store", "NIX_STATE_DIR=/nix/var/nix", "NIX_LOG_DIR=/nix/var/log/nix",
		"NIX_CONF_DIR=/nix/etc", "NIX_USER_CONF_FILES=/dev/null", "NIX_SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt",
		"HOME=/nix/home", "TMPDIR=/nix/tmp")
	cmd.Dir = "/"
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	if err := n.prepare(); err != nil {
		cmd.Err = err
	}
	return cmd
}

// prepare makes the directories and the configuration a command finds at /nix.
func (n Nix) prepare() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("stock Nix in %s: mounting over /nix needs root", n.Dir)
	}
	top := n.Dir
	if n.Lower != "" {
		top = filepath.Join(n.Dir, "upper")
		if err := os.MkdirAll(filepath.Join(n.Dir, "work"), 0o755); err != nil {
			return err
		}
	}
	// The mount point; Debian's nix-bin has it.
	if err := os.MkdirAll("/nix", 0o755); err != nil {
		return err
	}
	for _, dir := range []string{"store", "var/nix/db", "var/log/nix", "etc", "home", "tmp"} {
		if err := os.MkdirAll(filepath.Join(top, dir), 0o755); err != nil {
			return err
		}
	}
	conf := filepath.Join(top, "etc", "nix.conf")
	if have, err := os.ReadFile(conf); err == nil && string(have) == settings {
		return nil
	}
	// By rename: another command may be reading it.
	tmp, err := os.CreateTemp(filepath.Dir(conf), "nix.conf.")
	if err != nil {
		return err
	}
	defer tmp.Close()
	if _, err := tmp.WriteString(settings); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), conf)
}

// plainEnv is the caller's environment without what would steer Nix, a shell
// or the dynamic linker.
func plainEnv() []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		switch name {
		case "HOME", "TMPDIR", "BASH_ENV", "ENV", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME":
			continue
		}
		if !strings.HasPrefix(name, "NIX_") && !strings.HasPrefix(name, "LD_") {
			env = append(env, kv)
		}
	}
	return env
}
