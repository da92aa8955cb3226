package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// account is who the unprivileged processes run as.
type account struct {
	name     string
	uid, gid uint32
}

// defaultUser is taken if the machine has such a user; nobody is the last resort.
const defaultUser = "floxd"

// findAccount resolves the configured user, by name or number.
func findAccount(name string) (account, error) {
	names := []string{name}
	if name == "" {
		names = []string{defaultUser, "nobody"}
	}
	for _, n := range names {
		u, err := user.Lookup(n)
		if err != nil {
			u, err = user.LookupId(n)
		}
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		gid, gerr := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil || gerr != nil {
			return account{}, fmt.Errorf("user %s has the numbers %s and %s: %w", n, u.Uid, u.Gid, flox.ErrBadInput)
		}
		if uid == 0 {
			return account{}, cli.Explain(flox.ErrBadInput, "user %s is root: the processes that talk to the network must not be; make a user: useradd --system %s", n, defaultUser)
		}
		return account{name: u.Username, uid: uint32(uid), gid: uint32(gid)}, nil
	}
	if name == "" {
		return account{name: "nobody", uid: 65534, gid: 65534}, nil // a container without /etc/passwd
	}
	return account{}, cli.Explain(flox.ErrBadInput, "user %q does not exist: make it with: useradd --system %s", name, name)
}

// needRoot says what to do when floxd may not mount.
func needRoot(command string) error {
	if os.Geteuid() == 0 {
		return nil
	}
	return cli.Explain(flox.ErrDenied, `%s mounts the store, and only root may mount: run it with sudo.
(Everything that talks to the network runs as an ordinary user then, see --user.)`, command)
}

// makeStateDirs makes the state directory and the given ones in it, the latter
// readable by who and nobody else. What an earlier run as another user left is
// handed over.
func makeStateDirs(stateDir string, who account, names ...string) error {
	if err := os.MkdirAll(stateDir, 0o755); err != nil {
		return fmt.Errorf("state directory: %w: %w", err, flox.ErrDenied)
	}
	if os.Geteuid() == 0 {
		if err := canReach(stateDir, who); err != nil {
			return err
		}
	}
	for _, name := range names {
		dir := filepath.Join(stateDir, name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("state directory: %w: %w", err, flox.ErrDenied)
		}
		if os.Geteuid() != 0 {
			continue
		}
		if err := giveTo(dir, who); err != nil {
			return err
		}
	}
	return nil
}

// canReach checks that who may pass every directory on the way to dir: a state
// directory in somebody's private home would only show up as a child that
// cannot start.
func canReach(dir string, who account) error {
	for at := dir; ; at = filepath.Dir(at) {
		info, err := os.Stat(at)
		if err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
		if !passes(info, who) {
			return cli.Explain(flox.ErrDenied, "user %s, who will work in %s, may not pass %s (mode %04o): choose another --state-dir, or allow it: chmod o+x %s",
				who.name, dir, at, info.Mode().Perm(), at)
		}
		if at == "/" {
			return nil
		}
	}
}

// passes decides as the kernel does: the owner's bit counts for the owner, also
// where it grants less than the others'.
func passes(info fs.FileInfo, who account) bool {
	mode := info.Mode().Perm()
	st, isStat := info.Sys().(*syscall.Stat_t)
	switch {
	case isStat && st.Uid == who.uid:
		return mode&0o100 != 0
	case isStat && st.Gid == who.gid:
		return mode&0o010 != 0
	}
	return mode&0o001 != 0
}

// giveTo makes who the owner of dir and, where it was somebody else's, of
// everything below. That somebody may move things about meanwhile: nothing
// outside of dir is reached through what they put there. dir itself comes last,
// so that what was interrupted is done again.
func giveTo(dir string, who account) error {
	parent, err := os.OpenRoot(filepath.Dir(dir))
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	defer parent.Close()
	name := filepath.Base(dir)
	info, err := parent.Lstat(name)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if st, isStat := info.Sys().(*syscall.Stat_t); isStat && st.Uid == who.uid && st.Gid == who.gid {
		return nil
	}
	if info.IsDir() {
		err = giveBelow(parent, name, who)
	}
	if err == nil {
		err = parent.Lchown(name, int(who.uid), int(who.gid))
	}
	if err != nil {
		return fmt.Errorf("hand %s over to user %s: %w", dir, who.name, err)
	}
	return nil
}

// giveBelow makes who the owner of everything in the directory name of parent.
func giveBelow(parent *os.Root, name string, who account) error {
	dir, err := parent.OpenRoot(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	return fs.WalkDir(dir.FS(), ".", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == "." {
			return err
		}
		return dir.Lchown(path, int(who.uid), int(who.gid))
	})
}

// dropTo makes this process an ordinary one: who's, and unable to gain
// anything. One that is ordinary already stays who it is.
func dropTo(who account) error {
	if err := gainNothing(); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return nil
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"supplementary groups", func() error { return syscall.Setgroups([]int{int(who.gid)}) }},
		{"group", func() error { return syscall.Setgid(int(who.gid)) }},
		{"user", func() error { return syscall.Setuid(int(who.uid)) }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("become user %s: %s: %w", who.name, step.what, err)
		}
	}
	return nil
}

// gainNothing keeps this process, and what it starts, from ever gaining
// privileges: no setuid program gives it any.
func gainNothing() error {
	_, _, errno := syscall.AllThreadsSyscall(syscall.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0)
	// With cgo, as under the race detector, not all threads are Go's to set. A
	// process started by floxd up has it from there.
	if errno != 0 && errno != syscall.ENOTSUP {
		return os.NewSyscallError("prctl", errno)
	}
	return nil
}

// ownProgram is what a child of this program executes: the file it was started
// from, or, where who may not reach that (a build in a private home), the
// kernel's own link to it.
func ownProgram(who account) (string, error) {
	program, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	if strings.HasSuffix(program, " (deleted)") || canReach(filepath.Dir(program), who) != nil {
		return "/proc/self/exe", nil
	}
	return program, nil
}

// lockState makes a state directory and makes sure that one process uses it as
// what. The lock is the returned file's, and ends with the process.
func lockState(stateDir, name, what string) (*os.File, error) {
	if err := os.MkdirAll(stateDir, 0o755); err != nil {
		return nil, fmt.Errorf("state directory: %w: %w", err, flox.ErrDenied)
	}
	path := filepath.Join(stateDir, name)
	// No link: the directory may be an ordinary user's, and root empties the file.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		holder := make([]byte, 32)
		n, _ := f.Read(holder) // empty when it has just begun
		return nil, errors.Join(cli.Explain(flox.ErrBusy, "state directory %s is in use by another %s (pid %s): stop that one, or choose another --state-dir",
			stateDir, what, strings.TrimSpace(string(holder[:n]))), f.Close())
	}
	if err := f.Truncate(0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
	return f, err
}
