package ctl

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// newMachineCmd only holds the commands below it.
func newMachineCmd(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "machine",
		Short: "List, label, rename and revoke the machines of the storehouse",
		Long: `The machines that have joined the storehouse. MACHINE is a name, a peer ID or a
beginning of one that no other has.

` + cli.ExitCodes,
	}
	cmd.AddCommand(newMachineListCmd(g), newMachineShowCmd(g), newMachineLabelCmd(g), newMachineUserCmd(g), newMachineRenameCmd(g), newMachineRevokeCmd(g))
	return cmd
}

// userFacts is what a person may do on a machine.
type userFacts struct {
	Name string `json:"name"`
	Role string `json:"role"`
}

// machineFacts is a machine; seenAt is null when the leader has not seen it yet.
type machineFacts struct {
	Peer      string            `json:"peer"`
	Name      string            `json:"name"`
	Role      string            `json:"role"`
	Labels    map[string]string `json:"labels"`
	Users     []userFacts       `json:"users"`
	Ephemeral bool              `json:"ephemeral"`
	Addrs     []string          `json:"addrs"`
	JoinedAt  *string           `json:"joinedAt"`
	JoinedBy  string            `json:"joinedBy"`
	Invite    string            `json:"invite"`
	HTTPURL   string            `json:"httpUrl"`
	Consensus string            `json:"consensus"`
	Connected bool              `json:"connected"`
	SeenAt    *string           `json:"seenAt"`
}

func machineOf(s *floxv1.MachineState) machineFacts {
	m := s.GetMachine()
	users := make([]userFacts, 0, len(m.GetUsers()))
	for _, u := range m.GetUsers() {
		users = append(users, userFacts{Name: u.GetName(), Role: u.GetRole()})
	}
	return machineFacts{
		Peer: m.GetPeer(), Name: m.GetName(), Role: m.GetRole(), Labels: labelMap(m.GetLabels()), Users: users,
		Ephemeral: m.GetEphemeral(), Addrs: some(m.GetAddrs()), JoinedAt: stampMs(m.GetJoinedUnixMs()), JoinedBy: m.GetJoinedBy(),
		Invite: m.GetInvite(), HTTPURL: m.GetHttpUrl(), Consensus: m.GetRaftAddress(), Connected: s.GetConnected(), SeenAt: stampMs(s.GetSeenUnixMs()),
	}
}

func newMachineListCmd(g *globals) *cobra.Command {
	long := false
	cmd := &cobra.Command{
		Use:   "list [-l]",
		Short: "List the machines that have joined",
		Long: `List the machines that have joined: servers first, then by name, with when each
was seen last.

` + cli.ExitCodes,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runMachineList(cmd.Context(), g, g.printer(cmd), long)
		},
	}
	cmd.Flags().BoolVarP(&long, "long", "l", false, "whole peer IDs")
	return cmd
}

// runMachineList sorts, since the storehouse lists in the order of its facts.
func runMachineList(ctx context.Context, g *globals, out *output, long bool) error {
	machines, err := machinesOf(ctx, g, "")
	if err != nil {
		return err
	}
	slices.SortStableFunc(machines, func(a, b *floxv1.MachineState) int {
		x, y := a.GetMachine(), b.GetMachine()
		if server := x.GetRole() == "server"; server != (y.GetRole() == "server") {
			if server {
				return -1
			}
			return 1
		}
		return strings.Compare(strings.ToLower(x.GetName()), strings.ToLower(y.GetName()))
	})
	if out.json {
		facts := make([]machineFacts, 0, len(machines))
		for _, m := range machines {
			facts = append(facts, machineOf(m))
		}
		return out.printJSON(facts)
	}
	if len(machines) == 0 {
		out.printf("No machine has joined yet. Invite one: floxctl invite --role agent\n")
		return nil
	}
	now := time.Now()
	rows := [][]string{{"NAME", "ROLE", "SEEN", "JOINED", "USERS", "LABELS", "PEER"}}
	for _, s := range machines {
		m := s.GetMachine()
		role, peer := m.GetRole(), clean(m.GetPeer())
		if m.GetEphemeral() {
			role += ", ephemeral"
		}
		if !long {
			peer = shortPeer(peer)
		}
		rows = append(rows, []string{
			clean(m.GetName()), clean(role), seen(s, now), ago(m.GetJoinedUnixMs(), now), orDash(grantsOf(m.GetUsers())),
			orDash(labelsOf(m.GetLabels())), peer,
		})
	}
	out.table(rows, map[int]bool{2: true, 3: true})
	return nil
}

