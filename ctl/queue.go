package ctl

import (
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// buildNames says how a build is named on the command line.
const buildNames = `BUILD is a derivation (/nix/store/HASH-NAME.drv, or its base name), and of a build in the
queue also the beginning of that name, or NAME, if it is the only one.`

func newQueueCmd(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "queue",
		Short: "Builds that somebody waits for, and who builds them",
		Long: `Look at the storehouse's queue of builds, and change what is in it. Everybody may look.
What a machine wants built it may cancel, retry and bump, an admin everything.

` + buildNames + `

` + cli.ExitCodes,
		Example: `  floxctl queue list
  floxctl queue why hello-2.12       why does it not begin
  floxctl queue log -f hello-2.12`,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newQueueListCmd(g), newQueueShowCmd(g), newQueueLogCmd(g), newQueueWhyCmd(g), newQueueCancelCmd(g), newQueueRetryCmd(g), newQueueBumpCmd(g))
	return cmd
}

// buildArg is a build as the storehouse is asked for it: links that lead to a store path
// are followed, other names stay.
func buildArg(arg string) (string, error) {
	if strings.Contains(arg, "/") {
		return storeArg(arg)
	}
	if arg == "" {
		return "", cli.Usage("BUILD is empty")
	}
	return arg, nil
}

// buildStates are words for states of builds in the queue.
var buildStates = map[floxv1.BuildState]string{
	floxv1.BuildState_BUILD_STATE_WAITING: "waiting", floxv1.BuildState_BUILD_STATE_LEASED: "building",
	floxv1.BuildState_BUILD_STATE_DONE: "done", floxv1.BuildState_BUILD_STATE_FAILED: "failed",
}

// queuedFacts is a build in the queue.
type queuedFacts struct {
	Build       string   `json:"build"`
	State       string   `json:"state"`
	Owner       string   `json:"owner"` // machine that wanted it first
	Interactive bool     `json:"interactive"`
	Priority    int32    `json:"priority"`
	System      string   `json:"system"`
	Features    []string `json:"features"`
	QueuedAt    *string  `json:"queuedAt"`
	Wants       uint32   `json:"wants"` // how often it is wanted
	Worker      string   `json:"worker"`
	StartedAt   *string  `json:"startedAt"`
	ExpectMs    uint64   `json:"expectMs"` // 0 = nobody knows
	Tries       uint32   `json:"tries"`
	Fault       string   `json:"fault"` // why the last try ended
	NotBefore   *string  `json:"notBefore"`
	Status      *uint32  `json:"status"` // Nix's, once it is over
	Message     string   `json:"message"`
}

func queuedOf(b *floxv1.QueuedBuild, workers map[string]string) queuedFacts {
	f := queuedFacts{
		Build: b.GetKey(), State: buildStates[b.GetState()], Owner: b.GetOwner(), Interactive: b.GetInteractive(), Priority: b.GetPriority(),
		System: b.GetSystem(), Features: some(b.GetFeatures()), QueuedAt: stampMs(b.GetQueuedUnixMs()), Wants: b.GetWants(),
		Worker: workerName(b.GetLease().GetWorker(), workers), StartedAt: stampMs(b.GetLease().GetUnixMs()), ExpectMs: b.GetExpectMs(),
		Tries: b.GetTries(), Fault: b.GetFault(), NotBefore: stampMs(b.GetNotBeforeUnixMs()), Message: b.GetOutcome().GetMessage(),
	}
	if o := b.GetOutcome(); o != nil {
		status := o.GetStatus()
		f.Status = &status
	}
	return f
}

// workerName is how people know a worker.
func workerName(id string, names map[string]string) string {
	if name := names[id]; name != "" {
		return name
	}
	return id
}

func newQueueListCmd(g *globals) *cobra.Command {
	req := &floxv1.ListBuildsRequest{}
	cmd := &cobra.Command{
		Use:   "list [--owner MACHINE] [--limit N]",
		Short: "List the builds in the queue: under way, then in the order they came",
		Long: `List the builds that somebody waits for: those under way, then those that wait, in the
order they came, then those that are over while others that need them are not. OWNER is
the machine that wanted it first.

` + cli.ExitCodes,
		Example: "  floxctl queue list --owner laptop\n  floxctl queue list --json",
		Args:    cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runQueueList(cmd.Context(), g, g.printer(cmd), req)
		},
	}
	cmd.Flags().StringVar(&req.Owner, "owner", "", "only those that this machine, `NAME`, wanted first")
	cmd.Flags().Uint32VarP(&req.Limit, "limit", "n", 1000, "the first so many, at most 10,000")
	return cmd
}

