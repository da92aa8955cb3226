package fuse

import (
	"fmt"
	"os"
	"strings"

	"github.com/floxctl/flox"
)

// MountInfo is a line of /proc/self/mountinfo.
type MountInfo struct {
	Dir    string
	Device string // "major:minor"
	FSType string
	Source string
}

// FindMount gives the mount one sees at dir, nil if dir is no mount point. It
// does not look at dir itself, which could wait for a server that is gone.
func FindMount(dir string) (*MountInfo, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return findMount(string(b), dir), nil
}

// findMount finds the last mount at dir: it covers those before it.
func findMount(table, dir string) (found *MountInfo) {
	for line := range strings.Lines(table) {
		if m, ok := parseMountInfo(strings.TrimSuffix(line, "\n")); ok && m.Dir == dir {
			found = &m
		}
	}
	return found
}

// parseMountInfo parses one line (proc_pid_mountinfo(5)):
//
//	36 35 98:0 /root /dir rw,noatime shared:1 - ext3 /dev/root rw
func parseMountInfo(line string) (MountInfo, bool) {
	left, right, ok := strings.Cut(line, " - ")
	l, r := strings.Split(left, " "), strings.Split(right, " ")
	if !ok || len(l) < 6 || len(r) < 2 {
		return MountInfo{}, false
	}
	return MountInfo{Dir: unescape(l[4]), Device: l[2], FSType: unescape(r[0]), Source: unescape(r[1])}, true
}

// unescape undoes the kernel's \ooo for blanks and backslashes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && octal(s[i+1]) && octal(s[i+2]) && octal(s[i+3]) {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func octal(c byte) bool { return c >= '0' && c <= '7' }

// deviceNumber is the device number of the mount at dir.
func deviceNumber(dir string) (string, error) {
	m, err := FindMount(dir)
	if err != nil {
		return "", err
	}
	if m == nil || m.FSType != FSType {
		return "", fmt.Errorf("%s is not in /proc/self/mountinfo after mounting it: %w", dir, flox.ErrNotFound)
	}
	return m.Device, nil
}
