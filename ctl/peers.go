package ctl

import (
	"context"
	"fmt"
	"sort"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newPeersCmd(g *globals) *cobra.Command {
	long := false
	cmd := &cobra.Command{
		Use:   "peers [-l]",
		Short: "List the machines this one exchanges data with",
		Long: `List the machines this one exchanges data with, nearest first: how far they
are, how fast, how much went each way, and how they are rated and why.

` + cli.ExitCodes,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return runPeers(cmd.Context(), g, g.printer(cmd), long) },
	}
	cmd.Flags().BoolVarP(&long, "long", "l", false, "whole peer IDs and every address")
	return cmd
}

// peerFacts is a peer; the rate is an average, the score the one peers are
// chosen by, with its reason in words.
type peerFacts struct {
	ID             string   `json:"id"`
	Name           string   `json:"name"` // in the member list; "" = not in it
	Role           string   `json:"role"`
	Tier           string   `json:"tier"`
	Site           string   `json:"site"`
	Addrs          []string `json:"addrs"`
	RTTMs          float64  `json:"rttMs"`
	BytesPerSecond float64  `json:"bytesPerSecond"`
	BytesIn        uint64   `json:"bytesIn"`
	BytesOut       uint64   `json:"bytesOut"`
	ConnectedAt    *string  `json:"connectedAt"`
	Score          float64  `json:"score"`
	ScoreReason    string   `json:"scoreReason"`
}

// runPeers sorts as the agent asks: near before far, quick before slow.
func runPeers(ctx context.Context, g *globals, out *output, long bool) error {
	resp, err := g.agent().Peers(ctx, connect.NewRequest(&floxv1.PeersRequest{}))
	if err != nil {
		return explain(err)
	}
	peers := resp.Msg.GetPeers()
	sort.SliceStable(peers, func(i, j int) bool {
		a, b := peers[i], peers[j]
		if tierRank(a.GetTier()) != tierRank(b.GetTier()) {
			return tierRank(a.GetTier()) < tierRank(b.GetTier())
		}
		return a.GetRttMs() < b.GetRttMs()
	})
	if out.json {
		facts := make([]peerFacts, 0, len(peers))
		for _, p := range peers {
			facts = append(facts, peerFacts{
				ID: p.GetId(), Name: p.GetName(), Role: p.GetRole(), Tier: p.GetTier(), Site: p.GetSite(), Addrs: some(p.GetAddrs()),
				RTTMs: p.GetRttMs(), BytesPerSecond: p.GetGoodput(), BytesIn: p.GetBytesIn(), BytesOut: p.GetBytesOut(),
				ConnectedAt: stamp(p.GetConnectedUnix()), Score: p.GetScore(), ScoreReason: p.GetScoreReason(),
			})
		}
		return out.printJSON(facts)
	}
	if len(peers) == 0 {
		out.printf("No machine is connected. Is the storehouse reachable? See: floxctl status\n")
		return nil
	}
	printPeers(out, peers, long, time.Now())
	return nil
}

// tierRank orders peers as the agent asks them.
func tierRank(tier string) int {
	for i, t := range []string{"lan", "site", "far"} {
		if t == tier {
			return i
		}
	}
	return 3
}

// printPeers shortens IDs to their ends, since all begin alike.
func printPeers(out *output, peers []*floxv1.Peer, long bool, now time.Time) {
	rows := [][]string{{"PEER", "NAME", "ROLE", "WHERE", "SITE", "RTT", "SPEED", "IN", "OUT", "SINCE", "SCORE", "ADDRESS"}}
	for _, p := range peers {
		id, addr := clean(p.GetId()), strings.Join(p.GetAddrs(), " ")
		if !long {
			id = shortPeer(id)
			if len(p.GetAddrs()) > 1 {
				addr = fmt.Sprintf("%s +%d", p.GetAddrs()[0], len(p.GetAddrs())-1)
			}
		}
		since := "-"
		if p.GetConnectedUnix() > 0 {
			since = cli.FormatDuration(now.Sub(time.Unix(p.GetConnectedUnix(), 0)).Truncate(time.Second))
		}
		score := fmt.Sprintf("%.2f", p.GetScore())
		if p.GetScoreReason() != "" {
			score += " (" + clean(p.GetScoreReason()) + ")"
		}
		rows = append(rows, []string{
			id, orDash(clean(p.GetName())), clean(p.GetRole()), clean(p.GetTier()), orDash(clean(p.GetSite())), fmt.Sprintf("%.1f ms", p.GetRttMs()),
			cli.FormatRate(uint64(max(p.GetGoodput(), 0))), cli.FormatBytes(p.GetBytesIn()), cli.FormatBytes(p.GetBytesOut()),
			since, score, clean(addr),
		})
	}
	out.table(rows, map[int]bool{5: true, 6: true, 7: true, 8: true})
}

// shortPeer is the end of a peer ID: all begin alike.
func shortPeer(id string) string {
	if len(id) > 8 {
		return "…" + id[len(id)-8:]
	}
	return id
}

// orDash keeps a column from looking forgotten.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
