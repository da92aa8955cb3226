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

func newStatusCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show whether the store is mounted, who feeds it, and what is wrong",
		Long: `Show where the store is mounted, whether the storehouse answers, how full the
cache is, where data came from, what is ready to go offline, and every problem with what to do about it.

It exits 0 whenever the agent answers; for a check that fails, see: floxctl doctor.

` + cli.ExitCodes,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return runStatus(cmd.Context(), g, g.printer(cmd)) },
	}
}

// statusFacts is status --json.
type statusFacts struct {
	Version      string            `json:"version"`
	PID          uint32            `json:"pid"`
	StartedAt    *string           `json:"startedAt"`
	StoreDir     string            `json:"storeDir"`
	MountDir     string            `json:"mountDir"`
	Mounted      bool              `json:"mounted"`
	PeerID       string            `json:"peerId"`
	Site         string            `json:"site"`
	Storehouse   storehouseFacts   `json:"storehouse"`
	Peers        uint32            `json:"peers"`
	Cache        cacheFacts        `json:"cache"`
	Traffic      trafficFacts      `json:"traffic"`
	FuseRequests map[string]uint64 `json:"fuseRequests"`
	FuseRead     uint64            `json:"fuseReadBytes"`
	Heap         uint64            `json:"heapBytes"`
	Waiting      uint32            `json:"waiting"`
	PathsKnown   uint64            `json:"pathsKnown"`
	Offline      offlineFacts      `json:"offline"`
	Prefetch     prefetchFacts     `json:"prefetch"`
	Problems     []string          `json:"problems"`
}

// runStatus asks once and prints; nothing in it waits for the network.
func runStatus(ctx context.Context, g *globals, out *output) error {
	resp, err := g.agent().Status(ctx, connect.NewRequest(&floxv1.StatusRequest{}))
	if err != nil {
		return explain(err)
	}
	m := resp.Msg
	s := statusFacts{
		Version: m.GetVersion(), PID: m.GetPid(), StartedAt: stamp(m.GetStartedUnix()),
		StoreDir: m.GetStoreDir(), MountDir: m.GetMountDir(), Mounted: m.GetMounted(),
		PeerID: m.GetPeerId(), Site: m.GetSite(), Storehouse: storehouseOf(m.GetStorehouse()), Peers: m.GetPeers(),
		Cache: cacheOf(m.GetCache()), Traffic: trafficOf(m.GetTraffic()), FuseRequests: m.GetFuseRequests(),
		FuseRead: m.GetFuseReadBytes(), Heap: m.GetHeapBytes(), Waiting: m.GetWaiting(), PathsKnown: m.GetPathsKnown(),
		Offline: offlineOf(m.GetOffline()), Prefetch: prefetchOf(m.GetPrefetch()), Problems: some(m.GetProblems()),
	}
	if s.FuseRequests == nil {
		s.FuseRequests = map[string]uint64{}
	}
	if out.json {
		return out.printJSON(s)
	}
	printStatus(out, s, m, time.Now())
	return nil
}

// printStatus puts what a newcomer asks first on top: is it there, who feeds it,
// is anything wrong.
func printStatus(out *output, s statusFacts, m *floxv1.StatusResponse, now time.Time) {
	line := func(name, format string, args ...any) {
		out.printf("%s %s\n", out.paint(bold, fmt.Sprintf("%-11s", name)), fmt.Sprintf(format, args...))
	}
	mounted := "mounted at " + clean(s.MountDir) + ", read-only"
	if !s.Mounted {
		mounted = out.paint(red, "NOT mounted") + " at " + clean(s.MountDir)
	}
	if s.StoreDir != s.MountDir {
		mounted += " (its paths say " + clean(s.StoreDir) + ")"
	}
	line("store", "%s; %s known here", mounted, plural(s.PathsKnown, "path", "paths"))
	line("storehouse", "%s", storehouseLine(out, m.GetStorehouse(), now))
	line("cache", "%s", cacheLine(s.Cache))
	line("fetched", "%s", fetchedLine(s.Traffic))
	line("ahead", "%s", aheadLine(s.Prefetch))
	printOffline(out, s.Offline)
	line("served", "%s to other machines", cli.FormatBytes(s.Traffic.ServedBytes))
	line("peers", "%s connected%s", plural(uint64(s.Peers), "machine", "machines"), siteSuffix(s.Site))
	line("requests", "%s", requestsLine(s.FuseRequests))
	switch s.Waiting {
	case 0:
		line("waiting", "nobody waits for data")
	default:
		line("waiting", "%s for data; see who: floxctl watch", out.paint(yellow, plural(uint64(s.Waiting), "request waits", "requests wait")))
	}
	started := ""
	if m.GetStartedUnix() > 0 {
		started = ", running for " + cli.FormatDuration(now.Sub(time.Unix(m.GetStartedUnix(), 0)).Truncate(time.Second))
	}
	line("agent", "%s, pid %d%s, %s", clean(s.Version), s.PID, started, clean(s.PeerID))
	if len(s.Problems) == 0 {
		out.printf("\n%s\n", out.paint(green, "No problems."))
		return
	}
	out.printf("\n%s\n", out.paint(bold, "Problems"))
	for _, p := range s.Problems {
		out.printf("  %s %s\n", out.paint(red, "!"), clean(p))
	}
}

