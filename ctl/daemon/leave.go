package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/entry"
)

// leaveFlags are the flags of leave.
type leaveFlags struct {
	role             string
	purge, yes, json bool
}

func newLeaveCmd(file *string) *cobra.Command {
	opts := leaveFlags{}
	cmd := &cobra.Command{
		Use:   "leave [--role server|agent] [--purge] [--yes] [flags]",
		Short: "Take this machine out of its storehouse",
		Long: `Take this machine out of the storehouse it joined: what floxd join started is
stopped, the storehouse is told, and what this machine was told is forgotten. What
an agent has cached stays for the next time, unless --purge removes it and the
machine's key. It can be done offline; the storehouse then lists the machine until
somebody revokes it.

A server hands the lead over first, and does not leave if the others would not be
a majority. Its content is kept aside, in a directory that leave names.

` + cli.ExitCodes,
		Example: `  sudo floxd leave
  sudo floxd leave --purge --yes`,
		Args: cli.Args(0, 0, ""),
	}
	flags := bindFlags(cmd.Flags())
	f := cmd.Flags()
	f.StringVar(&opts.role, "role", "", "what of this machine leaves, where it is both: server or agent")
	f.BoolVar(&opts.purge, "purge", false, "remove what it has on the disk, too")
	f.BoolVarP(&opts.yes, "yes", "y", false, "do not ask")
	f.BoolVar(&opts.json, "json", false, "print the result as JSON")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		l := &leave{leaveFlags: opts, out: cmd.OutOrStdout(), errOut: cmd.ErrOrStderr()}
		if err := l.look(*file, flags); err != nil {
			return err
		}
		if err := cli.Confirm(cmd, opts.yes, l.question()); err != nil {
			return err
		}
		return l.run(cmd.Context())
	}
	return cmd
}

// leave is one machine's leaving.
type leave struct {
	leaveFlags
	out, errOut io.Writer

	cfg     *Config
	file    *configFile
	service *service
	who     account
}

// leaveFacts is what leave prints with --json.
type leaveFacts struct {
	*entry.Left
	Role    string `json:"role"`
	Kept    string `json:"kept,omitempty"`   // directory with what it had
	Config  string `json:"config,omitempty"` // where the configuration was put aside
	Machine string `json:"machine,omitempty"`
}

// look finds out what this machine is.
func (l *leave) look(file string, flags *overrides) (err error) {
	if os.Geteuid() != 0 {
		return cli.Explain(flox.ErrDenied, "floxd leave stops and removes what runs on this machine: run it with sudo")
	}
	if l.file, err = openConfig(file); err != nil {
		return err
	}
	cfg := *l.file.has
	l.cfg = &cfg
	if err := readEnv(l.cfg); err != nil {
		return err
	}
	flags.apply(l.cfg)
	if l.who, err = findAccount(l.cfg.User); err != nil {
		return err
	}
	if err := l.chooseRole(); err != nil {
		return err
	}
	part := "agent"
	if l.role == entry.RoleServer {
		part = "storehouse"
	}
	l.service, err = newService(part, l.cfg, l.file)
	return err
}

func (l *leave) chooseRole() error {
	have := map[string]bool{}
	for role, names := range map[string][]string{
		entry.RoleAgent:  {agentDir + "/" + inviteName},
		entry.RoleServer: {storehouseDir + "/joined.json", storehouseDir + "/storehouse.json"},
	} {
		for _, name := range names {
			if _, err := os.Lstat(filepath.Join(l.cfg.StateDir, name)); err == nil {
				have[role] = true
			}
		}
	}
	switch {
	case l.role != "" && l.role != entry.RoleAgent && l.role != entry.RoleServer:
		return cli.Usage("--role %q: want server or agent", l.role)
	case l.role != "" && !have[l.role], len(have) == 0:
		return cli.Explain(flox.ErrNotFound, "this machine has joined no storehouse%s (state directory %s)", asRole(l.role), l.cfg.StateDir)
	case l.role == "" && len(have) > 1:
		return cli.Usage("this machine is a server and an agent: say with --role server or --role agent which leaves")
	case l.role == "" && have[entry.RoleServer]:
		l.role = entry.RoleServer
	case l.role == "":
		l.role = entry.RoleAgent
	}
	return nil
}

func asRole(role string) string {
	if role == "" {
		return ""
	}
	return " as " + role
}

func (l *leave) question() string {
	words := "Take this machine out of its storehouse as " + l.role
	if l.purge {
		words += ", and remove what it has on the disk"
	}
	return words + "?"
}

func (l *leave) run(ctx context.Context) error {
	facts, err := l.agentLeaves, error(nil)
	if l.role == entry.RoleServer {
		facts = l.serverLeaves
	}
	done, err := facts(ctx)
	if err != nil {
		return err
	}
	if done.Config, err = l.putConfigAside(); err != nil {
		return err
	}
	if l.json {
		return json.NewEncoder(l.out).Encode(done)
	}
	return l.tell(done)
}

