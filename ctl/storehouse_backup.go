package ctl

import (
	"context"
	"errors"
	"os"
	"syscall"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// backupOptions are the command line of backup.
type backupOptions struct {
	*globals
	to, passphrase string
	keep           uint32
}

func newBackupCmd(g *globals) *cobra.Command {
	opts := backupOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "backup --to DIR|URL [--passphrase-file FILE] [--keep N]",
		Short: "Write a backup of everything the storehouse is: facts, content, keys",
		Long: `Have the storehouse write a backup while it serves: its facts as of now, the content
of all valid store paths, and its keys, encrypted with a passphrase. Content that
an earlier backup there holds is not written again. Ctrl-C, a crash or a full disk
leave earlier backups as they are, and the next one goes on with what was written.

DIR is a directory on the server that answers, which its user may write to; URL a
bucket of its own: s3://NAME?region=R&endpoint=URL&use_path_style=true or
file:///DIRECTORY, with the keys of S3 where the AWS tools look for them on the
server. Without the passphrase a backup cannot be restored: keep it elsewhere.

--keep removes all but the newest N backups there, and content that only they need.
With --json one line for each step; the last one says finished.

` + cli.ExitCodes,
		Example: `  sudo floxctl storehouse backup --to /mnt/backups --passphrase-file /root/passphrase --keep 7
  floxctl storehouse backup --to 's3://backups?region=eu-central-1'`,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.to == "" {
				return cli.Usage("--to is missing: a directory on the server, or the URL of a bucket")
			}
			passphrase, err := cli.Passphrase(cmd, opts.passphrase, true)
			if err != nil {
				return err
			}
			return runBackup(cmd.Context(), opts, string(passphrase), g.printer(cmd), g.progressPrinter(cmd))
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.to, "to", "", "where to, a `DIR|URL`")
	f.StringVar(&opts.passphrase, "passphrase-file", "", "a `FILE` whose first line is the passphrase (default: asked for)")
	f.Uint32Var(&opts.keep, "keep", 0, "keep the newest `N` backups and remove the others; 0 = all")
	return cmd
}

// backupFacts is one line of backup --json.
type backupFacts struct {
	Phase    string   `json:"phase"`
	Done     uint64   `json:"doneBytes"`
	Total    uint64   `json:"totalBytes"`
	New      uint64   `json:"newBytes"`
	Index    uint64   `json:"index"`
	Name     string   `json:"name"`
	Paths    uint64   `json:"paths"`
	Removed  []string `json:"removed,omitempty"`
	Finished bool     `json:"finished"`
}

func runBackup(ctx context.Context, opts backupOptions, passphrase string, out, errOut *output) error {
	stream, err := opts.admin().Backup(ctx, connect.NewRequest(&floxv1.BackupRequest{To: opts.to, Passphrase: passphrase, Keep: opts.keep}))
	if err != nil {
		return explainAdmin(err)
	}
	defer stream.Close()
	bar := newProgress(errOut)
	defer bar.end()
	var last *floxv1.BackupProgress
	for stream.Receive() {
		last = stream.Msg()
		if out.json {
			err := out.printJSONLine(backupFacts{
				Phase: last.GetPhase(), Done: last.GetDoneBytes(), Total: last.GetTotalBytes(), New: last.GetNewBytes(), Index: last.GetIndex(),
				Name: last.GetName(), Paths: last.GetPaths(), Removed: last.GetRemoved(), Finished: last.GetFinished(),
			})
			if err != nil {
				return err
			}
			continue
		}
		bar.show(step{done: last.GetDoneBytes(), total: last.GetTotalBytes(), what: last.GetPhase(), extra: cli.FormatBytes(last.GetNewBytes()) + " written"})
	}
	bar.end()
	if last.GetFinished() && !out.json {
		out.printf("Backup %s: %s, log index %d, %s of content written.\n", clean(last.GetName()), plural(last.GetPaths(), "path", "paths"), last.GetIndex(), cli.FormatBytes(last.GetNewBytes()))
		for _, name := range last.GetRemoved() {
			out.printf("Removed %s.\n", clean(name))
		}
	}
	if err := explainAdmin(stream.Err()); err != nil {
		return err
	}
	if !last.GetFinished() {
		return errors.New("the storehouse ended the backup without finishing it; run it again: it goes on with what was written")
	}
	return nil
}

// newBackupsCmd, newVerifyBackupCmd and newRestoreCmd are done by floxd, which can
// read what this small program cannot, and needs no storehouse to run.
func newBackupsCmd(g *globals) *cobra.Command {
	from := ""
	cmd := &cobra.Command{
		Use:   "backups --in DIR|URL",
		Short: "List the backups in a directory or bucket",
		Long: `List the backups in a directory on this machine or in a bucket, oldest first.

` + cli.ExitCodes,
		Example: `  floxctl storehouse backups --in /mnt/backups`,
		Args:    cli.Args(0, 0, ""),
		RunE: func(_ *cobra.Command, _ []string) error {
			if from == "" {
				return cli.Usage("--in is missing: the directory or the URL of the bucket with the backups")
			}
			return becomeStorehouse(g, "backup", "list", "--from", from)
		},
	}
	cmd.Flags().StringVar(&from, "in", "", "where the backups are, a `DIR|URL`")
	return cmd
}

func newVerifyBackupCmd(g *globals) *cobra.Command {
	return newPassedCmd(g, &cobra.Command{
		Use:   "verify --from DIR|URL [--backup NAME] [--passphrase-file FILE] [flags]",
		Short: "Prove that a backup can be restored",
		Long: `Read a whole backup back on this machine, and prove that it can be restored. This
is floxd storehouse backup verify, whose --help lists the flags.
`,
		Example: `  floxctl storehouse verify --from /mnt/backups --passphrase-file /root/passphrase`,
	}, "backup", "verify")
}

func newRestoreCmd(g *globals) *cobra.Command {
	return newPassedCmd(g, &cobra.Command{
		Use:   "restore --from DIR|URL [--backup NAME] [--passphrase-file FILE] [flags]",
		Short: "Make a storehouse of a backup, when all its servers are lost",
		Long: `Make a storehouse of one server out of a backup, on this machine. This is
floxd storehouse restore, whose --help lists the flags and says what comes then.
`,
		Example: `  sudo floxctl storehouse restore --from /mnt/backups --passphrase-file /root/passphrase`,
	}, "restore")
}

// newPassedCmd makes a command whose arguments go to floxd as they are.
func newPassedCmd(g *globals, cmd *cobra.Command, words ...string) *cobra.Command {
	cmd.DisableFlagParsing = true
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		return becomeStorehouse(g, append(words, args...)...)
	}
	return cmd
}

// becomeStorehouse replaces this process by floxd storehouse.
func becomeStorehouse(g *globals, args ...string) error {
	floxd := findFloxd()
	if floxd == "" {
		return cli.Explain(flox.ErrNotFound, "floxd is needed for this, and is neither beside floxctl nor on the PATH: install it on this machine")
	}
	args = append([]string{"floxd", "storehouse"}, args...)
	if g.json {
		args = append(args, "--json")
	}
	err := syscall.Exec(floxd, args, os.Environ())
	return cli.Explain(flox.ErrDenied, "cannot run %s: %v", floxd, err)
}