// storehouseLine says whether the storehouse answers, and since when it does not.
func storehouseLine(out *output, l *floxv1.StorehouseLink, now time.Time) string {
	name := clean(l.GetName())
	if name == "" {
		name = clean(l.GetPeerId())
	}
	if name == "" {
		return out.paint(yellow, "none configured") + ": only what is here and what peers have can be read"
	}
	if l.GetConnected() {
		s := fmt.Sprintf("%s to %s, at change %s", out.paint(green, "connected"), name, cli.FormatCount(l.GetIndex()))
		if l.GetHttpUrl() != "" {
			s += "; binary cache " + clean(l.GetHttpUrl())
		}
		return s
	}
	s := out.paint(red, "not connected") + " to " + name
	if l.GetLastSeenUnix() > 0 {
		seen := time.Unix(l.GetLastSeenUnix(), 0)
		s += fmt.Sprintf(" since %s (%s ago)", seen.Local().Format("2006-01-02 15:04:05"), cli.FormatDuration(now.Sub(seen).Truncate(time.Second)))
	} else {
		s += " since the agent started"
	}
	if l.GetError() != "" {
		s += ": " + clean(l.GetError())
	}
	return s
}

// cacheLine says how full the cache is and whether it still grows.
func cacheLine(c cacheFacts) string {
	s := cli.FormatBytes(c.Bytes) + " used"
	if c.BudgetBytes > 0 {
		s = fmt.Sprintf("%s of %s used (%d %%)", cli.FormatBytes(c.Bytes), cli.FormatBytes(c.BudgetBytes), c.Bytes*100/c.BudgetBytes)
	}
	s += fmt.Sprintf(", %s of it kept; %s free on the disk", cli.FormatBytes(c.KeptBytes), cli.FormatBytes(c.FreeDiskBytes))
	if c.Streaming {
		s += "; the disk is full: data is passed through and not kept"
	}
	return s
}

// fetchedLine says how much came from where; sources that gave nothing are left
// out.
func fetchedLine(t trafficFacts) string {
	if t.fetched() == 0 {
		return "nothing since the agent started"
	}
	var parts []string
	for _, p := range []struct {
		n    uint64
		from string
	}{
		{t.LanBytes, "this LAN"},
		{t.SiteBytes, "this site"},
		{t.FarBytes, "other peers"},
		{t.StorehouseBytes, "the storehouse"},
	} {
		if p.n > 0 {
			parts = append(parts, cli.FormatBytes(p.n)+" from "+p.from)
		}
	}
	return fmt.Sprintf("%s (%s on the wire): %s", cli.FormatBytes(t.fetched()), cli.FormatBytes(t.WireBytes), strings.Join(parts, ", "))
}

// siteSuffix names the place of this machine, if it was given one.
func siteSuffix(site string) string {
	if site == "" {
		return ""
	}
	return ", site " + clean(site)
}

// requestsLine names the few operations that make most of the requests: none
// at all is what a warm program should cost.
func requestsLine(byOp map[string]uint64) string {
	var total uint64
	names := make([]string, 0, len(byOp))
	for name, n := range byOp {
		total += n
		if n > 0 {
			names = append(names, name)
		}
	}
	if total == 0 {
		return "none from the kernel so far"
	}
	sort.Slice(names, func(i, j int) bool {
		a, b := names[i], names[j]
		return byOp[a] > byOp[b] || byOp[a] == byOp[b] && a < b
	})
	names = names[:min(4, len(names))]
	for i, name := range names {
		names[i] = cli.FormatCount(byOp[name]) + " " + clean(name)
	}
	return cli.FormatCount(total) + " from the kernel, most of them " + strings.Join(names, ", ")
}
