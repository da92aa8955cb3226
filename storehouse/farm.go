package storehouse

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/dispatch"
	"github.com/floxctl/flox/buildfarm/queue"
	cluster "github.com/floxctl/flox/raft"
)

// farming is this server's part in the queue of builds: what it wants of it, what it builds
// for it, and, while it leads, who builds what.
type farming struct {
	s       *Server
	session *cluster.Session
	changed bell // rings when the queue changed, as far as this server knows
	tended  bell // rings when there may be something to tell the others
	left    bell // rings when a want ends

	mu    sync.Mutex
	index uint64                    // of the log, up to which the queue was looked at
	wants map[string]*want          // of this server, by name: at most maxBuildCalls and those of channels
	watch map[string]map[*want]bool // by build
	runs  map[uint64]*leased        // leases of this server under way, by token
	work  *errgroup.Group           // they run in; nil = none begins
	ctx   context.Context           //nolint:containedctx // of the leases, which the log begins

	// What the leader has.
	beats    map[string]time.Time // when a server was heard that builds: at most maxServers
	here     map[string]time.Time // when a server was heard
	deciding chan struct{}        // holds one token while somebody uses decides
	decides  *dispatch.Dispatcher // nil = it has to read everything
	term     uint64               // in which this server leads
	since    time.Time            // the term began
	lastTend time.Time
}

func newFarming(s *Server) *farming {
	return &farming{
		s: s, session: s.node.NewSession(), wants: map[string]*want{}, watch: map[string]map[*want]bool{}, runs: map[uint64]*leased{},
		beats: map[string]time.Time{}, here: map[string]time.Time{}, deciding: make(chan struct{}, 1),
	}
}

// on reports whether builds go through the queue: every server knows it.
func (f *farming) on() bool { return f.s.node.ClusterLevel() >= queue.Level }

// id is this server's as a worker, and as a holder of wants.
func (f *farming) id() string { return string(f.s.id.peer) }

// run takes part until ctx ends.
func (f *farming) run(ctx context.Context) error {
	if f.s.cfg.noFarm {
		<-ctx.Done()
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	f.mu.Lock()
	f.work, f.ctx = group, ctx
	f.mu.Unlock()
	group.Go(func() error { return f.follow(ctx) })
	group.Go(func() error { return f.tend(ctx) })
	group.Go(func() error { return f.sweep(ctx) })
	group.Go(func() error { return f.s.asLeader(ctx, farmTick, &f.changed, "give builds to workers", f.lead) })
	<-ctx.Done()
	f.mu.Lock()
	f.work = nil // before Wait: nothing begins any more
	f.mu.Unlock()
	return group.Wait()
}

// propose puts a command into the log. ErrBadInput also if it holds what is no text.
func (f *farming) propose(ctx context.Context, session *cluster.Session, c *floxv1.QueueCommand) (*floxv1.QueueReply, error) {
	b, err := stable.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("a command about the queue of builds cannot be written: %w: %w", err, flox.ErrBadInput)
	}
	answer, err := enterAt(ctx, session, queue.Level, queue.Kind, b)
	if err != nil {
		return nil, err
	}
	reply := &floxv1.QueueReply{}
	return reply, proto.Unmarshal(answer, reply)
}

// view calls do with the queue as this server knows it.
func (f *farming) view(ctx context.Context, do func(r *cluster.Reader) error) error {
	return f.s.viewing(ctx, queue.Kind, cluster.Local, do)
}

// followPause is how long the queue is not looked at after that failed.
const followPause = time.Second

// follow tells wants of this server what becomes of their builds, and begins and ends
// builds as its leases do, until ctx ends.
func (f *farming) follow(ctx context.Context) error {
	for ctx.Err() == nil {
		at, err := f.look(ctx)
		if err == nil {
			_, err = f.s.node.Follow(ctx, at)
		}
		if err == nil || ctx.Err() != nil {
			continue
		}
		if errors.Is(err, flox.ErrClosed) {
			return nil // the log ends, and with it all else
		}
		f.s.cfg.Log.Warn("the queue of builds cannot be read, trying again", "error", err)
		select {
		case <-time.After(followPause):
		case <-ctx.Done():
		}
	}
	return nil
}

// look takes in what changed, and gives the log index up to which that is known.
func (f *farming) look(ctx context.Context) (at uint64, err error) {
	f.mu.Lock()
	from := f.index
	f.mu.Unlock()
	var states map[string]*floxv1.QueuedBuild
	var changed bool
	err = f.view(ctx, func(r *cluster.Reader) (err error) {
		at = r.Index()
		states, changed, err = f.read(r, from)
		return err
	})
	if err != nil {
		return 0, err
	}
	f.mu.Lock()
	f.index = at
	for key, b := range states {
		for w := range f.watch[key] {
			w.put(key, b)
		}
		f.holds(key, b)
	}
	f.mu.Unlock()
	if changed {
		f.changed.ring()
	}
	return at, nil
}

// read gives the builds that changed behind an index, nil for those that are gone, and
// whether anything changed.
func (f *farming) read(r *cluster.Reader, from uint64) (states map[string]*floxv1.QueuedBuild, changed bool, err error) {
	keys := map[string]bool{}
	note := func(key string) bool {
		keys[key] = true
		return true
	}
	var bad error
	known, err := queue.Changes(r, from, func(c *floxv1.QueueChange) {
		changed = true
		for _, key := range c.GetKeys() {
			note(key)
		}
		if c.GetWant() != "" {
			bad = errors.Join(bad, queue.Members(r, c.GetWant(), note))
		}
	})
	if err = errors.Join(err, bad); err == nil && (!known || from == 0) {
		changed, err = true, f.all(r, note)
	}
	if err != nil {
		return nil, false, err
	}
	states = map[string]*floxv1.QueuedBuild{}
	for key := range keys {
		b, err := queue.Find(r, key)
		if errors.Is(err, flox.ErrNotFound) {
			b, err = nil, nil
		}
		if err != nil {
			return nil, false, err
		}
		states[key] = b
	}
	return states, changed, nil
}

// all calls note with the builds of all there are that this server has to do with.
func (f *farming) all(r *cluster.Reader, note func(key string) bool) error {
	f.mu.Lock()
	for key := range f.watch {
		note(key)
	}
	for _, run := range f.runs {
		note(run.lease.GetKey())
	}
	f.mu.Unlock()
	return queue.Builds(r, "", func(b *floxv1.QueuedBuild) bool {
		if b.GetLease().GetWorker() == f.id() {
			note(b.GetKey())
		}
		return true
	})
}

// looked waits until this server has looked at the queue as it was at a log index.
func (f *farming) looked(ctx context.Context, index uint64) error {
	if _, err := f.s.node.Wait(ctx, index); err != nil {
		return err
	}
	for {
		rung := f.changed.wait()
		f.mu.Lock()
		at := f.index
		f.mu.Unlock()
		if at >= index {
			return nil
		}
		select {
		case <-rung:
		case <-time.After(followPause): // the last changes were of other kinds
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
