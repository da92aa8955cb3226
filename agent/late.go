package agent

import (
	"context"
	"fmt"
	"net"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/fuse"
	"github.com/floxctl/flox/p2p"
)

// lateHost is the p2p host for those who are there before it is open: the mount
// is served from what is here meanwhile, and who needs more waits.
type lateHost struct {
	up   chan struct{}
	host *p2p.Host // valid when up is closed
}

func newLateHost() *lateHost { return &lateHost{up: make(chan struct{})} }

// open gives everybody the host; it is called once.
func (l *lateHost) open(host *p2p.Host) {
	l.host = host
	close(l.up)
}

func (l *lateHost) wait(ctx context.Context) (*p2p.Host, error) {
	select {
	case <-l.up:
		return l.host, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("the network is not open yet: %w", flox.ErrUnreachable)
	}
}

// now gives the host if it is open.
func (l *lateHost) now() (*p2p.Host, bool) {
	select {
	case <-l.up:
		return l.host, true
	default:
		return nil, false
	}
}

// Fetch belongs to swarm.
func (l *lateHost) Fetch(ctx context.Context, wants []p2p.Want, hints p2p.Hints, deliver func(i int, data []byte, from p2p.Source)) error {
	host, err := l.wait(ctx)
	if err != nil {
		return err
	}
	return host.Fetch(ctx, wants, hints, deliver)
}

// Hurry belongs to swarm.
func (l *lateHost) Hurry(ids []flox.CID) {
	if host, ok := l.now(); ok {
		host.Hurry(ids)
	}
}

// Holding belongs to swarm. Nothing is fetched before the host is open.
func (l *lateHost) Holding(ids ...flox.CID) {
	if host, ok := l.now(); ok {
		host.Holding(ids...)
	}
}

// Peers belongs to finder.
func (l *lateHost) Peers() []p2p.PeerStat {
	if host, ok := l.now(); ok {
		return host.Peers()
	}
	return nil
}

// farthest is the round trip to the storehouse, which has what nobody near has;
// 0 before it was measured.
func (l *lateHost) farthest() (rtt time.Duration) {
	for _, p := range l.Peers() {
		if p.Role == p2p.Storehouse && (rtt == 0 || p.RTT < rtt) {
			rtt = p.RTT
		}
	}
	return rtt
}

// reach says whether a peer is connected, and how far it is.
func (l *lateHost) reach(id p2p.PeerID) (rtt time.Duration, connected bool) {
	if host, ok := l.now(); ok {
		return host.Reach(id)
	}
	return 0, false
}

// FindProviders belongs to finder.
func (l *lateHost) FindProviders(ctx context.Context, key flox.CID, most int) ([]p2p.PeerAddr, error) {
	host, err := l.wait(ctx)
	if err != nil {
		return nil, err
	}
	return host.FindProviders(ctx, key, most)
}

// AddPeer belongs to finder. Only what the host found is added.
func (l *lateHost) AddPeer(p p2p.PeerAddr) error {
	host, ok := l.now()
	if !ok {
		return fmt.Errorf("the network is not open yet: %w", flox.ErrUnreachable)
	}
	return host.AddPeer(p)
}

// dial belongs to calls.
func (l *lateHost) dial(ctx context.Context, peer p2p.PeerID, protocol string) (net.Conn, error) {
	host, err := l.wait(ctx)
	if err != nil {
		return nil, err
	}
	return host.Dial(ctx, peer, protocol)
}

// serving is the FUSE loop from when it begins, which is before everything else.
type serving struct {
	stop  context.CancelFunc
	ended chan struct{}
	err   error // valid when ended is closed
}

// serveInBackground begins to serve a mount.
func serveInBackground(mount *fuse.Server) *serving {
	ctx, stop := context.WithCancel(context.Background())
	s := &serving{stop: stop, ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		s.err = mount.Run(ctx)
	}()
	return s
}

// run stays with the loop until it ends, and ends it when ctx does.
func (s *serving) run(ctx context.Context) error {
	defer context.AfterFunc(ctx, s.stop)()
	<-s.ended
	return s.err
}

// close ends the loop; it may be called twice.
func (s *serving) close() {
	if s != nil {
		s.stop()
		<-s.ended
	}
}
