package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/metrics"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
)

// standstillSaid is how long status says that the process before this one stood
// still; doctor says it as long as this one lives.
const standstillSaid = time.Hour

// control answers floxctl on the agent's unix socket. Everybody on the machine
// may look; what takes content away is for root and the agent's own user.
type control struct {
	floxv1connect.UnimplementedAgentHandler
	a *Agent
}

var _ floxv1connect.AgentHandler = (*control)(nil)

// serveControl listens on the socket until ctx ends. A socket file that nobody
// listens on is what a killed agent left: it is replaced.
func (a *Agent) serveControl(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Dir(a.cfg.Socket), 0o755); err != nil { //nolint:gosec // the socket is for everybody
		return fmt.Errorf("control socket: %w", err)
	}
	if err := clearSocket(ctx, a.cfg.Socket); err != nil {
		return err
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "unix", a.cfg.Socket)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(a.cfg.Socket, 0o666); err != nil { //nolint:gosec // the socket is for everybody
		return errors.Join(fmt.Errorf("control socket: %w", err), listener.Close())
	}
	if a.mount != nil {
		a.tellWarden(a.cfg.Warden.Ready)
	}
	mux := http.NewServeMux()
	mux.Handle(floxv1connect.NewAgentHandler(&control{a: a}, connect.WithReadMaxBytes(4<<20)))
	mux.Handle("/"+floxv1connect.AdminName+"/", newPassAdmin(a))
	return serveHTTP(ctx, listener, &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 32 << 10, ConnState: newClients(callerUID).changed,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, callerKey{}, callerUID(conn))
		},
	})
}

// clearSocket removes a socket that a killed agent left. One that is served, or
// something that is no socket, is ErrBusy.
func clearSocket(ctx context.Context, name string) error {
	st, err := os.Lstat(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil && st.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("control socket %s: there is a file of that name: move it away, or choose another --run-dir: %w", name, flox.ErrBusy)
	}
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", name)
	if err == nil {
		_ = conn.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("control socket %s is served by another agent: stop it, or choose another --run-dir: %w", name, flox.ErrBusy)
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// callerKey is the context key of the calling user's id.
type callerKey struct{}

// callerUID is the user at the other end of a unix socket; -1 when unknown.
func callerUID(conn net.Conn) int {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return -1
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return -1
	}
	uid := -1
	err = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = int(cred.Uid)
		}
	})
	if err != nil {
		return -1
	}
	return uid
}

// caller is the user who calls; 0 is root, and whoever the agent runs as, -1 not
// known.
func caller(ctx context.Context) int {
	switch uid, ok := ctx.Value(callerKey{}).(int); {
	case !ok:
		return -1
	case uid == os.Geteuid():
		return 0
	default:
		return uid
	}
}

// mayTake refuses callers who may not take content away from others.
func mayTake(ctx context.Context) error {
	if caller(ctx) != 0 {
		return fmt.Errorf("this takes content away from everybody on the machine: only root may; try sudo: %w", flox.ErrDenied)
	}
	return nil
}

// Status implements floxv1connect.AgentHandler.
func (c *control) Status(ctx context.Context, _ *connect.Request[floxv1.StatusRequest]) (*connect.Response[floxv1.StatusResponse], error) {
	return connect.NewResponse(c.a.status(ctx)), nil
}

func (a *Agent) status(ctx context.Context) *floxv1.StatusResponse {
	peers := a.host.Peers()
	s := &floxv1.StatusResponse{
		Version: a.cfg.Version, StoreDir: string(a.cfg.StoreDir), StartedUnix: a.started.Unix(),
		Pid: uint32(os.Getpid()), PeerId: string(a.host.ID()), Site: a.cfg.Site, //nolint:gosec // a pid is positive
		Storehouse: a.linkMessage(), Peers: uint32(len(peers)), Cache: a.cacheMessage(), //nolint:gosec // a few thousand
		Traffic: a.trafficMessage(), Waiting: uint32(a.waits.count()), PathsKnown: a.facts.known(), //nolint:gosec // bounded by the mount
		Problems: a.problems(), Prefetch: a.starts.message(a.ahead.message()), Offline: a.complete.state(ctx), HeapBytes: liveHeap(),
		Staged: a.stagedMessage(), NixSocket: a.cfg.NixSocket, LocalStore: a.localMessage(), Bindings: a.binder.messages(""),
	}
	if a.mount != nil {
		s.Mounted, s.MountDir = true, a.cfg.Warden.MountDir
		stats := a.mount.Stats()
		s.FuseRequests, s.FuseReadBytes = stats.Requests, stats.ReadBytes
	}
	return s
}

