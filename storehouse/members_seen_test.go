package storehouse

import (
	"context"
	"testing"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	cluster "github.com/floxctl/flox/raft"
)

// An ephemeral machine is forgotten also when no server leads for as long as that
// takes: what one leader saw the next one knows.
func TestEphemeralMachineIsForgottenWhoeverLeads(t *testing.T) {
	t.Parallel()
	const ttl = 3 * time.Second
	h := newHouse(t, 2, func(c *Config) { c.EphemeralTTL = ttl })
	runner := newComputer(t).id()
	add := &floxv1.Machine{Peer: string(runner), Name: "runner", Role: members.Agent, Ephemeral: true}
	if _, err := h.servers[0].proposeMembers(within(t), &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Add{Add: add}}); err != nil {
		t.Fatal(err)
	}
	for _, s := range h.servers {
		eventually(t, "every server knows the machine", func() bool {
			_, ok := s.roster.machine(runner)
			return ok
		})
	}
	// One server alone sees it, for a while.
	leave := h.servers[1].seen.enter(string(runner))
	recorded := func() (at time.Time) {
		r, err := h.servers[0].view(within(t), members.Kind, cluster.Linearizable)
		if err == nil {
			err = members.Seen(r, func(_ string, seen time.Time) bool {
				at = seen
				return false
			})
			r.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	eventually(t, "the log knows it", func() bool { return !recorded().IsZero() })
	first := recorded()
	eventually(t, "the log hears of it again", func() bool { return recorded().After(first) })
	leave()

	ctx, cancel := context.WithCancel(within(t))
	defer cancel()
	done := make(chan int)
	go func() { // what each leader is given is less than it takes
		led := 0
		for {
			select {
			case <-time.After(ttl * 5 / 6):
				if h.servers[led%2].node.Transfer(ctx, "") == nil {
					led++
				}
			case <-ctx.Done():
				done <- led
				return
			}
		}
	}()
	eventually(t, "it is forgotten", func() bool {
		_, ok := h.servers[0].roster.machine(runner)
		return !ok
	})
	cancel()
	if led := <-done; led == 0 {
		t.Error("the same server led all the time")
	}
	if !recorded().IsZero() {
		t.Error("the log still knows when it was there")
	}
}
