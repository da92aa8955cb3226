package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/entry"
)

func newUpCmd(file *string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "up [flags]",
		Short: "Run everything on this machine: a storehouse and an agent",
		Long: `Run a storehouse and an agent on this machine, mount the store, and say how to
use it. It needs root to mount; what talks to the network runs as an ordinary
user. Ctrl-C stops all of it and unmounts. Starting it again goes on where it was.
Where Nix is installed, stock Nix can build here at once:
  NIX_REMOTE=unix:///run/floxd/nix.socket nix-build …
or in a shell after eval "$(floxctl shellenv)". What up starts ends with it, so it changes
nothing in /etc/nix; a machine that stays in a storehouse has that done by floxd join.
While it runs, new shells find your profile (/etc/profile.d/floxd.sh and the like).

A machine with a Nix store keeps it untouched: up refuses to cover one, and
--store-dir mounts elsewhere.

` + cli.ExitCodes,
		Example: `  sudo floxd up
  sudo floxd up --store-dir /flox/store --state-dir /srv/floxd`,
		Args: cli.Args(0, 0, ""),
	}
	flags := bindFlags(cmd.Flags(), "agent", "storehouse")
	defaults := DefaultConfig()
	defaults.Storehouse.Builds = true // as one machine's, it is what Nix is elsewhere
	cmd.Flags().Lookup("storehouse-builds").DefValue = "true"
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := loadOver(defaults, *file, flags)
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
	shells string // files by which shells find profiles
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
	if err := u.cfg.place("floxd up"); err != nil {
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
		args: append([]string{"storehouse", "--ready-fd", "3", "--embedded"}, noFile...),
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
		u.tell("Stopped; nothing is mounted at %s any more.\n", u.cfg.mountDir())
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
	if err := makeRunDir(u.cfg.RunDir, u.who); err != nil {
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
	if err := u.joinAgent(ctx); err != nil {
		return err
	}
	defer u.hookShells(newShellHooks(u.cfg))()
	ctx, cancel := context.WithCancel(ctx)
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer cancel()
		return runWarden(groupCtx, u.cfg, u.who, u.log, "--child", "--embedded")
	})
	group.Go(func() error {
		u.greet(groupCtx, invite)
		return nil
	})
	return group.Wait()
}

// hookShells has shells find profiles until undo is called. What floxd join did before
// stays. Where /etc cannot be written there are profiles all the same.
func (u *up) hookShells(hooks *shellHooks) (undo func()) {
	if hooks == nil {
		return func() {}
	}
	files, wrote, err := hooks.install()
	if err != nil {
		u.log.Warn("new shells do not all find profiles", "error", err)
	}
	u.shells = strings.Join(files, ", ")
	if !wrote {
		return func() {}
	}
	return func() {
		if err := hooks.remove(); err != nil {
			u.log.Warn("shells still look for profiles", "error", err)
		}
	}
}

// joinAgent makes the agent here a member, as any other machine becomes one. Who
// runs this is an admin of the storehouse: it is that person's.
func (u *up) joinAgent(ctx context.Context) error {
	self := &entry.Self{}
	if err := runStep(ctx, u.who, &entry.Step{Do: entry.Who, Role: entry.RoleAgent, StateDir: u.cfg.StateDir}, self, u.errOut); err != nil {
		return err
	}
	admin, done := cli.Admin(filepath.Join(u.cfg.RunDir, cli.StorehouseSocket))
	defer done()
	machines, err := admin.ListMachines(ctx, connect.NewRequest(&floxv1.ListMachinesRequest{}))
	if err != nil {
		return fmt.Errorf("ask the storehouse for its machines: %w", api.FromConnect(err))
	}
	taken := map[string]bool{}
	for _, m := range machines.Msg.GetMachines() {
		if m.GetMachine().GetPeer() == self.Peer {
			return installInvite(u.cfg, invitePath(u.cfg), u.who)
		}
		taken[strings.ToLower(m.GetMachine().GetName())] = true
	}
	name, err := machineName("", "", false)
	if err != nil {
		return err
	}
	host := name
	for n := 1; taken[strings.ToLower(name)]; n++ { // the server here is called like the host
		if name = host + "-agent"; n > 1 {
			name += fmt.Sprint("-", n)
		}
	}
	made, err := admin.MakeInvite(ctx, connect.NewRequest(&floxv1.MakeInviteRequest{
		Role: entry.RoleAgent, TtlSeconds: 600, User: &floxv1.UserGrant{Name: person(), Role: "admin"},
	}))
	if err != nil {
		return fmt.Errorf("make an invite for the agent: %w", api.FromConnect(err))
	}
	invite, err := api.ParseJoinInvite(made.Msg.GetInvite())
	if err != nil {
		return err
	}
	step := &entry.Step{Do: entry.Join, StateDir: u.cfg.StateDir, Invite: invite, Name: name, User: person(), Version: cli.ReadVersion().Version}
	return runStep(ctx, u.who, step, &entry.Joined{}, u.errOut)
}

