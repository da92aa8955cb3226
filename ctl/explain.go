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

func newExplainCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "explain PATH",
		Short: "Show how a store path was found and fetched, step by step with times",
		Long: `Show how a store path was found and fetched since the agent started: who was asked
for its facts, who was found to hold it, who gave how much of it and how long that
took, who was late, and what failed. Nobody is asked anything for this, so that it
answers while everything else waits.

Of steps that are alike the first few are shown, of the others those that took half
a second or longer; the sums count them all. The agent remembers the last 1,024 paths.

` + cli.ExitCodes,
		Example: `  floxctl explain "$(command -v hello)"
  floxctl explain ./result --json`,
		Args: cli.Args(1, 1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runExplain(cmd.Context(), g, g.printer(cmd), args[0])
		},
	}
}

// stepFacts is one step; times in milliseconds, a null peer is nobody in particular.
type stepFacts struct {
	At         *string  `json:"at"`
	Kind       string   `json:"kind"`
	Peer       *string  `json:"peer"`
	Name       string   `json:"name"` // of the peer, in the member list
	Tier       string   `json:"tier"`
	Count      uint32   `json:"count"`
	Bytes      uint64   `json:"bytes"`
	TookMs     *float64 `json:"tookMs"`
	Background bool     `json:"background"`
	Why        string   `json:"why"`
	Times      uint32   `json:"times"`
}

// sourceFacts is what one machine did for a path.
type sourceFacts struct {
	Peer      string  `json:"peer"`
	Name      string  `json:"name"`
	Tier      string  `json:"tier"`
	Blocks    uint32  `json:"blocks"`
	Bytes     uint64  `json:"bytes"`
	MeanMs    float64 `json:"meanMs"`
	SlowestMs float64 `json:"slowestMs"`
	Late      uint32  `json:"late"`
	Failed    uint32  `json:"failed"`
}

// explainFacts is all of it; contentBytes is null if the list of its files is not here.
type explainFacts struct {
	Path         string        `json:"path"`
	Since        *string       `json:"since"` // what was before is not known
	Known        bool          `json:"known"`
	LocalBytes   *uint64       `json:"localBytes"`
	ContentBytes *uint64       `json:"contentBytes"`
	Steps        []stepFacts   `json:"steps"`
	LeftOut      uint32        `json:"leftOut"`
	LeftOutAfter uint32        `json:"leftOutAfter"`
	Sources      []sourceFacts `json:"sources"`
	LocalBlocks  uint32        `json:"localBlocks"`
	UnderWay     uint32        `json:"underWay"`
	Fetches      uint32        `json:"fetches"`
	WaitedMs     float64       `json:"waitedMs"`
	SlowestMs    float64       `json:"slowestMs"`
}

func runExplain(ctx context.Context, g *globals, out *output, arg string) error {
	path, err := storeArg(arg)
	if err != nil {
		return err
	}
	response, err := g.agent().Explain(ctx, connect.NewRequest(&floxv1.ExplainRequest{Path: path}))
	if err != nil {
		return explain(err)
	}
	if out.json {
		return out.printJSON(explained(response.Msg))
	}
	printExplained(out, response.Msg, time.Now())
	return nil
}

func explained(m *floxv1.ExplainResponse) explainFacts {
	facts := explainFacts{
		Path: m.GetPath(), Since: stampMs(m.GetStartedUnixMs()), Known: m.GetKnown(), Steps: []stepFacts{}, LeftOut: m.GetLeftOut(), LeftOutAfter: m.GetLeftOutAfter(),
		Sources: []sourceFacts{}, LocalBlocks: m.GetLocalBlocks(), UnderWay: m.GetOpen(), Fetches: m.GetFetches(), WaitedMs: m.GetWaitedMs(), SlowestMs: m.GetSlowestMs(),
	}
	if m.GetContentBytes() > 0 {
		local, content := m.GetLocalBytes(), m.GetContentBytes()
		facts.LocalBytes, facts.ContentBytes = &local, &content
	}
	for _, s := range m.GetSteps() {
		step := stepFacts{
			At: stampMs(s.GetAtUnixUs() / 1000), Kind: s.GetKind(), Name: s.GetPeerName(), Tier: s.GetTier(), Count: s.GetCount(), Bytes: s.GetBytes(),
			Background: s.GetBackground(), Why: s.GetWhy(), Times: s.GetTimes(),
		}
		if peer := s.GetPeer(); peer != "" {
			step.Peer = &peer
		}
		if took := s.GetTookMs(); took > 0 {
			step.TookMs = &took
		}
		facts.Steps = append(facts.Steps, step)
	}
	for _, s := range m.GetSources() {
		facts.Sources = append(facts.Sources, sourceFacts{
			Peer: s.GetPeer(), Name: s.GetPeerName(), Tier: s.GetTier(), Blocks: s.GetBlocks(), Bytes: s.GetBytes(),
			MeanMs: s.GetMeanMs(), SlowestMs: s.GetSlowestMs(), Late: s.GetLate(), Failed: s.GetFailed(),
		})
	}
	return facts
}

// newGroup is after how long a pause the steps are dated anew.
const newGroup = 10 * time.Second

