package ctl

import (
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// The types of this file are what --json prints. Their field names are an
// interface: they are added to and never renamed.

// storehouseFacts is the link to the storehouse; index counts its changes.
type storehouseFacts struct {
	PeerID     string  `json:"peerId"`
	Name       string  `json:"name"`
	Connected  bool    `json:"connected"`
	LastSeenAt *string `json:"lastSeenAt"`
	Index      uint64  `json:"index"`
	Error      string  `json:"error"`
	HTTPURL    string  `json:"httpUrl"`
	// Servers are those of the storehouse, best first; Members counts the machines
	// in the member list here, 0 before there is one.
	Servers []houseServerFacts `json:"servers"`
	Members uint64             `json:"members"`
}

// houseServerFacts is a server of the storehouse; the followed one is that of the streams.
type houseServerFacts struct {
	PeerID    string   `json:"peerId"`
	Name      string   `json:"name"`
	Connected bool     `json:"connected"`
	Followed  bool     `json:"followed"`
	Addrs     []string `json:"addrs"`
}

func storehouseOf(l *floxv1.StorehouseLink) storehouseFacts {
	f := storehouseFacts{
		PeerID: l.GetPeerId(), Name: l.GetName(), Connected: l.GetConnected(), LastSeenAt: stamp(l.GetLastSeenUnix()),
		Index: l.GetIndex(), Error: l.GetError(), HTTPURL: l.GetHttpUrl(), Servers: []houseServerFacts{}, Members: l.GetMembers(),
	}
	for _, s := range l.GetServers() {
		f.Servers = append(f.Servers, houseServerFacts{
			PeerID: s.GetPeerId(), Name: s.GetName(), Connected: s.GetConnected(), Followed: s.GetFollowed(), Addrs: some(s.GetAddrs()),
		})
	}
	return f
}

// trafficFacts are bytes since the agent started; plain unless named wire.
type trafficFacts struct {
	LanBytes        uint64 `json:"lanBytes"`
	SiteBytes       uint64 `json:"siteBytes"`
	FarBytes        uint64 `json:"farBytes"`
	StorehouseBytes uint64 `json:"storehouseBytes"`
	WireBytes       uint64 `json:"wireBytes"`
	ServedBytes     uint64 `json:"servedBytes"`
	FactBytes       uint64 `json:"factBytes"`
	ManifestBytes   uint64 `json:"manifestBytes"`
	RoundTrips      uint64 `json:"roundTrips"` // that readers waited for, one after the other
}

func trafficOf(t *floxv1.Traffic) trafficFacts {
	return trafficFacts{
		LanBytes: t.GetLanBytes(), SiteBytes: t.GetSiteBytes(), FarBytes: t.GetFarBytes(),
		StorehouseBytes: t.GetStorehouseBytes(), WireBytes: t.GetWireBytes(), ServedBytes: t.GetServedBytes(),
		FactBytes: t.GetFactBytes(), ManifestBytes: t.GetManifestBytes(), RoundTrips: t.GetRoundTrips(),
	}
}

// fetched is what came in altogether, plain.
func (t trafficFacts) fetched() uint64 {
	return t.LanBytes + t.SiteBytes + t.FarBytes + t.StorehouseBytes
}

// cacheFacts is the cache; reserve is what stays free on the disk for others.
type cacheFacts struct {
	Dir           string `json:"dir"`
	Bytes         uint64 `json:"bytes"`
	BudgetBytes   uint64 `json:"budgetBytes"`
	KeptBytes     uint64 `json:"keptBytes"`
	Files         uint64 `json:"files"`
	Blocks        uint64 `json:"blocks"`
	FreeDiskBytes uint64 `json:"freeDiskBytes"`
	ReserveBytes  uint64 `json:"reserveBytes"`
	EvictedBytes  uint64 `json:"evictedBytes"`
	Streaming     bool   `json:"streaming"`
}

func cacheOf(c *floxv1.CacheUsageResponse) cacheFacts {
	return cacheFacts{
		Dir: c.GetDir(), Bytes: c.GetBytes(), BudgetBytes: c.GetBudgetBytes(), KeptBytes: c.GetKeptBytes(),
		Files: c.GetFiles(), Blocks: c.GetBlocks(), FreeDiskBytes: c.GetFreeDiskBytes(),
		ReserveBytes: c.GetReserveBytes(), EvictedBytes: c.GetEvictedBytes(), Streaming: c.GetStreaming(),
	}
}

// some gives an empty list instead of none, so that JSON never says null.
func some[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
