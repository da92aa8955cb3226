package ctl

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// watchOptions are the command line of watch.
type watchOptions struct {
	*globals
	interval time.Duration
	once     bool
}

func newWatchCmd(g *globals) *cobra.Command {
	opts := watchOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "watch [--interval DURATION] [--once]",
		Short: "Show live which process waits for which file, and why",
		Long: `Show which process waits for which file of the store, how far it is, how fast,
from where (LAN, peer, storehouse), how long it will take, and why it waits.

On a terminal this is a live view; q or Ctrl-C leaves it. Elsewhere it prints a
line for everything that begins to wait, moves or is through; with --json every
state is one line.

` + cli.ExitCodes,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.interval < 50*time.Millisecond || opts.interval > time.Hour {
				return cli.Usage("--interval %s: want between 50ms and 1h", opts.interval)
			}
			return runWatch(cmd.Context(), opts, g.printer(cmd))
		},
	}
	cmd.Flags().DurationVar(&opts.interval, "interval", 500*time.Millisecond, "how often the agent reports while something changes")
	cmd.Flags().BoolVar(&opts.once, "once", false, "print the present state and leave")
	return cmd
}

// watchFacts is one line of watch --json: a whole state, not a difference.
type watchFacts struct {
	Reads          []readFacts     `json:"reads"`
	BytesPerSecond uint64          `json:"bytesPerSecond"`
	Traffic        trafficFacts    `json:"traffic"`
	Storehouse     storehouseFacts `json:"storehouse"`
	Full           string          `json:"full"` // who takes all places of the mount, "" = nobody
}

// readFacts is one wait; a total of 0 means that the size is not known yet.
type readFacts struct {
	PID            uint32 `json:"pid"`
	Command        string `json:"command"`
	Path           string `json:"path"`
	Operation      string `json:"operation"`
	Since          string `json:"since"`
	DoneBytes      uint64 `json:"doneBytes"`
	TotalBytes     uint64 `json:"totalBytes"`
	BytesPerSecond uint64 `json:"bytesPerSecond"`
	Source         string `json:"source"`
	EtaMs          *int64 `json:"etaMs"` // null = unknown
	Reason         string `json:"reason"`
}

func watchOf(m *floxv1.WatchReads) watchFacts {
	f := watchFacts{
		Reads: []readFacts{}, BytesPerSecond: m.GetBytesPerSecond(),
		Traffic: trafficOf(m.GetTraffic()), Storehouse: storehouseOf(m.GetStorehouse()),
		Full: m.GetFull(),
	}
	for _, r := range m.GetReads() {
		read := readFacts{
			PID: r.GetPid(), Command: r.GetCommand(), Path: r.GetPath(), Operation: r.GetOperation(),
			Since:     time.UnixMilli(r.GetSinceUnixMs()).UTC().Format("2006-01-02T15:04:05.000Z07:00"),
			DoneBytes: r.GetDoneBytes(), TotalBytes: r.GetTotalBytes(), BytesPerSecond: r.GetBytesPerSecond(),
			Source: r.GetSource(), Reason: r.GetReason(),
		}
		if eta := r.GetEtaMs(); eta >= 0 {
			read.EtaMs = &eta
		}
		f.Reads = append(f.Reads, read)
	}
	return f
}

// runWatch chooses how to show the same stream: for programs, for logs, for eyes.
func runWatch(ctx context.Context, opts watchOptions, out *output) error {
	switch {
	case out.json:
		return receiveWatch(ctx, opts, func(m *floxv1.WatchReads) error { return out.printJSONLine(watchOf(m)) })
	case out.terminal == nil || opts.once:
		lines := newWatchLines(out)
		return receiveWatch(ctx, opts, lines.show)
	}
	return runWatchView(ctx, opts, out)
}

// receiveWatch calls show with every state the agent reports, until it hangs
// up, ctx ends, show fails, or once with --once.
func receiveWatch(ctx context.Context, opts watchOptions, show func(*floxv1.WatchReads) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req := &floxv1.WatchReadsRequest{IntervalMs: uint32(opts.interval.Milliseconds())}
	stream, err := opts.agent().Watch(ctx, connect.NewRequest(req))
	if err != nil {
		return explain(err)
	}
	defer stream.Close()
	for stream.Receive() {
		if err := show(stream.Msg()); err != nil {
			return err
		}
		if opts.once {
			cancel() // Close would wait for the rest of a stream that has no end
			return nil
		}
	}
	return explain(stream.Err())
}
