package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newUpCmd(file *string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "up [flags]",
		Short: "Run everything on this machine: a storehouse and an agent",
		Long: `Run a storehouse and an agent on this machine, mount the store, and say how to
use it. It needs root to mount; what talks to the network runs as an ordinary
user. Ctrl-C stops all of it and unmounts. Starting it again goes on where it was.

A machine with a Nix store keeps it untouched: up refuses to cover one, and
--store-dir mounts elsewhere.

` + cli.ExitCodes,
		Example: `  sudo floxd up
  sudo floxd up --store-dir /flox/store --state-dir /srv/floxd`,
		Args: cli.Args(0, 0, ""),
	}
	flags := bindFlags(cmd.Flags(), "agent", "storehouse")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load(*file, flags)
		if err != nil {
			return err
		}
		if cfg.LogLevel == "" {
			cfg.LogLevel = "warn" // what a newcomer needs is said in words
		}
		u := &up{
			cfg: cfg, say: cmd.OutOrStdout(), errOut: cmd.ErrOrStderr(),
			log: newLogger(cmd.ErrOrStderr(), cfg, slog.LevelWarn),
		}
		return u.run(cmd.Context())
	}
	return cmd
}

// up runs a storehouse and an agent as one.
type up struct {
	cfg    *Config
	who    account
	say    io.Writer // for people
	errOut io.Writer // logs of the children
	log    *slog.Logger
}

// tell prints a line for people; what goes wrong with the printing is not worth
// stopping a store for.
func (u *up) tell(format string, args ...any) { fmt.Fprintf(u.say, format, args...) }

// run starts the storehouse, then the agent, and ends both in the opposite order.
func (u *up) run(ctx context.Context) error {
	if err := needRoot("floxd up"); err != nil {
		return err
	}
	if err := keepDescriptors(); err != nil {
		return err
	}
	if err := checkStoreDir(u.cfg.StoreDir, "floxd up"); err != nil {
		return err
	}
	if err := checkRunDir(u.cfg.RunDir); err != nil {
		return err
	}
	for _, use := range []struct{ lock, what string }{{"up.lock", "floxd up"}, {agentLock, "agent"}} {
		lock, err := lockState(u.cfg.StateDir, use.lock, use.what)
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	if err := u.prepare(ctx); err != nil {
		return err
	}
	u.tell("floxd %s runs a storehouse and an agent here, as user %s. Ctrl-C stops both and unmounts.\n", cli.ReadVersion().Version, u.who.name)
	u.tell("  state       %s\n", u.cfg.StateDir)

	// The agent leaves before the storehouse, so that nobody waits for a
	// storehouse that is gone while the mount comes down.
	houseCtx, stopHouse := context.WithCancel(context.WithoutCancel(ctx))
	defer stopHouse()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	house := &child{
		name: "storehouse", who: u.who, out: u.errOut, log: u.log, env: environ(u.cfg),
		args: append([]string{"storehouse", "--ready-fd", "3"}, noFile...),
	}
	ready := make(chan struct{})
	var group errgroup.Group
	group.Go(func() error {
		err := house.run(houseCtx, ready)
		cancel(err)
		return err
	})
	group.Go(func() error {
		defer stopHouse()
		return u.runAgent(ctx, ready)
	})
	err := group.Wait()
	if err == nil {
		u.tell("Stopped; nothing is mounted at %s any more.\n", u.cfg.StoreDir)
	}
	return err
}

// prepare makes the directories and finds what is in the way before anything is
// started.
func (u *up) prepare(ctx context.Context) (err error) {
	if u.who, err = findAccount(u.cfg.User); err != nil {
		return err
	}
	if err := makeStateDirs(u.cfg.StateDir, u.who, agentDir, storehouseDir); err != nil {
		return err
	}
	for _, l := range u.cfg.listened() {
		for _, addr := range l.addrs {
			if err := checkPort(ctx, l.key, strings.ReplaceAll(l.key, ".", "-"), addr); err != nil {
				return err
			}
		}
	}
	return nil
}

// runAgent waits for the storehouse, then mounts and serves until ctx ends.
func (u *up) runAgent(ctx context.Context, storehouseReady <-chan struct{}) error {
	select {
	case <-storehouseReady:
	case <-ctx.Done():
		return nil
	}
	invite, err := api.LoadInvite(invitePath(u.cfg))
	if err != nil {
		return err
	}
	u.tell("  storehouse  %s is ready%s\n", invite.Name, u.cacheWords(invite))
	if err := installInvite(u.cfg, invitePath(u.cfg), u.who); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer cancel()
		return runWarden(groupCtx, u.cfg, u.who, u.log)
	})
	group.Go(func() error {
		u.greet(groupCtx, invite)
		return nil
	})
	return group.Wait()
}

// cacheWords names the binary cache, if there is one.
func (u *up) cacheWords(invite *api.Invite) string {
	if invite.HTTPURL == "" {
		return ""
	}
	return ", binary cache at " + invite.HTTPURL
}

// greet waits until the store is mounted and served, and says what can be done now.
func (u *up) greet(ctx context.Context, invite *api.Invite) {
	socket := filepath.Join(u.cfg.RunDir, cli.SocketName)
	const patience = 20 * time.Second
	begun, warned := time.Now(), false
	for !u.mounted(ctx, socket) {
		if ctx.Err() != nil {
			return
		}
		if time.Since(begun) > patience && !warned {
			u.tell("  agent       does not answer yet; its log is above, and it is started again until it does\n")
			warned = true
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return
		}
	}
	u.tell("  store       mounted at %s, read-only\n", u.cfg.StoreDir)
	u.tell("  token       %s (who has it may upload)\n", tokenPath(u.cfg))
	u.tell("  invite      %s (for other machines: sudo floxd agent --invite FILE)\n", invitePath(u.cfg))
	u.tell("\nReady. In another terminal:\n")
	socketFlag := ""
	if socket != cli.DefaultSocket {
		socketFlag = " --socket " + socket
	}
	u.tell("  floxctl status%s\n", socketFlag)
	u.tell("  sudo floxctl%s store add FILE --token-file %s\n", socketFlag, tokenPath(u.cfg))
	if invite.HTTPURL != "" {
		u.tell("  nix copy --from %s PATH   (trusted-public-keys = %s)\n", invite.HTTPURL, invite.NixKey)
		u.tell("  curl %s   (how stock Nix reads from it and writes to it)\n", invite.HTTPURL)
	}
	u.tell("\n")
}

// mounted asks the agent whether the store is served.
func (u *up) mounted(ctx context.Context, socket string) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	client, done := cli.Agent(socket)
	defer done()
	resp, err := client.Status(ctx, connect.NewRequest(&floxv1.StatusRequest{}))
	return err == nil && resp.Msg.GetMounted()
}
