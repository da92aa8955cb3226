package raft

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"golang.org/x/sync/semaphore"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/ballast"
)

// Node is one server's part in a replicated log.
type Node struct {
	cfg       Config
	machine   *machine
	log       *logStore
	snapshots *snapshots
	spare     *ballast.Ballast // room for the state on a full disk

	raft     atomic.Pointer[raft.Raft] // set while Run runs
	slots    chan struct{}             // bounds what waits on raft
	lastTime atomic.Int64              // Unix milliseconds of the newest proposal
	readTerm atomic.Uint64             // term in which all entries of former leaders are applied

	probes   probes
	lookNow  chan struct{} // holds one
	changing chan struct{} // holds one: who changes the members
	level    atomic.Uint32
	drained  atomic.Bool
	started  time.Time // of Run

	rejoining atomic.Bool // it lost its state, see Discard

	fresh       freshness
	acks        acks
	leadership  leadership
	beats       sync.RWMutex          // read locked by each heartbeat, locked for good after raft's end
	peers       atomic.Pointer[peers] // set while Run runs with a Layer
	bytes       *semaphore.Weighted   // bounds the commands of callers here
	served      chan struct{}         // bounds the calls of other servers
	servedBytes *semaphore.Weighted
	work        sync.WaitGroup // what Run waits for

	closers []func() error // in the order of opening
	close   sync.Once
	running atomic.Bool
}

