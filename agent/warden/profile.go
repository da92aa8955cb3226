package warden

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/floxctl/flox"
)

// maxHops is how many links are followed, as the kernel does.
const maxHops = 40

// Profiles reads where links lead that name the generation of something, such as
// Nix's profiles. It waits for no file system for long, and asks nothing of the
// store.
type Profiles struct {
	storeDir, mountDir string
	reads              *reads
}

// NewProfiles is for who has no warden: it reads with the rights of this process.
func NewProfiles(storeDir string) *Profiles {
	return &Profiles{storeDir: storeDir, mountDir: storeDir, reads: &reads{}}
}

// Read gives the store path, a base name, that a link leads to, over other links
// or at once. ErrNotFound: there is no such link, or it leads elsewhere; where, is
// not said. ErrUnread: its file system does not answer, or refuses.
func (p *Profiles) Read(link string) (name string, err error) {
	read, ok := patiently(p.reads, link, rootOwner(link, link), func() linkRead { return p.lead(link) })
	if !ok || read.failed {
		return "", fmt.Errorf("profile %s: its file system does not answer, or refuses: %w", link, ErrUnread)
	}
	if read.target == "" {
		return "", fmt.Errorf("profile %s: no link that leads to a path in %s: %w", link, p.storeDir, flox.ErrNotFound)
	}
	return read.target, nil
}

// lead follows one link after the other, the first on the way first, so that no
// directory is left through a link of ours.
func (p *Profiles) lead(at string) linkRead {
	for range maxHops {
		if rest, inside := strings.CutPrefix(at, p.storeDir+"/"); inside {
			name, _, _ := strings.Cut(rest, "/")
			if _, err := flox.ParseStorePath(name); err != nil {
				name = ""
			}
			return linkRead{target: name}
		}
		if strings.HasPrefix(at, p.mountDir+"/") { // would be asked of whom it is asked for
			return linkRead{}
		}
		next, failed := firstLink(at)
		if next == "" || len(next) >= maxLink {
			return linkRead{failed: failed}
		}
		at = next
	}
	return linkRead{}
}

// firstLink replaces the first symlink on the way to a name by where it points;
// "": there is none.
func firstLink(name string) (next string, failed bool) {
	for end := 1; end <= len(name); end++ {
		if end < len(name) && name[end] != '/' {
			continue
		}
		at := name[:end]
		target, err := os.Readlink(at)
		switch {
		case err != nil && !noLink(err):
			return "", true
		case err != nil:
			continue
		case !filepath.IsAbs(target):
			target = filepath.Join(filepath.Dir(at), target)
		}
		return filepath.Join(target, name[end:]), false
	}
	return "", false
}

// Profile is Profiles.Read with the warden's rights. ErrBadInput: the parent is
// older and cannot tell.
func (c *Conn) Profile(ctx context.Context, link string) (name string, err error) {
	a, err := c.ask(ctx, question{Ask: askProfile, Link: link})
	return a.Text, err
}
