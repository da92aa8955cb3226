package ctl

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/floxctl/flox/ctl/cli"
)

// aSudoer is a machine with sudo and profiles, as its user anna's sudo sees it.
func aSudoer(t *testing.T, sudoers string) (patient, *cobra.Command) {
	t.Helper()
	p := patient{root: t.TempDir(), socket: filepath.Join(t.TempDir(), "agent.sock")}
	for name, text := range map[string]string{
		filepath.Join(p.root, sudoersFile):          sudoers,
		filepath.Join(p.root, sudoersDir, "README"): "# none\n",
		p.shellList(): "* /flox/acme/base\nbob /flox/bob/default\nanna /flox/anna/default\n",
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("SUDO_USER", "anna")
	cmd := &cobra.Command{}
	cmd.SetContext(t.Context())
	cmd.SetIn(&bytes.Buffer{})
	return p, cmd
}

// Doctor notices that sudo does not find what shells find, and mends it once it may, with
// what the user has, behind the rest; what visudo does not take changes nothing.
func TestDoctorHasSudoFindProfiles(t *testing.T) {
	p, cmd := aSudoer(t, "Defaults env_reset\nDefaults secure_path=\"/usr/sbin:/usr/bin\"\n")
	out := &output{w: &bytes.Buffer{}}
	found := checkSudo(t.Context(), p)
	if len(found) != 1 || found[0].Level != levelWarning || !strings.Contains(found[0].What, "lacks /flox/anna/default/bin, /flox/acme/base/bin") {
		t.Fatalf("it finds %+v", found)
	}
	if err := fixSudo(cmd, p, false, out); err == nil {
		t.Error("nobody said yes")
	}
	file := filepath.Join(p.root, cli.SudoersDropIn)
	if _, err := os.Lstat(file); !os.IsNotExist(err) {
		t.Errorf("before it may it wrote it: %v", err)
	}
	for range 2 {
		if err := fixSudo(cmd, p, true, out); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if want := "\nDefaults:anna secure_path=\"/usr/sbin:/usr/bin:/flox/anna/default/bin:/flox/acme/base/bin\"\n"; err != nil || !strings.HasSuffix(string(b), want) {
			t.Errorf("sudo is told %q, %v", b, err)
		}
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o440 {
		t.Errorf("%v, %v", info, err)
	}
	if found := checkSudo(t.Context(), p); len(found) != 1 || found[0].Level != levelOK {
		t.Errorf("afterwards it finds %+v", found)
	}
	bad := filepath.Join(filepath.Dir(file), "bad")
	if err := writeDropIn(t.Context(), bad, "Defaults secure_path==\n"); err == nil {
		if os.Getenv("CI") == "true" {
			t.Error("what visudo does not take was written")
		}
	} else if names, _ := filepath.Glob(bad + "*"); len(names) > 0 {
		t.Errorf("left: %q", names)
	}
}

// Sudo that passes PATH on, and a machine that shows no profiles, are well.
func TestDoctorLeavesSudoAlone(t *testing.T) {
	p, _ := aSudoer(t, "Defaults env_reset\n# Defaults secure_path=\"/bin\"\n")
	if found := checkSudo(t.Context(), p); len(found) > 0 {
		t.Errorf("without secure_path it finds %+v", found)
	}
	p, cmd := aSudoer(t, "Defaults secure_path=/bin\n")
	if err := os.Remove(p.shellList()); err != nil {
		t.Fatal(err)
	}
	if found := checkSudo(t.Context(), p); len(found) > 0 {
		t.Errorf("without profiles it finds %+v", found)
	}
	if err := fixSudo(cmd, p, true, &output{w: &bytes.Buffer{}}); err != nil {
		t.Error(err)
	}
}

// What is of one user is never on the path of another one's sudo, whoever asks for it in
// which order, nor what somebody set for one user alone.
func TestDoctorKeepsUsersApart(t *testing.T) {
	p, cmd := aSudoer(t, "Defaults secure_path=\"/usr/bin\"\nDefaults:eve secure_path=\"/eve\"\nDefaults!/bin/x secure_path=\"/x\"\n")
	fix := func(user, want string) {
		t.Helper()
		t.Setenv("SUDO_USER", user)
		if found := checkSudo(t.Context(), p); len(found) != 1 || found[0].Level != levelWarning {
			t.Errorf("for %q it finds %+v", user, found)
		}
		if err := fixSudo(cmd, p, true, &output{w: &bytes.Buffer{}}); err != nil {
			t.Fatal(err)
		}
		if found := checkSudo(t.Context(), p); len(found) != 1 || found[0].Level != levelOK {
			t.Errorf("for %q it finds %+v afterwards", user, found)
		}
		b, err := os.ReadFile(filepath.Join(p.root, cli.SudoersDropIn))
		if err != nil || string(b) != cli.SudoersHead+"\n"+want {
			t.Errorf("for %q sudo is told %q, %v; want %q", user, b, err, want)
		}
	}
	const (
		anna = "Defaults:anna secure_path=\"/usr/bin:/flox/anna/default/bin:/flox/acme/base/bin\"\n"
		bob  = "Defaults:bob secure_path=\"/usr/bin:/flox/bob/default/bin:/flox/acme/base/bin\"\n"
		eve  = "Defaults:eve secure_path=\"/eve:/flox/acme/base/bin\"\n"
		all  = "Defaults secure_path=\"/usr/bin:/flox/acme/base/bin\"\n"
	)
	fix("anna", anna)
	fix("bob", anna+bob)
	fix("eve", anna+bob+eve)
	fix("", anna+bob+eve+all)
	// Another one is assigned to the machine.
	if err := os.WriteFile(p.shellList(), []byte("* /flox/acme/base\n* /flox/acme/new\nanna /flox/anna/default\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	fix("anna", bob+eve+all+"Defaults:anna secure_path=\"/usr/bin:/flox/anna/default/bin:/flox/acme/new/bin:/flox/acme/base/bin\"\n")
}
