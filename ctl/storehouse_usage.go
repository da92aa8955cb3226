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

func newUsageCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "usage",
		Short: "Show how much the storehouse holds, and how full its disk is",
		Long: `Show how many paths are valid, what their content takes on the server that answers,
how full its disk is, what is condemned and goes with the next collection, and how
many blocks may be on fewer than a majority of the servers that vote.

` + cli.ExitCodes,
		Example: "  floxctl storehouse usage --json",
		Args:    cli.Args(0, 0, ""),
		RunE:    func(cmd *cobra.Command, _ []string) error { return runUsage(cmd.Context(), g, g.printer(cmd)) },
	}
}

// usageFacts are of one server, but for paths, narBytes and condemned, which are
// the storehouse's; watermark is "" below all of them.
type usageFacts struct {
	Paths          uint64  `json:"paths"`
	NarBytes       uint64  `json:"narBytes"`
	Blocks         uint64  `json:"blocks"`
	BlockBytes     uint64  `json:"blockBytes"`
	StoredBytes    uint64  `json:"storedBytes"`
	DiskTotal      uint64  `json:"diskTotal"`
	DiskFree       uint64  `json:"diskFree"`
	Watermark      string  `json:"watermark"`
	UnderPlaced    uint64  `json:"underPlaced"`
	CondemnedPaths uint64  `json:"condemnedPaths"`
	CondemnedBytes uint64  `json:"condemnedBytes"`
	CollectedAt    *string `json:"collectedAt"`
	Collected      string  `json:"collected"`
	Collecting     string  `json:"collecting"`
}

func usageOf(u *floxv1.UsageResponse) usageFacts {
	return usageFacts{
		Paths: u.GetPaths(), NarBytes: u.GetNarBytes(), Blocks: u.GetBlocks(), BlockBytes: u.GetBlockBytes(), StoredBytes: u.GetStoredBytes(),
		DiskTotal: u.GetDiskTotal(), DiskFree: u.GetDiskFree(), Watermark: u.GetWatermark(), UnderPlaced: u.GetUnderPlaced(),
		CondemnedPaths: u.GetCondemnedPaths(), CondemnedBytes: u.GetCondemnedBytes(),
		CollectedAt: stamp(u.GetCollectedUnix()), Collected: u.GetCollected(), Collecting: u.GetCollecting(),
	}
}

// runUsage prints one page.
func runUsage(ctx context.Context, g *globals, out *output) error {
	resp, err := g.admin().Usage(ctx, connect.NewRequest(&floxv1.UsageRequest{}))
	if err != nil {
		return explainAdmin(err)
	}
	if out.json {
		return out.printJSON(usageOf(resp.Msg))
	}
	for _, line := range usageLines(resp.Msg, time.Now()) {
		out.printf("%-11s  %s\n", line[0], clean(line[1]))
	}
	return nil
}

// usageLines are names and words for people.
func usageLines(u *floxv1.UsageResponse, now time.Time) [][2]string {
	lines := [][2]string{
		{"paths", fmt.Sprintf("%s valid, %s of NARs", cli.FormatCount(u.GetPaths()), cli.FormatBytes(u.GetNarBytes()))},
		{"content", fmt.Sprintf("%s of %s, %s stored", plural(u.GetBlocks(), "block", "blocks"), cli.FormatBytes(u.GetBlockBytes()), cli.FormatBytes(u.GetStoredBytes()))},
		{"disk", diskWords(u)},
	}
	if u.GetUnderPlaced() > 0 {
		lines = append(lines, [2]string{"placement", fmt.Sprintf("up to %s on fewer than a majority of the voters", plural(u.GetUnderPlaced(), "block", "blocks"))})
	}
	if u.GetCondemnedPaths() > 0 {
		lines = append(lines, [2]string{"condemned", fmt.Sprintf("%s of %s, gone with the next collection unless somebody uses them",
			plural(u.GetCondemnedPaths(), "path", "paths"), cli.FormatBytes(u.GetCondemnedBytes()))})
	}
	return append(lines, [2]string{"collection", collectionWords(u, now)})
}

// diskWords says how full a server's disk is, and what that means.
func diskWords(u *floxv1.UsageResponse) string {
	words := fmt.Sprintf("%s free of %s", cli.FormatBytes(u.GetDiskFree()), cli.FormatBytes(u.GetDiskTotal()))
	switch u.GetWatermark() {
	case "":
		return words
	case "slow":
		return words + ": uploads are slowed down; collect garbage or give it a larger disk"
	case "high":
		return words + ": only profile changes and running builds are taken in; collect garbage or give it a larger disk"
	case "full":
		return words + ": nothing is taken in; collect garbage or give it a larger disk"
	}
	return words + ", watermark " + u.GetWatermark()
}

// collectionWords says what is being collected, and what was last.
func collectionWords(u *floxv1.UsageResponse, now time.Time) string {
	last := "none yet"
	if at := u.GetCollectedUnix(); at > 0 {
		last = fmt.Sprintf("last %s ago: %s", ago(at*1000, now), u.GetCollected())
	}
	if phase := u.GetCollecting(); phase != "" {
		return fmt.Sprintf("under way, in its phase %s; %s", phase, last)
	}
	return last
}
