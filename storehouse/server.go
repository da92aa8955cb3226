package storehouse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/queue"
	"github.com/floxctl/flox/content/pack"
	"github.com/floxctl/flox/content/pack/bucket"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	"github.com/floxctl/flox/profile"
	"github.com/floxctl/flox/profile/channel"
	cluster "github.com/floxctl/flox/raft"
)

// shutdownGrace is how long requests under way may still take at the end.
const shutdownGrace = 2 * time.Second

// Server is one storehouse.
type Server struct {
	cfg       Config
	id        *identity
	node      *cluster.Node
	packs     *pack.Store
	disk      *gauge
	swarm     *p2p.Host
	line      *p2p.Line // to the other servers, for consensus; nil = a single server
	servers   *servers
	roster    *roster
	outcast   membership    // whether the other servers take this one for one of them
	sealed    atomic.Uint64 // version of the secrets in force; 0 = those of the key files
	filed     uint64        // version that the files people read are of; only runServers uses it
	memberLog *cluster.Session
	news      bell      // rings when the member list or the keys changed
	seen      *seenBook // which machines are there
	doors     *doorBook // who was not let in
	held      *holding
	catchUp   *catchUp
	mender    *mender
	web       net.Listener // nil = no HTTP
	metrics   net.Listener // nil = nobody gets any
	batch     *batcher
	upstreams *upstreams
	staging   *staging
	builds    *builds
	farm      *farming
	profiles  *profiles
	channels  *channels
	tracker   *tracker
	reports   reportCounts
	made      *traceMaker
	checks    chan struct{}    // as many reports of starts are checked at once
	starts    *cluster.Session // puts them into the log

	marker     *cluster.Session // puts roots, and that marks are taken back, into the log
	holds      *holds
	reading    *readings
	moreRoots  []rootSource           // beside the storehouse's own
	collecting sync.Mutex             // held by the collection that runs
	phase      atomic.Pointer[string] // of that collection
	sweeping   sync.Mutex             // held by the sweep of the packs that runs
	collected  collectBook
	backingUp  sync.Mutex // held by the backup that runs
	frozen     frozen     // the facts it is of

	// buildTrace makes a trace; another one in tests.
	buildTrace func(context.Context, *floxv1.StartState) (*floxv1.StartTrace, error)

	ready   chan struct{}
	invite  atomic.Pointer[api.Invite]
	closers []func() error
	close   sync.Once
	running atomic.Bool
}

