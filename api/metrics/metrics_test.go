package metrics

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// scrape gives what Prometheus gets, without what Go and the kernel tell.
func scrape(t *testing.T, h http.Handler) (ours string, status int) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, Path, http.NoBody))
	if w.Code != http.StatusOK {
		return w.Body.String(), w.Code
	}
	problems, err := promlint.New(strings.NewReader(w.Body.String())).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "flox_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	for line := range strings.Lines(w.Body.String()) {
		if strings.HasPrefix(line, "flox_") {
			ours += line
		}
	}
	return ours, w.Code
}

func want(t *testing.T, got string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if !strings.Contains(got, line+"\n") {
			t.Errorf("want the line %q in\n%s", line, got)
		}
	}
}

func TestAgent(t *testing.T) {
	status := &floxv1.StatusResponse{
		Version: "1.2", StartedUnix: 1700000000, Mounted: true, Problems: []string{"one"}, Waiting: 3, PathsKnown: 7,
		Storehouse:   &floxv1.StorehouseLink{Connected: true, Index: 44},
		Traffic:      &floxv1.Traffic{LanBytes: 10, StorehouseBytes: 20, ServedBytes: 30},
		FuseRequests: map[string]uint64{"READ": 5},
		Cache:        &floxv1.CacheUsageResponse{Bytes: 100, BudgetBytes: 1000},
		Staged:       &floxv1.StagedUse{Paths: 5, Uploaded: 2},
		Prefetch:     &floxv1.Prefetch{TraceBytes: 9},
	}
	peers := []*floxv1.Peer{{Tier: "lan", RttMs: 2}, {Tier: "lan", RttMs: 0.5}, {Tier: "storehouse"}}
	waits := NewWaits()
	waits.Waited("read", 20*time.Millisecond)
	got, _ := scrape(t, Agent(
		func(context.Context) (*floxv1.StatusResponse, error) { return status, nil },
		func() []*floxv1.Peer { return peers }, waits))
	want(t, got,
		`flox_agent_info{version="1.2"} 1`, `flox_agent_mounted 1`, `flox_agent_problems 1`, `flox_agent_waiting 3`,
		`flox_agent_storehouse_connected 1`, `flox_agent_storehouse_index 44`,
		`flox_agent_peers{tier="lan"} 2`, `flox_agent_peers{tier="far"} 0`, `flox_agent_peer_rtt_seconds{tier="lan"} 0.0005`,
		`flox_agent_received_bytes_total{tier="lan"} 10`, `flox_agent_received_bytes_total{tier="storehouse"} 20`, `flox_agent_served_bytes_total 30`,
		`flox_agent_fuse_requests_total{operation="READ"} 5`, `flox_agent_cache_bytes 100`, `flox_agent_cache_budget_bytes 1000`,
		`flox_agent_staged_paths{uploaded="no"} 3`, `flox_agent_prefetch_bytes_total{reason="start"} 9`,
		`flox_agent_wait_seconds_bucket{for="read",le="0.01"} 0`, `flox_agent_wait_seconds_bucket{for="read",le="0.025"} 1`,
	)
	if strings.Contains(got, `rtt_seconds{tier="storehouse"}`) {
		t.Error("a round trip that nobody measured is told")
	}
}

func TestServer(t *testing.T) {
	state := &floxv1.StateResponse{
		State: &floxv1.ServerState{Leader: true, Problem: "its disk is 90 % full", Applied: 99, LackingBytes: 5, Version: "1.2", Level: 8},
		Usage: &floxv1.UsageResponse{Paths: 12, StoredBytes: 34, DiskFree: 56, Watermark: "slow"},
	}
	got, _ := scrape(t, Server(func(context.Context) (*floxv1.StateResponse, error) { return state, nil }))
	want(t, got,
		`flox_storehouse_info{version="1.2"} 1`, `flox_storehouse_leader 1`, `flox_storehouse_problem 1`, `flox_storehouse_applied_index 99`,
		`flox_storehouse_lacking_bytes 5`, `flox_storehouse_paths 12`, `flox_storehouse_stored_bytes 34`, `flox_storehouse_disk_free_bytes 56`,
		`flox_storehouse_watermark{level="slow"} 1`, `flox_storehouse_watermark{level="none"} 0`,
	)
}

// What cannot be told is an error, not a part of the truth.
func TestErrors(t *testing.T) {
	h := Server(func(context.Context) (*floxv1.StateResponse, error) { return nil, errors.New("the disk is gone") })
	if body, status := scrape(t, h); status != http.StatusInternalServerError || !strings.Contains(body, "the disk is gone") {
		t.Errorf("%d: %s", status, body)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, Path, http.NoBody))
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("a POST is answered with %d", w.Code)
	}
	var none *Waits
	none.Waited("read", time.Second)
}