func runQueueList(ctx context.Context, g *globals, out *output, req *floxv1.ListBuildsRequest) error {
	resp, err := g.admin().ListBuilds(ctx, connect.NewRequest(req))
	if err != nil {
		return explainAdmin(err)
	}
	m := resp.Msg
	if out.json {
		facts := struct {
			Waiting  uint64        `json:"waiting"`
			Building uint64        `json:"building"`
			Over     uint64        `json:"over"`
			Builds   []queuedFacts `json:"builds"`
		}{m.GetWaiting(), m.GetBuilding(), m.GetOver(), []queuedFacts{}}
		for _, b := range m.GetBuilds() {
			facts.Builds = append(facts.Builds, queuedOf(b, m.GetWorkers()))
		}
		return out.printJSON(facts)
	}
	all := m.GetWaiting() + m.GetBuilding() + m.GetOver()
	if all == 0 {
		out.printf("No builds.\n")
		return nil
	}
	rows, now := [][]string{{"STATE", "FOR", "BUILD", "OWNER", "WORKER"}}, time.Now()
	for _, b := range m.GetBuilds() {
		since := b.GetQueuedUnixMs()
		if b.GetLease() != nil {
			since = b.GetLease().GetUnixMs()
		}
		rows = append(rows, []string{
			buildStates[b.GetState()], ago(since, now), clean(b.GetKey()), clean(orDash(b.GetOwner())),
			clean(orDash(workerName(b.GetLease().GetWorker(), m.GetWorkers()))),
		})
	}
	out.table(rows, map[int]bool{1: true})
	out.printf("\n%s: %d under way, %d waiting, %d over.", plural(all, "build", "builds"), m.GetBuilding(), m.GetWaiting(), m.GetOver())
	if n := uint64(len(m.GetBuilds())); n < all {
		out.printf(" The first %d are shown: --limit", n)
	}
	out.printf("\n")
	return nil
}

func newQueueShowCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "show BUILD",
		Short: "Show one build: who wants it, where it is, what became of it before",
		Long: `Show a build: who wants it, where it is built, and of the last times that it was tried
who built it, how long its parts took, and how that ended.

` + buildNames + "\n\n" + cli.ExitCodes,
		Example: "  floxctl queue show hello-2.12",
		Args:    cli.Args(1, 1, "BUILD"),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := buildArg(args[0])
			if err != nil {
				return err
			}
			return runQueueShow(cmd.Context(), g, g.printer(cmd), name)
		},
	}
}

// triedFacts is a build that was tried.
type triedFacts struct {
	Worker      string  `json:"worker"`
	Owner       string  `json:"owner"`
	Status      uint32  `json:"status"` // Nix's
	Fault       string  `json:"fault"`  // it could not be tried; the status does not count
	QueuedAt    *string `json:"queuedAt"`
	StartedAt   *string `json:"startedAt"`
	StoppedAt   *string `json:"stoppedAt"`
	FetchingMs  uint64  `json:"fetchingMs"`
	BuildingMs  uint64  `json:"buildingMs"`
	UploadingMs uint64  `json:"uploadingMs"`
	Uploaded    uint64  `json:"uploaded"` // bytes of NARs
}

// shownFacts is what is known of a build.
type shownFacts struct {
	Build   string       `json:"build"`
	Queued  *queuedFacts `json:"queued"` // null = nobody wants it now
	Owners  []string     `json:"owners"`
	Failure *string      `json:"failure"` // that is remembered
	Tries   []triedFacts `json:"tries"`
}

