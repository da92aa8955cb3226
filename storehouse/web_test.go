package storehouse

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// A server tells Prometheus of itself.
func TestMetrics(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	cfg.Metrics = "127.0.0.1:0"
	s, _ := start(t, cfg)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.metrics.Addr().String()+"/metrics", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s, %v", resp.Status, err)
	}
	for _, line := range []string{"flox_storehouse_leader 1", "flox_storehouse_problem 0", "flox_storehouse_paths 0", `flox_storehouse_watermark{level="none"} 1`} {
		if !strings.Contains(string(body), line+"\n") {
			t.Errorf("want the line %q in\n%s", line, body)
		}
	}
}
