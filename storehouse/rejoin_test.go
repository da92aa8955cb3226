package storehouse

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
)

// rotLog makes a stopped server's log unreadable.
func rotLog(t *testing.T, s *Server) {
	t.Helper()
	if err := os.WriteFile(stateFile(s, "raft/log/wal-meta.db"), []byte("what was here has rotted"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A server whose facts are damaged starts all the same, with those of the others;
// also the first one, which nobody told who the others are.
func TestDamagedFactsComeFromTheOthers(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3)
	p := makePath(t, "precious", 100_000)
	publish(t, h.servers[1], p)
	h.stops[0]()
	rotLog(t, h.servers[0])
	others := stateFile(h.servers[0], othersNames[0])
	if err := os.WriteFile(others, []byte("[{rotted"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.start(0)
	checkWhole(t, h.servers[0], p)
	publish(t, h.servers[0], makePath(t, "later", 1000))
	var noted []api.InvitePeer
	if err := readNote(others, &noted); err != nil || len(noted) != 2 {
		t.Errorf("who the others are is not written anew: %v, %v", noted, err)
	}
	eventually(t, "nothing damaged is kept any more", func() bool {
		_, err := os.Stat(stateFile(h.servers[0], "raft/damaged"))
		return errors.Is(err, os.ErrNotExist)
	})
}

// The only server keeps what it has, however damaged: nobody else has it.
func TestDamagedFactsOfTheOnlyServerStay(t *testing.T) {
	t.Parallel()
	cfg := clusterConfig(t.TempDir())
	s, stop := start(t, cfg)
	publish(t, s, makePath(t, "precious", 1000))
	stop()
	rotLog(t, s)
	again, err := New(cfg)
	if !errors.Is(err, flox.ErrCorrupt) || !strings.Contains(fmt.Sprint(err), "restore a backup") {
		t.Errorf("got %v, want ErrCorrupt and what to do", err)
	}
	if err == nil {
		again.Close()
	}
	if there, err := filepath.Glob(stateFile(s, "raft/state/*/*")); len(there) == 0 {
		t.Errorf("the facts are gone: %v", err)
	}
}