// Open opens or makes the log and the state in cfg.Dir. Register every
// Processor, then Run. A Node that is not run must be closed. Errors: ErrBusy
// when another process uses Dir, ErrCorrupt when Dir holds something else.
func Open(cfg Config) (*Node, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	n := &Node{
		cfg: cfg, slots: make(chan struct{}, cfg.MaxInFlight), served: make(chan struct{}, cfg.MaxInFlight),
		lookNow: make(chan struct{}, 1), changing: make(chan struct{}, 1),
		bytes: semaphore.NewWeighted(maxBytesInFlight), servedBytes: semaphore.NewWeighted(maxBytesInFlight),
	}
	if err := n.open(); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// open opens what is on disk, in the order in which it depends on each other.
func (n *Node) open() error {
	if err := makeDir(n.cfg.Dir); err != nil {
		return err
	}
	unlock, err := lockDir(n.cfg.Dir)
	if err != nil {
		return err
	}
	n.closers = append(n.closers, unlock)
	if err := n.findRejoin(); err != nil {
		return err
	}

	if n.snapshots, err = openSnapshots(filepath.Join(n.cfg.Dir, "snapshots"), n.cfg.Log); err != nil {
		return err
	}
	spare := ballast.New(filepath.Join(n.cfg.Dir, "ballast"), "the state in "+n.cfg.Dir, int64(min(2*stateTable, n.cfg.ReserveBytes/4)), n.cfg.Log) //nolint:gosec // small
	state, err := openState(spare.FS(vfs.Default), filepath.Join(n.cfg.Dir, "state"), n.cfg.CacheBytes, n.cfg.Log)
	if err != nil {
		return err
	}
	n.closers = append(n.closers, state.close)
	n.machine = &machine{state: state, snapshots: n.snapshots, closed: make(chan struct{})}
	n.machine.processors = map[uint32]Processor{memberKind: members{n.cfg.Level}}

	w, err := openLog(filepath.Join(n.cfg.Dir, "log"), n.cfg)
	if err != nil {
		return err
	}
	n.log = &logStore{WAL: w, snapshots: n.snapshots}
	n.closers = append(n.closers, n.log.Close)
	if err := n.reconcile(); err != nil {
		return err
	}
	n.spare = spare
	n.spare.Set()
	return nil
}

// openLog opens the log. The libraries below may panic on a file that is none of theirs.
func openLog(dir string, cfg Config) (w *wal.WAL, err error) {
	if err := makeDir(dir); err != nil {
		return nil, err
	}
	err = checkMeta(filepath.Join(dir, "wal-meta.db"))
	if err == nil {
		err = guarded(func() (err error) {
			w, err = wal.Open(dir, wal.WithLogger(newRaftLog(cfg.Log)), wal.WithSegmentSize(cfg.Hooks.SegmentBytes))
			return err
		})
	}
	if isFull(err) {
		return nil, fmt.Errorf("open log %s: %w: %w", dir, err, flox.ErrFull)
	}
	if err != nil {
		return nil, fmt.Errorf("open log %s: %w: %w", dir, err, flox.ErrCorrupt)
	}
	return w, nil
}

// reconcile brings state, snapshots and log together: a crash between taking
// another server's snapshot and restoring it leaves the state behind.
func (n *Node) reconcile() error {
	if err := n.machine.load(); err != nil {
		return err
	}
	found, err := n.snapshots.all()
	if err != nil {
		return err
	}
	newest := snapshotMeta{}
	if len(found) > 0 {
		newest = *found[0]
	}
	if n.machine.applied() < newest.Applied {
		n.cfg.Log.Warn("restoring the state from a snapshot", "snapshot", newest.Raft.ID, "state_index", n.machine.applied())
		_, rc, err := n.snapshots.Open(newest.Raft.ID)
		if err != nil {
			return err
		}
		if err := n.machine.restore(rc); err != nil {
			return err
		}
	}
	first, err1 := n.log.FirstIndex()
	last, err2 := n.log.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	if err := n.log.GetLog(last, &raft.Log{}); last > 0 && err != nil {
		return fmt.Errorf("%s: the log ends at entry %d, which cannot be read: %w: %w", n.cfg.Dir, last, err, flox.ErrCorrupt)
	}
	if first > newest.Raft.Index+1 {
		return fmt.Errorf("%s: the log begins at entry %d and no readable snapshot reaches it; put the directory back from a backup or let the server join again as a new one: %w",
			n.cfg.Dir, first, flox.ErrCorrupt)
	}
	restored, err := n.machine.restored()
	if err != nil {
		return err
	}
	// A snapshot may hold more than its index says, and its state be here before the
	// entries in between: others have them, who will send them again.
	if have := max(last, newest.Raft.Index, restored); n.machine.applied() > have {
		return fmt.Errorf("%s: the state is at entry %d, the log ends at %d: part of the log was lost; put the directory back from a backup: %w",
			n.cfg.Dir, n.machine.applied(), have, flox.ErrCorrupt)
	}
	n.lastTime.Store(n.machine.time)
	n.machine.members = n.learnMembers
	return n.learnMembers()
}

// Register makes p apply the commands of a kind. It must be called before Run,
// with the same kinds on every server; kinds are never reused. Kind 0 is the
// Node's own: Run refuses to start with another Processor for it.
func (n *Node) Register(kind uint32, p Processor) {
	n.machine.processors[kind] = p
}

// config is cfg in raft's words.
func (n *Node) config() *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(n.cfg.ID)
	c.HeartbeatTimeout = n.cfg.Heartbeat
	c.ElectionTimeout = n.cfg.Heartbeat
	c.LeaderLeaseTimeout = n.cfg.Heartbeat
	c.CommitTimeout = max(n.cfg.Heartbeat/40, 5*time.Millisecond) // half of how late a follower hears of the last commit
	c.SnapshotThreshold = n.cfg.SnapshotEvery
	c.SnapshotInterval = n.cfg.SnapshotCheck
	c.TrailingLogs = n.cfg.KeepEntries
	c.NoSnapshotRestoreOnStart = true // the state is on disk already
	c.NoLegacyTelemetry = true
	c.ShutdownOnRemove = false
	c.Logger = newRaftLog(n.cfg.Log)
	return c
}

// Run takes part in the log until ctx ends, and closes the Node. It returns
// nil when ctx ended, and the reason when an entry could not be applied.
func (n *Node) Run(ctx context.Context) (err error) {
	if !n.running.CompareAndSwap(false, true) {
		return fmt.Errorf("raft: run twice: %w", flox.ErrBusy)
	}
	defer func() { err = errors.Join(err, n.closeAll()) }()
	if n.machine.processors[memberKind] != (members{n.cfg.Level}) {
		return fmt.Errorf("raft: kind %d is the node's own, register another: %w", memberKind, flox.ErrBadInput)
	}
	n.started = time.Now()

	transport, disconnect := n.connect()
	defer func() {
		err = errors.Join(err, disconnect())
		n.work.Wait()
	}()
	c := n.config()
	if n.cfg.Bootstrap && !n.rejoining.Load() {
		err := raft.BootstrapCluster(c, n.log, n.log, n.snapshots, transport, raft.Configuration{Servers: []raft.Server{{
			ID: c.LocalID, Address: raft.ServerAddress(n.cfg.Address),
		}}})
		if err != nil && !errors.Is(err, raft.ErrCantBootstrap) {
			return fmt.Errorf("begin a new log: %w", err)
		}
	}
	r, err := n.begin(c, transport)
	if err != nil {
		return err
	}
	n.raft.Store(r)
	stopWatching := n.watchLeader(r)
	looking, stopLooking := context.WithCancel(context.Background())
	n.work.Go(func() { n.look(looking, r) })
	n.work.Go(func() { n.rejoin(looking) })
	crashed := n.toEnd(ctx, r)
	stopLooking()
	stopWatching()
	if err := r.Shutdown().Error(); err != nil {
		return fmt.Errorf("stop raft: %w", err)
	}
	if crashed != nil {
		crashed()
	}
	if why := n.machine.stopped.Load(); why != nil && (crashed == nil || !errors.Is(*why, flox.ErrClosed)) {
		return *why
	}
	n.machine.stop(fmt.Errorf("raft: %w", flox.ErrClosed)) // ends everybody's waiting
	return nil
}

