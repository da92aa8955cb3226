package ctl

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newHouseStatusCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show on one page whether the storehouse is well",
		Long: `Show on one page whether the storehouse is well: who leads, how each server is, what
it holds, how full the disk of the server that answers is, the last collection, and
where builds run: with Nix's sandbox, in which they see nothing but their inputs, or
why without.
It fails (1) if a server is not well or nobody leads.

` + cli.ExitCodes,
		Example: "  floxctl storehouse status",
		Args:    cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runHouseStatus(cmd.Context(), g, g.printer(cmd))
		},
	}
}

// errNotWell sets the exit code of status; the page has said why.
var errNotWell = errors.New("the storehouse is not well")

// runHouseStatus asks for servers and content. Without a leader there may be no
// answer about the content; the servers are shown all the same.
func runHouseStatus(ctx context.Context, g *globals, out *output) error {
	house, err := askServers(ctx, g)
	if err != nil {
		return err
	}
	usage := &floxv1.UsageResponse{}
	resp, usageErr := g.admin().Usage(ctx, connect.NewRequest(&floxv1.UsageRequest{}))
	if usageErr == nil {
		usage = resp.Msg
	}
	leader, healthy := "", 0
	for _, s := range house.GetServers() {
		if s.GetLeader() {
			leader = s.GetName()
		}
		if s.GetHealthy() {
			healthy++
		}
	}
	well := leader != "" && healthy == len(house.GetServers()) && usageErr == nil
	switch {
	case out.json:
		err = out.printJSON(struct {
			Well         bool          `json:"well"`
			Leader       string        `json:"leader"`
			Servers      []serverFacts `json:"servers"`
			ClusterLevel uint32        `json:"clusterLevel"`
			Usage        usageFacts    `json:"usage"`
		}{well, leader, serversOf(house.GetServers()), house.GetClusterLevel(), usageOf(usage)})
		if err != nil {
			return err
		}
	default:
		printHouse(out, house, usage, usageErr, leader, healthy)
	}
	if !well {
		return cli.Said(errNotWell)
	}
	return nil
}

func printHouse(out *output, house *floxv1.ServersResponse, usage *floxv1.UsageResponse, usageErr error, leader string, healthy int) {
	lines := [][2]string{
		{"leader", nobody(leader)},
		{"servers", fmt.Sprintf("%d of %d well, level %d", healthy, len(house.GetServers()), house.GetClusterLevel())},
	}
	if usageErr == nil {
		lines = append(lines, usageLines(usage, time.Now())...)
	} else {
		lines = append(lines, [2]string{"content", explainAdmin(usageErr).Error()})
	}
	for _, words := range buildWords(house.GetServers()) {
		lines = append(lines, [2]string{"builds", words})
	}
	for _, line := range lines {
		out.printf("%-11s  %s\n", line[0], clean(line[1]))
	}
	out.printf("\n")
	printServers(out, house)
}

func nobody(leader string) string {
	if leader == "" {
		return "nobody: no majority of the servers reaches each other (start those that are away), or what is said below"
	}
	return leader
}
