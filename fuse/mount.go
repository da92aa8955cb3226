package fuse

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// FSType is the file system type of every mount made here, by which updatedb
// and backup programs can leave it out.
const FSType = "fuse.floxd"

// LinksSource is the Source of a mount of links, which is no store.
const LinksSource = "floxd-links"

// MountConfig says where and how to mount. Only Dir is required.
type MountConfig struct {
	// Dir is an existing, empty, absolute directory that is no mount point.
	Dir string
	// DevicePath is the FUSE device; "" = /dev/fuse.
	DevicePath string
	// Source is what mount(8) and df(1) show as the device; "" = "floxd".
	Source string
	// MaxBackground is how many readahead requests the kernel may have open at
	// once; 0 = 1024. It is large because each may wait for the network.
	MaxBackground uint16
	// WithoutResend treats the kernel as one that cannot send requests again to
	// the next server (before Linux 6.9). It is for tests.
	WithoutResend bool
	// MaxReadAheadKiB is the most the kernel may read ahead; 0 = what it offers.
	// Whoever may set the read-ahead of devices can raise it later.
	MaxReadAheadKiB int
	// Log takes what go-fuse has to say; nil discards.
	Log *slog.Logger
}

// Device is a mounted FUSE connection whose INIT is done.
type Device struct {
	// File is the open device. Whoever holds it keeps the mount alive.
	File *os.File
	// Init is the kernel's INIT request and the answer to it, as they crossed
	// the device. Every server of this mount needs it.
	Init []byte
	// Dir is where the file system is mounted.
	Dir string
	// BDI is the device number of the mount, "major:minor": its name in
	// /sys/class/bdi and, in other notation, in /proc/PID/maps.
	BDI string
}

// Mount mounts a file system of type FSType at cfg.Dir and answers the kernel's
// INIT. It needs root. Nothing is served until a Server runs; until then
// whoever touches the mount waits. Errors: ErrDenied (not root), ErrNotFound
// (no device, no directory), ErrBusy (Dir is a mount point or not empty),
// ErrBadInput; each says what to do.
func Mount(cfg MountConfig) (*Device, error) {
	if cfg.DevicePath == "" {
		cfg.DevicePath = "/dev/fuse"
	}
	if cfg.Source == "" {
		cfg.Source = "floxd"
	}
	if cfg.MaxBackground == 0 {
		cfg.MaxBackground = 1024
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("mount %s: only root can mount; run it with sudo: %w", cfg.Dir, flox.ErrDenied)
	}
	if err := checkMountPoint(cfg.Dir); err != nil {
		return nil, err
	}
	fd, err := openFUSE(cfg.DevicePath)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", cfg.Dir, err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0,allow_other,max_read=%d", fd, unix.S_IFDIR, maxRead)
	// Read-only also spares the kernel from asking for attributes after each
	// read, which it does on other mounts to learn the access time.
	if err := unix.Mount(cfg.Source, cfg.Dir, FSType, unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("mount %s: %w", cfg.Dir, os.NewSyscallError("mount", err))
	}
	d := &Device{Dir: cfg.Dir}
	if d.Init, err = initialise(fd, cfg); err == nil {
		d.BDI, err = deviceNumber(cfg.Dir)
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, errors.Join(fmt.Errorf("mount %s: %w", cfg.Dir, err), Unmount(cfg.Dir))
	}
	d.File = os.NewFile(uintptr(fd), cfg.DevicePath)
	return d, nil
}