// New checks cfg, opens or creates the state under StateDir, and binds the
// listening sockets. A Server that is not run must be closed. Errors: ErrBusy
// when the directory or a port is in use, ErrBadInput, ErrCorrupt.
func New(cfg Config) (*Server, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, ready: make(chan struct{}), tracker: newTracker(), made: newTraceMaker(), checks: make(chan struct{}, maxChecks)}
	s.holds, s.reading = &holds{count: map[string]int{}}, &readings{count: map[flox.CID]int{}}
	s.buildTrace = s.startTrace
	if err := s.open(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// open opens everything in the order in which it depends on each other. The
// log comes first: its lock covers the whole directory.
func (s *Server) open() (err error) {
	if err := os.MkdirAll(s.cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	unlock, err := lockState(s.cfg.StateDir)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, unlock)
	if err := halfRestored(s.cfg.StateDir); err != nil {
		return err
	}
	if s.cfg.NewEpoch {
		if err := AskNewEpoch(s.cfg.StateDir); err != nil {
			return err
		}
	}
	if s.id, err = loadIdentity(s.cfg); err != nil {
		return err
	}
	s.cfg.Name = s.id.Name
	if err := s.openLog(); err != nil {
		return err
	}
	for kind, p := range processors(s.cfg.touchEvery) {
		s.node.Register(kind, p)
	}
	s.upstreams = newUpstreams(s)
	s.disk = &gauge{dir: s.cfg.StateDir, marks: s.cfg.Watermarks, log: s.cfg.Log.With("part", "disk")}
	s.catchUp, s.mender = newCatchUp(s), newMender(s)
	if s.packs, err = s.openPacks(); err != nil {
		return err
	}
	s.closers = append(s.closers, s.packs.Close)
	s.held = &holding{packs: s.packs}
	s.closers = append(s.closers, s.held.close)
	if s.staging, err = openStaging(filepath.Join(s.cfg.StateDir, "staged"), s.cfg); err != nil {
		return err
	}
	s.closers = append(s.closers, s.staging.close)
	s.batch = newBatcher(s.node)
	s.starts, s.marker, s.memberLog = s.node.NewSession(), s.node.NewSession(), s.node.NewSession()
	s.builds, s.farm = newBuilds(s), newFarming(s)
	s.profiles, s.channels = newProfiles(s), newChannels(s)
	s.moreRoots = append(s.moreRoots, buildLogs{}, s.profiles, s.channels)
	return s.listen()
}

// processors gives those of all facts, by kind; touchEvery overrides its constant
// in tests, 0 = that.
func processors(touchEvery time.Duration) map[uint32]cluster.Processor {
	return map[uint32]cluster.Processor{
		pathsKind: paths{touchEvery: touchEvery}, tracesKind: traces{}, members.Kind: members.Processor{}, upstreamsKind: upstreamFacts{},
		profile.Kind: profile.Processor{}, channel.Kind: channel.Processor{}, queue.Kind: queue.Processor{},
	}
}

// openLog opens the facts, and the door to the other servers if there may be any.
func (s *Server) openLog() (err error) {
	s.roster = newRoster()
	s.roster.notify(s.openKeys)
	s.roster.notify(s.news.ring)
	s.seen, s.doors = newSeenBook(), newDoorBook()
	s.servers = newServers(s.id, s.roster)
	alone, err := epochAsked(s.cfg.StateDir)
	if err != nil {
		return err
	}
	s.servers.alone.Store(alone)
	cfg := cluster.Config{
		Dir: filepath.Join(s.cfg.StateDir, "raft"), ID: string(s.id.peer), Bootstrap: s.id.joined == nil,
		// Less than what content leaves free: facts can be written to the last.
		ReserveBytes: s.cfg.ReserveBytes / 2, Version: s.cfg.Version, Level: cmp.Or(s.cfg.level, level), PromoteAfter: s.cfg.promoteAfter,
		Heartbeat: s.cfg.Heartbeat, DeadAfter: s.cfg.deadAfter, Replacing: s.replaced,
		Log: s.cfg.Log.With("part", "raft"),
	}
	if s.cfg.Consensus != "" {
		s.line, err = p2p.NewLine(p2p.LineConfig{
			Key: s.id.machine, Listen: s.cfg.Consensus, Announce: s.cfg.ConsensusAdvertise,
			Secrets: s.id.ring.secrets, Allowed: s.servers.allowed, Vouched: s.vouched, Refused: s.doors.refused,
			Log: s.cfg.Log.With("part", "consensus"),
		})
		if err != nil {
			return err
		}
		s.closers = append(s.closers, s.line.Close)
		cfg.Layer = s.line
	}
	if s.node, err = s.openNode(cfg); err != nil {
		return err
	}
	s.closers = append(s.closers, s.node.Close)
	s.servers.node.Store(s.node)
	return nil
}

// openPacks opens the content, and the bucket it may live in.
func (s *Server) openPacks() (*pack.Store, error) {
	cfg := pack.Config{Dir: filepath.Join(s.cfg.StateDir, "packs"), Reserve: int64(s.cfg.ReserveBytes), Log: s.cfg.Log.With("part", "packs"), Lost: s.catchUp.lost}
	if s.cfg.Bucket != "" {
		b, err := bucket.Open(context.Background(), s.cfg.Bucket)
		if err != nil {
			return nil, err
		}
		s.closers = append(s.closers, b.Close)
		cfg.Bucket = &pack.BucketConfig{Bucket: b, Server: string(s.id.peer), CacheBytes: int64(s.cfg.BucketCache)}
	}
	return pack.Open(cfg)
}

// listen binds the doors to the outside.
func (s *Server) listen() (err error) {
	// Who is a member is known before anybody asks.
	if err := s.roster.refresh(context.Background(), s); err != nil {
		return err
	}
	s.swarm, err = p2p.New(p2p.Config{
		Key: s.id.machine, Listen: s.cfg.Listen, Announce: s.cfg.Advertise, Site: s.cfg.Site,
		Secrets: s.id.ring.secrets, Allowed: s.allowed, Vouched: s.vouched, Refused: s.doors.refused, Invites: s.inviteProof, Window: s.windowOpen,
		Role: p2p.Storehouse, NoMDNS: s.cfg.NoMDNS, Blocks: held{s.packs, s.mender}, Log: s.cfg.Log.With("part", "p2p"),
	})
	if err != nil {
		return err
	}
	s.servers.calls = p2p.NewCallers(s.swarm.Dial, rpcProtocol, maxServers)
	s.closers = append(s.closers, s.swarm.Close, s.servers.close)
	s.roster.notify(s.meetServers)
	s.roster.notify(s.noteOthers)
	if err := s.meetOthers(); err != nil {
		return err
	}
	return s.openWeb()
}

// Run serves until ctx ends and then closes the server. It returns nil when
// ctx ended, and an error when the storehouse cannot go on.
func (s *Server) Run(ctx context.Context) (err error) {
	if !s.running.CompareAndSwap(false, true) {
		return fmt.Errorf("storehouse runs already: %w", flox.ErrBusy)
	}
	defer func() { err = errors.Join(err, s.closeAll()) }()
	group, gctx := errgroup.WithContext(ctx)
	// The log outlives what writes to it, so that requests under way can end.
	logCtx, stopLog := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLog()
	logDone := make(chan error, 1)
	go func() {
		logDone <- s.node.Run(logCtx)
		stopLog()
	}()
	group.Go(func() error {
		select {
		case <-gctx.Done():
			return nil
		case <-logCtx.Done():
			return fmt.Errorf("the log stopped: %w", flox.ErrClosed)
		}
	})
	group.Go(func() error { return s.swarm.Run(gctx) })
	group.Go(func() error { return s.batch.run(gctx) })
	group.Go(func() error { return s.upstreams.run(gctx) })
	group.Go(func() error { return s.made.run(gctx, s.makeTrace) })
	group.Go(func() error { return s.begin(gctx) })
	operators := newAdmin(s, gctx)
	group.Go(func() error { return s.serveRPC(gctx, operators) })
	group.Go(func() error { return s.serveWeb(gctx) })
	group.Go(func() error { return s.serveMetrics(gctx) })
	group.Go(func() error { return s.packs.Run(gctx) })
	group.Go(func() error { return s.roster.run(gctx, s) })
	group.Go(func() error { return s.profiles.run(gctx) })
	group.Go(func() error { return s.profiles.pruneLoop(gctx) })
	group.Go(func() error { return s.profiles.upgradeLoop(gctx) })
	group.Go(func() error { return s.channels.trackLoop(gctx) })
	group.Go(func() error { return s.channels.expireLoop(gctx) })
	group.Go(func() error { return s.runServers(gctx) })
	group.Go(func() error { return s.runOutcast(gctx) })
	group.Go(func() error { return s.runSigning(gctx) })
	group.Go(func() error { return s.runMembers(gctx, operators) })
	group.Go(func() error { return s.catchUp.run(gctx) })
	group.Go(func() error { return s.scrubLoop(gctx) })
	group.Go(func() error { return s.mender.run(gctx) })
	group.Go(func() error { return s.staging.run(gctx, s.packs) })
	for _, run := range []func(context.Context) error{s.tracker.run, s.builds.run, s.farm.run, s.guard, s.collectLoop} {
		group.Go(func() error { return run(gctx) })
	}
	err = group.Wait()
	stopLog()
	if logErr := <-logDone; logErr != nil {
		err = logErr // the reason; what else ended, ended because of it
		if s.giveUpFacts(logErr) {
			err = fmt.Errorf("%w; start this server again: it gets its facts from the others", logErr)
		}
	}
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, flox.ErrClosed)) {
		return nil
	}
	return err
}

