package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent"
	"github.com/floxctl/flox/agent/warden"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/entry"
)

// Names in the state directory.
const (
	agentDir      = "agent"
	storehouseDir = "storehouse"
	inviteName    = "invite.json" // in both: the storehouse writes it, the agent gets a copy
	agentLock     = "agent.lock"  // of the privileged process; the child has its own
)

func newAgentCmd(file *string) *cobra.Command {
	child, embedded := false, false
	cmd := &cobra.Command{
		Use:   "agent [flags]",
		Short: "Mount the store on this machine and keep it fed",
		Long: `Mount the store and serve it: a small process of root mounts and watches, an
unprivileged one does everything else. It has joined with floxd join, or is given
an invite once with --invite.
After an update of floxd, floxd agent reload starts the new one under the mount.

` + cli.ExitCodes,
		Args: cli.Args(0, 0, ""),
	}
	flags := bindFlags(cmd.Flags(), "agent")
	cmd.Flags().BoolVar(&child, "child", false, "")
	cmd.Flags().BoolVar(&embedded, "embedded", false, "")
	for _, name := range []string{"child", "embedded"} {
		if err := cmd.Flags().MarkHidden(name); err != nil {
			panic(err) // the flags are the lines above
		}
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := load(*file, flags)
		if err != nil {
			return err
		}
		log := newLogger(cmd.ErrOrStderr(), cfg, slog.LevelInfo)
		if child {
			return runAgentChild(cmd.Context(), cfg, embedded, log)
		}
		return runAgent(cmd.Context(), cfg, log)
	}
	cmd.AddCommand(newReloadCmd(file))
	return cmd
}

// runAgent is the privileged parent: it prepares the state and hands over to
// the warden.
func runAgent(ctx context.Context, cfg *Config, log *slog.Logger) error {
	if err := needRoot("floxd agent"); err != nil {
		return err
	}
	if err := keepDescriptors(); err != nil {
		return err
	}
	who, err := findAccount(cfg.User)
	if err != nil {
		return err
	}
	if err := cfg.place("floxd agent"); err != nil {
		return err
	}
	if err := checkRunDir(cfg.RunDir); err != nil {
		return err
	}
	lock, err := lockState(cfg.StateDir, agentLock, "agent")
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := makeStateDirs(cfg.StateDir, who, agentDir); err != nil {
		return err
	}
	if err := takeInvite(ctx, cfg, who, log); err != nil {
		return err
	}
	for _, addr := range cfg.Agent.Listen {
		if err := checkPort(ctx, "agent.listen", "listen", addr); err != nil {
			return err
		}
	}
	if at := cfg.Agent.Metrics; at != "" {
		if err := checkPort(ctx, "agent.metrics", "metrics", at); err != nil {
			return err
		}
	}
	return runWarden(ctx, cfg, who, log, "--child")
}

// runWarden mounts and supervises the agent's child, which has these flags, until ctx ends.
func runWarden(ctx context.Context, cfg *Config, who account, log *slog.Logger, flags ...string) error {
	// Here already: the child would be started again and again, and readers wait.
	if err := agent.CheckState(filepath.Join(cfg.StateDir, agentDir), cli.ReadVersion().Version); err != nil {
		return err
	}
	program, err := ownProgram(who)
	if err != nil {
		return err
	}
	file, err := calledAs()
	if err != nil {
		return err
	}
	if err := makeNixLogDirs(cfg, who); err != nil {
		log.Warn("build logs are not where stock Nix looks for them", "error", err)
	}
	links, optional := cfg.profilesDir()
	defer func() { // shells look at nothing that is not mounted
		if err := removeFile(shellList(cfg)); err != nil {
			log.Warn("shells are told of profiles that are not shown any more", "error", err)
		}
	}()
	return warden.Run(ctx, warden.Config{
		LinksDir: links, LinksOptional: optional,
		MountDir: cfg.mountDir(), StoreDir: cfg.StoreDir, RunDir: cfg.RunDir, UID: who.uid, GID: who.gid,
		Child: slices.Concat([]string{program, "agent"}, flags, noFile), Env: environ(cfg),
		Program: file, VersionArgs: []string{"version", "--json"}, Control: controlSocket(cfg), WithoutResend: withoutResend(),
		ReadAheadKiB: int(cfg.Agent.ReadAhead >> 10), Log: log,
	})
}

