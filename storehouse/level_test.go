package storehouse

import (
	"context"
	"strings"
	"testing"
)

// A server whose program is older than what the storehouse uses by now is not taken
// in, and the operator is told what to do.
func TestOlderServerIsNotTakenIn(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 1, func(c *Config) { c.level = level + 1 })
	eventually(t, "the storehouse uses the newer level", func() bool { return h.servers[0].node.ClusterLevel() == level+1 })
	cfg := clusterConfig(t.TempDir())
	cfg.Version = "0.1.0"
	h.tell(cfg)
	older, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- older.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	h.admit(older, "older")
	eventually(t, "the operator is told", func() bool {
		st := h.servers[0].lookAtServers(within(t)).find(string(older.id.peer))
		return st != nil && strings.Contains(st.GetProblem(), "upgrade it") && strings.Contains(st.GetProblem(), `version "0.1.0"`)
	})
	if len(h.servers[0].servers.members()) != 1 {
		t.Error("it takes part all the same")
	}
}
