package room

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// Mounts lists where root has mounted stores of ours, as this process sees it:
// others may mount what looks like one, and must not be believed. It touches none
// of them.
func Mounts() []string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	return mounts(string(b))
}

// mounts finds them in a table of mounts (proc_pid_mountinfo(5)):
//
//	36 35 0:52 / /nix/store ro,nosuid,nodev - fuse.floxd floxd ro,user_id=0,group_id=0,allow_other
func mounts(table string) (dirs []string) {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(table) {
		left, right, split := strings.Cut(line, " - ")
		fields, tail := strings.Fields(left), strings.Fields(right)
		if !split || len(fields) < 5 || len(tail) < 2 {
			continue
		}
		dir := unescape.Replace(fields[4])
		// What is mounted later covers what was there.
		dirs = slices.DeleteFunc(dirs, func(d string) bool { return d == dir || strings.HasPrefix(d, dir+"/") })
		options := strings.Split(tail[len(tail)-1], ",")
		if tail[0] == cli.FilesystemType && tail[1] != cli.LinksSource && fields[3] == "/" && slices.Contains(options, "user_id=0") {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// There says why a store path at dir, where a store is, cannot be used.
func There(dir string) error {
	_, err := os.Lstat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return cli.Explain(flox.ErrNotFound, "%s is not valid in this storehouse", dir)
	case err != nil:
		return cli.Explain(flox.ErrUnreachable, "%s: nobody who knows it answers (%v)", dir, err)
	}
	return nil
}
