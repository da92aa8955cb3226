package storehouse

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/pack"
)

// A collection frees content on every server, and the room of it on the disks, and only
// what is dead; it is the leader that collects.
func TestCollectFreesContentOnEveryServer(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3)
	for _, s := range h.servers {
		s.cfg.CollectGrace, s.cfg.touchEvery = 20*time.Millisecond, time.Millisecond
	}
	dead, base := makePath(t, "dead", 4_000_000), makePath(t, "base", 200_000)
	kept := makePath(t, "kept", 200_000, base.info.Path)
	publish(t, h.servers[0], dead)
	publish(t, h.servers[2], base)
	publish(t, h.servers[1], kept)
	if err := h.servers[2].KeepPath(within(t), kept.info.Path, false, "", ""); err != nil {
		t.Fatal(err)
	}
	for _, s := range h.servers {
		eventually(t, "all content is everywhere", func() bool { return whole(s, dead) && whole(s, kept) && whole(s, base) })
	}
	aged()
	if err := h.servers[1].Collect(within(t), soon, nil); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("a follower collects: %v", err)
	}
	before := make([]pack.Stats, len(h.servers))
	for i, s := range h.servers {
		before[i] = s.packs.Stat()
		// What came for a path that is not valid yet is held for longer than this test.
		if err := s.held.close(); err != nil {
			t.Fatal(err)
		}
	}
	if got := collect(t, h.servers[0], soon); got.GetDeadPaths() != 1 {
		t.Errorf("%v, want one path gone", got)
	}
	for i, s := range h.servers {
		if now := s.packs.Stat(); now.Blocks >= before[i].Blocks || now.DiskBytes > before[i].DiskBytes-4_000_000 {
			t.Errorf("server %d has %+v, before %+v", i, now, before[i])
		}
		eventually(t, "it is gone", func() bool { return !stillValid(t, s, dead) })
		checkWhole(t, s, kept)
		checkWhole(t, s, base) // which what is kept refers to
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

// Collections, uploads to each of three servers, readers, and what a follower
// holds, at once: nothing that was acknowledged goes before its time, and what is
// held stays whole on every server, though nothing else wants it.
func TestCollectRacesNothingOnThreeServers(t *testing.T) {
	t.Parallel()
	const keep, grace = 1500 * time.Millisecond, 2 * time.Second
	h := newHouse(t, 3, func(c *Config) { c.CollectGrace, c.touchEvery = grace, time.Millisecond })
	held := makePath(t, "held", 200_000)
	publish(t, h.servers[2], held)
	eventually(t, "a follower knows it", func() bool { return stillValid(t, h.servers[1], held) })
	release, err := h.servers[1].Hold(within(t), held.info.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	litter := makePath(t, "litter", 20_000)
	publish(t, h.servers[1], litter)
	ctx, cancel := context.WithTimeout(within(t), 8*time.Second)
	defer cancel()
	var group sync.WaitGroup
	collected := uint64(0)
	group.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			// On a busy machine another one may lead meanwhile.
			err := h.servers[i%len(h.servers)].Collect(ctx, CollectOptions{KeepRecent: keep}, func(p *floxv1.CollectProgress) {
				if p.GetFinished() {
					collected += p.GetDeadPaths()
				}
			})
			if err != nil && ctx.Err() == nil && !errors.Is(err, flox.ErrUnreachable) {
				t.Error(err)
			}
		}
	})
	for i, s := range h.servers {
		group.Go(func() {
			for round := 0; ctx.Err() == nil; round++ {
				churn(ctx, t, s, i, round, keep)
			}
		})
	}
	group.Wait()
	if collected == 0 {
		t.Error("nothing was ever collected: the test shows nothing")
	}
	for i, s := range h.servers {
		eventually(t, fmt.Sprint("what is held is whole on server ", i), func() bool { return whole(s, held) })
		checkWhole(t, s, held)
		if err := s.packs.Scrub(within(t), func(id flox.CID, err error) { t.Errorf("scrub: %s: %v", id, err) }); err != nil {
			t.Error(err)
		}
	}
	release()
	eventually(t, "whoever leads collects", func() bool {
		for _, s := range h.servers {
			switch err := s.Collect(within(t), soon, nil); {
			case err == nil:
				return true
			case !errors.Is(err, flox.ErrUnreachable):
				t.Fatal(err)
			}
		}
		return false
	})
	eventually(t, "what is held no more goes", func() bool { return !stillValid(t, h.servers[1], held) })
}