func printExplained(out *output, m *floxv1.ExplainResponse, now time.Time) {
	out.printf("%s\n%s\n", out.paint(bold, clean(m.GetPath())), hereWords(m))
	if len(m.GetSteps()) == 0 {
		out.printf("Nothing was done to find or fetch it since the agent started, %s ago.\n", ago(m.GetStartedUnixMs(), now))
		if m.GetContentBytes() > m.GetLocalBytes() || m.GetContentBytes() == 0 {
			out.printf("To see how it comes, read it, or fetch all of it: floxctl download %s\n", clean(m.GetPath()))
		}
		return
	}
	var first, last time.Time
	for i, s := range m.GetSteps() {
		at := time.UnixMicro(s.GetAtUnixUs())
		if m.GetLeftOut() > 0 && i == int(m.GetLeftOutAfter()) {
			out.printf("           … %s left out\n", plural(uint64(m.GetLeftOut()), "step", "steps"))
		}
		if i == 0 || at.Sub(last) > newGroup {
			first = at
			out.printf("\n%s\n", at.Local().Format("2006-01-02 15:04:05.000"))
		}
		last = at
		times := ""
		if s.GetTimes() > 1 {
			times = fmt.Sprintf(" (%d times)", s.GetTimes())
		}
		out.printf("%9s  %s%s\n", "+"+took(at.Sub(first).Seconds()*1000), clean(stepWords(s)), times)
	}
	printSources(out, m)
}

// took is a time in milliseconds, in words.
func took(ms float64) string {
	if ms < 1000 {
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.1f s", ms/1000)
}

func hereWords(m *floxv1.ExplainResponse) string {
	switch {
	case !m.GetKnown():
		return "What is signed of it is not here."
	case m.GetContentBytes() == 0:
		return "What is signed of it is here, the list of its files is not."
	}
	return fmt.Sprintf("%s of its %s are here.", cli.FormatBytes(m.GetLocalBytes()), cli.FormatBytes(m.GetContentBytes()))
}

// stepWords says what was done.
func stepWords(s *floxv1.FetchStep) string {
	who := ""
	if s.GetPeer() != "" {
		who = fmt.Sprintf("%s (%s)", peerName(s.GetPeer(), s.GetPeerName()), s.GetTier())
	}
	after := took(s.GetTookMs())
	switch s.GetKind() {
	case "look-up":
		return "somebody wants it: who knows it?"
	case "facts-asked":
		return who + " is asked what it knows of it"
	case "facts":
		return fmt.Sprintf("%s told of %s after %s", who, plural(uint64(s.GetCount()), "path", "paths"), after)
	case "facts-none":
		return fmt.Sprintf("%s says after %s that there is no such path", who, after)
	case "facts-failed":
		return fmt.Sprintf("%s did not answer within %s: %s", who, after, s.GetWhy())
	case "facts-late":
		return "the storehouse takes long: other machines are asked, too"
	case "known":
		return "known after " + after
	case "unknown":
		return fmt.Sprintf("not known after %s: %s", after, s.GetWhy())
	}
	return fetchWords(s, who, after)
}

// fetchWords is stepWords of a fetch.
func fetchWords(s *floxv1.FetchStep, who, after string) string {
	amount := fmt.Sprintf("%s, %s", plural(uint64(s.GetCount()), "block", "blocks"), cli.FormatBytes(s.GetBytes()))
	forWhom := "somebody waits for"
	if s.GetBackground() {
		forWhom = "in the background:"
	}
	switch s.GetKind() {
	case "fetch":
		if s.GetBytes() == 0 {
			amount = plural(uint64(s.GetCount()), "block", "blocks")
		}
		return fmt.Sprintf("%s %s", forWhom, amount)
	case "search":
		return "looking who else has it: tracker, DHT"
	case "found":
		return fmt.Sprintf("met %s there after %s", plural(uint64(s.GetCount()), "machine", "machines"), after)
	case "asked":
		return who + " is asked for a block"
	case "late":
		return fmt.Sprintf("%s has not answered within %s: somebody else is asked, too", who, after)
	case "gave":
		return fmt.Sprintf("%s gave %s after %s", who, cli.FormatBytes(s.GetBytes()), after)
	case "sent":
		return fmt.Sprintf("%s names %s nearer by to ask instead", who, plural(uint64(s.GetCount()), "machine", "machines"))
	case "failed":
		return fmt.Sprintf("%s did not give a block: %s", who, s.GetWhy())
	case "fetched":
		return fmt.Sprintf("%s came after %s", amount, after)
	case "unfetched":
		return fmt.Sprintf("not all came within %s: %s", after, s.GetWhy())
	}
	return s.GetKind() // of a newer agent
}

// peerName is a machine's name, or the end of its ID.
func peerName(id, name string) string {
	if name != "" {
		return name
	}
	return shortPeer(id)
}

func printSources(out *output, m *floxv1.ExplainResponse) {
	if len(m.GetSources()) > 0 {
		rows := [][]string{{"FROM", "WHERE", "BLOCKS", "BYTES", "MEAN", "SLOWEST", "LATE", "FAILED"}}
		for _, s := range m.GetSources() {
			rows = append(rows, []string{
				clean(peerName(s.GetPeer(), s.GetPeerName())), clean(s.GetTier()), cli.FormatCount(uint64(s.GetBlocks())), cli.FormatBytes(s.GetBytes()),
				took(s.GetMeanMs()), took(s.GetSlowestMs()), cli.FormatCount(uint64(s.GetLate())), cli.FormatCount(uint64(s.GetFailed())),
			})
		}
		out.printf("\n")
		out.table(rows, map[int]bool{2: true, 3: true, 4: true, 5: true, 6: true, 7: true})
	}
	out.printf("\n")
	if m.GetFetches() > 0 {
		out.printf("Somebody waited for %s, %s in all, %s at most.\n", plural(uint64(m.GetFetches()), "fetch", "fetches"), took(m.GetWaitedMs()), took(m.GetSlowestMs()))
	}
	if n := m.GetLocalBlocks(); n > 0 {
		out.printf("On this machine already, in other files: %s.\n", plural(uint64(n), "block", "blocks"))
	}
	if n := m.GetOpen(); n > 0 {
		out.printf("%s under way now; see: floxctl watch\n", plural(uint64(n), "fetch", "fetches"))
	}
}
