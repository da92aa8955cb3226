package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// The log-dir of stock Nix leads into the mount, and back to nothing. What an agent
// kept there itself goes; what is a Nix's of this machine stays, and it is said.
func TestLogDirsAreLinkedAndBack(t *testing.T) {
	const agentUser = 4711
	who := account{uid: agentUser, gid: agentUser}
	for name, c := range map[string]struct {
		owner int // of the directory that is there; -1 = there is none
		stays bool
	}{"none": {-1, false}, "a Nix's": {0, true}, "an agent's": {agentUser, false}} {
		t.Run(name, func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("needs root to give directories away")
			}
			top := t.TempDir()
			cfg := &Config{StoreDir: filepath.Join(top, "store"), RunDir: filepath.Join(top, "run")}
			drvs, own := filepath.Join(top, "var/log/nix/drvs"), filepath.Join(cfg.RunDir, "nix-log/drvs")
			log := filepath.Join(drvs, "0c", "made.drv")
			if c.owner >= 0 {
				err := errors.Join(os.MkdirAll(filepath.Dir(log), 0o755), os.WriteFile(log, []byte("a line\n"), 0o644), os.Chown(drvs, c.owner, c.owner))
				if err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				if err := makeNixLogDirs(cfg, who); errors.Is(err, errOthersLogs) != c.stays || !c.stays && err != nil {
					t.Errorf("making them: %v", err)
				}
			}
			for link, ours := range map[string]bool{own: true, drvs: !c.stays} {
				if to, err := os.Readlink(link); (err == nil && to == filepath.Join(cfg.StoreDir, ".build-logs")) != ours {
					t.Errorf("%s leads to %q, %v", link, to, err)
				}
			}
			for range 2 {
				if err := removeNixLogDirs(cfg); err != nil {
					t.Fatal(err)
				}
			}
			for file, left := range map[string]bool{log: c.stays, filepath.Dir(drvs): c.stays, filepath.Dir(own): false} {
				if _, err := os.Lstat(file); (err == nil) != left {
					t.Errorf("afterwards %s: %v", file, err)
				}
			}
		})
	}
}
