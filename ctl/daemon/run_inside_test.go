package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent"
)

// TestOwnAgentLeavesNewerState: what a newer version wrote is refused before anything
// is mounted, by the parent of an agent of one's own, too.
func TestOwnAgentLeavesNewerState(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	mark := filepath.Join(dir, agentDir, "format.json")
	text := fmt.Sprintf(`{"format":%d,"version":"9.9"}`, agent.StateFormat+1)
	if err := errors.Join(os.Mkdir(filepath.Dir(mark), 0o700), os.WriteFile(mark, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cfg := DefaultConfig()
	cfg.StateDir, cfg.RunDir = dir, filepath.Join(dir, "run")
	// Without the check it would go on to a mount point that there is not.
	p := &roomPlan{Mode: modeFUSE, Config: cfg, MountDir: filepath.Join(dir, "none", "mnt"), UID: os.Geteuid(), GID: os.Getegid()}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err = p.serve(ctx, log)
	if !errors.Is(err, flox.ErrBadInput) || !strings.Contains(fmt.Sprint(err), `floxd "9.9"`) {
		t.Errorf("state of a newer version: %v", err)
	}
	if b, err := os.ReadFile(mark); err != nil || string(b) != text {
		t.Errorf("it was marked %s: %v", b, err)
	}
}
