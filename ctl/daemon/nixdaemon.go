package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// noNixSocket is the key's value for none.
const noNixSocket = "none"

// nixSocket is where the agent listens for stock Nix; "" if nowhere.
func nixSocket(cfg *Config) string {
	switch cfg.Agent.NixSocket {
	case noNixSocket:
		return ""
	case "":
		return filepath.Join(cfg.RunDir, cli.NixSocketName)
	}
	return cfg.Agent.NixSocket
}

// nixLogDir is where stock Nix looks for build logs; "" if it finds none there.
func nixLogDir(cfg *Config) string {
	switch cfg.Agent.NixLogDir {
	case noNixSocket:
		return ""
	case "":
		return filepath.Join(filepath.Dir(cfg.StoreDir), "var/log/nix")
	}
	return cfg.Agent.NixLogDir
}

// Build logs are looked up in the mount: the log-dir of stock Nix holds a link to
// there. One of our own is in RunDir, for machines where a Nix has its logs itself.
const nixLogs = "drvs"

// logsInMount is where the link leads.
func logsInMount(cfg *Config) string { return filepath.Join(cfg.StoreDir, flox.LogsName) }

// errOthersLogs: the directory is not ours.
var errOthersLogs = errors.New("a Nix of this machine has its logs there, and floxctl shellenv sets NIX_LOG_DIR to ours")

// makeNixLogDirs makes the links. What an agent before this one kept there goes:
// the storehouse has it.
func makeNixLogDirs(cfg *Config, who account) error {
	if nixSocket(cfg) == "" {
		return nil
	}
	err := linkLogs(cfg, filepath.Join(cfg.RunDir, cli.NixLogName), who)
	if dir := nixLogDir(cfg); dir != "" && cfg.Mount != mountSession {
		err = errors.Join(err, linkLogs(cfg, dir, who))
	}
	return err
}

func linkLogs(cfg *Config, dir string, who account) error {
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // logs are for everybody
		return err
	}
	link := filepath.Join(dir, nixLogs)
	err := os.Symlink(logsInMount(cfg), link)
	if !errors.Is(err, os.ErrExist) {
		return err
	}
	if to, err := os.Readlink(link); err == nil && to == logsInMount(cfg) {
		return nil
	}
	info, err := os.Lstat(link)
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || !info.IsDir() || st.Uid != who.uid || who.uid == 0 {
		return fmt.Errorf("%s: %w", link, errOthersLogs)
	}
	if err := os.RemoveAll(link); err != nil {
		return err
	}
	return os.Symlink(logsInMount(cfg), link)
}

// removeNixLogDirs removes the links, and what was made to hold them if it is empty.
func removeNixLogDirs(cfg *Config) error {
	for _, dir := range []string{filepath.Join(cfg.RunDir, cli.NixLogName), nixLogDir(cfg)} {
		if dir == "" {
			continue
		}
		link := filepath.Join(dir, nixLogs)
		if to, err := os.Readlink(link); err != nil || to != logsInMount(cfg) {
			continue // nobody's, or somebody else's
		}
		if err := os.Remove(link); err != nil {
			return fmt.Errorf("build logs: %w", err)
		}
		for _, parent := range []string{dir, filepath.Dir(dir)} {
			if os.Remove(parent) != nil {
				break
			}
		}
	}
	return nil
}

func newNixDaemonCmd(file *string) *cobra.Command {
	stdio := false
	cmd := &cobra.Command{
		Use:   "nix-daemon --stdio [flags]",
		Short: "Speak Nix's worker protocol on standard input and output",
		Long: `Connect standard input and output with the agent's socket for stock Nix. It is
what ssh-ng://HOST runs on this machine, in the place of nix-daemon --stdio. What is
on this machine uses the socket itself: NIX_REMOTE=unix:///run/floxd/nix.socket.

` + cli.ExitCodes,
		Example: `  nix copy --to 'ssh-ng://HOST?remote-program=floxd%20nix-daemon' ./result
  NIX_REMOTE=unix:///run/floxd/nix.socket nix path-info -r ./result     here, without this command`,
		Args: cli.Args(0, 0, ""),
	}
	flags := bindFlags(cmd.Flags())
	cmd.Flags().BoolVar(&stdio, "stdio", false, "use standard input and output; needed")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load(*file, flags)
		if err != nil {
			return err
		}
		if !stdio {
			return cli.Explain(flox.ErrBadInput, "floxd nix-daemon serves standard input and output only: add --stdio; the agent itself listens on %s", nixSocket(cfg))
		}
		return runNixDaemon(cmd.Context(), nixSocket(cfg), os.Stdin, cmd.OutOrStdout())
	}
	return cmd
}

// runNixDaemon splices a client and the agent's socket until either ends.
func runNixDaemon(ctx context.Context, socket string, in io.ReadCloser, out io.Writer) error {
	if socket == "" {
		return cli.Explain(flox.ErrNotFound, "the agent has no socket for Nix here: nix-socket is none")
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("no agent listens for Nix at %s; is floxd agent running? %w: %w", socket, err, flox.ErrUnreachable)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() {
		conn.Close()
		in.Close()
	})()
	go func() { // ends with the client, or with the process
		_, _ = io.Copy(conn, in)
		// The daemon takes the end for that of the client.
		if u, ok := conn.(*net.UnixConn); ok {
			_ = u.CloseWrite()
		}
	}()
	_, err = io.Copy(out, conn)
	if errors.Is(err, net.ErrClosed) {
		err = ctx.Err()
	}
	return err
}
