package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/floxctl/flox/ctl/cli"
)

// What shells read by themselves, below the root directory.
const (
	profileHook = "etc/profile.d/floxd.sh"     // login shells of sh, bash and ksh
	fishHook    = "etc/fish/conf.d/floxd.fish" // fish
	zshHook     = "etc/zsh/zshenv"             // zsh, where the distribution has the directory
	zshOldHook  = "etc/zshenv"                 // zsh elsewhere
	hookHead    = blockBegin + "\n"            // the first line of files that are ours
)

// shHook is for sh, bash, ksh and zsh. LIST stands for the agent's list: who, and a
// directory. It may be read under set -eu, and again.
const shHook = hookHead + `# It puts profiles in front of PATH, MANPATH and XDG_DATA_DIRS: your own, and those that are
# assigned to this machine. The agent lists them while it shows them; nobody is asked.
if [ -r LIST ]; then
	_floxd_me=$(id -un 2>/dev/null) || _floxd_me=
	while read -r _floxd_who _floxd_dir; do
		case $_floxd_who in
		"$_floxd_me" | '*') ;;
		*) continue ;;
		esac
		case ":$PATH:" in
		*":$_floxd_dir/bin:"*) ;;
		*) export PATH="$_floxd_dir/bin${PATH:+:$PATH}" ;;
		esac
		case ":${MANPATH-}:" in
		*":$_floxd_dir/share/man:"*) ;;
		*) export MANPATH="$_floxd_dir/share/man:${MANPATH-}" ;;
		esac
		case ":${XDG_DATA_DIRS-}:" in
		*":$_floxd_dir/share:"*) ;;
		*) export XDG_DATA_DIRS="$_floxd_dir/share:${XDG_DATA_DIRS:-/usr/local/share:/usr/share}" ;;
		esac
		[ -z "${ZSH_VERSION-}" ] || eval 'fpath=("$_floxd_dir/share/zsh/site-functions" ${fpath:#$_floxd_dir/share/zsh/site-functions})'
	done <LIST
	unset _floxd_me _floxd_who _floxd_dir
fi
`

// fishHookText is the same for fish.
const fishHookText = hookHead + `# It puts profiles in front of PATH, MANPATH, XDG_DATA_DIRS and fish_complete_path: your own,
# and those that are assigned to this machine. The agent lists them while it shows them;
# nobody is asked.
if test -r LIST
    set -l me (id -un 2>/dev/null)
    while read -l who dir
        contains -- $who $me '*'; or continue
        contains -- $dir/bin $PATH; or set -gx PATH $dir/bin $PATH
        set -q MANPATH; or set -gx MANPATH ''
        contains -- $dir/share/man $MANPATH; or set -gx MANPATH $dir/share/man $MANPATH
        set -q XDG_DATA_DIRS; or set -gx XDG_DATA_DIRS /usr/local/share:/usr/share
        contains -- $dir/share (string split : -- "$XDG_DATA_DIRS"); or set -gx XDG_DATA_DIRS $dir/share:"$XDG_DATA_DIRS"
        set -l completions $dir/share/fish/vendor_completions.d
        contains -- $completions $fish_complete_path; or set -gp fish_complete_path $completions
    end <LIST
end
`

// shellHooks has the shells of this machine put profiles on their paths.
type shellHooks struct {
	root string // "/"
	list string // the agent's file that says whose paths get which profiles
}

// shellList is that file.
func shellList(cfg *Config) string { return filepath.Join(cfg.RunDir, cli.ShellListName) }

// newShellHooks gives nil where no profiles are shown.
func newShellHooks(cfg *Config) *shellHooks {
	if dir, _ := cfg.profilesDir(); dir == "" {
		return nil
	}
	return &shellHooks{root: "/", list: shellList(cfg)}
}

// zsh is the file that zsh reads first, "" where there is no zsh.
func (s *shellHooks) zsh() string {
	if info, err := os.Stat(filepath.Join(s.root, filepath.Dir(zshHook))); err == nil && info.IsDir() {
		return filepath.Join(s.root, zshHook)
	}
	for _, name := range []string{zshOldHook, "etc/zshrc"} {
		if _, err := os.Lstat(filepath.Join(s.root, name)); err == nil {
			return filepath.Join(s.root, zshOldHook)
		}
	}
	if _, err := exec.LookPath("zsh"); err == nil {
		return filepath.Join(s.root, zshOldHook)
	}
	return ""
}

// install gives the files that profiles get into shells by, and whether it wrote any. A
// file of that name that is somebody's stays as it is. It may be called again.
func (s *shellHooks) install() (files []string, wrote bool, err error) {
	for _, h := range []struct{ name, text, list string }{{profileHook, shHook, cli.QuoteSh(s.list)}, {fishHook, fishHookText, cli.QuoteFish(s.list)}} {
		name, text := filepath.Join(s.root, h.name), strings.ReplaceAll(h.text, "LIST", h.list)
		has, err := os.ReadFile(name)
		switch {
		case err == nil && !strings.HasPrefix(string(has), hookHead):
			continue
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return nil, wrote, fmt.Errorf("shells of this machine: %w", err)
		}
		files = append(files, name)
		if string(has) == text {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil { //nolint:gosec // everybody's shells read it
			return nil, wrote, fmt.Errorf("shells of this machine: %w", err)
		}
		if err := replaceFile(name, text, 0o644); err != nil {
			return nil, wrote, fmt.Errorf("shells of this machine: %w", err)
		}
		wrote = true
	}
	zsh := s.zsh()
	if zsh == "" {
		return files, wrote, nil
	}
	old, err := readBlockFile(zsh)
	if err != nil {
		return nil, wrote, fmt.Errorf("shells of this machine: %w", err)
	}
	theirs, there, _ := old.withoutBlock()
	hook := cli.QuoteSh(filepath.Join(s.root, profileHook))
	text := withBlock(theirs, there, "[ ! -r "+hook+" ] || . "+hook)
	if text != old.text {
		wrote = true
		err = old.replace(text)
	}
	return append(files, zsh), wrote, err
}

// remove takes out what install put in, and nothing else.
func (s *shellHooks) remove() (err error) {
	for _, h := range []string{profileHook, fishHook} {
		name := filepath.Join(s.root, h)
		if has, readErr := os.ReadFile(name); readErr == nil && strings.HasPrefix(string(has), hookHead) {
			err = errors.Join(err, removeFile(name))
		}
	}
	drop := filepath.Join(s.root, cli.SudoersDropIn)
	if has, readErr := os.ReadFile(drop); readErr == nil && strings.HasPrefix(string(has), cli.SudoersHead+"\n") {
		err = errors.Join(err, removeFile(drop))
	}
	for dir := filepath.Join(s.root, filepath.Dir(fishHook)); filepath.Base(dir) != "etc"; dir = filepath.Dir(dir) {
		_ = os.Remove(dir) // one that install made; another one is not empty
	}
	for _, name := range []string{zshHook, zshOldHook} {
		err = errors.Join(err, removeBlock(filepath.Join(s.root, name)))
	}
	return err
}