// takeInvite makes this machine a member with what agent.invite says: an invite, a
// file with one, or an invite.json.
func takeInvite(ctx context.Context, cfg *Config, who account, log *slog.Logger) error {
	line := cfg.Agent.Invite
	if !api.IsJoinInvite(line) {
		if line = inviteIn(line); line == "" {
			return installInvite(cfg, cfg.Agent.Invite, who)
		}
	}
	invite, err := agentInvite(cfg, line)
	if err != nil {
		return err
	}
	self := &entry.Self{}
	if err := runStep(ctx, who, &entry.Step{Do: entry.Who, Role: entry.RoleAgent, StateDir: cfg.StateDir}, self, os.Stderr); err != nil {
		return err
	}
	if self.Joined != nil && entry.SameStorehouse(self.Joined, invite) {
		return nil // at an earlier start, and no server need be there now
	}
	name, err := machineName("", "", false)
	if err != nil {
		return err
	}
	step := &entry.Step{Do: entry.Join, StateDir: cfg.StateDir, Invite: invite, Name: name, User: person(), Version: cli.ReadVersion().Version}
	joined := &entry.Joined{}
	if err := runStep(ctx, who, step, joined, os.Stderr); err != nil {
		return err
	}
	log.Info("this machine is a member of the storehouse", "storehouse", joined.Storehouse, "name", joined.Name, "peer", joined.Peer, "before", joined.Already)
	if joined.Unclaimed != "" {
		log.Warn("profiles of who starts this are not this machine's", "user", person(), "because", joined.Unclaimed, "an admin changes it with", userWords(joined.Name))
	}
	return nil
}

// agentInvite reads an invite's line, which must be one for an agent of cfg.
func agentInvite(cfg *Config, line string) (*api.JoinInvite, error) {
	invite, err := api.ParseJoinInvite(line)
	if err != nil {
		return nil, err
	}
	if invite.Role == entry.RoleServer {
		return nil, cli.Explain(flox.ErrBadInput, "the invite of storehouse %s makes a server of this machine, not an agent: use it with sudo floxd join", invite.Name)
	}
	if string(invite.StoreDir) != cfg.StoreDir {
		return nil, cli.Explain(flox.ErrBadInput, `store directory %s: the paths of storehouse %s are made for %s, and the directory is part of every path's hash: start with --store-dir %s`,
			cfg.StoreDir, invite.Name, invite.StoreDir, invite.StoreDir)
	}
	return invite, nil
}

// inviteIn gives the invite in a file; "" if the file holds something else.
func inviteIn(file string) string {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would wait for a writer
	if err != nil {
		return "" // who reads it as invite.json says what is wrong
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return ""
	}
	return api.FindJoinInvite(string(text))
}

// installInvite gives the child its own copy of an invite that may be root's.
// Without one, what an earlier start installed is used.
func installInvite(cfg *Config, from string, who account) error {
	to := filepath.Join(cfg.StateDir, agentDir, inviteName)
	if from == "" || from == to {
		if _, err := os.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			return cli.Explain(flox.ErrBadInput, `this machine is in no storehouse yet. On a server of one, or as its admin: floxctl invite --role agent
and here: sudo floxd join INVITE
For a storehouse of this machine's own: sudo floxd up`)
		}
		_, err := checkInvite(cfg, to)
		return err
	}
	invite, err := checkInvite(cfg, from)
	if err != nil {
		return err
	}
	if had, err := api.LoadInvite(to); err == nil && reflect.DeepEqual(had, invite) { // also on a disk that is full
		return nil
	}
	if err := giveInvite(cfg.StateDir, invite, who); err != nil {
		return fmt.Errorf("install the invite %s: %w", from, err)
	}
	return nil
}

// checkInvite finds out before anything is mounted what would only keep the
// child from starting, again and again.
func checkInvite(cfg *Config, file string) (*api.Invite, error) {
	invite, err := api.LoadInvite(file)
	if err != nil {
		return nil, err
	}
	if string(invite.StoreDir) != cfg.StoreDir {
		return nil, cli.Explain(flox.ErrBadInput, `store directory %s: the paths of storehouse %s (%s) are made for %s, and the directory is part of every path's hash: start with --store-dir %s`,
			cfg.StoreDir, invite.Name, file, invite.StoreDir, invite.StoreDir)
	}
	return invite, nil
}

