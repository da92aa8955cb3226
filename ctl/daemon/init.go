package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/entry"
	"github.com/floxctl/flox/storehouse"
)

// initFlags are the flags of storehouse init.
type initFlags struct {
	entryFlags
	storehouseName string
}

// entryFlags are those that a first server and a machine that joins have in common.
type entryFlags struct {
	name, consensus, consensusAdvertise string
	noStart, json                       bool
}

// bind makes them flags of a command.
func (e *entryFlags) bind(f *pflag.FlagSet) {
	f.StringVar(&e.name, "name", "", "what this machine is called among the machines (default: the host's name)")
	f.StringVar(&e.consensus, "consensus", "", "of a server: `HOST:PORT` for the other servers")
	f.StringVar(&e.consensusAdvertise, "consensus-advertise", "", "`HOST:PORT` of it that is told to them, if it listens elsewhere")
	f.BoolVar(&e.noStart, "no-start", false, "configure only: whoever manages services here starts it")
	f.BoolVar(&e.json, "json", false, "print the result as JSON")
}

func newInitCmd(file *string) *cobra.Command {
	opts := initFlags{}
	cmd := &cobra.Command{
		Use:   "init --name NAME [--consensus HOST:PORT] [--storehouse-name NAME] [--no-start] [flags]",
		Short: "Set up the first server of a storehouse that others can join",
		Long: `Set up the first server of a storehouse: it is configured, so that further servers
can join, and started, and the invite for the next server is printed. With
--no-start it is only configured.

Without --consensus, the address for the other servers is this machine's towards
the network, port ` + strconv.Itoa(cli.DefaultConsensusPort) + `. The configuration goes into ` + cli.DefaultConfigFile + `, or --config;
nothing in it is lost. It can be run again.

` + cli.ExitCodes,
		Example: `  sudo floxd storehouse init --name s1
  sudo floxd storehouse init --name s1 --storehouse-name acme --consensus 10.0.0.1:7783`,
		Args: cli.Args(0, 0, ""),
	}
	flags := bindFlags(cmd.Flags())
	opts.bind(cmd.Flags())
	cmd.Flags().StringVar(&opts.storehouseName, "storehouse-name", "", "what people and keys call the storehouse, for good (default: the host's name)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		n := &initial{initFlags: opts, out: cmd.OutOrStdout(), errOut: cmd.ErrOrStderr()}
		if err := n.configure(cmd.Context(), *file, flags); err != nil {
			return err
		}
		return n.run(cmd.Context())
	}
	return cmd
}

// initial is the setting up of a first server.
type initial struct {
	initFlags
	out, errOut io.Writer

	cfg  *Config
	file *configFile
	text string
}

// farAway are documentation addresses that no network has: the way to them is
// the way out.
var farAway = []string{"192.0.2.1:9", "[2001:db8::1]:9"}

func (n *initial) configure(ctx context.Context, file string, flags *overrides) (err error) {
	if n.file, err = openConfig(file); err != nil {
		return err
	}
	cfg := *n.file.has
	n.cfg = &cfg
	if err := readEnv(n.cfg); err != nil {
		return err
	}
	flags.apply(n.cfg)
	s := &n.cfg.Storehouse
	if s.Server, err = machineName(n.name, s.Server, true); err != nil {
		return err
	}
	there, err := storehouseThere(n.cfg)
	if err != nil {
		return err
	}
	for _, name := range []string{n.storehouseName, s.Name, there} {
		if name != "" {
			s.Name = name
			break
		}
	}
	if s.Name == "" {
		if s.Name, err = machineName("", "", false); err != nil {
			return err
		}
	}
	if there != "" && s.Name != there {
		return cli.Explain(flox.ErrBusy, "%s holds the storehouse %s already, and its keys carry that name: leave --storehouse-name away, or choose another --state-dir",
			filepath.Join(n.cfg.StateDir, storehouseDir), there)
	}
	setText(&s.Consensus, n.consensus)
	setText(&s.ConsensAd, n.consensusAdvertise)
	if err := s.chooseConsensus(ctx, farAway); err != nil {
		return err
	}
	if err := n.cfg.check(); err != nil {
		return err
	}
	n.text, err = n.file.with(n.cfg, "storehouse")
	return err
}

