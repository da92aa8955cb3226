package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/floxctl/flox/integration/hosts"
)

// TestKeysRotateUnderAgents: every key of a storehouse is replaced while an agent
// runs. It goes on, and verifies what was valid before, also what it has never
// asked for, and what becomes valid afterwards; so does a machine that comes later.
func TestKeysRotateUnderAgents(t *testing.T) {
	l := open(t)
	house := l.newHouse(t, l.host(t, "rotating"), l.world.Ripgrep.Path)
	a := l.agentOf(t, l.host(t, "stays"), house)
	await(t, a, "follows the storehouse", connected)
	l.runs(t, a.Host)
	list := func() string { return do(t, a.Host, l.programs.Floxctl, "doctor").out }
	eventually(t, "the first trust list is accepted", func() bool { return strings.Contains(list(), "trust list version 1 ") })
	token := func() string {
		b, err := os.ReadFile(filepath.Join(house.State(), "upload-token"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	first := token()

	out := do(t, house.Host, l.programs.Floxctl, "key", "rotate")
	out.want(t, 0, "new: nix ", "new: manifest ", "new: swarm", "new: cluster")
	do(t, house.Host, l.programs.Floxctl, "key", "rotate", "--use", "token").want(t, 0, "new: token")
	eventually(t, "publishers are given another token", func() bool { return token() != first })
	eventually(t, "the agent accepts a later trust list", func() bool {
		said := list()
		return strings.Contains(said, "trust list version ") && !strings.Contains(said, "trust list version 1 ")
	})
	if err := l.copyTo(t.Context(), house, l.world.Unused.Path); err != nil {
		t.Fatal(err)
	}
	old, fresh := l.files(t, l.closure(l.world.Ripgrep.Path)...), l.files(t, l.closure(l.world.Unused.Path)...)
	check := func(agent *hosts.Agent) {
		t.Helper()
		await(t, agent, "follows the storehouse", connected)
		l.runs(t, agent.Host)
		l.same(t, agent.Host, old...)
		l.same(t, agent.Host, fresh...)
	}
	check(a)
	if err := a.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(a)
	check(l.agentOf(t, l.host(t, "comes"), house))
}
