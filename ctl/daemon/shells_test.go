package daemon

import (
	"bytes"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox/ctl/cli"
)

// needProgram skips a test where a program is missing, and fails it under CI.
func needProgram(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("this test needs %s, and CI must have it (scripts/setup)", name)
	}
	t.Skipf("needs %s", name)
	return ""
}

// hooked is a machine whose shells have been set up, and a list of the agent's.
func hooked(t *testing.T) *shellHooks {
	t.Helper()
	s := &shellHooks{root: t.TempDir(), list: filepath.Join(t.TempDir(), "it's the list")}
	write(t, filepath.Join(s.root, "etc/zsh/zshenv"), "# theirs")
	files, wrote, err := s.install()
	if err != nil || !wrote || len(files) != 3 {
		t.Fatal(files, wrote, err)
	}
	if _, wrote, err := s.install(); err != nil || wrote {
		t.Fatal("a second time: ", wrote, err)
	}
	return s
}

// hookShells are how shells read their file and say what they have then.
func hookShells(s *shellHooks) map[string][]string {
	const says = `; printf '%s\n' "$PATH" "$(printenv MANPATH || echo unset)" "$(printenv XDG_DATA_DIRS || echo unset)"`
	hook := "'" + filepath.Join(s.root, profileHook) + "'"
	return map[string][]string{
		"dash": {"-euc", ". " + hook + "; . " + hook + says},
		"bash": {"-euc", ". " + hook + "; . " + hook + says},
		"zsh":  {"-efc", "unsetopt unset; . '" + s.zsh() + "'; . " + hook + says + "; print -l $fpath | grep -c /flox/"},
		"fish": {"--no-config", "-c", "for i in 1 2; source '" + filepath.Join(s.root, fishHook) + `'; end; printf '%s\n' (string join : $PATH) (set -q MANPATH; and string join : $MANPATH; or echo unset) (set -q XDG_DATA_DIRS; and echo $XDG_DATA_DIRS; or echo unset); string match '/flox/*' $fish_complete_path | count`},
	}
}

// A new shell has the user's profile first, then those that are assigned, once; others'
// never. While nothing is shown it has nothing of them.
func TestShellsFindProfiles(t *testing.T) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	mine := "/flox/" + me.Username + "/default"
	for shell := range hookShells(&shellHooks{}) {
		t.Run(shell, func(t *testing.T) {
			program := needProgram(t, shell)
			s := hooked(t)
			run := func(env ...string) []string {
				t.Helper()
				cmd := exec.CommandContext(t.Context(), program, hookShells(s)[shell]...)
				cmd.Env = append([]string{"PATH=/usr/bin:/bin", "HOME=" + t.TempDir()}, env...)
				cmd.Stderr = os.Stderr
				out, err := cmd.Output()
				if err != nil && len(out) == 0 {
					t.Fatal(err)
				}
				return strings.Split(strings.TrimSpace(string(out)), "\n")[:3]
			}
			if d := cmp.Diff([]string{"/usr/bin:/bin", "unset", "unset"}, run()); d != "" {
				t.Errorf("nothing is shown: -want +got\n%s", d)
			}
			write(t, s.list, "* /flox/acme/base\nsomebody-else /flox/somebody-else/default\n"+me.Username+" "+mine+"\n")
			want := []string{
				mine + "/bin:/flox/acme/base/bin:/usr/bin:/bin", mine + "/share/man:/flox/acme/base/share/man:",
				mine + "/share:/flox/acme/base/share:/usr/local/share:/usr/share",
			}
			got := run()
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("-want +got\n%s", d)
			}
			nested := []string{"PATH=/mine:" + got[0], "MANPATH=" + got[1], "XDG_DATA_DIRS=/data:" + got[2]}
			if d := cmp.Diff([]string{"/mine:" + want[0], want[1], "/data:" + want[2]}, run(nested...)); d != "" {
				t.Errorf("a shell in a shell: -want +got\n%s", d)
			}
		})
	}
}

// What join wrote goes again, and nothing else; what is somebody's stays.
func TestShellHooksAreTakenBack(t *testing.T) {
	s := hooked(t)
	drop := filepath.Join(s.root, cli.SudoersDropIn)
	write(t, drop, cli.SudoersHead+"\nDefaults:anna secure_path=\"/bin\"\n")
	if err := s.remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(drop); !os.IsNotExist(err) {
		t.Errorf("sudo still looks for profiles: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(s.root, "etc/zsh/zshenv")); err != nil || string(b) != "# theirs" {
		t.Errorf("zshenv is %q, %v", b, err)
	}
	for _, name := range []string{profileHook, "etc/fish"} {
		if _, err := os.Lstat(filepath.Join(s.root, name)); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", name, err)
		}
	}
	for range 2 {
		write(t, filepath.Join(s.root, profileHook), "echo mine\n")
		if files, _, err := s.install(); err != nil || len(files) != 2 {
			t.Errorf("beside somebody's file: %v, %v", files, err)
		}
		if err := s.remove(); err != nil {
			t.Error(err)
		}
		if b, err := os.ReadFile(filepath.Join(s.root, profileHook)); err != nil || string(b) != "echo mine\n" {
			t.Errorf("it is %q, %v", b, err)
		}
	}
}

// Where the files cannot all be written up goes on, and takes back those that were.
func TestUpGoesOnWithoutShells(t *testing.T) {
	s := &shellHooks{root: t.TempDir(), list: filepath.Join(t.TempDir(), "list")}
	if err := os.MkdirAll(filepath.Join(s.root, fishHook), 0o755); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	u := &up{log: slog.New(slog.NewTextHandler(&log, nil))}
	undo := u.hookShells(s)
	if !strings.Contains(log.String(), "new shells do not all find profiles") {
		t.Errorf("it says %q", log.String())
	}
	if _, err := os.Lstat(filepath.Join(s.root, profileHook)); err != nil {
		t.Errorf("what can be written is not: %v", err)
	}
	undo()
	if _, err := os.Lstat(filepath.Join(s.root, profileHook)); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	u.hookShells(nil)()
}

// An agent that mounts no profiles changes no shell.
func TestNoShellHooksWithoutProfiles(t *testing.T) {
	cfg := DefaultConfig()
	if s := newShellHooks(cfg); s == nil || s.list != "/run/floxd/shell-profiles" {
		t.Errorf("the usual agent has %+v", s)
	}
	cfg.Profiles = noProfiles
	if s := newShellHooks(cfg); s != nil {
		t.Errorf("one that mounts none has %+v", s)
	}
}
