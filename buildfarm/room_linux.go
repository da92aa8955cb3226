package buildfarm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

const (
	// roomName is what the process that makes a room is called.
	roomName = "floxd-build-room"
	// ownDir is where the builder's directory lies in a room.
	ownDir = "/.flox"
	// roomLine is the descriptor of the line to who made the room: a plan comes in,
	// and its end is the room's end.
	roomLine = 3
	// roomID is who a room without root runs as, user and group: not root in any way, as
	// which Nix would try what an ordinary user may not even in a namespace of its own.
	roomID = 1000
	// roomFailed is the exit code of a room that could not be made; nothing Nix uses.
	roomFailed = 77
)

// plan says what is in a room and what runs there. Paths are those outside,
// but for StoreDir, File, Args and Env.
type plan struct {
	Root     string   `json:"root"`      // an empty directory
	Own      string   `json:"own"`       // of the job: store, var, home, tmp
	Conf     string   `json:"conf"`      // of Nix
	Inputs   string   `json:"inputs"`    // where Trees are
	Trees    []tree   `json:"trees"`     // what lies in the store, read-only
	StoreDir string   `json:"store_dir"` // where Own/store lies
	Hide     []string `json:"hide"`      // directories that are empty in the room
	Sealed   bool     `json:"sealed"`    // nothing else of this machine can be written to
	Load     string   `json:"load"`      // a file that LoadArgs reads before File runs; "" = none
	LoadArgs []string `json:"load_args"` // of File, too
	File     string   `json:"file"`
	Args     []string `json:"args"`
	Env      []string `json:"env"`
	UID      int      `json:"uid"` // who asks, with GID
	GID      int      `json:"gid"`
	As       int      `json:"as"` // who root has it run as; 0 = who asks
}

// room is a command with mounts of its own, where a job's store lies at the store
// directory, and processes of its own, of which none is left when the command has
// ended, its context has, or this process, however it ends. What runs there is in a
// user namespace, where it has no capability and the mounts are not its own: what is
// read-only stays so.
type room struct {
	*exec.Cmd
	plan         []byte
	theirs, ours *os.File // the line
}

// newRoom prepares a room. What is to be connected is set before start.
func newRoom(ctx context.Context, p *plan) (*room, error) {
	p.UID, p.GID = os.Geteuid(), os.Getegid()
	text, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	r := &room{plan: append(text, '\n'), Cmd: exec.CommandContext(ctx, "/proc/self/exe")}
	if r.theirs, r.ours, err = os.Pipe(); err != nil {
		return nil, os.NewSyscallError("pipe", err)
	}
	r.Args, r.Env, r.Dir, r.ExtraFiles = []string{roomName}, []string{}, "/", []*os.File{r.theirs}
	r.WaitDelay = 10 * time.Second
	r.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC}
	if p.As == 0 {
		// It writes its mappings itself: a process that gave up root, and whose memory
		// is nobody's to see, may not do so for its children.
		r.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		r.SysProcAttr.AmbientCaps = roomCaps
	}
	return r, nil
}

// start starts it. Who started it calls wait, unless start fails.
func (r *room) start() error {
	err := r.Start()
	_ = r.theirs.Close()
	if err != nil {
		_ = r.ours.Close()
		return fmt.Errorf("make a room to build in: %w: %w", err, flox.ErrDenied)
	}
	_, _ = r.ours.Write(r.plan) // fails if it has ended, which wait says
	return nil
}

// end ends everything in the room, and waits for that.
func (r *room) end() {
	_ = r.ours.Close()
	_ = r.Wait()
}

// wait waits for the end of everything in the room.
func (r *room) wait() error {
	err := r.Wait()
	_ = r.ours.Close()
	return err
}

// Inside is the first thing a program that has a Builder does: if this process
// is one that makes a room, it does so, runs what is to run there and exits.
func Inside() {
	if len(os.Args) == 0 || os.Args[0] != roomName {
		return
	}
	code, err := inside()
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: build room: %v\n", err)
		code = roomFailed
	}
	os.Exit(code)
}

