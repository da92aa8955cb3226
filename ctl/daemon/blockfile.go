package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/floxctl/flox"
)

// The lines of somebody's file between which everything is ours.
const (
	blockBegin = "# floxd join wrote this; floxd leave removes it."
	blockEnd   = "# Here ends what floxd join wrote."
	// What the file was before, where the rest of it does not show that.
	blockOpen  = "# The line before had no end."
	blockEmpty = "# The file was empty."
)

// blockFile is a file that we add lines to, as it is on the disk.
type blockFile struct {
	name  string // of the file itself, where its usual name is a link
	text  string
	there bool
	mode  fs.FileMode
	owner *syscall.Stat_t // nil: it is to be made
}

func readBlockFile(usual string) (*blockFile, error) {
	name, err := filepath.EvalSymlinks(usual)
	if errors.Is(err, fs.ErrNotExist) {
		if to, linkErr := os.Readlink(usual); linkErr == nil {
			return nil, fmt.Errorf("%s leads to %s, which is not there: make it, or remove the link: %w", usual, to, flox.ErrNotFound)
		}
		return &blockFile{name: usual, mode: 0o644}, nil
	}
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	owner, _ := info.Sys().(*syscall.Stat_t)
	return &blockFile{name: name, text: string(b), there: true, mode: info.Mode().Perm(), owner: owner}, nil
}

// replace writes the file anew, for whom it belonged to.
func (f *blockFile) replace(text string) error {
	if err := replaceFile(f.name, text, f.mode); err != nil || f.owner == nil {
		return err
	}
	return os.Lchown(f.name, int(f.owner.Uid), int(f.owner.Gid))
}

// withoutBlock gives what a file was before join wrote to it, whether it was there, and
// whether join did write.
func (f *blockFile) withoutBlock() (theirs string, there, had bool) {
	before, after, ok := strings.Cut(f.text, blockBegin+"\n")
	if !ok {
		return f.text, f.there, false
	}
	ours, after, ok := strings.Cut(after, blockEnd+"\n")
	if !ok {
		return f.text, f.there, false // somebody changed it: it is theirs now
	}
	if strings.HasPrefix(ours, blockOpen+"\n") && after == "" {
		before = strings.TrimSuffix(before, "\n")
	}
	theirs = before + after
	return theirs, theirs != "" || strings.HasPrefix(ours, blockEmpty+"\n"), true
}

// withBlock gives a file with our lines at its end.
func withBlock(theirs string, there bool, lines ...string) string {
	block := []string{blockBegin}
	switch {
	case theirs == "" && there:
		block = append(block, blockEmpty)
	case theirs != "" && !strings.HasSuffix(theirs, "\n"):
		theirs += "\n"
		block = append(block, blockOpen)
	}
	block = append(append(block, lines...), blockEnd, "")
	return theirs + strings.Join(block, "\n")
}

// removeBlock takes our lines out of a file, and the file away if it is ours alone.
func removeBlock(name string) error {
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	old, err := readBlockFile(name)
	if err != nil {
		return err
	}
	theirs, there, had := old.withoutBlock()
	switch {
	case !had:
		return nil
	case !there: // it was made for them
		return removeFile(old.name)
	}
	return old.replace(theirs)
}
