package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/storehouse"
)

func newStorehouseCmd(file *string) *cobra.Command {
	ready := 0
	cmd := &cobra.Command{
		Use:   "storehouse [flags]",
		Short: "Own the store: facts, content, and a binary cache for stock Nix",
		Long: `Run a storehouse. It needs no privileges; started as root it becomes an ordinary
user (--user). The first start makes its keys, the upload token and the invite
other machines join with, all in STATE-DIR/storehouse.

` + cli.ExitCodes,
		Args: cli.Args(0, 0, ""),
	}
	cmd.AddCommand(newVerifyCmd(file))
	flags := bindFlags(cmd.Flags(), "storehouse")
	cmd.Flags().IntVar(&ready, "ready-fd", 0, "")
	if err := cmd.Flags().MarkHidden("ready-fd"); err != nil {
		panic(err) // the flag is the line above
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load(*file, flags)
		if err != nil {
			return err
		}
		return runStorehouse(cmd.Context(), cfg, newLogger(cmd.ErrOrStderr(), cfg, slog.LevelInfo), ready)
	}
	return cmd
}

// runStorehouse serves until ctx ends. Once it answers, it writes a line to the
// descriptor ready, if that is not 0.
func runStorehouse(ctx context.Context, cfg *Config, log *slog.Logger, ready int) error {
	who, err := findAccount(cfg.User)
	if err != nil && os.Geteuid() == 0 {
		return err
	}
	if err := makeStateDirs(cfg.StateDir, who, storehouseDir); err != nil {
		return err
	}
	if err := checkStorehousePorts(ctx, cfg); err != nil {
		return err
	}
	if err := dropTo(who); err != nil {
		return err
	}
	server, err := storehouse.New(storehouseConfig(cfg, log))
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Run(ctx) })
	group.Go(func() error {
		if err := server.Ready(ctx); err != nil {
			return nil // Run says why
		}
		if ready == 0 {
			return nil
		}
		pipe := os.NewFile(uintptr(ready), "ready")
		defer pipe.Close()
		if _, err := fmt.Fprintln(pipe, "ready"); err != nil {
			return fmt.Errorf("say that the storehouse is ready: %w", err)
		}
		return nil
	})
	return group.Wait()
}

// checkStorehousePorts is asked while this process may still see whose the
// ports are.
func checkStorehousePorts(ctx context.Context, cfg *Config) error {
	if cfg.Storehouse.HTTP != noHTTP {
		if err := checkPort(ctx, "storehouse.http", "http", cfg.Storehouse.HTTP); err != nil {
			return err
		}
	}
	for _, addr := range cfg.Storehouse.Listen {
		if err := checkPort(ctx, "storehouse.listen", "listen", addr); err != nil {
			return err
		}
	}
	return nil
}

// storehouseConfig translates; the storehouse checks what it is given itself.
func storehouseConfig(cfg *Config, log *slog.Logger) storehouse.Config {
	s := cfg.Storehouse
	return storehouse.Config{
		StateDir: filepath.Join(cfg.StateDir, storehouseDir), StoreDir: flox.StoreDir(cfg.StoreDir), Name: s.Name,
		HTTPListen: s.HTTP, HTTPURL: s.HTTPURL, Listen: s.Listen, Advertise: s.Advertise, Site: s.Site,
		UploadTokenFile: s.TokenFile, StageTTL: time.Duration(s.StageTTL), CollectGrace: time.Duration(s.Grace), ReserveBytes: uint64(s.Reserve),
		Bucket: s.Bucket, BucketCache: uint64(s.BucketMax),
		OpenMembership: true, // machines are given invite.json
		NoMDNS:         !s.MDNS, Version: cli.ReadVersion().Version, Log: log,
	}
}

// invitePath is where the storehouse writes what other machines join with.
func invitePath(cfg *Config) string {
	return filepath.Join(cfg.StateDir, storehouseDir, inviteName)
}

// tokenPath is where the storehouse keeps the upload token.
func tokenPath(cfg *Config) string {
	if cfg.Storehouse.TokenFile != "" {
		return cfg.Storehouse.TokenFile
	}
	return filepath.Join(cfg.StateDir, storehouseDir, "upload-token")
}
