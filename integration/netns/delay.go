package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

const (
	// frameMax is the largest frame with its header: segmentation offload makes 64 KiB.
	frameMax = 66 << 10
	// delayFrames and delayBytes bound what is on its way in one direction; what
	// comes on top is dropped, as a router does. 1 Gb/s for 100 ms are 12 MiB.
	delayFrames = 16 << 10
	delayBytes  = 64 << 20
	maxDelay    = 10 * time.Second
)

// Delay makes the host's link longer: what it sends and what it is sent takes
// rtt/2 each way; 0 ends that. Order is kept. The frames go through a queue of
// this process, between the host's cable and a port of the subnet's bridge, and
// keep the kernel's large segments, so that hundreds of megabits pass. It ends
// with the network, or with this process.
//
// Errors: ErrBadInput if rtt is negative or more than ten seconds.
func (h *Host) Delay(ctx context.Context, rtt time.Duration) error {
	if rtt < 0 || rtt > maxDelay {
		return fmt.Errorf("delay %s of host %s: want 0 to %s: %w", rtt, h.Name, maxDelay, flox.ErrBadInput)
	}
	n := h.network
	n.mu.Lock()
	defer n.mu.Unlock()
	n.log.Info("delay set", "host", h.Name, "rtt", rtt)
	if h.relay != nil && rtt > 0 {
		h.relay.oneWay.Store(int64(rtt / 2))
		return nil
	}
	if h.relay != nil {
		h.relay.close()
		h.relay, h.uplink = nil, h.port
		return n.batch(ctx, n.router, "link set %s arp on master %s", h.port, h.Subnet.bridge)
	}
	if rtt == 0 {
		return nil
	}
	// The router must not answer by itself what arrives on the cable.
	if err := n.batch(ctx, n.router, "link set %s arp off nomaster", h.port); err != nil {
		return err
	}
	r, err := startRelay(filepath.Join(runDir, n.router), h.port, "t"+h.port, rtt/2)
	if err == nil {
		h.relay, h.uplink = r, "t"+h.port
		err = n.batch(ctx, n.router,
			"link set %s txqueuelen 10000 master %s", h.uplink, h.Subnet.bridge,
			"link set %s up", h.uplink)
	}
	if err != nil {
		return fmt.Errorf("delay of host %s: %w", h.Name, err)
	}
	return nil
}

// relay moves frames between a cable and a TAP device, each way after a while.
type relay struct {
	cable, tap *os.File
	oneWay     atomic.Int64 // nanoseconds
	work       sync.WaitGroup
}

// startRelay opens both ends in a network namespace; the TAP device is made.
func startRelay(namespace, cable, tap string, oneWay time.Duration) (*relay, error) {
	r := &relay{}
	r.oneWay.Store(int64(oneWay))
	err := apart(func() (err error) {
		if err = setns(namespace, unix.CLONE_NEWNET); err != nil {
			return err
		}
		if r.cable, err = openCable(cable); err != nil {
			return fmt.Errorf("packet socket on %s: %w", cable, err)
		}
		if r.tap, err = openTAP(tap); err != nil {
			return errors.Join(fmt.Errorf("TAP device %s: %w", tap, err), r.cable.Close())
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	r.pump(r.cable, r.tap)
	r.pump(r.tap, r.cable)
	return r, nil
}

// close ends the relay; the TAP device goes with its file.
func (r *relay) close() {
	_ = r.cable.Close()
	_ = r.tap.Close()
	r.work.Wait()
}

// frame is on its way.
type frame struct {
	b   []byte // with the offload header, which both ends understand
	due time.Time
}

// pump moves frames one way until the files are closed or the device is gone.
func (r *relay) pump(from, to *os.File) {
	queue := make(chan frame, delayFrames)
	var queued atomic.Int64
	r.work.Go(func() {
		defer close(queue)
		buf := make([]byte, frameMax)
		for {
			n, err := from.Read(buf)
			if errors.Is(err, unix.ENETDOWN) { // unplugged: it may come back
				continue
			}
			if err != nil {
				return
			}
			f := frame{append([]byte(nil), buf[:n]...), time.Now().Add(time.Duration(r.oneWay.Load()))}
			if queued.Load()+int64(n) > delayBytes {
				continue
			}
			select {
			case queue <- f:
				queued.Add(int64(n))
			default:
			}
		}
	})
	r.work.Go(func() {
		for f := range queue {
			queued.Add(-int64(len(f.b)))
			time.Sleep(time.Until(f.due))
			// The other end may have no room or no carrier: then the frame is lost.
			if _, err := to.Write(f.b); errors.Is(err, os.ErrClosed) {
				for range queue { //nolint:revive // let the reader end
				}
				return
			}
		}
	})
}

// openCable takes the frames that arrive on a device, and sends some.
func openCable(name string) (*os.File, error) {
	all := int(htons(unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	index, err := linkIndex(name)
	for _, option := range []struct{ level, name, value int }{
		{unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1},
		{unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1},
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16 << 20},
		{unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 16 << 20},
	} {
		if err == nil {
			err = unix.SetsockoptInt(fd, option.level, option.name, option.value)
		}
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: index}) //nolint:gosec // 16 bits
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// openTAP makes a TAP device that takes and gives large segments.
func openTAP(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err == nil {
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// linkIndex is the number of a device in this thread's network namespace.
func linkIndex(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, request)
	return int(request.Uint32()), err
}

// htons gives a number in the network's byte order.
func htons(n uint16) uint16 { return n<<8 | n>>8 }
