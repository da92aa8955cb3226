package scenario

import (
	"fmt"
	"io"
	"time"

	"github.com/floxctl/flox/integration/hosts"
)

// Run is one program started on one host.
type Run struct {
	Host        string
	Program     string
	Round       int           // 1 = first on that host
	FirstOutput time.Duration // from start to the first byte of output
	Took        time.Duration
	Fuse        uint64 // FUSE requests that wanted an answer, without Ioctl
	Ioctl       uint64 // ioctl requests: the kernel keeps no answer to them
	Closure     uint64 // bytes of the program's closure, as NARs
	Traffic     hosts.Traffic
}

// Report is what the main job showed.
type Report struct {
	Paths        int    // store paths copied into the storehouse
	WorldBytes   uint64 // their NARs
	CopySeconds  float64
	Runs         []Run
	HeldByA      hosts.Traffic // what B fetched to read a path that A holds and never ran
	Unplugged    hosts.Traffic // what B fetched, storehouse unplugged, to read what only A holds
	NobodyError  string        // what a reader is told about what nobody holds
	NobodyWaited time.Duration
	// WarmFuse is the number of FUSE requests of all programs' second run on B.
	WarmFuse uint64
}

// Table prints the report for people.
func (r *Report) Table(w io.Writer) {
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }
	p("\n%d store paths, %s of NARs, copied into the storehouse with stock nix copy in %.1f s.\n\n", r.Paths, size(r.WorldBytes), r.CopySeconds)
	p("%-4s %-14s %4s %9s %9s %7s %9s %9s %9s %9s %6s %6s\n", "host", "program", "run", "closure", "fetched", "share", "wire", "storehs.", "peers", "1st out", "FUSE", "ioctl")
	for _, run := range r.Runs {
		share := "-"
		if run.Closure > 0 {
			share = fmt.Sprintf("%.1f%%", 100*float64(run.Traffic.Plain())/float64(run.Closure))
		}
		p("%-4s %-14s %4d %9s %9s %7s %9s %9s %9s %7dms %6d %6d\n", run.Host, run.Program, run.Round, size(run.Closure), size(run.Traffic.Plain()),
			share, size(run.Traffic.Wire), size(run.Traffic.Storehouse), size(run.Traffic.Peers()), run.FirstOutput.Milliseconds(), run.Fuse, run.Ioctl)
	}
	p("\nfetched: uncompressed bytes, manifests and facts included; wire: the same as they crossed the network, before encryption.\n")
	p("ioctl: the kernel passes every ioctl on and keeps no answer; Python asks isatty of each file it opens.\n")
	p("\nB read a path that A holds and never ran: %s from A, %s from the storehouse.\n", size(r.HeldByA.Peers()), size(r.HeldByA.Storehouse))
	p("Storehouse unplugged, B read what only A holds: %s from A.\n", size(r.Unplugged.Peers()))
	p("Storehouse unplugged, B asked for what nobody holds: %q after %.1f s.\n", r.NobodyError, r.NobodyWaited.Seconds())
	p("Everything a second time on B: %d FUSE requests (ioctl apart).\n", r.WarmFuse)
}

// size writes bytes as people read them.
func size(n uint64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.2fGiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1fMiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.0fKiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%dB", n)
}

// Row is one comparison, as every file in bench/out holds them.
type Row struct {
	Name     string  `json:"name"`
	Unit     string  `json:"unit"`
	Ours     float64 `json:"ours"`
	Peer     float64 `json:"peer"` // 0 = nothing to compare with
	PeerName string  `json:"peer_name"`
	Ratio    float64 `json:"ratio"` // ours / peer
	// Low and High are the 95 % interval of Ratio, where one was worked out.
	Low    float64 `json:"ratio_low,omitempty"`
	High   float64 `json:"ratio_high,omitempty"`
	Rounds int     `json:"rounds,omitempty"` // pairs or samples behind the medians
	Target string  `json:"target"`           // in words; "publish" = no target
	Met    bool    `json:"met"`
}

// Rows gives the report's figures.
func (r *Report) Rows() []Row {
	var rows []Row
	for _, run := range r.Runs {
		name := fmt.Sprintf("%s on %s, run %d: ", run.Program, run.Host, run.Round)
		if run.Round > 1 {
			rows = append(rows, Row{
				Name: name + "FUSE requests, ioctl apart", Unit: "requests", Ours: float64(run.Fuse), PeerName: "target", Target: "0 on B", Met: run.Fuse == 0,
			}, Row{
				Name: name + "FUSE ioctl requests, which no kernel caches", Unit: "requests", Ours: float64(run.Ioctl), Target: "publish", Met: true,
			})
			continue
		}
		fetched := float64(run.Traffic.Plain())
		rows = append(rows, Row{
			Name: name + "uncompressed bytes fetched / closure", Unit: "bytes", Ours: fetched, Peer: float64(run.Closure), PeerName: "closure",
			Ratio: fetched / float64(run.Closure), Target: "publish", Met: true,
		}, Row{
			Name: name + "time to first output", Unit: "ms", Ours: float64(run.FirstOutput.Milliseconds()), Target: "publish", Met: true,
		}, Row{
			Name: name + "bytes on the wire", Unit: "bytes", Ours: float64(run.Traffic.Wire), Peer: fetched, PeerName: "uncompressed",
			Ratio: float64(run.Traffic.Wire) / max(fetched, 1), Target: "publish", Met: true,
		}, Row{
			Name: name + "FUSE requests", Unit: "requests", Ours: float64(run.Fuse), Target: "publish", Met: true,
		})
	}
	return append(rows, Row{
		Name: "path A holds but never ran, read on B: bytes from the storehouse", Unit: "bytes", Ours: float64(r.HeldByA.Storehouse),
		Peer: float64(r.HeldByA.Peers()), PeerName: "bytes from A", Target: "0", Met: r.HeldByA.Storehouse == 0 && r.HeldByA.Peers() > 0,
	}, Row{
		Name: "second run of everything on B: FUSE requests, ioctl apart", Unit: "requests", Ours: float64(r.WarmFuse), Target: "0", Met: r.WarmFuse == 0,
	})
}