// giveInvite writes what was read, whole or not at all, so that only who can
// read it. The file it came from is not read again: that of the storehouse here
// is an ordinary user's, who could have put a link to a secret of root's in its
// place. For the same reason nothing outside of the state directory is touched.
func giveInvite(stateDir string, invite *api.Invite, who account) error {
	content, err := json.MarshalIndent(invite, "", "  ")
	if err != nil {
		return err
	}
	dir, err := os.OpenRoot(stateDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	const draft = ".invite.new"
	_ = dir.Remove(draft) // of one that was killed; what is in the way is said next
	f, err := dir.OpenFile(draft, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Remove(draft) }() // gone already when it was renamed
	_, err = f.Write(append(content, '\n'))
	if err == nil {
		err = f.Chown(int(who.uid), int(who.gid))
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return dir.Rename(draft, filepath.Join(agentDir, inviteName))
}

// runAgentChild is the unprivileged process the warden starts.
func runAgentChild(ctx context.Context, cfg *Config, embedded bool, log *slog.Logger) error {
	line, err := warden.FromEnv()
	if err != nil {
		return fmt.Errorf("floxd agent --child is started by floxd agent only: %w", err)
	}
	// It was started through a descriptor, whose number would be its name.
	_ = os.WriteFile("/proc/self/comm", []byte("floxd"), 0)
	invite, err := api.LoadInvite(filepath.Join(cfg.StateDir, agentDir, inviteName))
	if err != nil {
		return err
	}
	agentCfg := agentConfig(cfg, invite, log)
	agentCfg.Warden, agentCfg.Embedded = line, embedded
	if err := cfg.linkSession(); err != nil {
		return err
	}
	if cfg.Mount == mountSession {
		cfg.showLocal(&agentCfg)
	}
	a, err := agent.New(agentCfg)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// agentConfig is what the agent's child needs of the configuration.
func agentConfig(cfg *Config, invite *api.Invite, log *slog.Logger) agent.Config {
	bind, _ := cfg.Agent.bindings() // which was checked
	return agent.Config{
		StateDir: filepath.Join(cfg.StateDir, agentDir), StoreDir: flox.StoreDir(cfg.StoreDir),
		Socket: filepath.Join(cfg.RunDir, cli.SocketName), NixSocket: nixSocket(cfg), NixConf: nixKeysFile(cfg), ShellList: shellList(cfg),
		Invite: invite, Listen: cfg.Agent.Listen, Advertise: cfg.Agent.Advertise, Site: cfg.Agent.Site,
		NoMDNS: !cfg.Agent.MDNS, DHTClient: !cfg.Agent.DHTServer,
		CacheBudget: int64(cfg.Agent.CacheBudget), CacheReserve: int64(cfg.Agent.CacheReserve),
		LookupTimeout: time.Duration(cfg.Agent.LookupTimeout), ReadTimeout: time.Duration(cfg.Agent.ReadTimeout),
		NoPrefetch: !cfg.Agent.Prefetch, PrefetchRate: int64(cfg.Agent.PrefetchRate), NoTraces: !cfg.Agent.StartTraces,
		System: cfg.Agent.System, Bind: bind,
		Offline: cfg.Agent.Offline, ListValid: cfg.Agent.List == "valid",
		Metrics: cfg.Agent.Metrics,
		Version: cli.ReadVersion().Version, Log: log,
	}
}

// checkRunDir refuses a directory of root's that holds something: the run
// directory is given to the child's user, and /run or /tmp must not be.
func checkRunDir(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return nil //nolint:nilerr // it is made, or the warden says what is wrong
	}
	names, err := os.ReadDir(dir)
	if st, isStat := info.Sys().(*syscall.Stat_t); err == nil && len(names) > 0 && isStat && st.Uid == 0 {
		return cli.Explain(flox.ErrBadInput, "run directory %s is root's and holds files already (%s, ...): it would be given to an ordinary user; choose one of its own with --run-dir, such as %s",
			dir, names[0].Name(), filepath.Join(dir, "floxd"))
	}
	return nil
}

// checkStoreDir refuses to cover a store that is there already. It asks the
// kernel's table first: a mount of ours whose agent is gone must not be touched,
// and the warden takes it over or away.
func checkStoreDir(dir, command string) error {
	mounted, err := mountedType(dir)
	if err != nil || mounted == cli.FilesystemType {
		return err
	}
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("store directory: %w: %w", err, flox.ErrBusy)
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && !info.IsDir() {
		return cli.Explain(flox.ErrBadInput, "store directory %s is a file: choose a directory, or one that does not exist yet, with --store-dir", dir)
	}
	names, err := f.Readdirnames(1)
	if len(names) == 0 && errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("store directory %s: %w: %w", dir, err, flox.ErrBusy)
	}
	return cli.Explain(flox.ErrBusy, `%s holds files already (%s, ...): a Nix store of this machine, it seems.
%s does not cover it and has changed nothing. Mount the store elsewhere:
  sudo %s --store-dir /flox/store
The directory is part of every path's hash: that storehouse then holds paths made for /flox/store.`, dir, names[0], command, command)
}