// begin does what the first leader has to do, writes the invite and says that
// the server is ready.
func (s *Server) begin(ctx context.Context) error {
	if err := s.node.Ready(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	var fingerprint flox.CID
	err := s.introduce(ctx)
	if err == nil {
		err = s.id.ring.wait(ctx)
	}
	if err == nil {
		err = s.beginEpoch(ctx)
	}
	if err == nil {
		fingerprint, err = s.ensureTrust(ctx)
	}
	if err == nil {
		err = s.writeInvite(fingerprint)
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	close(s.ready)
	s.cfg.Log.Info("storehouse is ready", "name", s.cfg.Name, "peer", string(s.id.peer), "http", s.invite.Load().HTTPURL, "store", string(s.cfg.StoreDir))
	return nil
}

// writeInvite writes invite.json for the addresses of this start.
func (s *Server) writeInvite(trust flox.CID) error {
	addrs := s.swarm.Addrs()
	inv := &api.Invite{
		Version: api.InviteVersion, Name: s.cfg.Name, Secret: s.id.ring.secrets()[0],
		Storehouse: []api.InvitePeer{{ID: string(s.id.peer), Addrs: addrs}},
		TrustList:  trust, HTTPURL: s.httpURL(addrs), StoreDir: s.cfg.StoreDir, NixKey: s.PublicKey(),
	}
	if err := inv.Save(filepath.Join(s.cfg.StateDir, "invite.json")); err != nil {
		return err
	}
	s.invite.Store(inv)
	return nil
}

// Close frees everything of a Server that was not run. It may be called twice.
func (s *Server) Close() error {
	if !s.running.CompareAndSwap(false, true) {
		return nil
	}
	return s.closeAll()
}

func (s *Server) closeAll() (err error) {
	s.close.Do(func() {
		for _, c := range slices.Backward(s.closers) {
			err = errors.Join(err, c())
		}
	})
	return err
}

// Ready waits until Run has got as far as answering reads and publishes.
func (s *Server) Ready(ctx context.Context) error {
	select {
	case <-s.ready:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the storehouse is not ready yet: %w: %w", ctx.Err(), flox.ErrUnreachable)
	}
}

// Config is the configuration in use, defaults filled in.
func (s *Server) Config() Config { return s.cfg }

// Invite is what machines need to join, as written to invite.json; nil until Ready.
func (s *Server) Invite() *api.Invite { return s.invite.Load() }

// Packs is the store of the content.
func (s *Server) Packs() *pack.Store { return s.packs }

// Blocks reads the blocks held here.
func (s *Server) Blocks() flox.Blocks { return s.packs }

// held serves the packs to peers.
type held struct {
	packs  *pack.Store
	mender *mender
}

var _ p2p.PackedHolder = held{}

// Get is p2p.Holder.
func (h held) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	b, err := h.packs.Get(ctx, id)
	if errors.Is(err, flox.ErrCorrupt) {
		h.mender.note(id) // the peer asks another server
	}
	return b, err
}

// Packed is p2p.PackedHolder.
func (h held) Packed(ctx context.Context, id flox.CID) (data []byte, size int, zstd bool, err error) {
	data, size, zstd, err = h.packs.Packed(ctx, id)
	if errors.Is(err, flox.ErrCorrupt) {
		h.mender.note(id)
	}
	return data, size, zstd, err
}

// Has is p2p.Holder.
func (h held) Has(ids []flox.CID) []bool {
	has, err := h.packs.Has(context.Background(), ids)
	if err != nil {
		return make([]bool, len(ids))
	}
	return has
}

// Each is p2p.Holder. A storehouse is asked last and for anything, so it sends
// no filter of what it holds and nobody enumerates it.
func (h held) Each(func(flox.CID) bool) {}

// serve runs an HTTP server until ctx ends, giving requests under way a moment.
func serve(ctx context.Context, l net.Listener, server *http.Server) error {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
		defer cancel()
		if server.Shutdown(grace) != nil {
			_ = server.Close() // cuts what did not end by itself
		}
	})
	err := server.Serve(l)
	if !stop() {
		<-done
	}
	if errors.Is(err, http.ErrServerClosed) || ctx.Err() != nil {
		return nil
	}
	return err
}
