package integration

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
)

// told is how long it takes at most until a start that is over is told to the
// storehouse and in its log.
const told = 6 * time.Second

// recorded waits until an agent has recorded a start.
func recorded(t *testing.T, a *hosts.Agent) {
	t.Helper()
	await(t, a, "a start was recorded", func(s *hosts.Status) bool { return s.Prefetch.StartsRecorded > 0 })
}

// TestStartTraces: what two machines saw of a program's start, one of them with
// all but the program warm, makes its next start cheap on a machine 50 ms away that
// never saw it; and nothing of that happens where it is switched off.
func TestStartTraces(t *testing.T) {
	l := open(t)
	house := l.newHouse(t, l.host(t, "tracer"), l.world.Ripgrep.Path)
	far := l.far(t, house, 25*time.Millisecond)
	newAgent := func(name, invite string, flags ...string) *hosts.Agent {
		a, err := hosts.StartAgent(t.Context(), l.programs, l.host(t, name), l.dir, invite, flags...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { stop(t, a.Daemon) })
		await(t, a, "follows the storehouse", connected)
		return a
	}
	start := func(a *hosts.Agent) *hosts.Status {
		began := time.Now()
		l.runs(t, a.Host)
		took := time.Since(began)
		s := status(t, a)
		t.Logf("%s: %v, %d round trips, %+v, %+v", a.Host.Name, took, s.Traffic.RoundTrips, s.Traffic, s.Prefetch)
		return s
	}
	cold, warm := newAgent("cold", house.Invite()), newAgent("warm", house.Invite())
	l.warm(t, warm.Host)
	for _, a := range []*hosts.Agent{cold, warm} {
		start(a)
		recorded(t, a)
	}
	time.Sleep(told)
	for _, a := range []*hosts.Agent{cold, warm} {
		stop(t, a.Daemon) // what follows comes from far away, each time
	}

	plain := newAgent("plain", far, "--start-traces=false")
	without := start(plain)
	stop(t, plain.Daemon)
	unfetched := newAgent("unfetched", far, "--prefetch=false")
	off := start(unfetched)
	stop(t, unfetched.Daemon)
	next := newAgent("next", far)
	with := start(next)
	await(t, next, "the replay is over", func(s *hosts.Status) bool { with.Prefetch = s.Prefetch; return s.Prefetch.StartsReplayed > 0 })
	if with.Prefetch.TraceBytes == 0 || !with.Prefetch.Traces {
		t.Errorf("nothing was replayed: %+v", with.Prefetch)
	}
	if n := with.Traffic.RoundTrips; n > 6 || n*3 > without.Traffic.RoundTrips {
		t.Errorf("%d round trips with the trace, %d without", n, without.Traffic.RoundTrips)
	}
	if p := without.Prefetch; p.Traces || p.StartsRecorded > 0 || p.StartsReplayed > 0 || p.TraceBytes > 0 {
		t.Errorf("without traces: %+v", p)
	}
	if p := off.Prefetch; p.On || p.StartsReplayed > 0 || p.TraceBytes > 0 {
		t.Errorf("without prefetch: %+v", p)
	}
}

// warm reads everything ripgrep needs but itself, so that the kernel has it.
func (l *lab) warm(t *testing.T, h *netns.Host) {
	t.Helper()
	for _, p := range l.closure(l.world.Ripgrep.Path) {
		if p != l.world.Ripgrep.Path {
			l.same(t, h, l.files(t, p)...)
		}
	}
}

// far gives an invite by which a storehouse is so much farther away: what is sent
// either way arrives by that much later.
func (l *lab) far(t *testing.T, house *hosts.Storehouse, later time.Duration) (invite string) {
	t.Helper()
	const port = 7999
	ctx, cancel := context.WithCancel(context.Background())
	listener, err := house.Host.Listen(ctx, "tcp", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		_ = listener.Close()
		group.Wait()
	})
	group.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer near.Close()
				other, err := house.Host.Dial(ctx, "tcp", fmt.Sprintf("%s:%d", house.Host.Addr(), hosts.HousePort))
				if err != nil {
					return
				}
				defer other.Close()
				defer context.AfterFunc(ctx, func() { _, _ = near.Close(), other.Close() })()
				var both sync.WaitGroup
				both.Go(func() { delayed(near, other, later) })
				both.Go(func() { delayed(other, near, later) })
				both.Wait()
			})
		}
	})
	m, err := api.LoadInvite(house.Invite())
	if err != nil {
		t.Fatal(err)
	}
	m.Storehouse[0].Addrs = []string{fmt.Sprintf("/ip4/%s/tcp/%d", house.Host.Addr(), port)}
	invite = filepath.Join(t.TempDir(), "far.json")
	if err := m.Save(invite); err != nil {
		t.Fatal(err)
	}
	return invite
}

// delayed copies from one connection to another until one ends.
func delayed(from, to net.Conn, later time.Duration) {
	type part struct {
		due  time.Time
		data []byte
	}
	parts := make(chan part, 4096)
	go func() {
		defer close(parts)
		for {
			b := make([]byte, 64<<10)
			n, err := from.Read(b)
			if n > 0 {
				parts <- part{time.Now().Add(later), b[:n]}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range parts {
		time.Sleep(time.Until(p.due))
		if _, err := to.Write(p.data); err != nil {
			_ = from.Close()
		}
	}
	_ = to.Close()
}