// seen gives when a machine was there last: "now", "3 h ago", "not yet".
func seen(s *floxv1.MachineState, now time.Time) string {
	switch {
	case s.GetConnected():
		return "now"
	case s.GetSeenUnixMs() > 0:
		return ago(s.GetSeenUnixMs(), now) + " ago"
	}
	return "not yet"
}

// grantsOf gives "alice:admin,bob:member".
func grantsOf(users []*floxv1.UserGrant) string {
	words := make([]string, 0, len(users))
	for _, u := range users {
		words = append(words, grantOf(u))
	}
	return strings.Join(words, ",")
}

// machinesOf asks for all machines or for one.
func machinesOf(ctx context.Context, g *globals, machine string) ([]*floxv1.MachineState, error) {
	resp, err := g.admin().ListMachines(ctx, connect.NewRequest(&floxv1.ListMachinesRequest{Machine: machine}))
	if err != nil {
		return nil, explainAdmin(err)
	}
	return resp.Msg.GetMachines(), nil
}

// oneMachine finds the machine that is meant, and no other.
func oneMachine(ctx context.Context, g *globals, name string) (*floxv1.MachineState, error) {
	if name == "" { // which would mean all
		return nil, cli.Usage("MACHINE is empty")
	}
	machines, err := machinesOf(ctx, g, name)
	if err != nil {
		return nil, err
	}
	switch len(machines) {
	case 0:
		return nil, cli.Explain(flox.ErrNotFound, "no machine is called %s and no peer ID begins so; see: floxctl machine list -l", name)
	case 1:
		return machines[0], nil
	}
	names := make([]string, 0, len(machines))
	for _, m := range machines {
		names = append(names, fmt.Sprintf("%s (%s)", clean(m.GetMachine().GetName()), clean(m.GetMachine().GetPeer())))
	}
	return nil, cli.Explain(flox.ErrBadInput, "%s may be %s: name one", name, strings.Join(names, " or "))
}

// spelled gives the name of a machine as the storehouse spells it; what it does not
// know by name stays as it is.
func spelled(ctx context.Context, g *globals, name string) string {
	if m, err := oneMachine(ctx, g, name); err == nil && strings.EqualFold(m.GetMachine().GetName(), name) {
		return m.GetMachine().GetName()
	}
	return name
}

func newMachineShowCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "show MACHINE",
		Short: "Show all that is known of a machine",
		Long:  "Show all that is known of a machine.\n\n" + cli.ExitCodes,
		Args:  cli.Args(1, 1, "MACHINE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runMachineShow(cmd.Context(), g, g.printer(cmd), args[0])
		},
	}
}

// runMachineShow leaves out what a machine does not have.
func runMachineShow(ctx context.Context, g *globals, out *output, name string) error {
	s, err := oneMachine(ctx, g, name)
	if err != nil {
		return err
	}
	if out.json {
		return out.printJSON(machineOf(s))
	}
	m, now := s.GetMachine(), time.Now()
	for _, line := range [][2]string{
		{"name", m.GetName()},
		{"peer", m.GetPeer()},
		{"role", m.GetRole()},
		{"seen", seen(s, now)},
		{"joined", fmt.Sprintf("%s ago, %s", ago(m.GetJoinedUnixMs(), now), m.GetJoinedBy())},
		{"labels", labelsOf(m.GetLabels())},
		{"users", grantsOf(m.GetUsers())},
		{"addresses", strings.Join(m.GetAddrs(), " ")},
		{"consensus", m.GetRaftAddress()},
		{"cache", m.GetHttpUrl()},
	} {
		if line[1] != "" {
			out.printf("%-10s  %s\n", line[0], clean(line[1]))
		}
	}
	if m.GetEphemeral() {
		out.printf("It is ephemeral: forgotten some time after it was seen last.\n")
	}
	return nil
}
