package metrics

import (
	"context"
	"net/http"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Server answers with what a server of a storehouse says of itself. Nobody else is
// asked, so that it answers without a leader as well.
func Server(state func(context.Context) (*floxv1.StateResponse, error)) http.Handler {
	return handler(&source[*floxv1.StateResponse]{"storehouse", state, serverMetrics})
}

var serverMetrics = []metric[*floxv1.StateResponse]{
	{name: "info", help: "Always 1; the label says which version runs.", label: "version", many: func(s *floxv1.StateResponse, add func(string, float64)) {
		add(s.GetState().GetVersion(), 1)
	}},
	{name: "leader", help: "1 if this server leads.", one: func(s *floxv1.StateResponse) float64 { return truth(s.GetState().GetLeader()) }},
	{name: "problem", help: "1 if something is wrong with it; floxctl storehouse status says what.", one: func(s *floxv1.StateResponse) float64 { return truth(s.GetState().GetProblem() != "") }},
	{name: "applied_index", help: "The last entry of the log that is applied here.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetState().GetApplied()) }},
	{name: "log_level", help: "Level of the log's format that this server knows.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetState().GetLevel()) }},
	{name: "lacking_blocks", help: "Blocks that are to be here and are not yet.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetState().GetLackingBlocks()) }},
	{name: "lacking_bytes", help: "What they have.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetState().GetLackingBytes()) }},
	{name: "catch_up_bytes_per_second", help: "How fast they come.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetState().GetCatchUpRate()) }},
	{name: "builds", help: "1 if this server builds.", one: func(s *floxv1.StateResponse) float64 { return truth(s.GetState().GetBuilds().GetOn()) }},
	{name: "paths", help: "Valid store paths.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetUsage().GetPaths()) }},
	{name: "nar_bytes", help: "What they have as NARs.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetUsage().GetNarBytes()) }},
	{name: "blocks", help: "Blocks held here.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetUsage().GetBlocks()) }},
	{name: "block_bytes", help: "What they have, plain.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetUsage().GetBlockBytes()) }},
	{name: "stored_bytes", help: "What they take on the disk, or in the bucket.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetUsage().GetStoredBytes()) }},
	{name: "under_placed_blocks", help: "Blocks that fewer than a majority of the voters have: at most so many.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetUsage().GetUnderPlaced()) }},
	{name: "condemned_paths", help: "Paths that a collection will remove unless somebody uses them.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetUsage().GetCondemnedPaths()) }},
	{name: "condemned_bytes", help: "What they have as NARs.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetUsage().GetCondemnedBytes()) }},
	{name: "collected_seconds", help: "When a collection ended last, Unix time; 0 = none did.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetUsage().GetCollectedUnix()) }},
	{name: "disk_bytes", help: "Size of its disk.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetUsage().GetDiskTotal()) }},
	{name: "disk_free_bytes", help: "What of it is free.", one: func(s *floxv1.StateResponse) float64 { return float64(s.GetUsage().GetDiskFree()) }},
	{name: "watermark", help: "1 for what holds: nothing, slow (uploads are slowed down), high (only profiles and running builds), full (read-only).", label: "level", many: func(s *floxv1.StateResponse, add func(string, float64)) {
		for _, level := range []string{"", "slow", "high", "full"} {
			name := level
			if name == "" {
				name = "none"
			}
			add(name, truth(s.GetUsage().GetWatermark() == level))
		}
	}},
}
