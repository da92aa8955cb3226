package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/storehouse"
)

func newStorehouseCmd(file *string) *cobra.Command {
	ready, embedded := 0, false
	cmd := &cobra.Command{
		Use:   "storehouse [flags]",
		Short: "Own the store: facts, content, and a binary cache for stock Nix",
		Long: `Run a storehouse. It needs no privileges; started as root it becomes an ordinary
user (--user). The first start makes its keys, the upload token and and more, all in
STATE-DIR/storehouse. Machines join it with floxctl invite and floxd join.

` + cli.ExitCodes,
		Args: cli.Args(0, 0, ""),
	}
	cmd.AddCommand(newInitCmd(file), newVerifyCmd(file), newBackupCmd(), newRestoreCmd(file))
	flags := bindFlags(cmd.Flags(), "storehouse")
	cmd.Flags().IntVar(&ready, "ready-fd", 0, "")
	cmd.Flags().BoolVar(&embedded, "embedded", false, "")
	for _, name := range []string{"ready-fd", "embedded"} {
		if err := cmd.Flags().MarkHidden(name); err != nil {
			panic(err) // the flags are the lines above
		}
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load(*file, flags)
		if err != nil {
			return err
		}
		return runStorehouse(cmd.Context(), cfg, newLogger(cmd.ErrOrStderr(), cfg, slog.LevelInfo), ready, embedded)
	}
	return cmd
}

// runStorehouse serves until ctx ends. Once it answers, it writes a line to the
// descriptor ready, if that is not 0. See storehouse.Config for embedded.
func runStorehouse(ctx context.Context, cfg *Config, log *slog.Logger, ready int, embedded bool) error {
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
	reach := makeRunDir(cfg.RunDir, who)
	if reach != nil && os.Geteuid() == 0 {
		return reach
	}
	if err := dropTo(who); err != nil {
		return err
	}
	// It holds keys: other processes of its user, whatever that is used for, are not to
	// look into it. Who changed its user has this already, an exec (floxd up) undoes it.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	house := storehouseConfig(cfg, log)
	house.Embedded = embedded
	if reach != nil {
		log.Warn("operators cannot reach this server by a socket; give it a run directory of its own with --run-dir", "error", reach)
		house.Socket = ""
	}
	moreProcessors()
	server, err := storehouse.New(house)
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

// makeRunDir makes the run directory and gives it to who, if this process may.
func makeRunDir(dir string, who account) error {
	if err := checkRunDir(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("run directory: %w: %w", err, flox.ErrDenied)
	}
	if os.Geteuid() != 0 {
		return nil
	}
	if err := os.Chown(dir, int(who.uid), int(who.gid)); err != nil {
		return fmt.Errorf("run directory: %w: %w", err, flox.ErrDenied)
	}
	return nil
}

// checkStorehousePorts is asked while this process may still see whose the
// ports are.
func checkStorehousePorts(ctx context.Context, cfg *Config) error {
	if cfg.Storehouse.HTTP != noHTTP {
		if err := checkPort(ctx, "storehouse.http", "http", cfg.Storehouse.HTTP); err != nil {
			return err
		}
	}
	if at := cfg.Storehouse.Metrics; at != "" {
		if err := checkPort(ctx, "storehouse.metrics", "metrics", at); err != nil {
			return err
		}
	}
	if at := cfg.Storehouse.consensus(); at != "" {
		if err := checkPort(ctx, "storehouse.consensus", "consensus", at); err != nil {
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
		Metrics: s.Metrics, HTTPListen: s.HTTP, HTTPURL: s.HTTPURL, Listen: s.Listen, Advertise: s.Advertise, Site: s.Site,
		ServerName: s.Server, Consensus: s.consensus(), ConsensusAdvertise: s.ConsensAd, CatchUpRate: uint64(s.CatchUp),
		Heartbeat:       time.Duration(s.Heartbeat),
		Watermarks:      storehouse.Watermarks{Slow: float64(s.DiskSlow), Essential: float64(s.DiskHigh), ReadOnly: float64(s.DiskFull)},
		Socket:          filepath.Join(cfg.RunDir, cli.StorehouseSocket),
		UploadTokenFile: s.TokenFile, StageTTL: time.Duration(s.StageTTL), CollectGrace: time.Duration(s.Grace), ReserveBytes: uint64(s.Reserve),
		CollectEvery: time.Duration(s.Every), Bucket: s.Bucket, BucketCache: uint64(s.BucketMax),
		Builds:         storehouse.BuildsConfig{On: s.Builds, Jobs: int(s.Jobs), Sandbox: s.Sandbox, SandboxPaths: s.Visible, Disk: uint64(s.BuildDisk)},
		OpenMembership: s.Open, NoMDNS: !s.MDNS, Version: cli.ReadVersion().Version, Log: log,
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

// moreProcessors lets more goroutines be in the middle of a system call than there
// are cores: the runtime takes up to 10 ms to notice that one is held up by the
// disk, and what servers confirm to each other waits for its processor.
func moreProcessors() {
	if n := runtime.GOMAXPROCS(0); n < 8 && os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(min(4*n, 8))
	}
}
