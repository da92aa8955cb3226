package ctl

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox/ctl/cli"
)

// localChecks is what can be seen without the agent, in the order in which one
// thing builds on another.
func localChecks(ctx context.Context, p patient) []finding {
	var all []finding
	for _, check := range []func(context.Context, patient) []finding{
		checkKernel, checkProc, checkFuse, checkMount, checkDisk, checkClock, checkPorts, checkKeys, checkSudo,
	} {
		all = append(all, check(ctx, p)...)
	}
	return all
}

// Kernel versions and what they brought to FUSE.
var (
	kernelNoOpendir = [2]int{5, 1} // directories are opened without a request
	kernelResend    = [2]int{6, 9} // a new process takes over requests in flight (FUSE_NOTIFY_RESEND)
)

// checkKernel goes by version: the features themselves are only told to who
// mounts.
func checkKernel(_ context.Context, p patient) []finding {
	b, err := os.ReadFile(filepath.Join(p.root, "/proc/sys/kernel/osrelease"))
	release := strings.TrimSpace(string(b))
	version, parsed := parseKernel(release)
	switch {
	case err != nil || !parsed:
		return []finding{warning("kernel", "", "cannot tell which kernel this is (%q)", release)}
	case before(version, kernelNoOpendir):
		return []finding{failure("kernel", "install a kernel of version 6.9 or newer (5.1 is the oldest that can work)",
			"Linux %s is too old: every open would be a request to the agent", release)}
	case before(version, kernelResend):
		return []finding{warning("kernel", "install a kernel of version 6.9 or newer",
			"Linux %s works, but does not ask again what a killed agent had not answered (no FUSE_NOTIFY_RESEND): a journal of the agent does, and the check takeover says whether it is whole", release)}
	}
	return []finding{ok("kernel", "Linux %s has every FUSE feature used", release)}
}

// parseKernel reads the two first numbers of "6.12.3-1-amd64".
func parseKernel(release string) (version [2]int, parsed bool) {
	parts := strings.SplitN(release, ".", 3)
	if len(parts) < 2 {
		return version, false
	}
	for i := range version {
		digits := strings.IndexFunc(parts[i], func(r rune) bool { return r < '0' || r > '9' })
		if digits < 0 {
			digits = len(parts[i])
		}
		n, err := strconv.Atoi(parts[i][:digits])
		if err != nil {
			return version, false
		}
		version[i] = n
	}
	return version, true
}

func before(a, b [2]int) bool { return a[0] < b[0] || a[0] == b[0] && a[1] < b[1] }

// fuseFix is for both places where /dev/fuse is missing: a host and a container.
const fuseFix = "load the module: sudo modprobe fuse; in a container pass the device: --device /dev/fuse --cap-add SYS_ADMIN"

// checkFuse opens the device, because in a container it may be there and
// forbidden. Opening alone mounts nothing.
func checkFuse(_ context.Context, p patient) []finding {
	device := filepath.Join(p.root, "/dev/fuse")
	info, err := os.Stat(device)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return []finding{failure("fuse", fuseFix, "there is no /dev/fuse: nothing can be mounted")}
	case err != nil:
		return []finding{failure("fuse", fuseFix, "/dev/fuse: %v", err)}
	case info.Mode()&fs.ModeCharDevice == 0:
		return []finding{failure("fuse", "remove it and load the module: sudo modprobe fuse", "/dev/fuse is not a device")}
	}
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		return []finding{ok("fuse", "/dev/fuse is there (only root may open it, which is who mounts)")}
	case err != nil:
		return []finding{failure("fuse", fuseFix, "/dev/fuse cannot be opened: %v", err)}
	}
	f.Close()
	return []finding{ok("fuse", "/dev/fuse can be opened")}
}

// mount is a line of /proc/self/mountinfo.
type mount struct{ dir, fstype, options, super string }

// checkProc looks whether the agent's user may see other users' processes: that is
// how it learns that who waits for it was killed.
func checkProc(_ context.Context, p patient) []finding {
	m := mountAt(p, "/proc")
	if m == nil || m.fstype != "proc" {
		return nil
	}
	for option := range strings.SplitSeq(m.super, ",") {
		key, value, _ := strings.Cut(option, "=")
		if key == "hidepid" && value != "0" && value != "off" {
			return []finding{warning("proc", "mount /proc without hidepid, or with gid= of a group that floxd's user is in",
				"/proc is mounted with %s: a program that waits for bytes ends only when they come, or at the deadline, when it is killed", option)}
		}
	}
	return nil
}

