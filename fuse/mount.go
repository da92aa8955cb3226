package fuse

import (
	"errors"
	"log/slog"
	"os"
)

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
	MaxBackground int
	// Log takes what go-fuse has to say; nil discards.
	Log *slog.Logger
}

// Device is a mounted, initialised FUSE connection.
type Device struct {
	// File is the open device. Whoever holds it keeps the mount alive.
	File *os.File
	// Init is the kernel's INIT request and the answer to it, as they crossed
	// the device. Every server of this mount needs it.
	Init []byte
	// Dir is where the file system is mounted.
	Dir string
	// BDI is the device number of the mount, "major:minor": its name in
	// /sys/class/bdi and in /proc/PID/maps.
	BDI string
}

// Mount mounts a file system of type fuse.floxd at cfg.Dir and answers the
// kernel's INIT. It needs root. Nothing is served until a Server runs; until
// then whoever touches the mount waits. Errors: ErrDenied (not root),
// ErrNotFound (no device, no directory), ErrBusy (Dir is a mount point or not
// empty), ErrBadInput; each says what to do.
func Mount(cfg MountConfig) (*Device, error) {
	return nil, errors.ErrUnsupported
}

// Unmount unmounts dir, lazily if it is in use: it then leaves the tree at
// once and ends when its last user goes.
func Unmount(dir string) error {
	return errors.ErrUnsupported
}
