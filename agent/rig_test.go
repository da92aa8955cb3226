package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/floxctl/flox/p2p"
)

// runAgent makes and runs an agent of h; prepare may change it before it runs.
// The function returned ends it.
func runAgent(t *testing.T, h *house, change func(*Config), prepare func(*Agent)) (*Agent, func()) {
	t.Helper()
	dir := t.TempDir()
	cfg := Config{
		StateDir: filepath.Join(dir, "state"), Socket: filepath.Join(dir, "agent.sock"), Invite: h.invite,
		Listen: []string{"127.0.0.1:0"}, NoMDNS: true, CacheReserve: 1, CacheBudget: 256 << 20,
	}
	if os.Getenv("AGENT_TEST_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if change != nil {
		change(&cfg)
	}
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	a.readers.far = never // however slow the machine is
	if prepare != nil {
		prepare(a)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	var once sync.Once
	stop := func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("agent: %v", err)
			}
		})
	}
	t.Cleanup(stop)
	return a, stop
}

// following waits until the agent follows its storehouse.
func following(t *testing.T, a *Agent) {
	t.Helper()
	until(t, "the agent follows the storehouse", func() bool { return a.follower.state().connected })
}

// until waits for what must come about.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// randomBytes are the same for the same seed.
func randomBytes(seed byte, n int) []byte {
	b := make([]byte, n)
	_, _ = io.ReadFull(rand.NewChaCha8([32]byte{seed}), b)
	return b
}

// manyFiles are files of every size that is handled in a way of its own.
func manyFiles() []testFile {
	files := []testFile{
		{name: "bin/tool", data: randomBytes(1, 70_000), exec: true},
		{name: "zeros", data: make([]byte, 1_500_000)}, // one chunk again and again
		{name: "zeros-too", data: make([]byte, 700_001)},
		{name: "shared-a", data: slices.Concat(randomBytes(9, 900_000), []byte("a"))},
		{name: "shared-b", data: slices.Concat(randomBytes(9, 900_000), []byte("b"))},
	}
	for i, n := range []int{0, 1, 255, 256, 257, 4096, 16383, 16384, 16385, 65536, 100_000, 262_144, 300_001, 2_500_000} {
		files = append(files, testFile{name: fmt.Sprintf("f/%d", n), data: randomBytes(byte(20+i), n)})
	}
	return files
}

// peerAddr says where an agent can be reached.
func peerAddr(a *Agent) p2p.PeerAddr { return p2p.PeerAddr{ID: a.host.ID(), Addrs: a.host.Addrs()} }
