package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/entry"
)

// joinFlags are the flags of join, and what they set in the part of the
// configuration that the role is configured by.
type joinFlags struct {
	entryFlags
	http, site, yes   string
	listen, advertise []string
	noNix, noShells   bool
}

func newJoinCmd(file *string) *cobra.Command {
	opts := joinFlags{}
	cmd := &cobra.Command{
		Use:   "join [INVITE] [--name NAME] [--no-start] [flags]",
		Short: "Make this machine a part of a storehouse, with an invite",
		Long: `Join a storehouse as what the invite says: a server, an agent, or a worker. INVITE
is the line that floxctl invite printed, or - to read it from standard input. This
machine gets a key, becomes a member, and is configured and started as that: by a
systemd unit, or where there is no systemd as a process with its log in the state
directory. With --no-start it is only configured. It can be run again: a machine
that has joined stays what it is.

An agent's machine that has no Nix store of its own gets its stock Nix set up as a
client of the agent, for everybody and without any variable: a few lines at the end of
/etc/nix/nix.conf, and Nix's socket. floxd leave takes both back; --no-nix leaves them.
A machine that has one keeps it, untouched: the store is mounted in the state directory,
and is what floxctl nix -- COMMAND sees (--mount session, the default there).

New shells of an agent's machine find your own profile, and those assigned to it:
/etc/profile.d/floxd.sh and files for fish and zsh, until floxd leave (--no-shells: none).

Without INVITE, join looks for a storehouse on the LAN that lets machines in now
(floxctl invite --lan 10m), shows its fingerprint, and asks.

What is to be kept goes into the configuration file (` + cli.DefaultConfigFile + `,
or --config). Nothing in it is lost; if it says otherwise, join refuses.

A server needs an address for the other servers alone, --consensus; without it, it
is this machine's address towards the storehouse, port ` + strconv.Itoa(cli.DefaultConsensusPort) + `.

` + cli.ExitCodes,
		Example: `  sudo floxd join flox1AAB…
  sudo floxd join flox1AAB… --name s2 --consensus 10.0.0.2:7783
  sudo floxd join --yes FINGERPRINT       a storehouse of this LAN, in a script
  floxctl invite --role agent --json | jq -r .invite | ssh root@laptop floxd join -`,
		Args: cli.Args(0, 1, "INVITE"),
	}
	flags := bindFlags(cmd.Flags())
	f := cmd.Flags()
	opts.bind(f)
	f.StringVar(&opts.http, "http", "", "of a server: `ADDRESS` of its binary cache, or none")
	f.StringVar(&opts.site, "site", "", "label of the `PLACE` this machine is at")
	f.StringSliceVar(&opts.listen, "listen", nil, "`ADDRESS` for machines, host:port or multiaddr; may be repeated")
	f.StringSliceVar(&opts.advertise, "advertise", nil, "`ADDRESS` that is told to others; may be repeated")
	f.StringVar(&opts.yes, "yes", "", "without INVITE: join the storehouse with this `FINGERPRINT`, without asking")
	f.BoolVar(&opts.noNix, "no-nix", false, "of an agent: leave /etc/nix/nix.conf and Nix's socket alone")
	f.BoolVar(&opts.noShells, "no-shells", false, "of an agent: leave the shells of this machine alone")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		j := &join{joinFlags: opts, out: cmd.OutOrStdout(), errOut: cmd.ErrOrStderr()}
		if err := j.load(*file, flags); err != nil {
			return err
		}
		if err := j.findInvite(cmd.Context(), cmd.InOrStdin(), args); err != nil {
			return err
		}
		if err := j.configure(cmd.Context(), flags); err != nil {
			return err
		}
		return j.run(cmd.Context())
	}
	return cmd
}

// inviteLine gives an invite from the command line, or for "-" from standard
// input, where no list of processes shows it.
func inviteLine(in io.Reader, arg string) (string, error) {
	if arg != "-" {
		return arg, nil
	}
	b, err := io.ReadAll(io.LimitReader(in, 64<<10))
	if err != nil {
		return "", fmt.Errorf("read the invite: %w", err)
	}
	return string(b), nil
}

// join is one machine's joining.
type join struct {
	joinFlags
	invite      *api.JoinInvite
	out, errOut io.Writer

	cfg    *Config
	placed Config // cfg, with where the store is mounted decided
	file   *configFile
	text   string // of the configuration file, as it will be
	who    account
}

