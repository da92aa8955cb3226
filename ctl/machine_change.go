package ctl

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newMachineLabelCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "label MACHINE KEY=VALUE|KEY-...",
		Short: "Set and drop labels of a machine",
		Long: `Set labels of a machine (KEY=VALUE) and drop them (KEY-). The label site says
where it is: machines of one site prefer each other. voter=false makes a server one
that only follows, voter=true one that votes; what it changes takes some seconds.

` + cli.ExitCodes,
		Example: `  floxctl machine label laptop site=berlin team=build
  floxctl machine label laptop team-`,
		Args: cli.Args(2, -1, "MACHINE and KEY=VALUE or KEY-"),
		RunE: func(cmd *cobra.Command, args []string) error {
			change := &floxv1.ChangeMachine{}
			var set []string
			for _, word := range args[1:] {
				key, drop := strings.CutSuffix(word, "-")
				if drop && key != "" && !strings.Contains(key, "=") {
					change.DropLabels = append(change.DropLabels, key)
					continue
				}
				set = append(set, word)
			}
			var err error
			if change.SetLabels, err = parseLabels(set); err != nil {
				return err
			}
			return runMachineChange(cmd.Context(), g, g.printer(cmd), args[0], change)
		},
	}
}

func newMachineUserCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "user MACHINE NAME[:member|publisher|admin]|NAME-...",
		Short: "Say who may do what in the storehouse from a machine",
		Long: `Give people rights in the storehouse when they use this machine, or take them
back (NAME-). A member reads, a publisher uploads too, an admin may do everything.
On a server of the storehouse root and the account it runs as are always admins: the
last other one can be taken away, and be made one again there.

` + cli.ExitCodes,
		Example: `  floxctl machine user laptop alice:admin
  floxctl machine user laptop bob-`,
		Args: cli.Args(2, -1, "MACHINE and NAME[:ROLE] or NAME-"),
		RunE: func(cmd *cobra.Command, args []string) error {
			change := &floxv1.ChangeMachine{}
			for _, word := range args[1:] {
				if name, drop := strings.CutSuffix(word, "-"); drop && name != "" && !strings.Contains(name, ":") {
					change.DropUsers = append(change.DropUsers, name)
					continue
				}
				grant, err := parseGrant(word)
				if err != nil {
					return err
				}
				change.SetUsers = append(change.SetUsers, grant)
			}
			return runMachineChange(cmd.Context(), g, g.printer(cmd), args[0], change)
		},
	}
}

func newMachineRenameCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "rename MACHINE NAME",
		Short:   "Give a machine another name",
		Long:    "Give a machine another name. Its key, and so its peer ID, stays.\n\n" + cli.ExitCodes,
		Example: "  floxctl machine rename laptop alices-laptop",
		Args:    cli.Args(2, 2, "MACHINE and NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[1] == "" { // which would mean that it stays
				return cli.Usage("NAME is empty")
			}
			return runMachineChange(cmd.Context(), g, g.printer(cmd), args[0], &floxv1.ChangeMachine{Name: args[1]})
		},
	}
}

// runMachineChange prints the machine as it is then.
func runMachineChange(ctx context.Context, g *globals, out *output, name string, change *floxv1.ChangeMachine) error {
	s, err := oneMachine(ctx, g, name)
	if err != nil {
		return err
	}
	resp, err := g.admin().ChangeMachine(ctx, connect.NewRequest(&floxv1.ChangeMachineRequest{Machine: s.GetMachine().GetPeer(), Change: change}))
	if err != nil {
		return explainAdmin(err)
	}
	s.Machine = resp.Msg.GetMachine()
	if out.json {
		return out.printJSON(machineOf(s))
	}
	m := s.GetMachine()
	out.printf("%s: labels %s; users %s\n", clean(m.GetName()), orDash(labelsOf(m.GetLabels())), orDash(grantsOf(m.GetUsers())))
	return nil
}

func newMachineRevokeCmd(g *globals) *cobra.Command {
	yes, reason := false, ""
	cmd := &cobra.Command{
		Use:   "revoke MACHINE [--yes] [--reason TEXT]",
		Short: "Shut a machine out for good",
		Long: `Shut a machine out for good: its connections end and its key is never let in
again. What it has of the store stays on its disk. To let the machine in again it
needs a new key (floxd leave --purge there) and a new invite. A key that is no
member's is named by its whole peer ID; the newest 65,536 revocations are kept.

A server of the storehouse is taken out of the servers as well: it hands over if it
leads, and the others get a new cluster key. That is refused where no healthy majority
of the servers would be left: start those that are down, or add one, and revoke it
then. It knew the storehouse's keys: see floxctl key rotate.

` + cli.ExitCodes,
		Example: "  floxctl machine revoke laptop --reason stolen",
		Args:    cli.Args(1, 1, "MACHINE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := oneMachine(cmd.Context(), g, args[0])
			if errors.Is(err, flox.ErrNotFound) && strings.HasPrefix(args[0], "12D3KooW") && len(args[0]) == 52 {
				s, err = &floxv1.MachineState{Machine: &floxv1.Machine{Peer: args[0], Name: args[0], Role: "no member"}}, nil
			}
			if err != nil {
				return err
			}
			m := s.GetMachine()
			question := fmt.Sprintf("Revoke %s (%s, %s)? Its key is never let in again.", clean(m.GetName()), clean(m.GetRole()), clean(m.GetPeer()))
			if err := confirm(cmd, yes, question); err != nil {
				return err
			}
			resp, err := g.admin().RemoveMachine(cmd.Context(), connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: m.GetPeer(), Reason: reason}))
			if err != nil {
				return explainAdmin(err)
			}
			out := g.printer(cmd)
			if out.json {
				return out.printJSON(machineOf(&floxv1.MachineState{Machine: resp.Msg.GetMachine()}))
			}
			out.printf("%s is revoked.\n", clean(m.GetName()))
			return nil
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the audit log")
	return cmd
}
