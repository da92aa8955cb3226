package integration

import (
	"slices"
	"time"

	"connectrpc.com/connect"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/integration/hosts"
)

// revokesTheLeader: an operator revokes the server that leads. Another one leads
// then, and writers go on; the revoked one takes part in nothing any more, also when it
// is started again, and says so. While another server is down the revocation is
// refused, and changes nothing.
func (h *house) revokesTheLeader() {
	t := h.t
	h.eventually("all three vote", func() bool { // one may have just come anew
		_, leader := h.leader()
		return h.well(leader) == 3
	})
	at, leader := h.leader()
	others := slices.Delete(slices.Clone(h.servers), at, at+1)
	floxctl := h.programs.Floxctl

	down := others[1]
	must(t, down.Stop())
	do(t, others[0].Host, floxctl, "machine", "revoke", leader.Host.Name, "--yes", "--reason", "stolen").want(t, 8, "is not revoked, and nothing was changed")
	must(t, down.Start(t.Context()))
	h.eventually("all three vote and are well", func() bool { return h.well(leader) == 3 })

	stopWriting := h.writing(4)
	h.flows(time.Now())
	do(t, others[0].Host, floxctl, "machine", "revoke", leader.Host.Name, "--yes", "--reason", "stolen").want(t, 0, leader.Host.Name)
	h.flows(time.Now())
	h.eventually("two servers are left, and one of them leads", func() bool {
		next, err := hosts.Leader(others)
		return err == nil && h.well(next) == 2
	})
	h.flows(time.Now())
	stopWriting()
	if slices.Contains(h.machines(others[0]), leader.Host.Name) {
		t.Errorf("the revoked server is a member: %v", h.machines(others[0]))
	}

	must(t, leader.Stop())
	must(t, leader.Launch())
	h.eventually("the revoked server says what it is", func() bool {
		said, err := leader.Said("this server takes no part")
		must(t, err)
		return said != ""
	})
	if h.well(others[0]) != 2 {
		t.Errorf("%d servers vote and are well, want the other two", h.well(others[0]))
	}
}

// well is how many servers vote and are healthy, as one of them says.
func (h *house) well(asked *hosts.Storehouse) (n int) {
	h.t.Helper()
	resp, err := asked.Admin().Servers(h.t.Context(), connect.NewRequest(&floxv1.ServersRequest{}))
	if err != nil {
		return 0 // nobody leads for a moment
	}
	for _, s := range resp.Msg.GetServers() {
		if s.GetVoter() && s.GetHealthy() {
			n++
		}
	}
	return n
}
