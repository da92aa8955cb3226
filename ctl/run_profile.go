package ctl

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// profilesDir holds everybody's profiles as links, where they are mounted.
const profilesDir = "/flox"

// profileLink gives the link a profile's name stands for.
func profileLink(name string) (string, error) { return profileIn(profilesDir, name) }

func profileIn(dir, name string) (string, error) {
	if filepath.IsAbs(name) || strings.HasPrefix(name, "./") || strings.HasPrefix(name, "../") {
		return name, nil
	}
	owner, rest, split := strings.Cut(name, "/")
	if !split || owner == "" || rest == "" || strings.Contains(rest, "/") {
		return "", cli.Explain(flox.ErrBadInput, "profile %q: want OWNER/NAME, or a link written with a directory such as ~/.nix-profile or ./result", name)
	}
	link := filepath.Join(dir, owner, rest)
	_, err := os.Lstat(link)
	switch {
	case err == nil:
		return link, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", cli.Explain(flox.ErrUnreachable, "profile %s: %v", name, err)
	}
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return "", cli.Explain(flox.ErrNotFound, "profile %s: this machine has no %s, where profiles of the storehouse are shown; name a link to a store path instead, such as -p ~/.nix-profile", name, dir)
	}
	return "", cli.Explain(flox.ErrNotFound, "profile %s: there is no %s", name, link)
}