// liveHeap is how many bytes were in use after the last garbage collection.
func liveHeap() uint64 {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	if live[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return live[0].Value.Uint64()
}

// problems says what a user should know about, each with what to do.
func (a *Agent) problems() []string {
	var out []string
	l := a.follower.state()
	if !l.connected {
		since := "never reached since the agent started"
		if !l.lastSeen.IsZero() {
			since = "last heard of " + l.lastSeen.Format(time.DateTime)
		}
		out = append(out, fmt.Sprintf("the storehouse is not connected (%s): %v; what is here and what peers hold can be read; check where it is, %s, and the network",
			since, oneLine(l.err), a.whereHouses()))
	}
	if a.mount != nil {
		if before := a.cfg.Warden.Before(); before != nil && time.Since(before.At) < standstillSaid {
			out = append(out, fmt.Sprintf("at %s the agent's process was replaced, %s; floxctl doctor says what to do", before.At.Format(time.DateTime), before.Why))
		}
	}
	if full := a.mountFull(); full != "" {
		out = append(out, full)
	}
	if missed := a.nix.roots.notRead(); missed != "" {
		out = append(out, missed)
	}
	if err := a.facts.full(); err != nil {
		out = append(out, oneLine(err))
	}
	if err := a.staged.Full(); err != nil {
		out = append(out, oneLine(err))
	}
	if u := a.cache.Usage(); u.Limit < u.Budget/2 {
		out = append(out, fmt.Sprintf("the disk of %s is nearly full: the cache may use %d of its %d bytes; free some space or set a smaller reserve", a.cfg.StateDir, u.Limit, u.Budget))
	}
	return out
}

func (a *Agent) linkMessage() *floxv1.StorehouseLink {
	l := a.follower.state()
	m := &floxv1.StorehouseLink{
		PeerId: string(l.house), Name: l.name, Connected: l.connected, Index: l.index, HttpUrl: l.httpURL,
		Servers: a.houseServers(l), Members: a.members.count(),
	}
	if m.Name == "" {
		m.Name, m.HttpUrl = a.cfg.Invite.Name, a.cfg.Invite.HTTPURL
	}
	if !l.lastSeen.IsZero() {
		m.LastSeenUnix = l.lastSeen.Unix()
	}
	if l.err != nil {
		m.Error = oneLine(l.err)
	}
	return m
}

func (a *Agent) trafficMessage() *floxv1.Traffic {
	return a.traffic.message(a.host.Served())
}

func (a *Agent) cacheMessage() *floxv1.CacheUsageResponse {
	u := a.cache.Usage()
	return &floxv1.CacheUsageResponse{
		Bytes: uint64(u.Bytes), BudgetBytes: uint64(u.Budget), KeptBytes: uint64(u.Kept), //nolint:gosec // sizes are positive
		Files: uint64(u.Files), Blocks: uint64(u.Blocks), FreeDiskBytes: uint64(u.FreeDisk), //nolint:gosec // sizes are positive
		ReserveBytes: uint64(u.Reserve), EvictedBytes: uint64(u.Evicted), //nolint:gosec // sizes are positive
		Dir: filepath.Join(a.cfg.StateDir, "cache"), Streaming: u.Limit <= 0 || u.Bytes >= u.Limit,
	}
}

// Peers implements floxv1connect.AgentHandler.
func (c *control) Peers(context.Context, *connect.Request[floxv1.PeersRequest]) (*connect.Response[floxv1.PeersResponse], error) {
	return connect.NewResponse(&floxv1.PeersResponse{Peers: c.a.peerMessages()}), nil
}

func (a *Agent) peerMessages() (all []*floxv1.Peer) {
	for _, p := range a.host.Peers() {
		all = append(all, &floxv1.Peer{
			Id: string(p.ID), Addrs: p.Addrs, Role: p.Role.String(), Tier: p.Tier.String(), Site: p.Site,
			RttMs: float64(p.RTT) / float64(time.Millisecond), Goodput: p.Goodput, BytesIn: p.BytesIn, BytesOut: p.BytesOut,
			ConnectedUnix: p.Connected.Unix(), Score: p.Score, ScoreReason: p.Why, Name: a.members.member(p.ID).GetName(),
		})
	}
	return all
}

// CacheUsage implements floxv1connect.AgentHandler.
func (c *control) CacheUsage(context.Context, *connect.Request[floxv1.CacheUsageRequest]) (*connect.Response[floxv1.CacheUsageResponse], error) {
	return connect.NewResponse(c.a.cacheMessage()), nil
}

// CacheGC implements floxv1connect.AgentHandler.
func (c *control) CacheGC(ctx context.Context, req *connect.Request[floxv1.CacheGCRequest]) (*connect.Response[floxv1.CacheGCResponse], error) {
	if err := mayTake(ctx); err != nil {
		return nil, api.ToConnect(err)
	}
	freed, err := c.a.cache.GC(ctx, int64(req.Msg.GetTargetBytes())) //nolint:gosec // a size
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(&floxv1.CacheGCResponse{
		FreedBytes: uint64(freed), Bytes: uint64(c.a.cache.Usage().Bytes), //nolint:gosec // sizes are positive
	}), nil
}

// Watch implements floxv1connect.AgentHandler.
func (c *control) Watch(ctx context.Context, req *connect.Request[floxv1.WatchReadsRequest], stream *connect.ServerStream[floxv1.WatchReads]) error {
	interval := time.Duration(req.Msg.GetIntervalMs()) * time.Millisecond
	if interval <= 0 {
		interval = 500 * time.Millisecond
	}
	interval = min(max(interval, 50*time.Millisecond), 2*time.Second)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	before, at := c.a.traffic.total(), time.Now()
	for {
		now, total := time.Now(), c.a.traffic.total()
		rate := float64(total-before) / max(now.Sub(at).Seconds(), 0.001)
		before, at = total, now
		err := stream.Send(&floxv1.WatchReads{
			Reads: c.waiting(now), BytesPerSecond: uint64(rate), Traffic: c.a.trafficMessage(), Storehouse: c.a.linkMessage(),
			Full: c.a.mountFull(),
		})
		if err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// shownAfter keeps waits that end at once out of what people see.
const shownAfter = 20 * time.Millisecond

// waiting lists who waits for what: reads with their progress, and names looked up.
func (c *control) waiting(now time.Time) []*floxv1.WaitingRead {
	pids, link := c.a.waitingPIDs(), c.a.follower.state()
	var out []*floxv1.WaitingRead
	for _, w := range c.a.waits.snapshot(now.Add(-shownAfter)) {
		r := &floxv1.WaitingRead{
			Pid: w.pid, Path: w.path, Operation: w.op, SinceUnixMs: w.since.UnixMilli(),
			DoneBytes: w.done, TotalBytes: w.total, Source: w.source, EtaMs: -1, Reason: w.why,
		}
		if r.Pid == 0 {
			r.Pid = pids[w.path]
		}
		r.Command = command(r.Pid)
		if r.Source == "" {
			r.Source = "nobody yet"
		}
		if r.Reason == "" && w.done == 0 && !link.connected { // nothing failed yet, and this is why it may
			r.Reason = "the storehouse is not connected: " + oneLine(link.err)
		}
		if elapsed := now.Sub(w.since).Seconds(); w.done > 0 && elapsed > 0 {
			r.BytesPerSecond = uint64(float64(w.done) / elapsed)
			r.EtaMs = int64(float64(w.total-min(w.done, w.total)) / float64(w.done) * elapsed * 1000)
		}
		out = append(out, r)
	}
	return out
}

// waitingPIDs says who waits for a name of the store directory or for something
// in a store path that is not a READ, which says so itself: of several, the first.
func (a *Agent) waitingPIDs() map[string]uint32 {
	pids := make(map[string]uint32)
	if a.mount == nil {
		return pids
	}
	for _, w := range a.mount.Waiting() {
		name := filepath.Join(string(a.cfg.StoreDir), w.Name)
		if manifest, _, ok := a.mount.Resolve(w.Node); ok {
			info, known := a.facts.byManifest(manifest)
			if !known {
				continue
			}
			name = a.cfg.StoreDir.Join(info.Path)
		}
		if _, ok := pids[name]; !ok {
			pids[name] = w.PID
		}
	}
	return pids
}

// command is the name of a process as the kernel keeps it, "" if it is gone.
func command(pid uint32) string {
	if pid == 0 {
		return ""
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil || len(b) == 0 {
		return ""
	}
	return string(b[:len(b)-1])
}