// toEnd waits until ctx ends, nothing can be applied any more, or a crash, of which it
// gives what is to be done then; and it settles what is under way.
func (n *Node) toEnd(ctx context.Context, r *raft.Raft) (crashed func()) {
	select {
	case <-ctx.Done():
		n.handOver(r)
	case <-n.machine.closed:
	case crashed = <-n.cfg.Hooks.Crash:
		// From now on nobody hears anything and nothing gets into the state. What waits
		// for raft would wait for ever if that ended without an answer.
		n.machine.stop(fmt.Errorf("raft: %w", flox.ErrClosed))
	}
	n.raft.Store(nil)
	n.drain()
	return crashed
}

// begin starts raft. Damage of the log that it finds then, or later, ends the
// server.
func (n *Node) begin(c *raft.Config, transport raft.Transport) (r *raft.Raft, err error) {
	rotten := n.machine.stop
	n.machine.state.rotten.Store(&rotten)
	n.log.rotten = n.machine.stop
	err = guarded(func() (err error) { // may be ended by logStore.rot
		r, err = raft.NewRaft(c, n.machine, n.log, n.log, n.snapshots, transport)
		return err
	})
	if why := n.machine.stopped.Load(); why != nil && r == nil {
		return nil, *why
	}
	if err != nil {
		return nil, fmt.Errorf("start raft: %w", err)
	}
	return r, nil
}

// handOver gives leadership away before a planned end, so that nobody waits for
// an election.
func (n *Node) handOver(r *raft.Raft) {
	if r.State() != raft.Leader {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*n.cfg.Heartbeat)
	defer cancel()
	if err := n.transferHere(ctx, ""); err != nil {
		n.cfg.Log.Debug("no hand-over before the end", "error", err)
	}
}

// drain waits until what was proposed is answered: raft drops what it has
// committed and not yet applied when it shuts down, and never tells.
func (n *Node) drain() {
	// Without a majority a leader gives up, and answers, within its lease.
	deadline := time.Now().Add(4 * n.cfg.Heartbeat)
	for len(n.slots) > 0 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
}

// Close frees what Open took if Run was never called. It may be called twice.
func (n *Node) Close() error {
	if !n.running.CompareAndSwap(false, true) {
		return nil
	}
	if n.machine != nil {
		n.machine.stop(fmt.Errorf("raft: %w", flox.ErrClosed))
	}
	return n.closeAll()
}

func (n *Node) closeAll() (err error) {
	n.close.Do(func() {
		for _, c := range slices.Backward(n.closers) {
			err = errors.Join(err, c())
		}
	})
	return err
}

// Ready waits until this server answers linearizable reads: somebody leads, and
// what was answered before is applied here.
func (n *Node) Ready(ctx context.Context) error {
	if err := n.current(ctx); err != nil {
		return fmt.Errorf("not ready: %w", err)
	}
	return nil
}

// Snapshot takes a snapshot now; nil when there is nothing new.
func (n *Node) Snapshot(ctx context.Context) error {
	r, err := n.active()
	if err != nil {
		return err
	}
	err = n.wait(ctx, r.Snapshot())
	if errors.Is(err, raft.ErrNothingNewToSnapshot) {
		return nil
	}
	return err
}

// active gives the running raft.
func (n *Node) active() (*raft.Raft, error) {
	if why := n.machine.stopped.Load(); why != nil {
		return nil, fmt.Errorf("%w: %w", *why, ErrNotLeader)
	}
	r := n.raft.Load()
	if r == nil {
		return nil, fmt.Errorf("raft is not running yet: %w", ErrNotLeader)
	}
	return r, nil
}