// inviteWords is the command that makes an invite.
func (u *up) inviteWords() string {
	socket := ""
	if u.cfg.RunDir != cli.DefaultRunDir {
		socket = " --socket " + filepath.Join(u.cfg.RunDir, cli.StorehouseSocket)
	}
	return "sudo floxctl" + socket + " invite --role agent"
}

// cacheWords names the binary cache, if there is one.
func (u *up) cacheWords(invite *api.Invite) string {
	if invite.HTTPURL == "" {
		return ""
	}
	return ", binary cache at " + invite.HTTPURL
}

// buildWords says whether derivations are built here.
func (u *up) buildWords() string {
	if !u.cfg.Storehouse.Builds {
		return "none: builds = false"
	}
	nix, err := exec.LookPath("nix-store")
	if err != nil {
		return "none: there is no Nix here to build with; install it (Debian: apt install nix-bin) and start this again"
	}
	return "with the Nix in " + filepath.Dir(nix)
}

// tellBuild says how to build.
func (u *up) tellBuild() {
	if socket := nixSocket(u.cfg); socket != "" {
		u.tell("  NIX_REMOTE=unix://%s nix-build …\n", socket)
		if socket == filepath.Join(cli.DefaultRunDir, cli.NixSocketName) {
			u.tell("  eval \"$(floxctl shellenv)\"   (the same for a whole shell, with the programs of your profile)\n")
		}
	}
}

// greet waits until the store is mounted and served, and says what can be done now.
func (u *up) greet(ctx context.Context, invite *api.Invite) {
	socket := filepath.Join(u.cfg.RunDir, cli.SocketName)
	const patience = 20 * time.Second
	begun, warned := time.Now(), false
	for !agentMounted(ctx, socket) {
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
	u.tell("  store       mounted at %s, read-only\n", u.cfg.mountDir())
	if u.cfg.Mount == mountSession {
		u.tell("  Nix         %s is this machine's own and stays as it is; beside it: floxctl nix -- COMMAND\n", u.cfg.StoreDir)
	}
	if u.shells != "" {
		u.tell("  shells      new ones find your profile: %s\n", u.shells)
	}
	u.tell("  builds      %s\n", u.buildWords())
	u.tell("  token       %s (who has it may upload)\n", tokenPath(u.cfg))
	u.tell("  others      join with what this prints: %s\n", u.inviteWords())
	u.tell("\nReady. In another terminal:\n")
	socketFlag := ""
	if socket != cli.DefaultSocket {
		socketFlag = " --socket " + socket
	}
	u.tell("  floxctl status%s\n", socketFlag)
	u.tell("  sudo floxctl%s store add FILE --token-file %s\n", socketFlag, tokenPath(u.cfg))
	if invite.HTTPURL != "" {
		u.tell("  nix copy --from %s PATH   (trusted-public-keys = %s)\n", invite.HTTPURL, invite.NixKey)
		u.tellBuild()
		u.tell("  curl %s   (how stock Nix reads from it and writes to it)\n", invite.HTTPURL)
	}
	u.tell("\n")
}
