package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/storehouse"
)

// newBackupCmd holds what is done with backups where no storehouse need run. They
// are written by a running one: floxctl storehouse backup.
func newBackupCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "backup",
		Short: "List backups, and prove that they can be restored",
		Long: `Look at backups without the storehouse. A running storehouse writes them:

  floxctl storehouse backup --to DIR|URL

DIR is a directory, URL a bucket: s3://NAME?region=R&endpoint=URL&use_path_style=true
or file:///DIRECTORY, with the keys of S3 where the AWS tools look for them.

` + cli.ExitCodes,
	}
	cmd.AddCommand(newBackupListCmd(), newBackupVerifyCmd())
	return cmd
}

// where gives a directory as an absolute one, and a URL as it is.
func where(from string) (string, error) {
	if from == "" {
		return "", cli.Usage("--from is missing: the directory or the URL of the bucket with the backups")
	}
	if strings.Contains(from, "://") {
		return from, nil
	}
	return filepath.Abs(from)
}

func newBackupListCmd() *cobra.Command {
	from, asJSON := "", false
	cmd := &cobra.Command{
		Use:   "list --from DIR|URL [--json]",
		Short: "List the backups in a directory or bucket, oldest first",
		Long: `List the backups in a directory or bucket that were finished, oldest first. What is
there of one that was not is no backup; the next one goes on with it.

` + cli.ExitCodes,
		Example: `  floxd storehouse backup list --from /mnt/backups`,
		Args:    cli.Args(0, 0, ""),
	}
	cmd.Flags().StringVar(&from, "from", "", "where the backups are, a `DIR|URL`")
	cmd.Flags().BoolVar(&asJSON, "json", false, "one JSON object for each backup")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		at, err := where(from)
		if err != nil {
			return err
		}
		return runBackupList(cmd.Context(), at, cmd.OutOrStdout(), asJSON)
	}
	return cmd
}

// listedFacts is one line of backup list --json.
type listedFacts struct {
	Name       string     `json:"name"`
	Taken      *time.Time `json:"taken"` // null = its manifest cannot be read
	Storehouse string     `json:"storehouse"`
	Index      uint64     `json:"index"`
	Paths      uint64     `json:"paths"`
	NarBytes   uint64     `json:"narBytes"`
	NewBytes   uint64     `json:"newBytes"`
	Lacking    uint64     `json:"lackingPaths"`
	Error      string     `json:"error"`
}

func runBackupList(ctx context.Context, from string, out io.Writer, asJSON bool) error {
	list, err := storehouse.Backups(ctx, from, nil)
	if err != nil {
		return err
	}
	lines := json.NewEncoder(out)
	for _, b := range list {
		f := listedFacts{Name: b.Name}
		says := ""
		if m := b.Manifest; m != nil {
			f.Taken, f.Storehouse, f.Index, f.Paths, f.NarBytes, f.NewBytes, f.Lacking = &m.Taken, m.Storehouse, m.Index, m.Paths, m.NarBytes, m.NewBytes, m.LackPaths
			says = fmt.Sprintf("%s, %d paths of %s, %s written", m.Storehouse, m.Paths, cli.FormatBytes(m.NarBytes), cli.FormatBytes(m.NewBytes))
			if m.LackPaths > 0 {
				says += fmt.Sprintf(", lacks the content of %d paths", m.LackPaths)
			}
		} else {
			f.Error = b.Err.Error()
			says = "damaged: " + f.Error
		}
		if asJSON {
			err = lines.Encode(f)
		} else {
			_, err = fmt.Fprintf(out, "%-28s  %s\n", b.Name, says)
		}
		if err != nil {
			return err
		}
	}
	if len(list) == 0 && !asJSON {
		_, err = fmt.Fprintf(out, "%s holds no finished backup\n", from)
	}
	return err
}

// backupFlags are those that verify and restore have in common.
type backupFlags struct {
	from, name, passphrase string
	json                   bool
}

func (b *backupFlags) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&b.from, "from", "", "where the backups are, a `DIR|URL`")
	f.StringVar(&b.name, "backup", "", "which one, a `NAME` as the list shows it (default: the newest)")
	f.StringVar(&b.passphrase, "passphrase-file", "", "a `FILE` whose first line is the passphrase (default: asked for)")
	f.BoolVar(&b.json, "json", false, "JSON: one object for each damage, then one with what was done")
}