// checkMountPoint makes sure that mounting at dir covers nothing.
func checkMountPoint(dir string) error {
	if !filepath.IsAbs(dir) || filepath.Clean(dir) != dir || dir == "/" {
		return fmt.Errorf("mount %q: want an absolute directory without a trailing slash: %w", dir, flox.ErrBadInput)
	}
	// First, because looking at the directory itself could wait for a file
	// system that nobody serves.
	m, err := FindMount(dir)
	if err != nil {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	if m != nil {
		return fmt.Errorf("mount %s: it is a mount point already (%s from %s); unmount it (umount %s) or choose another directory: %w",
			dir, m.FSType, m.Source, dir, flox.ErrBusy)
	}
	names, err := readSome(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("mount %s: no such directory; make it (mkdir -p %s): %w", dir, dir, flox.ErrNotFound)
	case errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("mount %s: not a directory: %w", dir, flox.ErrBadInput)
	case err != nil:
		return fmt.Errorf("mount %s: %w", dir, err)
	case len(names) > 0:
		return fmt.Errorf("mount %s: the directory is not empty (it has %q) and a mount would hide what is in it; choose another directory: %w",
			dir, names[0], flox.ErrBusy)
	}
	return nil
}

// readSome gives a name or two of a directory.
func readSome(dir string) ([]string, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(2)
	if len(names) == 0 && err != nil && errors.Is(err, io.EOF) {
		return nil, nil
	}
	return names, err
}

func openFUSE(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return -1, fmt.Errorf("no %s; load the module (modprobe fuse), or give the container the device (--device /dev/fuse): %w", path, flox.ErrNotFound)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return -1, fmt.Errorf("%s may not be opened; a container needs --device /dev/fuse and --cap-add SYS_ADMIN: %w", path, flox.ErrDenied)
	case err != nil:
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
	return fd, nil
}

// initialise answers the INIT that the kernel sends first. It is done here, by
// root, so that the kernel grants the limits asked for, and so that the first
// server of a mount does what every later one does.
func initialise(fd int, cfg MountConfig) ([]byte, error) {
	request := make([]byte, requestSize)
	n, err := unix.Read(fd, request)
	if err != nil {
		return nil, os.NewSyscallError("read INIT", err)
	}
	request = request[:n]
	h, err := parseHeader(request)
	if err != nil {
		return nil, err
	}
	if h.op != opInit {
		return nil, fmt.Errorf("the kernel's first request is %s instead of INIT: %w", opNames[slot(h.op)], flox.ErrBadInput)
	}
	if cfg.WithoutResend {
		maskResend(request)
	}
	opts := options(cfg.Log)
	opts.MaxBackground = int(cfg.MaxBackground)
	answer, err := handleInit(fuse.NewProtocolServer(fuse.NewDefaultRawFileSystem(), opts), request)
	if err != nil {
		return nil, err
	}
	tunedInit(answer)
	limitReadAhead(answer, cfg.MaxReadAheadKiB)
	if _, err := unix.Write(fd, answer); err != nil {
		return nil, os.NewSyscallError("answer INIT", err)
	}
	return append(request, answer...), nil
}

// handleInit makes p what it is after the INIT exchange and gives the answer.
func handleInit(p *fuse.ProtocolServer, request []byte) ([]byte, error) {
	answer := make([]byte, answerSize)
	n, status := p.HandleRequest([][]byte{request}, [][]byte{answer})
	if status != fuse.OK || n <= outHeaderSize || answerFailed(answer[:n]) {
		return nil, fmt.Errorf("the kernel's INIT was not understood (%s): %w", status, flox.ErrBadInput)
	}
	return answer[:n], nil
}

// options are what every ProtocolServer of a mount has in common.
func options(log *slog.Logger) *fuse.MountOptions {
	return &fuse.MountOptions{
		MaxWrite:             maxRead, // go-fuse derives the largest READ from it
		EnableSymlinkCaching: true,
		// Content never changes, so the kernel has nothing to find out by itself.
		ExplicitDataCacheControl: true,
		ExtraCapabilities:        fuse.CAP_NO_OPENDIR_SUPPORT | fuse.CAP_READDIRPLUS_AUTO | fuse.CAP_HAS_RESEND,
		// Passthrough excludes opens without a request.
		DisabledCapabilities: fuse.CAP_PASSTHROUGH,
		DisableXAttrs:        true,
		Logger:               slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// Unmount unmounts dir, lazily if it is in use: it then leaves the tree at
// once and ends when its last user goes.
func Unmount(dir string) error {
	err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}