// isServer reports what the invite makes of this machine.
func (j *join) isServer() bool { return j.invite.Role == entry.RoleServer }

// section is the part of the configuration that is about the role.
func (j *join) section() string {
	if j.isServer() {
		return "storehouse"
	}
	return "agent"
}

// load reads what this machine is configured as.
func (j *join) load(file string, flags *overrides) (err error) {
	if os.Geteuid() != 0 && !j.noStart {
		return cli.Explain(flox.ErrDenied, "floxd join sets this machine up: run it with sudo, or with --no-start and directories of your own (--state-dir, --run-dir, --config)")
	}
	if j.file, err = openConfig(file); err != nil {
		return err
	}
	cfg := *j.file.has
	j.cfg = &cfg
	if err := readEnv(j.cfg); err != nil {
		return err
	}
	flags.apply(j.cfg)
	if os.Geteuid() == 0 {
		j.who, err = findAccount(j.cfg.User)
	}
	return err
}

// findInvite takes the invite of the command line, or that of the LAN.
func (j *join) findInvite(ctx context.Context, in io.Reader, args []string) error {
	if len(args) == 0 {
		if err := makeStateDirs(j.cfg.StateDir, j.who, agentDir); err != nil {
			return err
		}
		var err error
		j.invite, err = j.onLAN(ctx, in)
		return err
	}
	if j.yes != "" {
		return cli.Usage("--yes FINGERPRINT is for joining without INVITE")
	}
	line, err := inviteLine(in, args[0])
	if err == nil {
		j.invite, err = api.ParseJoinInvite(line)
	}
	return err
}

// configure finds out everything that can be wrong on this machine, before the
// invite is used.
func (j *join) configure(ctx context.Context, flags *overrides) (err error) {
	if err := j.storeDir(flags); err != nil {
		return err
	}
	if j.name, err = machineName(j.name, j.cfg.Storehouse.Server, j.isServer()); err != nil {
		return err
	}
	if err := j.apply(ctx); err != nil {
		return err
	}
	if err := j.cfg.check(); err != nil {
		return err
	}
	j.text, err = j.file.with(j.cfg, j.section())
	return err
}

// storeDir takes the storehouse's store directory: it is part of every path.
func (j *join) storeDir(flags *overrides) error {
	theirs := string(j.invite.StoreDir)
	given := flags.flags.Changed("store-dir") || os.Getenv("FLOXD_STORE_DIR") != "" || j.file.says["store-dir"]
	if given && j.cfg.StoreDir != theirs {
		return cli.Explain(flox.ErrBadInput, "store directory %s: the paths of storehouse %s are made for %s, and the directory is part of every path's hash: join with --store-dir %s, and store-dir so in %s",
			j.cfg.StoreDir, j.invite.Name, theirs, theirs, j.file.path)
	}
	j.cfg.StoreDir = theirs
	return nil
}

// apply puts the flags where the role is configured.
func (j *join) apply(ctx context.Context) error {
	s, a := &j.cfg.Storehouse, &j.cfg.Agent
	if !j.isServer() {
		for flag, value := range map[string]string{"--consensus": j.consensus, "--consensus-advertise": j.consensusAdvertise, "--http": j.http} {
			if value != "" {
				return cli.Usage("%s is for servers, and this invite is for the role %s", flag, j.invite.Role)
			}
		}
		setList(&a.Listen, j.listen)
		setList(&a.Advertise, j.advertise)
		setText(&a.Site, j.site)
		return nil
	}
	setList(&s.Listen, j.listen)
	setList(&s.Advertise, j.advertise)
	setText(&s.Site, j.site)
	setText(&s.HTTP, j.http)
	setText(&s.Server, j.name)
	setText(&s.Consensus, j.consensus)
	setText(&s.ConsensAd, j.consensusAdvertise)
	return s.chooseConsensus(ctx, serverHosts(j.invite))
}

func setText(to *string, value string) {
	if value != "" {
		*to = value
	}
}

func setList(to *[]string, value []string) {
	if len(value) > 0 {
		*to = value
	}
}

