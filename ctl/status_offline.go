package ctl

import (
	"fmt"
	"strings"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// offlineShown is how many paths that are not ready people are shown.
const offlineShown = 5

// offlineFacts is what works with the network cut.
type offlineFacts struct {
	Policy       string         `json:"policy"`
	Used         uint32         `json:"used"`
	UsedComplete uint32         `json:"usedComplete"`
	Kept         uint32         `json:"kept"`
	KeptComplete uint32         `json:"keptComplete"`
	MissingBytes uint64         `json:"missingBytes"`
	Missing      []offlineLacks `json:"missing"`
	Profiles     []profileFacts `json:"profiles"`
}

// profileFacts is a link whose policy is that of what it leads to.
type profileFacts struct {
	Link         string `json:"link"`
	Path         string `json:"path"` // where it led when it could last be read
	Policy       string `json:"policy"`
	Complete     bool   `json:"complete"`
	MissingBytes uint64 `json:"missingBytes"`
	Reason       string `json:"reason,omitempty"` // why it is not complete, or not followed
}

func profilesOf(list []*floxv1.KeptProfile) []profileFacts {
	out := []profileFacts{}
	for _, p := range list {
		out = append(out, profileFacts{p.GetLink(), p.GetPath(), p.GetOffline(), p.GetComplete(), p.GetMissingBytes(), p.GetReason()})
	}
	return out
}

// profileLine says what a profile is now, and whether that is ready.
func profileLine(out *output, p profileFacts) string {
	s := clean(p.Link) + ", now " + clean(p.Path) + ": "
	switch {
	case p.Complete && p.Reason == "":
		return s + "ready"
	case p.Complete:
		return s + "ready; " + out.paint(yellow, clean(p.Reason))
	case p.MissingBytes > 0:
		s += cli.FormatBytes(p.MissingBytes) + " missing, "
	}
	return s + out.paint(yellow, clean(p.Reason))
}

// offlineLacks is a store path that is not complete.
type offlineLacks struct {
	Path         string `json:"path"`
	Policy       string `json:"policy"`
	MissingBytes uint64 `json:"missingBytes"`
	Reason       string `json:"reason"`
}

func offlineOf(m *floxv1.OfflineState) offlineFacts {
	f := offlineFacts{
		Policy: m.GetPolicy(), Used: m.GetUsed(), UsedComplete: m.GetUsedComplete(), Kept: m.GetKept(), KeptComplete: m.GetKeptComplete(),
		MissingBytes: m.GetMissingBytes(), Missing: []offlineLacks{}, Profiles: profilesOf(m.GetProfiles()),
	}
	for _, p := range m.GetMissing() {
		f.Missing = append(f.Missing, offlineLacks{Path: p.GetPath(), Policy: p.GetPolicy(), MissingBytes: p.GetMissingBytes(), Reason: p.GetReason()})
	}
	return f
}

// prefetchFacts is what was fetched before somebody asked for it.
type prefetchFacts struct {
	On              bool   `json:"on"`
	Traces          bool   `json:"traces"`
	RateBytes       uint64 `json:"rateBytes"`
	SequentialBytes uint64 `json:"sequentialBytes"`
	DirectoryBytes  uint64 `json:"directoryBytes"`
	TraceBytes      uint64 `json:"traceBytes"`
	LoaderBytes     uint64 `json:"loaderBytes"`
	CompleteBytes   uint64 `json:"completeBytes"`
	StartsRecorded  uint64 `json:"startsRecorded"`
	StartsReplayed  uint64 `json:"startsReplayed"`
}

func prefetchOf(m *floxv1.Prefetch) prefetchFacts {
	return prefetchFacts{
		On: m.GetOn(), Traces: m.GetTraces(), RateBytes: m.GetRateBytes(), SequentialBytes: m.GetSequentialBytes(),
		DirectoryBytes: m.GetDirectoryBytes(), TraceBytes: m.GetTraceBytes(), LoaderBytes: m.GetLoaderBytes(), CompleteBytes: m.GetCompleteBytes(),
		StartsRecorded: m.GetStartsRecorded(), StartsReplayed: m.GetStartsReplayed(),
	}
}

// offlineLine says what is ready to go offline.
func offlineLine(out *output, f offlineFacts) string {
	ready := func(done, all uint32, what string) string {
		s := fmt.Sprintf("%d of %d %s", done, all, what)
		if done < all {
			return out.paint(yellow, s)
		}
		return s
	}
	var parts []string
	if f.Used > 0 {
		parts = append(parts, ready(f.UsedComplete, f.Used, "paths used here are ready"))
	}
	if f.Kept > 0 {
		parts = append(parts, ready(f.KeptComplete, f.Kept, "kept paths"))
	}
	if n := len(f.Profiles); n > 0 {
		done := 0
		for _, p := range f.Profiles {
			if p.Complete {
				done++
			}
		}
		parts = append(parts, ready(uint32(done), uint32(n), "kept profiles")) //nolint:gosec // a few hundred
	}
	if len(parts) == 0 {
		return "nothing ran here yet"
	}
	s := strings.Join(parts, ", ")
	if f.MissingBytes > 0 {
		s += "; " + cli.FormatBytes(f.MissingBytes) + " still to come"
	}
	return s
}

// printOffline prints that line, and a few of the paths that are not ready.
func printOffline(out *output, f offlineFacts) {
	out.printf("%s %s\n", out.paint(bold, fmt.Sprintf("%-11s", "offline")), offlineLine(out, f))
	for _, p := range f.Profiles[:min(offlineShown, len(f.Profiles))] {
		out.printf("%-11s %s (offline: %s)\n", "", profileLine(out, p), clean(p.Policy))
	}
	if more := len(f.Profiles) - offlineShown; more > 0 {
		out.printf("%-11s and %d more; all: floxctl keep --list\n", "", more)
	}
	for _, p := range f.Missing[:min(offlineShown, len(f.Missing))] {
		size := ""
		if p.MissingBytes > 0 {
			size = cli.FormatBytes(p.MissingBytes) + " missing, "
		}
		out.printf("%-11s %s: %s%s\n", "", clean(p.Path), size, clean(p.Reason))
	}
	if more := len(f.Missing) - offlineShown; more > 0 {
		out.printf("%-11s and %d more; all: floxctl status --json\n", "", more)
	}
}

// aheadLine says what was fetched that nobody waited for.
func aheadLine(p prefetchFacts) string {
	if !p.On {
		return "nothing is fetched before it is asked for: prefetching is switched off"
	}
	var parts []string
	for _, part := range []struct {
		n   uint64
		why string
	}{
		{p.SequentialBytes, "of large files"},
		{p.DirectoryBytes, "of directories"},
		{p.TraceBytes, "for starts"},
		{p.LoaderBytes, "for loaders"},
		{p.CompleteBytes, "to complete what was used"},
	} {
		if part.n > 0 {
			parts = append(parts, cli.FormatBytes(part.n)+" "+part.why)
		}
	}
	s := "nothing fetched before it was asked for"
	if len(parts) > 0 {
		s = strings.Join(parts, ", ")
	}
	if p.RateBytes > 0 {
		s += "; at most " + cli.FormatRate(p.RateBytes)
	}
	if p.StartsRecorded+p.StartsReplayed > 0 {
		s += fmt.Sprintf("; starts: %s recorded, %s replayed", cli.FormatCount(p.StartsRecorded), cli.FormatCount(p.StartsReplayed))
	}
	return s
}
