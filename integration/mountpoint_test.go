package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/floxctl/flox/ctl/cli"
)

// halfEnv says that another process of the tests cleans up.
const halfEnv = "FLOX_HALF"

// mountPoint is the directory that agents make for profiles. Hosts share the real
// machine's root directory, so it is there as well, and an agent that took its own away
// would take the others' mounts away with it.
type mountPoint struct{ was bool }

// lookForMountPoint is called before there is any agent.
func lookForMountPoint() mountPoint {
	_, err := os.Lstat(cli.DefaultProfilesDir)
	return mountPoint{was: !errors.Is(err, fs.ErrNotExist) || os.Getenv(halfEnv) != ""}
}

// remove takes it away if these tests' agents made it, and nobody else uses it.
func (m mountPoint) remove() error {
	if m.was {
		return nil
	}
	tables, err := filepath.Glob("/proc/[0-9]*/mountinfo")
	if err != nil {
		return err
	}
	for _, table := range tables {
		if b, err := os.ReadFile(table); err == nil && strings.Contains(string(b), " "+cli.DefaultProfilesDir+" ") {
			return nil
		}
	}
	err = os.Remove(cli.DefaultProfilesDir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTEMPTY) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("where agents showed profiles: %w", err)
	}
	return nil
}