// inside makes the room and stays as its first process, which takes all others
// along when it ends.
func inside() (code int, err error) {
	unix.CloseOnExec(roomLine)
	line := bufio.NewReader(os.NewFile(roomLine, "line"))
	text, err := line.ReadBytes('\n')
	if err != nil {
		return 0, fmt.Errorf("no plan: %w", err)
	}
	p := &plan{}
	if err := json.Unmarshal(text, p); err != nil {
		return 0, fmt.Errorf("plan: %w", err)
	}
	go func() {
		_, _ = io.Copy(io.Discard, line)
		os.Exit(128 + int(syscall.SIGKILL)) // who made the room is gone
	}()
	if err := p.become(); err != nil {
		return 0, err
	}
	load, err := p.open()
	if err != nil {
		return 0, err
	}
	if err := p.furnish(); err != nil {
		return 0, err
	}
	runtime.LockOSThread() // of which what runs has its capabilities: none
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return 0, os.NewSyscallError("prctl", err)
	}
	if load != nil {
		code, err = p.run(p.LoadArgs, load.Fd(), 2)
		_ = load.Close()
		if code != 0 || err != nil {
			return code, err
		}
	}
	return p.run(p.Args, 0, 1)
}

// open opens what is to be loaded, if anything is.
func (p *plan) open() (*os.File, error) {
	if p.Load == "" {
		return nil, nil
	}
	return os.Open(p.Load)
}

// run runs the program to its end, with descriptors of this process as its input and
// output.
func (p *plan) run(args []string, in, out uintptr) (code int, err error) {
	pid, err := syscall.ForkExec(p.File, args, &syscall.ProcAttr{Dir: "/", Env: p.Env, Files: []uintptr{in, out, 2}, Sys: p.demoted()})
	if err != nil {
		return 0, fmt.Errorf("%s: %w", p.File, err)
	}
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR) || err == nil && got != pid:
		case err != nil:
			return 0, os.NewSyscallError("wait4", err)
		case status.Signaled():
			return 128 + int(status.Signal()), nil
		case status.Exited():
			return status.ExitStatus(), nil
		}
	}
}

// roomCaps are what making a room takes, in its own user namespace.
var roomCaps = []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_SETUID, unix.CAP_SETGID}

// become has this process be roomID in its user namespace, if it has one.
func (p *plan) become() error {
	if p.As != 0 {
		return nil
	}
	for _, f := range []struct{ name, text string }{
		{"setgroups", "deny"}, {"uid_map", fmt.Sprintf("%d %d 1\n", roomID, p.UID)}, {"gid_map", fmt.Sprintf("%d %d 1\n", roomID, p.GID)},
	} {
		if err := os.WriteFile("/proc/self/"+f.name, []byte(f.text), 0); err != nil {
			return fmt.Errorf("user namespace: %w", err)
		}
	}
	return nil
}

// demoted has what root runs here be an ordinary user in a user namespace, as which it
// can make Nix's sandbox.
func (p *plan) demoted() *syscall.SysProcAttr {
	if p.As == 0 {
		return nil
	}
	return &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: roomID, HostID: p.As, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: roomID, HostID: p.As, Size: 1}},
		Credential:  &syscall.Credential{Uid: roomID, Gid: roomID}, GidMappingsEnableSetgroups: true, // to have no groups
	}
}

// furnish mounts what the room has and makes it the root of this process.
func (p *plan) furnish() error {
	root := p.Root
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := mount("tmpfs", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return err
	}
	if err := p.graft("/", root, strings.Split(strings.Trim(p.StoreDir, "/"), "/"), []string{"proc", "tmp", strings.Trim(ownDir, "/")}); err != nil {
		return err
	}
	for _, at := range []struct {
		from, to string
		lock     bool
	}{
		{filepath.Join(p.Own, "var"), ownDir + "/var", false},
		{filepath.Join(p.Own, "home"), ownDir + "/home", false},
		{p.Conf, ownDir + "/etc", true},
		{filepath.Join(p.Own, "tmp"), "/tmp", false},
		{filepath.Join(p.Own, "store"), p.StoreDir, false},
		{p.Inputs, ownDir + "/inputs", true},
	} {
		to := filepath.Join(root, at.to)
		if err := os.MkdirAll(to, 0o755); err != nil {
			return err
		}
		if err := bind(at.from, to, at.lock); err != nil {
			return err
		}
	}
	if err := p.lay(root); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(root, "proc"), 0o755); err != nil {
		return err
	}
	if err := mount("proc", filepath.Join(root, "proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return os.NewSyscallError("umount", err)
	}
	// Now, so that a symlink on the way leads to where it does in the room.
	for _, dir := range p.Hide {
		if err := empty(dir, unix.MS_RDONLY, "mode=755"); err != nil {
			return err
		}
	}
	if err := empty("/dev/shm", 0, "mode=1777"); err != nil {
		return err
	}
	return os.Chdir("/")
}

