package ctl

import (
	"context"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newWorkersCmd(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "workers",
		Short: "Machines that build what is in the queue",
		Long: `List the machines that build, and say which of them get builds. Everybody may look; an
admin may change it. It holds over restarts of the worker and of the storehouse.

WORKER is a name, or an ID or the beginning of one.

` + cli.ExitCodes,
		Example: `  floxctl workers list
  floxctl workers cordon s2       it ends what it builds, and gets nothing more
  floxctl workers drain s2        what it builds goes to others as well
  floxctl workers uncordon s2`,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newWorkersListCmd(g))
	for _, c := range []struct {
		use, short, long, said string
		state                  floxv1.WorkerState
	}{
		{
			"drain", "Give a worker no builds, and what it builds to others",
			"Give a worker no more builds, and what it builds now to others, which begin it anew. Then\nit can be stopped.", "gets no builds, and others get those it had",
			floxv1.WorkerState_WORKER_STATE_DRAINING,
		},
		{
			"cordon", "Give a worker no more builds", "Give a worker no more builds. It ends those that it has.", "gets no more builds",
			floxv1.WorkerState_WORKER_STATE_CORDONED,
		},
		{
			"uncordon", "Give a worker builds again", "Give a worker builds again that was cordoned or drained.", "gets builds",
			floxv1.WorkerState_WORKER_STATE_ACTIVE,
		},
	} {
		cmd.AddCommand(&cobra.Command{
			Use: c.use + " WORKER", Short: c.short, Long: c.long + "\n\n" + cli.ExitCodes, Example: "  floxctl workers " + c.use + " s2",
			Args: cli.Args(1, 1, "WORKER"),
			RunE: func(cmd *cobra.Command, args []string) error {
				return runSetWorker(cmd.Context(), g, g.printer(cmd), &floxv1.SetWorkerRequest{Worker: args[0], State: c.state}, c.said)
			},
		})
	}
	return cmd
}

// workerStates are words for who gets builds.
var workerStates = map[floxv1.WorkerState]string{
	floxv1.WorkerState_WORKER_STATE_ACTIVE: "active", floxv1.WorkerState_WORKER_STATE_CORDONED: "cordoned", floxv1.WorkerState_WORKER_STATE_DRAINING: "draining",
}

func runSetWorker(ctx context.Context, g *globals, out *output, req *floxv1.SetWorkerRequest, said string) error {
	if req.GetWorker() == "" {
		return cli.Usage("WORKER is empty")
	}
	resp, err := g.admin().SetWorker(ctx, connect.NewRequest(req))
	if err != nil {
		return explainAdmin(err)
	}
	w := resp.Msg.GetWorker()
	if out.json {
		return out.printJSON(struct {
			ID    string `json:"id"`
			Name  string `json:"name"`
			State string `json:"state"`
		}{w.GetId(), w.GetName(), workerStates[w.GetState()]})
	}
	out.printf("%s %s.\n", clean(w.GetName()), said)
	return nil
}

func newWorkersListCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the workers: what they can build, and what they do",
		Long: `List the workers: for which systems and features they build, how much at once, and what
they build now. One that is away was not heard for some seconds: others get what it had.

` + cli.ExitCodes,
		Example: "  floxctl workers list --json",
		Args:    cli.Args(0, 0, ""),
		RunE:    func(cmd *cobra.Command, _ []string) error { return runWorkersList(cmd.Context(), g, g.printer(cmd)) },
	}
}

// workerFacts is a worker and what it does.
type workerFacts struct {
	ID        string        `json:"id"`
	Name      string        `json:"name"`
	State     string        `json:"state"`
	Away      bool          `json:"away"`
	Systems   []string      `json:"systems"`
	Features  []string      `json:"features"`
	Mandatory []string      `json:"mandatory"` // features that a build must require
	Slots     uint32        `json:"slots"`     // builds at once
	Since     *string       `json:"since"`
	Builds    []queuedFacts `json:"builds"`
}

func runWorkersList(ctx context.Context, g *globals, out *output) error {
	resp, err := g.admin().ListWorkers(ctx, connect.NewRequest(&floxv1.ListWorkersRequest{}))
	if err != nil {
		return explainAdmin(err)
	}
	all := []workerFacts{}
	names := map[string]string{}
	for _, s := range resp.Msg.GetWorkers() {
		w := s.GetWorker()
		names[w.GetId()] = w.GetName()
		f := workerFacts{
			ID: w.GetId(), Name: w.GetName(), State: workerStates[w.GetState()], Away: s.GetAway(), Systems: some(w.GetSystems()), Features: some(w.GetFeatures()),
			Mandatory: some(w.GetMandatory()), Slots: w.GetSlots(), Since: stampMs(w.GetSinceUnixMs()), Builds: []queuedFacts{},
		}
		for _, b := range s.GetBuilds() {
			f.Builds = append(f.Builds, queuedOf(b, names))
		}
		all = append(all, f)
	}
	if out.json {
		return out.printJSON(all)
	}
	if len(all) == 0 {
		out.printf("No workers: nothing is built. A server builds with builds = true in its configuration.\n")
		return nil
	}
	rows := [][]string{{"WORKER", "STATE", "BUSY", "SYSTEMS", "FEATURES", "BUILDS"}}
	for _, f := range all {
		state := f.State
		if f.Away {
			state += ", away"
		}
		var builds []string
		for _, b := range f.Builds {
			builds = append(builds, b.Build)
		}
		rows = append(rows, []string{
			clean(f.Name), state, fmt.Sprintf("%d of %d", len(f.Builds), f.Slots), clean(strings.Join(f.Systems, " ")), clean(orDash(strings.Join(f.Features, " "))),
			clean(orDash(strings.Join(builds, " "))),
		})
	}
	out.table(rows, nil)
	return nil
}