// storehouseThere gives the name of the storehouse whose first server the state
// directory holds; "" = none.
func storehouseThere(cfg *Config) (string, error) {
	dir := filepath.Join(cfg.StateDir, storehouseDir)
	if _, err := os.Lstat(filepath.Join(dir, "joined.json")); err == nil {
		return "", cli.Explain(flox.ErrBusy, "%s is that of a server that joined others: floxd leave takes it out there; or choose another --state-dir", dir)
	}
	name, err := storehouse.NameIn(dir)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	return name, err
}

func (n *initial) run(ctx context.Context) error {
	if os.Geteuid() != 0 && !n.noStart {
		return cli.Explain(flox.ErrDenied, "floxd storehouse init sets this machine up: run it with sudo, or with --no-start and directories of your own (--state-dir, --run-dir, --config)")
	}
	who := account{}
	if os.Geteuid() == 0 {
		var err error
		if who, err = findAccount(n.cfg.User); err != nil {
			return err
		}
	}
	if err := makeStateDirs(n.cfg.StateDir, who, storehouseDir); err != nil {
		return err
	}
	changed := n.text != n.file.text
	if err := n.file.save(n.text); err != nil {
		return err
	}
	s := n.cfg.Storehouse
	facts := &initFacts{Storehouse: s.Name, Server: s.Server, Consensus: s.advertised(), Config: n.file.path}
	if !n.noStart {
		if err := n.start(ctx, facts, changed); err != nil {
			return err
		}
	}
	if n.json {
		return json.NewEncoder(n.out).Encode(facts)
	}
	n.tell(facts)
	return nil
}

// start has the server run, and makes the invite for the next one.
func (n *initial) start(ctx context.Context, facts *initFacts, changed bool) error {
	s, err := newService("storehouse", n.cfg, n.file)
	if err != nil {
		return err
	}
	if facts.Runs, err = s.start(ctx, changed); err != nil {
		return err
	}
	admin, done := cli.Admin(filepath.Join(n.cfg.RunDir, cli.StorehouseSocket))
	defer done()
	ctx, cancel := context.WithTimeout(ctx, servicePatience)
	defer cancel()
	for {
		resp, err := admin.MakeInvite(ctx, connect.NewRequest(&floxv1.MakeInviteRequest{Role: entry.RoleServer}))
		if err == nil {
			facts.Invite = resp.Msg.GetInvite()
			return nil
		}
		err = fmt.Errorf("the storehouse runs; make the invite for the next server: %w", api.FromConnect(err))
		if !errors.Is(err, flox.ErrUnreachable) {
			return err
		}
		select {
		case <-time.After(askEvery): // it has only begun, and has no trust list yet
		case <-ctx.Done():
			return err
		}
	}
}

// initFacts is what init prints with --json.
type initFacts struct {
	Storehouse string `json:"storehouse"`
	Server     string `json:"server"`
	Consensus  string `json:"consensus"`
	Config     string `json:"config"`
	Runs       *runs  `json:"runs"`   // null with --no-start
	Invite     string `json:"invite"` // for the next server
}

func (n *initial) tell(f *initFacts) {
	fmt.Fprintf(n.out, "Storehouse  %s\nServer      %s\nConsensus   %s\nConfig      %s\n", f.Storehouse, f.Server, f.Consensus, f.Config)
	if f.Runs == nil {
		fmt.Fprintf(n.out, "Start it with: %s\nThen, for the next server: sudo floxctl invite --role server\n", strings.Join(startWords("storehouse", n.file), " "))
		return
	}
	fmt.Fprintf(n.out, "%s\nOn the next server, within an hour:\n\nsudo floxctl join %s\n\n", f.Runs.tell("storehouse"), f.Invite)
	fmt.Fprintf(n.out, "For machines that use it: sudo floxctl invite --role agent\n")
}
