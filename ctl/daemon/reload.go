package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/warden"
	"github.com/floxctl/flox/ctl/cli"
)

// reloadPatience is the longest a reload may take: the new program has its time
// to say its version and to serve, and after that the old one.
const reloadPatience = 2 * time.Minute

func newReloadCmd(file *string) *cobra.Command {
	asJSON, program := false, ""
	cmd := &cobra.Command{
		Use:   "reload [flags]",
		Short: "Start the running agent's program anew, without an unmount",
		Long: `Put the program file as it is on the disk now in the place of the agent that
runs from it, such as after an update: the file that is now behind the name the
agent was called by, which may be a link. The mount stays, and so does whoever uses
it: what is read meanwhile waits for the new program, and nothing fails.

The new program is asked for its version first. If it cannot be started, nothing
is changed; if it does not come to serve, the one before is started again. It
serves with the configuration the agent was started with. The small process of
root that mounts and watches is not replaced: only a restart of the agent does.

--state-dir (or the configuration) says which agent of this machine is meant;
one started with floxd up is reloaded as well.

` + cli.ExitCodes,
		Example: `  sudo floxd agent reload
  sudo floxd agent reload --program /opt/floxd-2/floxd   another file from now on`,
		Args: cli.Args(0, 0, ""),
	}
	flags := bindFlags(cmd.Flags())
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the result as JSON")
	cmd.Flags().StringVar(&program, "program", "", "program `FILE` to start from now on (default: the one the agent was started from)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load(*file, flags)
		if err != nil {
			return err
		}
		return runReload(cmd.Context(), cfg, program, asJSON, cmd.OutOrStdout())
	}
	return cmd
}

// controlSocket is where the privileged process of an agent takes root's orders.
func controlSocket(cfg *Config) string { return filepath.Join(cfg.StateDir, "agent-control.sock") }

func runReload(ctx context.Context, cfg *Config, program string, asJSON bool, out io.Writer) error {
	if os.Geteuid() != 0 {
		return cli.Explain(flox.ErrDenied, "floxd agent reload says which program of this machine's runs as the agent: only root may, run it with sudo")
	}
	if program != "" {
		var err error
		if program, err = filepath.Abs(program); err != nil {
			return fmt.Errorf("program: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, reloadPatience)
	defer cancel()
	r, err := warden.Reload(ctx, controlSocket(cfg), program)
	switch {
	case errors.Is(err, flox.ErrUnreachable):
		return cli.Explain(flox.ErrUnreachable, "no agent runs with the state directory %s: start one with sudo floxd agent, or name the directory of the one that runs with --state-dir", cfg.StateDir)
	case err != nil:
		return fmt.Errorf("reload: %w", err)
	case asJSON:
		return json.NewEncoder(out).Encode(r)
	}
	_, err = fmt.Fprintf(out, "The agent runs %s (before: %s), process %d, from %s.\nNobody served the mount for %s; what was read meanwhile waited.\n",
		r.To, known(r.From), r.PID, r.Program, r.Unserved.Round(100*time.Microsecond))
	if err == nil && r.Unchanged && r.To == r.From {
		_, err = fmt.Fprintf(out, "That is the file and the version that ran before: if this was an update, it lies elsewhere; name its file with --program.\n")
	}
	return err
}

// known is a version, or that it is not known: nothing ran.
func known(version string) string {
	if version == "" {
		return "nothing"
	}
	return version
}