// storeMount finds what is mounted at the store directory.
func storeMount(p patient) *mount { return mountAt(p, p.storeDir) }

// mountAt finds what is mounted at a directory. It only reads the kernel's table: a
// mount without its agent makes everybody wait who touches it.
func mountAt(p patient, at string) *mount {
	b, err := os.ReadFile(filepath.Join(p.root, "/proc/self/mountinfo"))
	if err != nil {
		return nil
	}
	var found *mount
	for line := range strings.Lines(string(b)) {
		left, right, split := strings.Cut(strings.TrimSpace(line), " - ")
		fields, tail := strings.Fields(left), strings.Fields(right)
		if !split || len(fields) < 6 || len(tail) < 1 {
			continue
		}
		if dir := unescapeMount(fields[4]); dir == at {
			found = &mount{dir: dir, fstype: tail[0], options: fields[5], super: tail[len(tail)-1]} // the last one covers the others
		}
	}
	return found
}

// unescapeMount undoes the octal escapes of mountinfo: space, tab, newline and
// backslash.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// checkMount looks into the directory only where the kernel's table says that
// nothing is mounted there.
func checkMount(_ context.Context, p patient) []finding {
	m := storeMount(p)
	switch {
	case m != nil && m.fstype == cli.FilesystemType:
		return []finding{ok("mount", "the store is mounted at %s (%s)", p.storeDir, m.options)}
	case m != nil:
		return []finding{warning("mount", "mount elsewhere with floxd's --store-dir, or unmount what is there",
			"another file system (%s) is mounted at %s", m.fstype, p.storeDir)}
	case p.agent != nil && p.agent.GetMountDir() == p.storeDir:
		return []finding{failure("mount", "restart floxd; inside a container look at the mount from the host's mount namespace",
			"the agent runs, but nothing is mounted at %s", p.storeDir)}
	}
	entries, err := readSome(filepath.Join(p.root, p.storeDir))
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && entries == 0:
		return []finding{ok("mount", "%s is free to mount the store at", p.storeDir)}
	case err != nil:
		return []finding{warning("mount", "run: sudo floxctl doctor", "cannot look into %s: %v", p.storeDir, err)}
	}
	if own, err := cli.IsNixStore(filepath.Join(p.root, p.storeDir)); err == nil && own {
		return []finding{ok("mount", "%s holds files already: a Nix store of this machine, which floxd leaves alone; beside it: floxctl nix -- COMMAND", p.storeDir)}
	}
	return []finding{warning("mount", "floxd will not cover it; mount elsewhere: sudo floxd up --store-dir /flox/store",
		"%s holds files already: a Nix store of this machine", p.storeDir)}
}

// readSome reads at most one name of a directory.
func readSome(dir string) (int, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	names, err := f.Readdirnames(1)
	if len(names) > 0 {
		return len(names), nil
	}
	if err != nil && err.Error() != "EOF" {
		return 0, fmt.Errorf("list %s: %w", dir, err)
	}
	return 0, nil
}

// earliest is before any build of this program: a clock that shows it was never set.
var earliest = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

// checkClock asks the kernel, not the network: doctor must work offline.
func checkClock(_ context.Context, _ patient) []finding {
	const fix = "switch time synchronisation on: sudo timedatectl set-ntp true (invites, leases and TLS go by the clock)"
	now := time.Now()
	if now.Before(earliest) {
		return []finding{failure("clock", fix, "it shows %s", now.Format(time.RFC3339))}
	}
	var t unix.Timex // zero modes: only ask
	if _, err := unix.Adjtimex(&t); err != nil {
		return []finding{ok("clock", "%s", now.Format(time.RFC3339))}
	}
	if t.Status&unix.STA_UNSYNC != 0 {
		return []finding{warning("clock", fix, "%s, not synchronised as far as the kernel knows", now.Format(time.RFC3339))}
	}
	return []finding{ok("clock", "%s, synchronised", now.Format(time.RFC3339))}
}
