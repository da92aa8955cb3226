package room

import (
	"os"
	"strings"
)

// Root reports whether this process is root of the machine (or of a container
// that has the machine's users), and not only of a user namespace. What such a
// one starts in a namespace is the machine's root, too, whatever it is called
// there.
func Root() bool {
	if os.Geteuid() != 0 {
		return false
	}
	b, err := os.ReadFile("/proc/self/uid_map")
	return err != nil || isWhole(string(b)) // without /proc better too careful
}

// isWhole reports whether a map of user ids (user_namespaces(7)) is that of the
// first namespace, where everybody is who they are.
func isWhole(ids string) bool {
	return strings.Join(strings.Fields(ids), " ") == "0 0 4294967295"
}
