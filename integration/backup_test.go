package integration

import (
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/integration/hosts"
)

// TestAllServersLost: all three servers of a storehouse are killed and their disks
// lost. One is restored from a backup at its old address, and two agents that nobody
// touched go on: with what they have, with what they never read, and with what is
// published now. The others join it anew, and it survives each of them again.
func TestAllServersLost(t *testing.T) {
	l := open(t)
	h := l.newServers(t)
	// Not the one that began the storehouse, nor the one that the agents joined at.
	house := h.servers[1]
	must(t, l.copyTo(t.Context(), h.servers[2], l.world.Ripgrep.Path))
	agents := []*hosts.Agent{
		l.agentOf(t, l.host(t, "first"), h.servers[0], "--offline", "none"),
		l.agentOf(t, l.host(t, "second"), h.servers[2], "--offline", "none"),
	}
	files := l.files(t, l.closure(l.world.Ripgrep.Path)...)
	read, unread := files[:len(files)/4], files[len(files)/4:]
	pids := make([]int, len(agents))
	for i, a := range agents {
		await(t, a, "follows the storehouse", connected)
		l.same(t, a.Host, read...)
		pids[i] = status(t, a).PID
	}
	untouched := func(files ...string) {
		t.Helper()
		for i, a := range agents {
			await(t, a, "follows the storehouse again", connected)
			l.same(t, a.Host, files...)
			l.runs(t, a.Host)
			if pid := status(t, a).PID; pid != pids[i] || !a.Running() {
				t.Errorf("the agent on %s is process %d, it was %d", a.Host.Name, pid, pids[i])
			}
		}
	}

	place, passphrase := backupPlace(t, l, house), filepath.Join(l.dir, "passphrase")
	must(t, os.WriteFile(passphrase, []byte("correct horse battery\n"), 0o600))
	backUp(t, h, 1, place, passphrase)
	for _, s := range h.servers {
		s.Kill()
	}
	for i, s := range h.servers {
		must(t, os.RemoveAll(s.State()))
		if _, err := os.Stat(filepath.Join(h.disks[i].Dir, "storehouse")); err == nil {
			t.Fatal("the state is still there")
		}
	}
	for _, a := range agents {
		await(t, a, "knows that the storehouse is gone", func(s *hosts.Status) bool { return !connected(s) })
	}

	do(t, house.Host, l.programs.Floxctl, "storehouse", "restore", "--state-dir", h.disks[1].Dir, "--from", place, "--passphrase-file", passphrase).want(t, 0, "restored ")
	must(t, house.Start(t.Context()))
	must(t, l.copyTo(t.Context(), house, l.world.Unused.Path))
	_, published := l.large(t)
	untouched(slices.Concat(read, unread, []string{published})...)

	for _, s := range []*hosts.Storehouse{h.servers[0], h.servers[2]} {
		must(t, s.Join(t.Context(), h.invite(1, "server")))
		must(t, s.Launch())
	}
	h.up()
	h.eventually("all three vote again, and hold everything", func() bool {
		resp, err := house.Admin().Servers(t.Context(), connect.NewRequest(&floxv1.ServersRequest{}))
		must(t, err)
		whole := 0
		for _, s := range resp.Msg.GetServers() {
			if s.GetVoter() && s.GetHealthy() && s.GetLackingBlocks()+s.GetLackingBytes() == 0 {
				whole++
			}
		}
		return whole == len(h.servers)
	})
	house.Kill()
	must(t, h.servers[2].Await(t.Context()))
	must(t, l.copyTo(t.Context(), h.servers[2], l.world.Unused.Path))
	untouched(published)
}

// backUp makes two backups by way of a server, and has the second one verified.
func backUp(t *testing.T, h *house, server int, place, passphrase string) {
	t.Helper()
	at, ctl := h.servers[server].Host, h.programs.Floxctl
	do(t, at, ctl, "storehouse", "backup", "--to", place, "--passphrase-file", passphrase).want(t, 0, "Backup ", "of content written")
	do(t, at, ctl, "storehouse", "backup", "--to", place, "--passphrase-file", passphrase, "--keep", "1").want(t, 0, "Backup ", "0 B of content written", "Removed ")
	do(t, at, ctl, "storehouse", "backup", "--to", h.disks[server].Dir+"/storehouse/backups", "--passphrase-file", passphrase).want(t, 2, "lies in")
	do(t, at, ctl, "audit").want(t, 0, "storehouse.backup")
	do(t, at, ctl, "storehouse", "verify", "--from", place, "--passphrase-file", passphrase).want(t, 0, "with every manifest and chunk", "the keys open")
	do(t, at, ctl, "storehouse", "backups", "--in", place).want(t, 0, "paths of")
}

// backupPlace makes a directory that the storehouse's user may write to.
func backupPlace(t *testing.T, l *lab, house *hosts.Storehouse) string {
	t.Helper()
	place, err := os.MkdirTemp(l.dir, "backups-")
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(house.State())
	if err != nil {
		t.Fatal(err)
	}
	owner, _ := st.Sys().(*syscall.Stat_t)
	if err := os.Chown(place, int(owner.Uid), int(owner.Gid)); err != nil {
		t.Fatal(err)
	}
	return place
}