// chooseConsensus completes where the other servers reach this one: at the
// address this machine has towards the first of those that it can send to.
func (c *StorehouseConfig) chooseConsensus(ctx context.Context, towards []string) error {
	if c.consensus() == "" {
		own := ownAddress(ctx, towards)
		if own == "" {
			return cli.Explain(flox.ErrBadInput, "which address do the other servers reach this one at? Say so with --consensus HOST:%d", cli.DefaultConsensusPort)
		}
		c.Consensus = net.JoinHostPort(own, strconv.Itoa(cli.DefaultConsensusPort))
	}
	host, port, err := net.SplitHostPort(c.Consensus)
	if err != nil {
		return cli.Explain(flox.ErrBadInput, "consensus %q: want host:port, such as 10.0.0.1:%d", c.Consensus, cli.DefaultConsensusPort)
	}
	ip := net.ParseIP(host)
	if c.ConsensAd != "" || host != "" && (ip == nil || !ip.IsUnspecified()) {
		return nil
	}
	own := ownAddress(ctx, towards)
	if own == "" {
		return cli.Explain(flox.ErrBadInput, "consensus %s listens at any address: say with --consensus-advertise HOST:PORT which one the other servers use", c.Consensus)
	}
	c.ConsensAd = net.JoinHostPort(own, port)
	return nil
}

// advertised is the host:port that other servers are told.
func (c *StorehouseConfig) advertised() string {
	if c.ConsensAd != "" {
		return c.ConsensAd
	}
	return c.Consensus
}

// serverHosts lists the host:port of an invite's servers.
func serverHosts(inv *api.JoinInvite) (list []string) {
	for _, s := range inv.Storehouse {
		for _, addr := range s.Addrs {
			if at, err := parseListen(addr); err == nil {
				list = append(list, at)
			}
		}
	}
	return list
}

// ownAddress is what this machine sends from to the first of these that it has a
// way to and that is another machine. Nothing is sent.
func ownAddress(ctx context.Context, towards []string) string {
	for _, at := range towards {
		conn, err := (&net.Dialer{}).DialContext(ctx, "udp", at)
		if err != nil {
			continue
		}
		local, isUDP := conn.LocalAddr().(*net.UDPAddr)
		_ = conn.Close()
		if isUDP && !local.IP.IsLoopback() {
			return local.IP.String()
		}
	}
	return ""
}

// machineName is what this machine wants to be called: what was given, what it
// was configured as, or the host's name.
func machineName(given, configured string, isServer bool) (string, error) {
	if given != "" {
		return given, nil
	}
	if isServer && configured != "" {
		return configured, nil
	}
	host, err := os.Hostname()
	if err != nil || host == "" {
		return "", cli.Explain(flox.ErrBadInput, "this host has no name: say with --name what the machine is called")
	}
	name, _, _ := strings.Cut(host, ".")
	return name, nil
}