func newBackupVerifyCmd() *cobra.Command {
	b, quick, noKeys := backupFlags{}, false, false
	cmd := &cobra.Command{
		Use:   "verify --from DIR|URL [--backup NAME] [--passphrase-file FILE] [flags]",
		Short: "Prove that a backup can be restored",
		Long: `Read a whole backup back, on any machine and without the storehouse, and prove that
it can be restored: every object has the bytes that its name says, every block those
of its CID, the facts open, the manifest and all chunks of every valid path are
there, the keys open with the passphrase and are those of the facts. What is
damaged is named with the store paths it hurts; then it exits 6.

--quick reads facts, keys, manifests and the lists of blocks, not the content itself.

` + cli.ExitCodes,
		Example: `  floxd storehouse backup verify --from /mnt/backups --passphrase-file /root/passphrase
  floxd storehouse backup verify --from 's3://backups?region=eu-central-1' --quick --no-keys`,
		Args: cli.Args(0, 0, ""),
	}
	b.bind(cmd)
	cmd.Flags().BoolVar(&quick, "quick", false, "do not read the content itself")
	cmd.Flags().BoolVar(&noKeys, "no-keys", false, "do not ask for the passphrase, and leave open whether the keys can be used")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		at, err := where(b.from)
		if err != nil {
			return err
		}
		opts := storehouse.VerifyOptions{From: at, Backup: b.name, Quick: quick}
		if !noKeys {
			if opts.Passphrase, err = cli.Passphrase(cmd, b.passphrase, false); err != nil {
				return err
			}
		}
		opts.Log = newLogger(cmd.ErrOrStderr(), DefaultConfig(), slog.LevelWarn)
		return runBackupVerify(cmd.Context(), opts, cmd.OutOrStdout(), b.json)
	}
	return cmd
}

// damagedFacts is one line of backup verify --json; either object or path is set.
type damagedFacts struct {
	Object string `json:"object"`
	Path   string `json:"path"`
	Error  string `json:"error"`
}

// verifiedFacts is the last line of backup verify --json.
type verifiedFacts struct {
	Backup     string    `json:"backup"`
	Taken      time.Time `json:"taken"`
	Storehouse string    `json:"storehouse"`
	Index      uint64    `json:"index"`
	Epoch      uint64    `json:"epoch"`
	Paths      uint64    `json:"paths"`
	Objects    int       `json:"objects"`
	ReadBytes  uint64    `json:"readBytes"`
	KeysOpen   bool      `json:"keysOpen"`
	Damaged    int       `json:"damaged"`
}

// sayDamage prints what is wrong with a backup.
func sayDamage(out io.Writer, asJSON bool) func(storehouse.BackupDamage) {
	lines := json.NewEncoder(out)
	return func(d storehouse.BackupDamage) {
		what := d.Object
		if d.Path != "" {
			what = string(d.Path)
		}
		if asJSON {
			_ = lines.Encode(damagedFacts{d.Object, string(d.Path), d.Err.Error()}) // a closed pipe ends the process
			return
		}
		_, _ = fmt.Fprintf(out, "damaged  %s: %v\n", what, d.Err)
	}
}

func runBackupVerify(ctx context.Context, opts storehouse.VerifyOptions, out io.Writer, asJSON bool) (err error) {
	if opts.Dir, err = os.MkdirTemp("", "floxd-verify-"); err != nil {
		return fmt.Errorf("directory for the time of verifying: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(opts.Dir)) }()
	done, err := storehouse.VerifyBackup(ctx, opts, sayDamage(out, asJSON))
	if err != nil {
		return err
	}
	f := verifiedFacts{
		Backup: done.Name, Taken: done.Taken, Storehouse: done.Storehouse, Index: done.Index, Epoch: done.Epoch, Paths: done.Paths,
		Objects: done.Objects, ReadBytes: done.Read, KeysOpen: done.KeysOpen, Damaged: done.Damaged,
	}
	if asJSON {
		err = json.NewEncoder(out).Encode(f)
	} else {
		_, err = fmt.Fprint(out, f.words(opts))
	}
	if err == nil && done.Damaged > 0 {
		err = cli.Explain(flox.ErrCorrupt, "backup %s of %s is damaged: %d objects and paths. Verify an older one with --backup, and write a new one: what is damaged is then written again", f.Backup, opts.From, f.Damaged)
	}
	return err
}

// words says what was proved, and what was not asked.
func (f *verifiedFacts) words(opts storehouse.VerifyOptions) string {
	content := fmt.Sprintf("%d objects of content, %s, all read and checked", f.Objects, cli.FormatBytes(f.ReadBytes))
	if opts.Quick {
		content = fmt.Sprintf("%d objects of content, whose lists of blocks were read; not the content itself (--quick)", f.Objects)
	}
	keys := "the keys open with the passphrase, and are those of the facts"
	if opts.Passphrase == nil {
		keys = "whether the keys open was not tried (--no-keys)"
	} else if !f.KeysOpen {
		keys = "the keys cannot be used"
	}
	return fmt.Sprintf("backup %s of storehouse %s, log index %d, epoch %d\n  %d store paths with every manifest and chunk\n  %s\n  %s\n",
		f.Backup, f.Storehouse, f.Index, f.Epoch, f.Paths, content, keys)
}