// agentLeaves stops the agent, has its user tell the storehouse, and forgets.
func (l *leave) agentLeaves(ctx context.Context) (*leaveFacts, error) {
	if err := l.service.stop(ctx); err != nil {
		return nil, err
	}
	lock, err := lockState(l.cfg.StateDir, agentLock, "agent")
	if err != nil {
		return nil, err // it was not started by join, and is not ended by leave
	}
	defer lock.Close()
	left := &entry.Left{}
	step := &entry.Step{Do: entry.Leave, StateDir: l.cfg.StateDir, User: person()}
	if err := runStep(ctx, l.who, step, left, l.errOut); err != nil {
		return nil, err
	}
	if nix := newNixClient(l.cfg); nix != nil {
		if err := nix.remove(); err != nil {
			return nil, err
		}
	}
	if hooks := newShellHooks(l.cfg); hooks != nil {
		if err := hooks.remove(); err != nil {
			return nil, err
		}
	}
	if err := removeNixLogDirs(l.cfg); err != nil {
		return nil, err
	}
	if err := os.Remove(filepath.Join(l.cfg.StateDir, sessionDir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("where the store was mounted: %w", err)
	}
	dir := filepath.Join(l.cfg.StateDir, agentDir)
	if !l.purge {
		return &leaveFacts{Left: left, Role: l.role, Kept: dir}, nil
	}
	err = errors.Join(os.RemoveAll(dir), removeFile(l.service.logPath()), removeFile(l.service.logPath()+".old"))
	return &leaveFacts{Left: left, Role: l.role}, err
}

// serverLeaves has the storehouse take this server out, as long as it runs, and
// puts its state aside: it must not become the first server of a storehouse of
// its own, which it would at its next start.
func (l *leave) serverLeaves(ctx context.Context) (*leaveFacts, error) {
	facts := &leaveFacts{Role: l.role, Left: &entry.Left{}}
	if err := l.askServers(ctx, facts); err != nil {
		return nil, err
	}
	if err := l.service.stop(ctx); err != nil {
		return nil, err
	}
	dir := filepath.Join(l.cfg.StateDir, storehouseDir)
	if err := unused(filepath.Join(dir, "lock")); err != nil {
		return nil, err
	}
	if l.purge {
		return facts, os.RemoveAll(dir)
	}
	facts.Kept = dir + "-left-" + time.Now().UTC().Format("20060102-150405")
	return facts, os.Rename(dir, facts.Kept)
}

// askServers asks this server, if it runs, to be taken out.
func (l *leave) askServers(ctx context.Context, facts *leaveFacts) error {
	if inv, err := api.LoadInvite(invitePath(l.cfg)); err == nil {
		facts.Storehouse = inv.Name
	}
	who := &entry.Self{}
	if err := runStep(ctx, l.who, &entry.Step{Do: entry.Who, Role: entry.RoleServer, StateDir: l.cfg.StateDir}, who, l.errOut); err != nil {
		return err
	}
	facts.Peer = who.Peer
	admin, done := cli.Admin(filepath.Join(l.cfg.RunDir, cli.StorehouseSocket))
	defer done()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	_, err := admin.RemoveServer(ctx, connect.NewRequest(&floxv1.RemoveServerRequest{Server: who.Peer}))
	var dial *cli.DialError
	switch {
	case err == nil:
		facts.Told = true
		return nil
	case errors.As(err, &dial):
		facts.Reason = "this server does not run"
		return nil
	case ctx.Err() == nil && errors.Is(api.FromConnect(err), flox.ErrNotFound):
		facts.Told = true // an earlier try got that far
		return nil
	}
	return cli.Explain(api.FromConnect(err), "%s\nNothing was changed.", strings.TrimSpace(api.FromConnect(err).Error()))
}

// unused refuses a state directory that a server still uses.
func unused(lock string) error {
	f, err := os.OpenFile(lock, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB); err != nil {
		pid := make([]byte, 20)
		n, _ := f.Read(pid)
		return cli.Explain(flox.ErrBusy, "the server still runs (process %s) and was not started by floxd join: stop it where it was started, then run floxd leave again", strings.TrimSpace(string(pid[:n])))
	}
	return nil
}

// putConfigAside renames a configuration file that floxd made. Another one is
// somebody's, and stays.
func (l *leave) putConfigAside() (string, error) {
	if !strings.HasPrefix(l.file.text, configHead) {
		return "", nil
	}
	to := l.file.path + ".old"
	return to, os.Rename(l.file.path, to)
}

func removeFile(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (l *leave) tell(f *leaveFacts) error {
	name := f.Storehouse
	if name == "" {
		name = "the storehouse"
	}
	if f.Told {
		fmt.Fprintf(l.out, "This machine (%s) has left %s as %s.\n", f.Peer, name, f.Role)
	} else {
		fmt.Fprintf(l.out, "This machine has left %s as %s, but the storehouse was not told: %s.\nIf it lists the machine, it does so until somebody runs, elsewhere: floxctl machine revoke %s\n", name, f.Role, f.Reason, f.Peer)
	}
	if f.Kept != "" {
		fmt.Fprintf(l.out, "What it had is in %s.\n", f.Kept)
	}
	if f.Config != "" {
		fmt.Fprintf(l.out, "Its configuration is in %s.\n", f.Config)
	}
	return nil
}
