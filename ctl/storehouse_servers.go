package ctl

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newServersCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "servers",
		Short: "List the servers of the storehouse and how each is",
		Long: `List the servers of the storehouse: who leads and votes, who is well and, if not, why,
how much of the content each still lacks and how fast it comes, how full its disk is.
A server that does not answer within seconds is shown as such.

What a server lacks is reckoned: rather too much while it has not looked at
everything, to the block for what no other server could give it.

` + cli.ExitCodes,
		Example: "  floxctl storehouse servers --json",
		Args:    cli.Args(0, 0, ""),
		RunE:    func(cmd *cobra.Command, _ []string) error { return runServers(cmd.Context(), g, g.printer(cmd)) },
	}
}

// serverFacts is a server; lastContactMs is null if the leader never heard of it.
type serverFacts struct {
	Peer          string  `json:"peer"`
	Name          string  `json:"name"`
	Address       string  `json:"address"`
	Leader        bool    `json:"leader"`
	Voter         bool    `json:"voter"`
	WantsVote     bool    `json:"wantsVote"`
	Drained       bool    `json:"drained"`
	Healthy       bool    `json:"healthy"`
	Problem       string  `json:"problem"`
	Advice        string  `json:"advice"` // what is not wrong yet
	RTTUs         uint32  `json:"rttUs"`  // from the leader; 0 = not known
	LastContactMs *int64  `json:"lastContactMs"`
	Applied       uint64  `json:"applied"`
	Version       string  `json:"version"`
	Level         uint32  `json:"level"`
	LackingBlocks uint64  `json:"lackingBlocks"`
	LackingBytes  uint64  `json:"lackingBytes"`
	CatchUpRate   uint64  `json:"catchUpRate"` // bytes per second
	DiskUsed      float64 `json:"diskUsed"`    // 0 to 1
	// Builds is null where that is not known.
	Builds *buildsFacts `json:"builds"`
}

// buildsFacts say what builds on a server; why, why nothing does, or why not in a
// sandbox.
type buildsFacts struct {
	On        bool   `json:"on"`
	Nix       string `json:"nix"`
	Jobs      uint32 `json:"jobs"`
	Sandboxed bool   `json:"sandboxed"`
	Why       string `json:"why"`
}

func serverOf(s *floxv1.ServerState) serverFacts {
	f := serverFacts{
		Peer: s.GetPeer(), Name: s.GetName(), Address: s.GetAddress(), Leader: s.GetLeader(), Voter: s.GetVoter(), WantsVote: s.GetWantsVote(),
		Drained: s.GetDrained(), Healthy: s.GetHealthy(), Problem: s.GetProblem(), Applied: s.GetApplied(), Version: s.GetVersion(), Level: s.GetLevel(),
		LackingBlocks: s.GetLackingBlocks(), LackingBytes: s.GetLackingBytes(), CatchUpRate: s.GetCatchUpRate(), DiskUsed: s.GetDiskUsed(),
		Advice: s.GetAdvice(), RTTUs: s.GetRttUs(),
	}
	if ms := s.GetLastContactMs(); ms >= 0 {
		f.LastContactMs = &ms
	}
	if b := s.GetBuilds(); b != nil {
		f.Builds = &buildsFacts{b.GetOn(), b.GetNix(), b.GetJobs(), b.GetSandboxed(), b.GetWhy()}
	}
	return f
}

// buildWords say where builds run, and whether they see nothing but their inputs.
func buildWords(servers []*floxv1.ServerState) []string {
	var words []string
	why := ""
	for _, s := range servers {
		b := s.GetBuilds()
		switch {
		case b.GetSandboxed():
			words = append(words, fmt.Sprintf("%s: sandboxed, %d at a time, Nix %s", s.GetName(), b.GetJobs(), b.GetNix()))
		case b.GetOn():
			words = append(words, fmt.Sprintf("%s: NOT sandboxed, %s; %d at a time, Nix %s", s.GetName(), b.GetWhy(), b.GetJobs(), b.GetNix()))
		case b.GetWhy() != "" && why == "":
			why = fmt.Sprintf("nowhere; %s: %s", s.GetName(), b.GetWhy())
		}
	}
	if len(words) == 0 && why != "" {
		words = append(words, why)
	}
	return words
}

func serversOf(list []*floxv1.ServerState) []serverFacts {
	facts := make([]serverFacts, 0, len(list))
	for _, s := range list {
		facts = append(facts, serverOf(s))
	}
	return facts
}

// askServers asks whichever server answers.
func askServers(ctx context.Context, g *globals) (*floxv1.ServersResponse, error) {
	resp, err := g.admin().Servers(ctx, connect.NewRequest(&floxv1.ServersRequest{}))
	if err != nil {
		return nil, explainAdmin(err)
	}
	return resp.Msg, nil
}

// runServers succeeds also when some are not well: it says what is.
func runServers(ctx context.Context, g *globals, out *output) error {
	resp, err := askServers(ctx, g)
	if err != nil {
		return err
	}
	if out.json {
		return out.printJSON(struct {
			Servers      []serverFacts `json:"servers"`
			ClusterLevel uint32        `json:"clusterLevel"`
		}{serversOf(resp.GetServers()), resp.GetClusterLevel()})
	}
	printServers(out, resp)
	return nil
}

// printServers prints a table, and below it what is wrong.
func printServers(out *output, resp *floxv1.ServersResponse) {
	rows := [][]string{{"NAME", "PART", "WELL", "HEARD", "APPLIED", "LACKS", "DISK", "VERSION", "ADDRESS"}}
	for _, s := range resp.GetServers() {
		well, heard, disk := "yes", "never", "-"
		if !s.GetHealthy() {
			well = "NO"
		}
		if ms := s.GetLastContactMs(); ms >= 0 {
			heard = cli.FormatDuration(time.Duration(ms) * time.Millisecond)
		}
		if s.GetDiskUsed() > 0 {
			disk = fmt.Sprintf("%.0f %%", 100*s.GetDiskUsed())
		}
		rows = append(rows, []string{
			clean(s.GetName()), partOf(s), well, heard, cli.FormatCount(s.GetApplied()), lacksWords(s), disk,
			orDash(clean(s.GetVersion())), orDash(clean(s.GetAddress())),
		})
	}
	out.table(rows, map[int]bool{3: true, 4: true, 6: true})
	for _, s := range resp.GetServers() {
		if s.GetProblem() != "" {
			out.printf("%s: %s\n", out.paint(yellow, clean(s.GetName())), clean(s.GetProblem()))
		}
		if s.GetAdvice() != "" {
			out.printf("%s: %s\n", clean(s.GetName()), clean(s.GetAdvice()))
		}
	}
}

// partOf is what a server does in the log.
func partOf(s *floxv1.ServerState) string {
	part := "follows"
	switch {
	case s.GetLeader():
		part = "leads"
	case s.GetVoter():
		part = "votes"
	case s.GetWantsVote():
		part = "will vote"
	}
	if s.GetDrained() {
		part += ", drained"
	}
	return part
}

// lacksWords is how much of the content a server does not have yet.
func lacksWords(s *floxv1.ServerState) string {
	if s.GetLackingBlocks() == 0 {
		return "-"
	}
	words := fmt.Sprintf("%s in %s", cli.FormatBytes(s.GetLackingBytes()), plural(s.GetLackingBlocks(), "block", "blocks"))
	if rate := s.GetCatchUpRate(); rate > 0 {
		words += ", " + cli.FormatRate(rate)
	}
	return words
}
