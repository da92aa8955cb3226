package ctl

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

const (
	sudoersFile = "/etc/sudoers"
	sudoersDir  = "/etc/sudoers.d"
)

// sudoPath is what sudo makes of PATH on this machine, and what it lacks.
type sudoPath struct {
	secure []string // of secure_path
	lacks  []string // directories of profiles' programs that a shell finds and sudo does not
	user   string   // for whom one of them is, beside everybody; "" = nobody
}

// readSudoPath reads what root only may read; nil: sudo passes PATH on, or is not there, or
// no profiles are shown here. The list is the agent's, as shells read it.
func readSudoPath(root, list, user string) (*sudoPath, error) {
	b, err := os.ReadFile(list)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // as above
	}
	if err != nil {
		return nil, err
	}
	secure, err := securePath(root)
	if err != nil || secure == nil {
		return nil, err
	}
	s := &sudoPath{secure: secure}
	for line := range strings.Lines(string(b)) {
		who, dir, _ := strings.Cut(strings.TrimSpace(line), " ")
		bin := dir + "/bin"
		if who != "*" && who != user || strings.ContainsAny(dir, "\"\\:,=!") || !filepath.IsAbs(dir) || slices.Contains(secure, bin) {
			continue
		}
		s.lacks = append([]string{bin}, s.lacks...) // the last of the list is the most important one
		if who == user {
			s.user = user
		}
	}
	return s, nil
}

// securePath is the last secure_path that sudo's configuration sets, nil for none.
func securePath(root string) (dirs []string, err error) {
	files := []string{filepath.Join(root, sudoersFile)}
	entries, err := os.ReadDir(filepath.Join(root, sudoersDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries { // sudoers(5): others are passed over
		if !strings.Contains(e.Name(), ".") && !strings.HasSuffix(e.Name(), "~") {
			files = append(files, filepath.Join(root, sudoersDir, e.Name()))
		}
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(b)) {
			words, ok := strings.CutPrefix(strings.TrimSpace(line), "Defaults")
			name, value, set := strings.Cut(words, "=")
			_, name, scoped := strings.Cut(name, "secure_path")
			if ok && set && scoped && strings.TrimSpace(name) == "" {
				dirs = filepath.SplitList(strings.Trim(strings.TrimSpace(value), `"`))
			}
		}
	}
	return dirs, nil
}

// dropIn is the configuration that puts the profiles behind what sudo has.
func (s *sudoPath) dropIn() string {
	scope := "Defaults"
	if s.user != "" {
		scope = "Defaults:" + s.user
	}
	return fmt.Sprintf("%s\n%s secure_path=\"%s\"\n", cli.SudoersHead, scope, strings.Join(append(slices.Clone(s.secure), s.lacks...), ":"))
}

// checkSudo looks whether programs of profiles are found behind sudo.
func checkSudo(_ context.Context, p patient) []finding {
	s, err := readSudoPath(p.root, p.shellList(), os.Getenv("SUDO_USER"))
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil // others are told to ask with sudo by other checks
	case err != nil:
		return []finding{warning("sudo", "", "cannot see what sudo makes of PATH: %v", err)}
	case s == nil:
		return nil
	case len(s.lacks) == 0:
		return []finding{ok("sudo", "its secure_path has the profiles that shells have")}
	}
	return []finding{warning("sudo", "sudo floxctl doctor --fix writes "+cli.SudoersDropIn+", which puts them behind the rest",
		"programs of profiles are not found behind sudo: its secure_path lacks %s", strings.Join(s.lacks, ", "))}
}

// shellList is the agent's file for shells, beside its socket.
func (p patient) shellList() string {
	return filepath.Join(filepath.Dir(p.socket), cli.ShellListName)
}

// fixSudo writes the drop-in, after it was asked whether it may.
func fixSudo(cmd *cobra.Command, p patient, yes bool, out *output) error {
	s, err := readSudoPath(p.root, p.shellList(), os.Getenv("SUDO_USER"))
	if err != nil {
		return fmt.Errorf("what sudo makes of PATH: %w", err)
	}
	if s == nil || len(s.lacks) == 0 {
		return nil
	}
	text, file := s.dropIn(), filepath.Join(p.root, cli.SudoersDropIn)
	if has, err := os.ReadFile(file); err == nil && !strings.HasPrefix(string(has), cli.SudoersHead) {
		return cli.Explain(flox.ErrBusy, "%s is there and was not written by floxctl: remove it first", file)
	}
	if err := cli.Confirm(cmd, yes, fmt.Sprintf("Write %s?\n%s", file, text)); err != nil {
		return err
	}
	if err := writeDropIn(cmd.Context(), file, text); err != nil {
		return err
	}
	if !out.json {
		out.printf("Written: %s. Programs of profiles are found behind sudo.\n\n", file)
	}
	return nil
}

// writeDropIn writes a file of sudo's configuration whole or not at all, and only one that
// visudo finds right, where there is one: a wrong one would keep everybody from sudo.
func writeDropIn(ctx context.Context, file, text string) (err error) {
	// Sudo passes over a name with a dot, and wants nobody to write.
	t, err := os.OpenFile(file+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o440)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(t.Name())
		}
	}()
	_, err = t.WriteString(text)
	if err == nil {
		err = t.Chmod(0o440) // whatever the umask is
	}
	if err = errors.Join(err, t.Sync(), t.Close()); err != nil {
		return err
	}
	if visudo, lookErr := exec.LookPath("visudo"); lookErr == nil {
		if said, err := exec.CommandContext(ctx, visudo, "-cf", t.Name()).CombinedOutput(); err != nil {
			return fmt.Errorf("visudo does not take it, and nothing was changed: %s: %w", strings.TrimSpace(string(said)), err)
		}
	}
	return os.Rename(t.Name(), file)
}
