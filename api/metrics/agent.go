package metrics

import (
	"context"
	"net/http"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Agent answers with what an agent's status and peers say, and with its waits.
func Agent(status func(context.Context) (*floxv1.StatusResponse, error), peers func() []*floxv1.Peer, waits *Waits) http.Handler {
	ask := func(ctx context.Context) (agentFacts, error) {
		s, err := status(ctx)
		return agentFacts{s, peers()}, err
	}
	return handler(&source[agentFacts]{"agent", ask, agentMetrics}, waits.spent)
}

type agentFacts struct {
	*floxv1.StatusResponse
	peers []*floxv1.Peer
}

// tiers are those of peers, nearest first.
var tiers = []string{"lan", "site", "far", "storehouse"}

var agentMetrics = []metric[agentFacts]{
	{name: "info", help: "Always 1; the label says which version runs.", label: "version", many: func(s agentFacts, add func(string, float64)) {
		add(s.GetVersion(), 1)
	}},
	{name: "started_seconds", help: "When the agent started, Unix time.", one: func(s agentFacts) float64 { return float64(s.GetStartedUnix()) }},
	{name: "mounted", help: "1 if the store is mounted.", one: func(s agentFacts) float64 { return truth(s.GetMounted()) }},
	{name: "problems", help: "How many problems floxctl status tells.", one: func(s agentFacts) float64 { return float64(len(s.GetProblems())) }},
	{name: "storehouse_connected", help: "1 if a server of the storehouse is connected.", one: func(s agentFacts) float64 { return truth(s.GetStorehouse().GetConnected()) }},
	{name: "storehouse_index", help: "Up to which entry of the storehouse's log it has heard.", one: func(s agentFacts) float64 { return float64(s.GetStorehouse().GetIndex()) }},
	{name: "peers", help: "Connected machines, by how near they are.", label: "tier", many: func(s agentFacts, add func(string, float64)) {
		n := make(map[string]float64)
		for _, p := range s.peers {
			n[p.GetTier()]++
		}
		for _, tier := range tiers {
			add(tier, n[tier])
		}
	}},
	{name: "peer_rtt_seconds", help: "Shortest round trip to a connected machine, by how near they are.", label: "tier", many: func(s agentFacts, add func(string, float64)) {
		least := make(map[string]float64)
		for _, p := range s.peers {
			if rtt := p.GetRttMs() / 1000; rtt > 0 && (least[p.GetTier()] == 0 || rtt < least[p.GetTier()]) {
				least[p.GetTier()] = rtt
			}
		}
		for tier, rtt := range least {
			add(tier, rtt)
		}
	}},
	{name: "received_bytes_total", help: "Plain bytes of content that came, by how near who gave them is.", grows: true, label: "tier", many: func(s agentFacts, add func(string, float64)) {
		t := s.GetTraffic()
		for i, n := range []uint64{t.GetLanBytes(), t.GetSiteBytes(), t.GetFarBytes(), t.GetStorehouseBytes()} {
			add(tiers[i], float64(n))
		}
	}},
	{name: "received_wire_bytes_total", help: "The same as they came over the wire, before encryption.", grows: true, one: func(s agentFacts) float64 { return float64(s.GetTraffic().GetWireBytes()) }},
	{name: "facts_bytes_total", help: "Bytes of signed facts of paths that came.", grows: true, one: func(s agentFacts) float64 { return float64(s.GetTraffic().GetFactBytes()) }},
	{name: "served_bytes_total", help: "Plain bytes of content given to other machines.", grows: true, one: func(s agentFacts) float64 { return float64(s.GetTraffic().GetServedBytes()) }},
	{name: "round_trips_total", help: "Round trips that readers waited for, one after the other.", grows: true, one: func(s agentFacts) float64 { return float64(s.GetTraffic().GetRoundTrips()) }},
	{name: "waiting", help: "Requests that wait now.", one: func(s agentFacts) float64 { return float64(s.GetWaiting()) }},
	{name: "fuse_requests_total", help: "Requests of the kernel, since this process has the mount.", grows: true, label: "operation", many: func(s agentFacts, add func(string, float64)) {
		for op, n := range s.GetFuseRequests() {
			add(op, float64(n))
		}
	}},
	{name: "fuse_read_bytes_total", help: "What reads of the kernel were answered with.", grows: true, one: func(s agentFacts) float64 { return float64(s.GetFuseReadBytes()) }},
	{name: "paths_known", help: "Store paths whose facts are here.", one: func(s agentFacts) float64 { return float64(s.GetPathsKnown()) }},
	{name: "cache_bytes", help: "What the cache holds.", one: func(s agentFacts) float64 { return float64(s.GetCache().GetBytes()) }},
	{name: "cache_budget_bytes", help: "What it may hold.", one: func(s agentFacts) float64 { return float64(s.GetCache().GetBudgetBytes()) }},
	{name: "cache_kept_bytes", help: "What of it is not evicted.", one: func(s agentFacts) float64 { return float64(s.GetCache().GetKeptBytes()) }},
	{name: "cache_evicted_bytes_total", help: "What was evicted.", grows: true, one: func(s agentFacts) float64 { return float64(s.GetCache().GetEvictedBytes()) }},
	{name: "cache_streaming", help: "1 if the disk is so full that what is read is not kept.", one: func(s agentFacts) float64 { return truth(s.GetCache().GetStreaming()) }},
	{name: "disk_free_bytes", help: "Free on the disk of the cache.", one: func(s agentFacts) float64 { return float64(s.GetCache().GetFreeDiskBytes()) }},
	{name: "staged_paths", help: "Store paths that were added on this machine, by whether the storehouse has them.", label: "uploaded", many: func(s agentFacts, add func(string, float64)) {
		done := s.GetStaged().GetUploaded()
		add("yes", float64(done))
		add("no", float64(s.GetStaged().GetPaths()-min(done, s.GetStaged().GetPaths())))
	}},
	{name: "staged_bytes", help: "What they take on the disk.", one: func(s agentFacts) float64 { return float64(s.GetStaged().GetBytes()) }},
	{name: "offline_missing_bytes", help: "What is not here yet of what shall work without the network.", one: func(s agentFacts) float64 { return float64(s.GetOffline().GetMissingBytes()) }},
	{name: "prefetch_bytes_total", help: "What was fetched before anybody asked for it, by why.", grows: true, label: "reason", many: func(s agentFacts, add func(string, float64)) {
		p := s.GetPrefetch()
		add("sequential", float64(p.GetSequentialBytes()))
		add("directory", float64(p.GetDirectoryBytes()))
		add("start", float64(p.GetTraceBytes()))
		add("loader", float64(p.GetLoaderBytes()))
		add("complete", float64(p.GetCompleteBytes()))
	}},
}
