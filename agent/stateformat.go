package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
)

// StateFormat is the version of everything an agent has in its state directory.
// It is one more for every change after which a program that knows only what was
// before would misread that, or lose some of it.
const StateFormat = 1

// stateMark says who wrote a state directory; without one its format is 1.
type stateMark struct {
	Format  int    `json:"format"`
	Version string `json:"version"` // of the floxd that did
}

// maxStateMark is how many bytes of a mark are read.
const maxStateMark = 4096

func stateMarkIn(dir string) string { return filepath.Join(dir, "format.json") }

// CheckState refuses a state directory that a newer version wrote (ErrBadInput):
// what this one does not know of it would be lost. version is its own.
func CheckState(dir, version string) error {
	_, err := readStateMark(dir, version)
	return err
}

func readStateMark(dir, version string) (m stateMark, err error) {
	name := stateMarkIn(dir)
	// The directory is an ordinary user's, and root reads there too.
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, iofs.ErrNotExist) {
		return m, nil
	}
	var b []byte
	if err == nil {
		defer f.Close()
		if b, err = io.ReadAll(io.LimitReader(f, maxStateMark)); err == nil {
			err = json.Unmarshal(b, &m)
		}
	}
	switch {
	case err != nil || m.Format < 1:
		return m, fmt.Errorf("which version of floxd wrote the state directory %s is not known: %s: %w; delete that file if it was this one", dir, name, errors.Join(err, flox.ErrBadInput))
	case m.Format > StateFormat:
		return m, fmt.Errorf("the state directory %s was written by floxd %q in format %d; this is floxd %q, which knows formats up to %d and leaves it as it is: start floxd %q or a newer one, or give this one a --state-dir of its own: %w",
			dir, m.Version, m.Format, version, StateFormat, m.Version, flox.ErrBadInput)
	}
	return m, nil
}

// markState checks a state directory, and says that this version writes it now.
func markState(dir, version string) error {
	m, err := readStateMark(dir, version)
	if want := (stateMark{StateFormat, version}); err != nil || m == want {
		return err
	} else if b, err := json.Marshal(want); err != nil {
		return err
	} else if err := replaceFile(stateMarkIn(dir), b, 0o600, true); err != nil {
		return fmt.Errorf("agent state: %w", err)
	}
	return nil
}
