package daemon

import (
	"fmt"
	"os"
	"strings"
)

// mountedType gives the type of the file system mounted at dir, "" for none.
// It reads the kernel's table and does not touch dir.
func mountedType(dir string) (string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("look for mounts: %w", err)
	}
	return findMount(string(b), dir), nil
}

// findMount searches a mountinfo table (Linux Documentation/filesystems/proc.rst).
// The last mount of a directory covers the ones before.
func findMount(table, dir string) string {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	found := ""
	for line := range strings.Lines(table) {
		left, right, split := strings.Cut(line, " - ")
		fields, tail := strings.Fields(left), strings.Fields(right)
		if split && len(fields) > 4 && len(tail) > 0 && unescape.Replace(fields[4]) == dir {
			found = tail[0]
		}
	}
	return found
}
