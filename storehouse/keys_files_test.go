package storehouse

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox/nix"
)

// keyFiles are the secrets that lie in files of a state directory.
func keyFiles(t *testing.T, stateDir string) map[string]bool {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(stateDir, keysDir))
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, e := range entries {
		there[e.Name()] = true
	}
	return there
}

// Keys that retired are in no file of the first server, and it goes on with those
// in its log, also after it was started again.
func TestRetiredKeysLeaveTheDisk(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	soonSigned(&cfg)
	s, stop := start(t, cfg)
	before := makePath(t, "before", 1000)
	publish(t, s, before)
	rotateAt(t, s, "", time.Hour)
	if there := keyFiles(t, cfg.StateDir); !there[nixKeyName] || !there[manifestName] || !there[swarmName] {
		t.Fatalf("files %v are left while all keys are in force", there)
	}
	rotateAt(t, s, "", time.Second)
	eventually(t, "only the machine's key lies in a file", func() bool {
		there := keyFiles(t, cfg.StateDir)
		return there[machineKeyName] && len(there) == 1
	})
	signer := s.PublicKey()
	stop()

	// A key that was never this storehouse's is not ours to remove.
	foreign, err := nix.GenerateKey("foreign-1")
	if err != nil {
		t.Fatal(err)
	}
	put := filepath.Join(cfg.StateDir, keysDir, nixKeyName)
	if err := os.WriteFile(put, []byte(foreign.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, stop = start(t, cfg)
	if s.PublicKey() != signer {
		t.Errorf("after a restart it signs with %s, want %s", s.PublicKey(), signer)
	}
	after := makePath(t, "after", 1000)
	publish(t, s, after)
	for _, p := range []testPath{before, after} {
		if err := newest(t, s).VerifyInfo(s.cfg.StoreDir, factsOf(t, s, p)); err != nil {
			t.Error(err)
		}
	}
	for range 2 { // the second is written when what follows the first is done
		rotateAt(t, s, useToken, time.Hour)
		eventually(t, "the new token is in its file", func() bool {
			b, err := os.ReadFile(s.cfg.UploadTokenFile)
			return err == nil && strings.TrimSpace(string(b)) == s.id.ring.now.Load().all.GetUploadToken()
		})
	}
	stop()
	if _, err := os.Stat(put); errors.Is(err, os.ErrNotExist) {
		t.Error("a key that somebody put there is gone")
	}
}
