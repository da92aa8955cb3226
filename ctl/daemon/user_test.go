package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
)

// asRoot skips a test that gives files away, and fails it under CI.
func asRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root, and CI must be")
	}
	t.Skip("needs root")
}

// ownerOf is the uid of a file, or of a link itself.
func ownerOf(t *testing.T, path string) uint32 {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Uid
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

var somebody = account{name: "somebody", uid: 65533, gid: 65532}

// A state directory changes hands with everything in it, and nothing that links
// in it lead to does.
func TestHandOver(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	write(t, dir+"/state/agent/cache/block", "x")
	write(t, dir+"/roots/secret", "x")
	for _, name := range []string{"file", "cache/dir"} {
		if err := os.Symlink(dir+"/roots", dir+"/state/agent/"+name); err != nil {
			t.Fatal(err)
		}
	}
	if err := giveTo(dir+"/state/agent", somebody); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]uint32{
		"state": 0, "state/agent": somebody.uid, "state/agent/cache/block": somebody.uid,
		"state/agent/cache/dir": somebody.uid, "roots": 0, "roots/secret": 0,
	} {
		if got := ownerOf(t, dir+"/"+path); got != want {
			t.Errorf("%s belongs to %d, want %d", path, got, want)
		}
	}

	// One that is a link is not followed either.
	if err := os.Symlink(dir+"/roots", dir+"/state/storehouse"); err != nil {
		t.Fatal(err)
	}
	if err := giveTo(dir+"/state/storehouse", somebody); err != nil {
		t.Fatal(err)
	}
	if ownerOf(t, dir+"/roots") != 0 || ownerOf(t, dir+"/roots/secret") != 0 {
		t.Error("what a link in the state directory leads to was given away")
	}
}

// Root empties no file through a link somebody put in the place of a lock.
func TestLockFollowsNoLink(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/precious", "x")
	if err := os.Symlink(dir+"/precious", dir+"/agent.lock"); err != nil {
		t.Fatal(err)
	}
	if lock, err := lockState(dir, agentLock, "agent"); !errors.Is(err, unix.ELOOP) {
		t.Errorf("lock: %v, want ELOOP", err)
		lock.Close()
	}
	if b, err := os.ReadFile(dir + "/precious"); err != nil || string(b) != "x" {
		t.Errorf("the file behind the link holds %q (%v)", b, err)
	}
}

// The child gets the invite that was checked, whole and for its eyes only, and
// it is written nowhere but in the state directory.
func TestInstallInvite(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	invite := &api.Invite{
		Version: api.InviteVersion, Name: "test", Secret: make([]byte, 32), TrustList: flox.CID{1}, StoreDir: flox.DefaultStoreDir,
		Storehouse: []api.InvitePeer{{ID: "id", Addrs: []string{"127.0.0.1:1"}}}, NixKey: "test-1:key",
	}
	from, to := dir+"/invite.json", dir+"/state/agent/invite.json"
	if err := invite.Save(from); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir+"/state/agent", 0o700); err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.StateDir = dir + "/state"
	for range 2 { // the second finds it installed
		if err := installInvite(cfg, from, somebody); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := os.Stat(to); err != nil || info.Mode().Perm() != 0o600 || ownerOf(t, to) != somebody.uid {
		t.Errorf("the installed invite: %v, %v", info, err)
	}
	if _, err := api.LoadInvite(to); err != nil {
		t.Error(err)
	}
	if names, err := os.ReadDir(cfg.StateDir); err != nil || len(names) != 1 {
		t.Errorf("left in the state directory: %v (%v)", names, err)
	}

	// A directory that leads elsewhere is not written to.
	if err := os.RemoveAll(dir + "/state/agent"); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/elsewhere/other", "x")
	if err := os.Symlink(dir+"/elsewhere", dir+"/state/agent"); err != nil {
		t.Fatal(err)
	}
	if err := installInvite(cfg, from, somebody); err == nil {
		t.Error("an invite was installed through a link out of the state directory")
	}
	if names, err := os.ReadDir(dir + "/elsewhere"); err != nil || len(names) != 1 {
		t.Errorf("behind the link: %v (%v)", names, err)
	}
}

// What is given to the child's user is a directory of the agent's own.
func TestRunDirIsNobodyElses(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	write(t, dir+"/full/other", "x")
	write(t, dir+"/used/agent.sock", "x")
	if err := errors.Join(os.Mkdir(dir+"/empty", 0o755), os.Chown(dir+"/used", int(somebody.uid), int(somebody.gid))); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]error{"full": flox.ErrBadInput, "used": nil, "empty": nil, "none": nil} {
		if err := checkRunDir(dir + "/" + name); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
}
