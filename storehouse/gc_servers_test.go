package storehouse

import (
	"errors"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// A collection frees content on every server, and only what is dead; it is the
// leader that collects.
func TestCollectFreesContentOnEveryServer(t *testing.T) {
	h := newHouse(t, 3)
	for _, s := range h.servers {
		s.cfg.CollectGrace, s.cfg.touchEvery = 20*time.Millisecond, time.Millisecond
	}
	dead, kept := makePath(t, "dead", 200_000), makePath(t, "kept", 200_000)
	publish(t, h.servers[0], dead)
	publish(t, h.servers[1], kept)
	if err := h.servers[2].KeepPath(within(t), kept.info.Path, false, "", ""); err != nil {
		t.Fatal(err)
	}
	for _, s := range h.servers {
		eventually(t, "all content is everywhere", func() bool { return whole(s, dead) && whole(s, kept) })
	}
	aged()
	if err := h.servers[1].Collect(within(t), soon, nil); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("a follower collects: %v", err)
	}
	before := make([]uint64, len(h.servers))
	for i, s := range h.servers {
		before[i] = s.packs.Stat().Blocks
		// What came for a path that is not valid yet is held for longer than this test.
		if err := s.held.close(); err != nil {
			t.Fatal(err)
		}
	}
	if got := collect(t, h.servers[0], soon); got.GetDeadPaths() != 1 {
		t.Errorf("%v, want one path gone", got)
	}
	for i, s := range h.servers {
		if now := s.packs.Stat().Blocks; now >= before[i] {
			t.Errorf("server %d has %d blocks, %d before", i, now, before[i])
		}
		eventually(t, "it is gone", func() bool { return !stillValid(t, s, dead) })
		checkWhole(t, s, kept)
	}
	stream, err := h.servers[0].servers.client(h.servers[1].id.peer).Sweep(within(t), connect.NewRequest(&floxv1.SweepRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	for stream.Receive() {
	}
	if err := errors.Join(stream.Err(), stream.Close()); err != nil {
		t.Errorf("a server's sweep: %v", api.FromConnect(err))
	}
}
