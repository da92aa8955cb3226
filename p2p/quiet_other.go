//go:build !linux

package p2p

import (
	"net"
	"time"
)

// quietAfter does nothing here: keep-alive alone finds silent ends.
func quietAfter(net.Conn, time.Duration) {}
