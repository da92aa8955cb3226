package daemon

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/floxctl/flox/ctl"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"floxd": func() { os.Exit(Main()) }, "floxctl": func() { os.Exit(ctl.Main()) }})
}

// TestScripts runs floxd where it refuses to start: what it says then is all a
// user has to go on.
func TestScripts(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() })
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("TAKEN", taken.Addr().String())
			// What runs as another user must be able to pass.
			for _, dir := range []string{env.WorkDir, env.WorkDir + "/.."} {
				if err := os.Chmod(dir, 0o755); err != nil {
					return err
				}
			}
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond != "root" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			return os.Geteuid() == 0 || os.Getenv("CI") == "true", nil // under CI not being root must fail
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": runExits},
	})
}

// runExits is the script command `exits CODE program args...`.
func runExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE program args...")
	}
	got := "0"
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		got = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if got != args[0] {
		ts.Fatalf("%s exited %s, want %s", strings.Join(args[1:], " "), got, args[0])
	}
}
