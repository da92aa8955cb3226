package storehouse

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// A server that is away and was replaced is no member any more: the keys are sealed
// anew without it, that is audited, and when it returns it is no fourth voter but says
// what to do. A new invite makes it a server again.
func TestServerThatWasReplacedIsOutOfTheMemberList(t *testing.T) {
	t.Parallel()
	h, ask := operatedHouse(t, 3, func(c *Config) { c.deadAfter = time.Second })
	gone := h.servers[2].id.peer
	h.stops[2]()
	eventually(t, "the leader counts it as away", func() bool {
		list, err := h.servers[0].node.Servers(within(t))
		return err == nil && slices.ContainsFunc(list, func(s cluster.ServerStatus) bool { return s.ID == string(gone) && !s.DownSince.IsZero() })
	})
	version := h.servers[0].sealed.Load()
	h.add(func(c *Config) { c.deadAfter = time.Second })
	voters := func(s *Server) (names []string) {
		for _, m := range s.node.Status().Members {
			if m.Voter {
				names = append(names, m.ID)
			}
		}
		return names
	}
	for _, s := range []*Server{h.servers[0], h.servers[1], h.servers[3]} {
		eventually(t, "the one that came takes its place", func() bool {
			_, member := s.roster.machine(gone)
			return !member && len(voters(s)) == 3 && !slices.Contains(voters(s), string(gone)) && !s.servers.allowed(gone)
		})
		eventually(t, "the keys are sealed anew, to the others alone", func() bool { return s.sealed.Load() > version && !s.keysKnownTo(string(gone)) })
	}
	if got := auditOf(t, ask[0], &floxv1.AuditRequest{Machine: "s3"}); !slices.Contains(got, "machine.leave") || !slices.Contains(got, "key.known") {
		t.Errorf("the audit log has of it %q", got)
	}

	back, stop := h.run(2)
	defer stop()
	eventually(t, "it says that it is none of them", func() bool {
		st, err := back.ownState(within(t))
		return err == nil && strings.Contains(st.GetState().GetProblem(), "floxctl join")
	})
	if err := h.servers[1].tendServers(within(t)); err != nil {
		t.Error(err)
	}
	if n := len(voters(h.servers[0])); n != 3 || h.servers[0].servers.allowed(gone) {
		t.Errorf("it returned and there are %d voters", n)
	}
	h.admit(back, "s3-again")
	if err := back.Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is a server again", func() bool {
		st, err := back.ownState(within(t))
		return err == nil && slices.Contains(voters(h.servers[0]), string(gone)) && st.GetState().GetProblem() == ""
	})
}

// A server that is taken out says so from the first answer that it gives to those who
// need all servers: it does not send them to look for a majority.
func TestServerThatIsTakenOutSaysSoAtOnce(t *testing.T) {
	t.Parallel()
	h, ask := operatedHouse(t, 3)
	if _, err := ask[0].RemoveServer(within(t), connect.NewRequest(&floxv1.RemoveServerRequest{Server: "s3"})); err != nil {
		t.Fatal(err)
	}
	for what, call := range map[string]func() error{
		"an invite": func() error {
			_, err := ask[2].MakeInvite(within(t), connect.NewRequest(&floxv1.MakeInviteRequest{Role: "agent"}))
			return err
		},
		"a hand-over": func() error {
			_, err := ask[2].Transfer(within(t), connect.NewRequest(&floxv1.TransferRequest{}))
			return err
		},
		"a change that was let in before it knew": func() error {
			_, err := h.servers[2].proposeMembers(within(t), &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Remove{Remove: &floxv1.RemoveMachine{Peer: "nobody"}}})
			return err
		},
		"who leads": func() error { _, err := h.servers[2].whoLeads(within(t), false); return err },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			var err error
			// It may take part for a moment in which it was not heard of here yet.
			eventually(t, "it is refused", func() bool { err = api.FromConnect(call()); return err != nil && !errors.Is(err, flox.ErrNotFound) })
			if !errors.Is(err, flox.ErrUnreachable) || !strings.Contains(err.Error(), "it was taken out") {
				t.Errorf("%v, want that it was taken out", err)
			}
		})
	}
	t.Run("the servers", func(t *testing.T) {
		t.Parallel()
		eventually(t, "the server says it of itself", func() bool {
			said := false
			resp, err := ask[2].Servers(within(t), connect.NewRequest(&floxv1.ServersRequest{}))
			if err != nil {
				t.Fatal(err)
			}
			for _, st := range resp.Msg.GetServers() { // by peer: it has no name of its own any more
				if strings.Contains(st.GetProblem(), "no majority") {
					t.Fatalf("of %s it says: %s", st.GetName(), st.GetProblem())
				}
				said = said || st.GetPeer() == string(h.servers[2].id.peer) && strings.Contains(st.GetProblem(), "it was taken out")
			}
			return said
		})
	})
}