func runQueueShow(ctx context.Context, g *globals, out *output, name string) error {
	resp, err := g.admin().ShowBuild(ctx, connect.NewRequest(&floxv1.ShowBuildRequest{Build: name}))
	if err != nil {
		return explainAdmin(err)
	}
	m := resp.Msg
	facts := shownFacts{Build: m.GetKey(), Owners: some(m.GetOwners()), Tries: []triedFacts{}}
	if m.GetBuild() != nil {
		q := queuedOf(m.GetBuild(), m.GetWorkers())
		facts.Queued = &q
	}
	if f := m.GetFailure(); f != nil {
		text := f.GetOutcome().GetMessage()
		facts.Failure = &text
	}
	for _, e := range m.GetTries() {
		facts.Tries = append(facts.Tries, triedFacts{
			Worker: workerName(e.GetWorker(), m.GetWorkers()), Owner: e.GetOwner(), Status: e.GetStatus(), Fault: e.GetFault(), QueuedAt: stampMs(e.GetQueuedUnixMs()),
			StartedAt: stampMs(e.GetLeasedUnixMs()), StoppedAt: stampMs(e.GetStoppedUnixMs()), FetchingMs: e.GetFetchingMs(), BuildingMs: e.GetBuildingMs(),
			UploadingMs: e.GetUploadingMs(), Uploaded: e.GetUploaded(),
		})
	}
	if out.json {
		return out.printJSON(facts)
	}
	out.printf("%-10s %s\n", "build", clean(facts.Build))
	if q := facts.Queued; q != nil {
		printQueued(out, m.GetBuild(), q)
		out.printf("%-10s %s\n", "wanted by", clean(orDash(strings.Join(facts.Owners, ", "))))
	} else {
		out.printf("%-10s nobody wants it now\n", "state")
	}
	if facts.Failure != nil {
		out.printf("%-10s remembered: %s; to try it again: floxctl queue retry %s\n", "failure", clean(*facts.Failure), clean(facts.Build))
	}
	for _, e := range m.GetTries() {
		ms := func(n uint64) string { return cli.FormatDuration(time.Duration(min(n, 1<<40)) * time.Millisecond) }
		how := fmt.Sprintf("Nix's status %d", e.GetStatus())
		switch {
		case e.GetFault() != "":
			how = "not tried: " + e.GetFault()
		case e.GetStatus() == 0:
			how = "built"
		}
		out.printf("%-10s %s on %s, %s (fetching %s, building %s, uploading %s)\n", "tried", time.UnixMilli(e.GetLeasedUnixMs()).Format(time.DateTime),
			clean(workerName(e.GetWorker(), m.GetWorkers())), clean(how), ms(e.GetFetchingMs()), ms(e.GetBuildingMs()), ms(e.GetUploadingMs()))
	}
	return nil
}

// printQueued prints how a build in the queue is.
func printQueued(out *output, b *floxv1.QueuedBuild, q *queuedFacts) {
	now := time.Now()
	switch {
	case b.GetLease() != nil:
		out.printf("%-10s building on %s for %s\n", "state", clean(q.Worker), ago(b.GetLease().GetUnixMs(), now))
	case q.Message != "":
		out.printf("%-10s %s: %s\n", "state", q.State, clean(q.Message))
	default:
		out.printf("%-10s %s\n", "state", q.State)
	}
	class := "batch"
	if q.Interactive {
		class = "interactive"
	}
	out.printf("%-10s %s ago, %s, priority %d\n", "queued", ago(b.GetQueuedUnixMs(), now), class, q.Priority)
	out.printf("%-10s %s with features {%s}\n", "requires", clean(q.System), clean(strings.Join(q.Features, ", ")))
	if q.Fault != "" {
		out.printf("%-10s %s; the last one: %s\n", "faults", plural(uint64(q.Tries), "try", "tries"), clean(q.Fault))
	}
}

func newQueueWhyCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "why BUILD",
		Short: "Say why a build waits",
		Long: `Say why a build waits: for others that it needs, behind others (and what puts those
first), for a worker that fits while all are busy or away, or because none fits at all.

` + buildNames + "\n\n" + cli.ExitCodes,
		Example: "  floxctl queue why hello-2.12",
		Args:    cli.Args(1, 1, "BUILD"),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := buildArg(args[0])
			if err != nil {
				return err
			}
			return runQueueWhy(cmd.Context(), g, g.printer(cmd), name)
		},
	}
}

func runQueueWhy(ctx context.Context, g *globals, out *output, name string) error {
	resp, err := g.admin().WhyBuild(ctx, connect.NewRequest(&floxv1.WhyBuildRequest{Build: name}))
	if err != nil {
		return explainAdmin(err)
	}
	s := resp.Msg.GetStanding()
	if s == nil {
		return fmt.Errorf("the storehouse does not say where %s stands: %w", name, flox.ErrCorrupt)
	}
	if out.json {
		return out.printJSON(struct {
			Build   string   `json:"build"`
			State   string   `json:"state"`
			Why     string   `json:"why"`
			Ahead   uint32   `json:"ahead"` // builds that go before it
			Needs   []string `json:"needs"` // some that it waits for
			NeedsOf uint32   `json:"needsOf"`
			Until   *string  `json:"until"` // it is not tried before
			Worker  string   `json:"worker"`
			Able    uint32   `json:"able"` // workers that can build it
			Free    uint32   `json:"free"`
			Away    []string `json:"away"`
			Closed  []string `json:"closed"` // cordoned or draining
		}{
			s.GetKey(), s.GetState(), s.GetWhy(), s.GetAhead(), some(s.GetNeeds()), s.GetNeedsOf(), stampMs(s.GetUntilUnixMs()), s.GetWorker(),
			s.GetAble(), s.GetFree(), some(s.GetAway()), some(s.GetClosed()),
		})
	}
	out.printf("%s is %s:\n", clean(s.GetKey()), clean(s.GetState()))
	for line := range strings.Lines(s.GetWhy()) {
		out.printf("  %s\n", clean(strings.TrimSuffix(line, "\n")))
	}
	return nil
}
