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
	secure []string     // of the secure_path that others set
	adds   []string     // directories of profiles' programs that a shell finds, and that has not
	lacks  []string     // of those, what sudo does not find
	user   string       // for whom secure or one of adds is; "" = both are for everybody
	others []securePath // what our file says for others
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
	all, err := securePaths(root)
	if err != nil {
		return nil, err
	}
	ours := func(p securePath) bool { return p.ours }
	secure, named := secureFor(user, slices.DeleteFunc(slices.Clone(all), ours))
	if secure == nil {
		return nil, nil //nolint:nilnil // as above
	}
	s := &sudoPath{secure: secure}
	if named {
		s.user = user
	}
	for line := range strings.Lines(string(b)) {
		who, dir, _ := strings.Cut(strings.TrimSpace(line), " ")
		bin := dir + "/bin"
		if who != "*" && who != user || strings.ContainsAny(dir, "\"\\:,=!") || !filepath.IsAbs(dir) || slices.Contains(s.secure, bin) {
			continue
		}
		s.adds = append([]string{bin}, s.adds...) // the last of the list is the most important one
		if who == user {
			s.user = user
		}
	}
	has, _ := secureFor(user, all)
	s.lacks = slices.DeleteFunc(slices.Clone(s.adds), func(bin string) bool { return slices.Contains(has, bin) })
	s.others = slices.DeleteFunc(all, func(p securePath) bool { return !p.ours || p.scope == s.user })
	return s, nil
}

// securePath is one setting of secure_path in sudo's configuration.
type securePath struct {
	scope string // the users whose commands it is for, with commas between them; "" = everybody's
	dirs  []string
	ours  bool // it is in our file
}

// line is the setting as sudo reads it.
func (p securePath) line() string {
	scope := "Defaults"
	if p.scope != "" {
		scope += ":" + p.scope
	}
	return fmt.Sprintf("%s secure_path=\"%s\"\n", scope, strings.Join(p.dirs, ":"))
}

// secureFor is what the settings make of secure_path when a user calls sudo, nil for
// nothing: the last one, but one that names the user comes before those for everybody.
func secureFor(user string, all []securePath) (dirs []string, named bool) {
	for _, p := range all {
		switch is := user != "" && slices.Contains(strings.Split(p.scope, ","), user); {
		case is, p.scope == "" && !named:
			dirs, named = p.dirs, is
		}
	}
	return dirs, named
}

// securePaths gives the settings of secure_path in sudo's configuration in their order, but
// not those for hosts, commands, and users that a command is run as.
func securePaths(root string) (all []securePath, err error) {
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
		ours := file == filepath.Join(root, cli.SudoersDropIn) && strings.HasPrefix(string(b), cli.SudoersHead)
		for line := range strings.Lines(string(b)) {
			if p, ok := parseSecurePath(line); ok {
				p.ours = ours
				all = append(all, p)
			}
		}
	}
	return all, nil
}

// parseSecurePath reads a line of sudo's configuration; not ok: it sets no secure_path.
func parseSecurePath(line string) (p securePath, ok bool) {
	words, ok := strings.CutPrefix(strings.TrimSpace(line), "Defaults")
	if named, is := strings.CutPrefix(words, ":"); is {
		if at := strings.IndexAny(named, " \t"); at > 0 {
			p.scope, words = named[:at], named[at:]
		}
	}
	name, value, set := strings.Cut(words, "=")
	before, name, has := strings.Cut(name, "secure_path")
	if !ok || !set || !has || strings.TrimSpace(name) != "" || !strings.HasPrefix(before, " ") && !strings.HasPrefix(before, "\t") {
		return p, false
	}
	p.dirs = filepath.SplitList(strings.Trim(strings.TrimSpace(value), `"`))
	return p, true
}

// dropIn is the configuration that puts the profiles behind what sudo has, for whom they
// are: what it says for others stays.
func (s *sudoPath) dropIn() string {
	text := cli.SudoersHead + "\n"
	for _, p := range s.others {
		text += p.line()
	}
	return text + securePath{scope: s.user, dirs: slices.Concat(s.secure, s.adds)}.line()
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
	if errors.Is(err, fs.ErrPermission) {
		return cli.Explain(flox.ErrDenied, "only root sees what sudo makes of PATH (%v): run it with sudo", err)
	}
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
