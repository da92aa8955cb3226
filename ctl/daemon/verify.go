package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/storehouse"
)

func newVerifyCmd(file *string) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "verify [flags]",
		Short: "Read everything a stopped storehouse holds and name what is damaged",
		Long: `Read back every block of a storehouse that does not run and name each store path
that damaged or missing blocks belong to. Nothing is changed. It exits 6 when
something is damaged: upload those paths again from where they came.

` + cli.ExitCodes,
		Args: cli.Args(0, 0, ""),
	}
	flags := bindFlags(cmd.Flags(), "storehouse")
	cmd.Flags().BoolVar(&asJSON, "json", false, "one JSON object per damaged path, then one with the counts")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load(*file, flags)
		if err != nil {
			return err
		}
		return runVerify(cmd.Context(), cfg, newLogger(cmd.ErrOrStderr(), cfg, slog.LevelWarn), cmd.OutOrStdout(), asJSON)
	}
	return cmd
}

// damageFacts is one line of verify --json; path is "" for damage outside of
// every valid path.
type damageFacts struct {
	Path   string   `json:"path"`
	Blocks []string `json:"blocks"`
	Error  string   `json:"error"`
}

// scrubFacts is its last line.
type scrubFacts struct {
	Paths     uint64 `json:"paths"`
	Hurt      uint64 `json:"hurt"`
	Blocks    uint64 `json:"blocks"`
	BadBlocks int    `json:"badBlocks"`
}

// runVerify opens the state as the storehouse's own user, with no door open.
func runVerify(ctx context.Context, cfg *Config, log *slog.Logger, out io.Writer, asJSON bool) (err error) {
	who, err := findAccount(cfg.User)
	if err != nil {
		return err
	}
	c := storehouseConfig(cfg, log)
	if _, err := os.Stat(c.StateDir); errors.Is(err, iofs.ErrNotExist) {
		return cli.Explain(flox.ErrNotFound, "there is no storehouse in %s: name the directory it keeps its state in with --state-dir", cfg.StateDir)
	}
	if err := dropTo(who); err != nil {
		return err
	}
	c.HTTPListen, c.Listen, c.NoMDNS = noHTTP, []string{"127.0.0.1:0"}, true
	server, err := storehouse.New(c)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := server.Close(); err == nil {
			err = cerr
		}
	}()
	lines := json.NewEncoder(out)
	say := func(line any, format string, args ...any) {
		if asJSON {
			_ = lines.Encode(line) // a closed pipe ends the process
			return
		}
		_, _ = fmt.Fprintf(out, format+"\n", args...)
	}
	done, err := server.Scrub(ctx, func(d storehouse.Damage) {
		f := damageFacts{Path: string(d.Path), Error: d.Err.Error()}
		for _, id := range d.Blocks {
			f.Blocks = append(f.Blocks, id.String())
		}
		path := "no valid path"
		if d.Path != "" {
			path = filepath.Join(cfg.StoreDir, string(d.Path))
		}
		say(f, "damaged  %s: %d blocks: %v", path, len(d.Blocks), d.Err)
	})
	if err != nil {
		return err
	}
	say(scrubFacts{done.Paths, done.Hurt, done.StoredBlocks, done.BadBlocks},
		"%d store paths, %d blocks read, %d damaged, %d paths hurt", done.Paths, done.StoredBlocks, done.BadBlocks, done.Hurt)
	if done.Hurt > 0 || done.BadBlocks > 0 {
		return cli.Explain(flox.ErrCorrupt, "%d store paths are damaged: upload them again from where they came", done.Hurt)
	}
	return nil
}
