package storehouse

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/members"
)

// addServer makes a machine that is not there a member as a server.
func addServer(t *testing.T, s *Server, name string) string {
	t.Helper()
	c := newComputer(t)
	_, public, err := sealKey(c.key)
	if err == nil {
		_, err = s.proposeMembers(within(t), &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Add{Add: &floxv1.Machine{
			Peer: string(c.id()), Name: name, Role: members.Server, SealKey: public[:],
		}}})
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(c.id())
}

// copyState copies the state directory of a server that is stopped.
func copyState(t *testing.T, from string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	secret, err := filepath.Glob(filepath.Join(to, "keys", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(secret, filepath.Join(to, "upload-token")) {
		if err := os.Chmod(name, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return to
}

func newest(t *testing.T, s *Server) *content.TrustList {
	t.Helper()
	list, err := s.newestList(within(t))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// A storehouse begins anew with what a backup held: who was ahead of the backup
// takes its list all the same, but nothing else of an older one.
func TestRestoredStorehouseBeginsANewEpoch(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	s, stop := start(t, cfg)
	addServer(t, s, "lost")
	eventually(t, "both servers vote by the list", func() bool { return len(newest(t, s).Voters) == 2 })
	base := newest(t, s)
	stop()
	backup := copyState(t, cfg.StateDir)
	s, stop = start(t, cfg)
	for _, name := range []string{"s3", "s4"} { // what the backup does not know
		addServer(t, s, name)
		eventually(t, "the list follows", func() bool { return newest(t, s).Version > base.Version+uint64(name[1]-'3') })
	}
	ahead := newest(t, s)
	stop()

	var epochs []uint64
	for range 2 { // the same backup may be needed twice
		cfg.StateDir, cfg.NewEpoch = copyState(t, backup), true
		s, stop = start(t, cfg)
		list := newest(t, s)
		epochs = append(epochs, list.Epoch)
		if err := content.Newer(base, list); err != nil {
			t.Errorf("who is where the backup was: %v", err)
		}
		if list.Version > ahead.Version {
			t.Fatalf("version %d is behind %d: the test proves nothing", list.Version, ahead.Version)
		}
		if err := content.Restored(ahead, list); err != nil {
			t.Errorf("who is ahead of the backup: %v", err)
		}
		if len(list.Voters) != 1 || list.Voters[0] != string(s.id.peer) || len(s.roster.servers()) != 1 {
			t.Errorf("voters %v, servers %d: want the restored one alone", list.Voters, len(s.roster.servers()))
		}
		publish(t, s, makePath(t, "after", 1000))
		stop()
		// Once is enough.
		cfg.NewEpoch = false
		s, stop = start(t, cfg)
		if again := newest(t, s); again.Epoch != list.Epoch {
			t.Errorf("the next start began epoch %d", again.Epoch)
		}
		stop()
	}
	if err := content.Restored(newestOf(epochs[0], ahead), ahead); !errors.Is(err, flox.ErrUntrusted) {
		t.Errorf("back to the epoch before: %v", err)
	}
}

// newestOf is a list in an epoch.
func newestOf(epoch uint64, list *content.TrustList) *content.TrustList {
	next := *list
	next.Epoch = epoch
	return &next
}