// person is who runs this command, also with sudo.
func person() string {
	if name := os.Getenv("SUDO_USER"); name != "" && os.Geteuid() == 0 {
		return name
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return ""
}

// run joins, keeps what it was told, and starts what this machine is then.
func (j *join) run(ctx context.Context) error {
	if err := j.prepare(); err != nil {
		return err
	}
	if !j.json {
		fmt.Fprintf(j.out, "Storehouse  %s\nFingerprint %s\n", j.invite.Name, j.invite.TrustList)
	}
	step := &entry.Step{
		Do: entry.Join, StateDir: j.cfg.StateDir, Invite: j.invite, Name: j.name, User: person(),
		Version: cli.ReadVersion().Version, Consensus: j.cfg.Storehouse.advertised(),
	}
	joined := &entry.Joined{}
	if err := runStep(ctx, j.who, step, joined, j.errOut); err != nil {
		return err
	}
	changed := j.text != j.file.text
	if err := j.file.save(j.text); err != nil {
		return err
	}
	facts := &joinedFacts{Joined: joined, Config: j.file.path, Mount: j.placed.Mount}
	if nix := newNixClient(&j.placed); nix != nil && !j.isServer() && !j.noNix && os.Geteuid() == 0 {
		var err error
		if facts.Nix, err = nix.install(); err != nil {
			return err
		}
	}
	if hooks := newShellHooks(&j.placed); hooks != nil && !j.isServer() && !j.noShells && os.Geteuid() == 0 {
		var err error
		if facts.Shells, _, err = hooks.install(); err != nil { // it is a member all the same
			fmt.Fprintf(j.errOut, "%v: new shells do not all find profiles; to leave them alone: --no-shells\n", err)
		}
	}
	if !j.json {
		if err := j.tell(facts); err != nil {
			return err
		}
	}
	if !j.noStart {
		if err := j.start(ctx, facts, changed || !joined.Already); err != nil {
			return err
		}
	}
	if j.json {
		return json.NewEncoder(j.out).Encode(facts)
	}
	return nil
}

// start has the part run that this machine is now. One that ran before it joined
// is started anew.
func (j *join) start(ctx context.Context, facts *joinedFacts, anew bool) error {
	s, err := newService(j.section(), j.cfg, j.file)
	if err != nil {
		return err
	}
	if facts.Runs, err = s.start(ctx, anew); err != nil || j.json {
		return err
	}
	_, err = io.WriteString(j.out, facts.Runs.tell(j.section()))
	return err
}

// prepare makes the directories of the role, owned by who will use them.
func (j *join) prepare() error {
	j.placed = *j.cfg
	dir := storehouseDir
	if !j.isServer() {
		if dir = agentDir; os.Geteuid() == 0 {
			if err := j.placed.place("floxd agent"); err != nil {
				return err
			}
		}
	}
	return makeStateDirs(j.cfg.StateDir, j.who, dir)
}

// joinedFacts is what join prints with --json.
type joinedFacts struct {
	*entry.Joined
	Config string    `json:"config"`           // the file
	Runs   *runs     `json:"runs"`             // null with --no-start
	Nix    *nixFacts `json:"nix,omitempty"`    // of an agent on a machine without a Nix store
	Shells []string  `json:"shells,omitempty"` // the files by which shells find profiles
	Mount  string    `json:"mount,omitempty"`  // session: beside a Nix store of this machine
}

func (j *join) tell(facts *joinedFacts) error {
	m := facts.Joined
	verb := "joined"
	if m.Already {
		verb = "was a member already, and stays it"
	}
	_, err := fmt.Fprintf(j.out, "Machine     %s (%s) %s: %s\n", m.Name, m.Role, verb, m.Peer)
	if m.Unconfirmed {
		fmt.Fprintf(j.out, "No server of the storehouse answers now, so whether it still is a member was not asked.\n")
	}
	if j.isServer() {
		fmt.Fprintf(j.out, "Consensus   %s\n", j.cfg.Storehouse.advertised())
	}
	if m.Unclaimed != "" && !j.isServer() {
		fmt.Fprintf(j.out, "Profiles    of %s are not this machine's: %s. An admin of the storehouse makes them its: %s\n", person(), m.Unclaimed, userWords(m.Name))
	}
	if m.Role == entry.RoleWorker {
		fmt.Fprintf(j.out, "A worker runs an agent; what builds on it comes with a later release.\n")
	}
	fmt.Fprintf(j.out, "Config      %s\n", j.file.path)
	switch n := facts.Nix; {
	case facts.Mount == mountSession:
		fmt.Fprintf(j.out, "Stock Nix   keeps its store: %s stays as it is. Beside it, with both: floxctl nix -- COMMAND\n", j.cfg.StoreDir)
	case n == nil:
	case n.Reason != "":
		fmt.Fprintf(j.out, "Stock Nix   stays as it is: %s. Where the agent is wanted: NIX_REMOTE=unix://%s\n", n.Reason, nixSocket(j.cfg))
	default:
		fmt.Fprintf(j.out, "Stock Nix   uses the agent (%s)\n", n.Conf)
	}
	if len(facts.Shells) > 0 {
		fmt.Fprintf(j.out, "Shells      find profiles, new ones (%s)\n", strings.Join(facts.Shells, ", "))
	}
	if j.noStart {
		fmt.Fprintf(j.out, "Start it with: %s\n", strings.Join(startWords(j.section(), j.file), " "))
	}
	return err
}

// userWords is the command by which a machine speaks for who runs this.
func userWords(machine string) string { return "floxctl machine user " + machine + " " + person() }

// startWords is the command that runs a part of floxd as a file configures it.
func startWords(part string, file *configFile) []string {
	words := []string{"sudo", "floxd", part}
	if file.path != cli.DefaultConfigFile {
		words = slices.Insert(words, 2, "--config", file.path)
	}
	return words
}
