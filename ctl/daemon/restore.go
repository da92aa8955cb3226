package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/storehouse"
)

func newRestoreCmd(file *string) *cobra.Command {
	b, newKey := backupFlags{}, false
	cmd := &cobra.Command{
		Use:   "restore --from DIR|URL [--backup NAME] [--passphrase-file FILE] [flags]",
		Short: "Make a storehouse of a backup, when all its servers are lost",
		Long: `Make a storehouse of one server out of a backup, in STATE-DIR/storehouse, which must
be empty. What was interrupted goes on when it is run again; until it is finished
no storehouse starts there. A damaged backup is refused, and what is damaged named.

Then start it as before, at the address it had (--advertise) or that the host name in
the machines' invites leads to now. Its first start begins a new epoch: the agents go
on with it, cache and mount untouched, and the other servers of old are members no
more: they join anew. None of the old servers may run on: the restored one is the
server that wrote the backup, under the same key.

--new-key makes it another machine, for a copy beside a storehouse that lives on:
agents come to it with a new invite only.

` + cli.ExitCodes,
		Example: `  sudo floxd storehouse restore --from /mnt/backups --passphrase-file /root/passphrase
  sudo floxd storehouse --advertise 10.0.0.5:7781`,
		Args: cli.Args(0, 0, ""),
	}
	flags := bindFlags(cmd.Flags(), "storehouse")
	b.bind(cmd)
	cmd.Flags().BoolVar(&newKey, "new-key", false, "make it another machine than the one that wrote the backup")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		at, err := where(b.from)
		if err != nil {
			return err
		}
		cfg, err := load(*file, flags)
		if err != nil {
			return err
		}
		opts := storehouse.RestoreOptions{From: at, Backup: b.name, NewKey: newKey}
		if opts.Passphrase, err = cli.Passphrase(cmd, b.passphrase, false); err != nil {
			return err
		}
		if !b.json {
			opts.Progress = restoreProgress(cmd.ErrOrStderr())
		}
		return runRestore(cmd.Context(), cfg, newLogger(cmd.ErrOrStderr(), cfg, slog.LevelWarn), opts, cmd.OutOrStdout(), b.json)
	}
	return cmd
}

// restoreProgress says now and then how far a restore is.
func restoreProgress(out io.Writer) func(phase string, done, total uint64) {
	last, every := time.Now(), 5*time.Second
	return func(_ string, done, total uint64) {
		if now := time.Now(); total > 0 && now.Sub(last) >= every {
			last = now
			fmt.Fprintf(out, "%s of %s\n", cli.FormatBytes(done), cli.FormatBytes(total))
		}
	}
}

// runRestore restores as the storehouse's own user.
func runRestore(ctx context.Context, cfg *Config, log *slog.Logger, opts storehouse.RestoreOptions, out io.Writer, asJSON bool) error {
	who, err := findAccount(cfg.User)
	if err != nil && os.Geteuid() == 0 {
		return err
	}
	if err := makeStateDirs(cfg.StateDir, who, storehouseDir); err != nil {
		return err
	}
	if err := dropTo(who); err != nil {
		return err
	}
	done, err := storehouse.Restore(ctx, storehouseConfig(cfg, log), opts, sayDamage(out, asJSON))
	if err != nil {
		return err
	}
	if asJSON {
		return json.NewEncoder(out).Encode(done)
	}
	_, err = fmt.Fprintf(out, `restored %s of storehouse %s into %s: %d store paths, log index %d
Start it where the machines look for it: floxd storehouse --advertise HOST:PORT
`, done.Backup, done.Storehouse, filepath.Join(cfg.StateDir, storehouseDir), done.Paths, done.Index)
	return err
}
