package ctl

import (
	"context"
	"fmt"
	"sort"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newStatusCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show whether the store is mounted, who feeds it, and what is wrong",
		Long: `Show where the store is mounted, whether the storehouse answers, how full the
cache is, where data came from, what is ready to go offline, and every problem with what to do about it.
In a session of a profile (floxctl activate) also whether a newer generation lives.

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
	Staged       stagedFacts       `json:"staged"`
	Traffic      trafficFacts      `json:"traffic"`
	FuseRequests map[string]uint64 `json:"fuseRequests"`
	FuseRead     uint64            `json:"fuseReadBytes"`
	Heap         uint64            `json:"heapBytes"`
	Waiting      uint32            `json:"waiting"`
	PathsKnown   uint64            `json:"pathsKnown"`
	NixSocket    string            `json:"nixSocket,omitempty"`  // none = stock Nix has none to use
	LocalStore   *localStoreFacts  `json:"localStore,omitempty"` // none = nothing of one is shown
	Offline      offlineFacts      `json:"offline"`
	Prefetch     prefetchFacts     `json:"prefetch"`
	Bindings     []bindingFacts    `json:"bindings"`          // profiles of stock Nix that are one with profiles here
	Session      *sessionFacts     `json:"session,omitempty"` // of a profile's session, which asks
	Problems     []string          `json:"problems"`
}

// stagedFacts are of what was added on this machine; uploaded are those of them the
// storehouse has meanwhile.
type stagedFacts struct {
	Paths       uint64 `json:"paths"`
	Uploaded    uint64 `json:"uploaded"`
	NarBytes    uint64 `json:"narBytes"`
	Bytes       uint64 `json:"bytes"`
	BudgetBytes uint64 `json:"budgetBytes"`
}

// localStoreFacts are about the Nix store this machine has of its own.
type localStoreFacts struct {
	Dir       string `json:"dir"`
	Error     string `json:"error,omitempty"`
	Shown     uint64 `json:"shown"`
	ReadBytes uint64 `json:"readBytes"`
}

func localStoreOf(m *floxv1.LocalStore) *localStoreFacts {
	if m == nil {
		return nil
	}
	return &localStoreFacts{Dir: m.GetDir(), Error: m.GetError(), Shown: m.GetShown(), ReadBytes: m.GetReadBytes()}
}

// localStoreLine says what becomes of the store this machine has of its own.
func localStoreLine(s *localStoreFacts) string {
	if s.Error != "" {
		return fmt.Sprintf("%s stays as it is; its daemon does not answer, so sessions show nothing of it: %s", clean(s.Dir), clean(s.Error))
	}
	return fmt.Sprintf("%s stays as it is; floxctl nix and floxctl run show both, %s read from it", clean(s.Dir), cli.FormatBytes(s.ReadBytes))
}

func stagedOf(m *floxv1.StagedUse) stagedFacts {
	return stagedFacts{Paths: m.GetPaths(), Uploaded: m.GetUploaded(), NarBytes: m.GetNarBytes(), Bytes: m.GetBytes(), BudgetBytes: m.GetBudgetBytes()}
}

// stagedLine says how much was added here, and how much of it only here.
func stagedLine(s stagedFacts) string {
	here := "all of them also in the storehouse"
	if s.Uploaded < s.Paths {
		here = plural(s.Paths-s.Uploaded, "path", "paths") + " only here"
	}
	return fmt.Sprintf("%s added on this machine, %s, %s on disk", plural(s.Paths, "path", "paths"), here, cli.FormatBytes(s.Bytes))
}

// answerPatience is how long status waits before it says that the agent does not
// answer, which it does from memory.
const answerPatience = 30 * time.Second

// askStatus asks the agent. One that is stopped is seen to be after a moment.
func askStatus(ctx context.Context, g *globals) (*floxv1.StatusResponse, error) {
	asking, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	socket := g.socketPath()
	defer time.AfterFunc(answerPatience, func() {
		giveUp(cli.Explain(flox.ErrUnreachable, "the agent at %s does not answer; floxctl doctor looks for the reason", socket))
	}).Stop()
	go func() { // ends with the question
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-asking.Done():
				return
			case <-tick.C:
			}
			if pid, stopped := stoppedServer(asking, socket); stopped {
				giveUp(cli.Explain(flox.ErrUnreachable, `the agent's process %d is stopped, by a signal or a debugger, and readers wait.
  kill -CONT %d    lets it go on
Else its parent replaces it after about a minute, unless a debugger holds it.`, pid, pid))
			}
		}
	}()
	resp, err := g.agent().Status(asking, connect.NewRequest(&floxv1.StatusRequest{}))
	switch {
	case err == nil:
		return resp.Msg, nil
	case asking.Err() != nil && ctx.Err() == nil:
		return nil, context.Cause(asking)
	}
	return nil, err
}

// runStatus asks once and prints; nothing in it waits for the network.
func runStatus(ctx context.Context, g *globals, out *output) error {
	m, err := askStatus(ctx, g)
	if err != nil {
		return explain(err)
	}
	s := statusFacts{
		LocalStore: localStoreOf(m.GetLocalStore()), NixSocket: m.GetNixSocket(),
		Version: m.GetVersion(), PID: m.GetPid(), StartedAt: stamp(m.GetStartedUnix()),
		StoreDir: m.GetStoreDir(), MountDir: m.GetMountDir(), Mounted: m.GetMounted(),
		PeerID: m.GetPeerId(), Site: m.GetSite(), Storehouse: storehouseOf(m.GetStorehouse()), Peers: m.GetPeers(),
		Cache: cacheOf(m.GetCache()), Staged: stagedOf(m.GetStaged()), Traffic: trafficOf(m.GetTraffic()), FuseRequests: m.GetFuseRequests(),
		FuseRead: m.GetFuseReadBytes(), Heap: m.GetHeapBytes(), Waiting: m.GetWaiting(), PathsKnown: m.GetPathsKnown(),
		Offline: offlineOf(m.GetOffline()), Prefetch: prefetchOf(m.GetPrefetch()), Problems: some(m.GetProblems()),
		Bindings: bindingsOf(m.GetBindings()),
	}
	if s.FuseRequests == nil {
		s.FuseRequests = map[string]uint64{}
	}
	s.Session = askSession(ctx, g)
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
	if s.LocalStore != nil {
		line("local Nix", "%s", localStoreLine(s.LocalStore))
	}
	line("storehouse", "%s", storehouseLine(out, m.GetStorehouse(), now))
	if len(s.Storehouse.Servers) > 1 {
		line("servers", "%s", serversLine(out, s.Storehouse.Servers))
	}
	line("cache", "%s", cacheLine(s.Cache))
	if s.Staged.Paths > 0 {
		line("staged", "%s", stagedLine(s.Staged))
	}
	line("fetched", "%s", fetchedLine(s.Traffic))
	line("ahead", "%s", aheadLine(s.Prefetch))
	printOffline(out, s.Offline)
	if s.Session != nil {
		line("session", "%s", s.Session.words())
	}
	for _, b := range s.Bindings {
		line("bound", "%s", b.words())
	}
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

// serversLine names the servers of the storehouse, the one that is followed first.
func serversLine(out *output, servers []houseServerFacts) string {
	words := make([]string, 0, len(servers))
	for _, s := range servers {
		name := clean(s.Name)
		if name == "" {
			name = clean(s.PeerID)
		}
		switch {
		case s.Followed:
			name = out.paint(green, name+" (followed)")
		case s.Connected:
			name = out.paint(green, name)
		default:
			name = out.paint(yellow, name+" (not connected)")
		}
		words = append(words, name)
	}
	return strings.Join(words, ", ")
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
