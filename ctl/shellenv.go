package ctl

import (
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/room"
)

// nixOwnSocket and nixOwnLogs are where stock Nix looks for its daemon and for
// build logs by itself.
const (
	nixOwnSocket = "/nix/var/nix/daemon-socket/socket"
	nixOwnLogs   = "/nix/var/log/nix/drvs"
)

func newShellenvCmd(g *globals) *cobra.Command {
	shell := ""
	cmd := &cobra.Command{
		Use:   "shellenv [--shell sh|fish]",
		Short: "Print what a shell needs to use stock Nix with the agent",
		Long: `Print what a shell needs: its commands set NIX_REMOTE to the agent's socket, unless
stock Nix uses that by itself (floxd join sees to it on machines without a Nix store),
NIX_LOG_DIR to where nix log finds our build logs, unless it does by itself, and put your Nix profile's programs into PATH, its documentation and completions into
XDG_DATA_DIRS, and the certificates of this machine where programs of the store look.
On a machine with a Nix store of its own, NIX_REMOTE is set in sessions only (floxctl nix):
elsewhere its own daemon is the one whose paths are seen.

It can be evaluated again: nothing is put in twice. Nobody is asked, so it works while
the agent does not run. Without --shell it is for sh, bash, zsh and ksh, or for fish if
$SHELL is fish.

` + cli.ExitCodes,
		Example: `  eval "$(floxctl shellenv)"                  in ~/.profile
  floxctl shellenv --shell fish | source      in ~/.config/fish/config.fish`,
		Args: cli.Args(0, 0, ""),
	}
	cmd.Flags().StringVar(&shell, "shell", "", "`SHELL` the commands are for: sh or fish")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if shell == "" && filepath.Base(os.Getenv("SHELL")) == "fish" {
			shell = "fish"
		}
		if !slices.Contains([]string{"", "sh", "bash", "zsh", "ksh", "fish"}, shell) {
			return cli.Usage("--shell %q: want sh or fish; bash, zsh and ksh take what is for sh", shell)
		}
		return runShellenv(g.printer(cmd), shell, newShellenv(g.socketPath()))
	}
	return cmd
}

// shellenv is what it sets.
type shellenv struct {
	NixRemote string `json:"nixRemote,omitempty"` // none: stock Nix finds its daemon by itself
	Mode      string `json:"mode"`                // system: the agent is that; session: in floxctl nix only
	Profile   string `json:"profile"`
	Profiles  string `json:"profiles"`           // NIX_PROFILES, the most important one last
	CertFile  string `json:"certFile,omitempty"` // NIX_SSL_CERT_FILE, unless it is set
	LogDir    string `json:"logDir,omitempty"`   // NIX_LOG_DIR; none: stock Nix finds our logs by itself
}

func newShellenv(socket string) *shellenv {
	ours := filepath.Join(filepath.Dir(socket), cli.NixSocketName)
	home := filepath.Join(os.Getenv("HOME"), ".nix-profile")
	e := &shellenv{Profile: home, Profiles: "/nix/var/nix/profiles/default " + home, Mode: "system"}
	to, err := os.Readlink(nixOwnSocket)
	switch {
	case err == nil && to == ours:
	case besideNix(filepath.Dir(socket), room.Mounts()):
		e.Mode = "session"
	default:
		e.NixRemote = "unix://" + ours
	}
	logs := filepath.Join(filepath.Dir(socket), cli.NixLogName)
	if to, err := os.Readlink(nixOwnLogs); err != nil || filepath.Base(to) != flox.LogsName {
		e.LogDir = logs
	}
	for _, file := range []string{"/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/ca-bundle.pem", "/etc/pki/tls/certs/ca-bundle.crt"} {
		if _, err := os.Stat(file); err == nil && os.Getenv("NIX_SSL_CERT_FILE") == "" {
			e.CertFile = file
			break
		}
	}
	return e
}

// besideNix reports whether the agent's store is mounted beside a Nix store of this
// machine, and this is no session.
func besideNix(runDir string, mounts []string) bool {
	at, err := os.Readlink(filepath.Join(runDir, cli.SessionLink))
	return err == nil && slices.Contains(mounts, at) && !slices.Contains(mounts, string(flox.DefaultStoreDir))
}

func runShellenv(out *output, shell string, e *shellenv) error {
	if out.json {
		return out.printJSON(e)
	}
	set, quote := func(name, value string) { out.printf("export %s=%s\n", name, value) }, cli.QuoteSh
	if shell == "fish" {
		set, quote = func(name, value string) { out.printf("set -gx %s %s\n", name, value) }, cli.QuoteFish
	}
	if e.Mode == "session" {
		out.printf("# This machine has a Nix store of its own: the agent's is seen in floxctl nix -- COMMAND.\n")
	}
	if e.NixRemote != "" {
		set("NIX_REMOTE", quote(e.NixRemote))
	}
	if e.LogDir != "" {
		set("NIX_LOG_DIR", quote(e.LogDir))
	}
	set("NIX_PROFILES", quote(e.Profiles))
	if e.CertFile != "" {
		set("NIX_SSL_CERT_FILE", quote(e.CertFile))
	}
	bin, share := quote(filepath.Join(e.Profile, "bin")), quote(filepath.Join(e.Profile, "share"))
	if shell == "fish" {
		out.printf("contains -- %[1]s $PATH; or set -gx PATH %[1]s $PATH\n", bin)
		out.printf("set -q XDG_DATA_DIRS; or set -gx XDG_DATA_DIRS /usr/local/share:/usr/share\n")
		out.printf("contains -- %[1]s (string split : -- \"$XDG_DATA_DIRS\"); or set -gx XDG_DATA_DIRS %[1]s:\"$XDG_DATA_DIRS\"\n", share)
		return nil
	}
	out.printf("case \":$PATH:\" in *:%[1]s:*) ;; *) export PATH=%[1]s\"${PATH:+:$PATH}\" ;; esac\n", bin)
	out.printf("export XDG_DATA_DIRS=\"${XDG_DATA_DIRS:-/usr/local/share:/usr/share}\"\n")
	out.printf("case \":$XDG_DATA_DIRS:\" in *:%[1]s:*) ;; *) export XDG_DATA_DIRS=%[1]s:\"$XDG_DATA_DIRS\" ;; esac\n", share)
	return nil
}
