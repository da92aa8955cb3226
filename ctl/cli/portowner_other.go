//go:build !linux

package cli

// PortOwner cannot tell on this system.
func PortOwner(int) (Owner, bool) { return Owner{}, false }