// lay puts the trees where they belong. A copy of a mount that is read-only is so as well.
func (p *plan) lay(root string) error {
	inputs := filepath.Join(root, ownDir, "inputs")
	for _, t := range p.Trees {
		if err := mount(filepath.Join(inputs, t.Name), filepath.Join(root, p.StoreDir, t.Path), "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	// What others need is not seen.
	return os.NewSyscallError("umount", unix.Unmount(inputs, unix.MNT_DETACH))
}

// empty mounts an empty directory over one, if there is one.
func empty(dir string, flags uintptr, mode string) error {
	err := mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|flags, mode)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// statRelatime is ST_RELATIME (statvfs(3)).
const statRelatime = 1 << 12

// bind shows a directory in another place, read-only if it is locked.
func bind(from, to string, lock bool) error {
	if err := mount(from, to, "", unix.MS_BIND, ""); err != nil || !lock {
		return err
	}
	var st unix.Statfs_t // whose flags cannot be taken away
	if err := unix.Statfs(to, &st); err != nil {
		return os.NewSyscallError("statfs", err)
	}
	// They are told in the bits that mount takes, but for one.
	kept := uintptr(st.Flags) & (unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME | unix.MS_NODIRATIME) //nolint:gosec // bits
	if st.Flags&statRelatime != 0 {
		kept |= unix.MS_RELATIME
	}
	return mount("", to, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|kept, "")
}

// graft puts what is in from into the empty directory to, but for what lies
// along way, of which the last is left out, and but for skip. Nothing on the way is
// touched: the last may be a mount whose server waits for us.
func (p *plan) graft(from, to string, way, skip []string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		source, target := filepath.Join(from, name), filepath.Join(to, name)
		switch {
		case slices.Contains(skip, name):
			continue
		case name == way[0] && len(way) == 1:
			continue
		case name == way[0] && e.IsDir():
			if err := os.Mkdir(target, 0o755); err != nil {
				return err
			}
			if err := p.graft(source, target, way[1:], nil); err != nil {
				return err
			}
			continue
		}
		if err := p.graftOne(e.Type(), source, target); err != nil {
			return err
		}
	}
	return nil
}

func (p *plan) graftOne(kind os.FileMode, source, target string) (err error) {
	switch kind {
	case os.ModeDir:
		err = os.Mkdir(target, 0o755)
	case os.ModeSymlink:
		dest, err := os.Readlink(source)
		if err == nil {
			err = os.Symlink(dest, target)
		}
		return err
	default:
		err = os.WriteFile(target, nil, 0o600)
	}
	if err != nil {
		return err
	}
	err = mount(source, target, "", unix.MS_BIND|unix.MS_REC, "")
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) {
		return nil // gone meanwhile, or nobody's business here
	}
	if err == nil && p.Sealed {
		attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err = unix.MountSetattr(unix.AT_FDCWD, target, unix.AT_RECURSIVE, attr); err != nil {
			err = fmt.Errorf("mount %s read-only (this needs Linux 5.12): %w", target, err)
		}
	}
	return err
}

func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}

// capture collects what a command says on stderr, its end if that is much.
type capture struct{ buf bytes.Buffer }

const maxCapture = 16 << 10

func (c *capture) Write(b []byte) (int, error) {
	c.buf.Write(b)
	if over := c.buf.Len() - maxCapture; over > maxCapture {
		c.buf.Next(over)
	}
	return len(b), nil
}
