// Package daemon holds floxd's commands, one file each, and its configuration.
//
// It composes: what an agent or a storehouse does is theirs, and what a command
// line looks like is cli's.
package daemon

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/floxctl/flox/agent"
	"github.com/floxctl/flox/agent/warden"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/ctl/cli"
)

// Main runs floxd with the process's arguments and returns its exit code.
func Main() int {
	buildfarm.Inside()
	if !warden.Standby() {
		return 0
	}
	// Hardened machines give root a mask under which nobody else could pass the
	// directories it makes. What is secret says so by its own mode.
	syscall.Umask(0o022)
	return cli.Run(newRootCmd(), os.Args[1:])
}

func newRootCmd() *cobra.Command {
	file := ""
	root := &cobra.Command{
		Use:   "floxd",
		Short: "The store's daemons: agent, storehouse, or both on one machine",
		Long: `floxd runs what stays running: the agent that mounts the package store on a
machine, the storehouse that owns it, or both at once with: sudo floxd up

Configuration comes from flags, then the environment (FLOXD_ and the key in
capitals, such as FLOXD_AGENT_CACHE_BUDGET), then the configuration file
` + cli.DefaultConfigFile + ` (--config or ` + cli.EnvConfig + ` names another), then defaults:

` + ExampleConfig + `
` + cli.ExitCodes,
		Example: `  sudo floxd up                           everything on this machine
  sudo floxd up --store-dir /flox/store   beside a Nix that is there already
  sudo floxd storehouse init --name s1    the first server of a storehouse of several
  sudo floxd join INVITE                  a further server, or a machine that uses it`,
	}
	root.PersistentFlags().StringVar(&file, "config", "", "configuration `FILE` (default $"+cli.EnvConfig+", then "+cli.DefaultConfigFile+")")
	root.AddCommand(newUpCmd(&file), newAgentCmd(&file), newStorehouseCmd(&file), newRunCmd(&file), newNixDaemonCmd(&file), newJoinCmd(&file), newLeaveCmd(&file), newStepCmd(), newVersionCmd())
	return root
}

// load resolves the configuration of a command.
func load(file string, flags *overrides) (*Config, error) {
	return loadOver(DefaultConfig(), file, flags)
}

// loadOver is load with other defaults.
func loadOver(cfg *Config, file string, flags *overrides) (*Config, error) {
	required := true
	if file == "" {
		if file = os.Getenv(cli.EnvConfig); file == "" {
			file, required = cli.DefaultConfigFile, false
		}
	}
	if err := ReadConfig(cfg, file, required); err != nil {
		return nil, err
	}
	if err := readEnv(cfg); err != nil {
		return nil, err
	}
	flags.apply(cfg)
	return cfg, cfg.check()
}

// newLogger writes structured logs to w. Without a level it takes fallback.
func newLogger(w io.Writer, cfg *Config, fallback slog.Level) *slog.Logger {
	level := fallback
	if cfg.LogLevel != "" {
		if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
			level = fallback // check refused everything else already
		}
	}
	opts := &slog.HandlerOptions{Level: level}
	if cfg.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// newVersionCmd prints the same words as floxctl's, so that the two can be
// compared by eye.
func newVersionCmd() *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print which build of floxd this is",
		Args:  cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(struct {
					cli.Version
					StateFormat int `json:"stateFormat"` // what a reload compares
				}{cli.ReadVersion(), agent.StateFormat})
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "floxd %s\n", cli.ReadVersion())
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print it as JSON")
	return cmd
}
