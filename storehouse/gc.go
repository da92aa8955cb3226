package storehouse

import (
	"context"
	"fmt"
	"math"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// DefaultKeepRecent is how long a path stays after it was published last, whoever
// wants it.
const DefaultKeepRecent = 14 * 24 * time.Hour

const (
	// collectBatch is how many paths one entry of a collection names.
	collectBatch = 1000
	// progressEvery is how often a collection that waits says so.
	progressEvery = 5 * time.Second
)

// Phases of a collection.
const (
	phaseMark    = "mark"
	phaseCondemn = "condemn"
	phaseWait    = "wait"
	phaseRemove  = "remove"
	phaseSweep   = "sweep"
)

// CollectOptions say what a collection does.
type CollectOptions struct {
	// DryRun names what would go, and changes nothing.
	DryRun bool
	// KeepRecent is how long a path stays after it was last published or used, and
	// touchEvery longer; 0 = DefaultKeepRecent.
	KeepRecent time.Duration
	// Resume goes on with what an earlier collection condemned, and condemns no more.
	Resume bool
	// Machine makes it a collection of the one machine whose storehouse this is;
	// nil = of the whole storehouse.
	Machine *MachineCollection
}

// Collect removes the paths that no root reaches, and frees their content here. It
// marks what is live, condemns the rest, waits until nobody can take an old answer
// for a new one, removes what nobody wanted meanwhile, and sweeps the packs. All it
// has to remember are the marks on condemned paths, which are facts: after a crash
// at any moment another Collect goes on from them, and a condemned path stays valid
// until then. progress is called from one goroutine. ErrBusy while another
// collection runs, ErrUnreachable if this server does not lead, or no more.
func (s *Server) Collect(ctx context.Context, opts CollectOptions, progress func(*floxv1.CollectProgress)) error {
	if opts.KeepRecent < 0 {
		return fmt.Errorf("collect: keep recent paths for %v, want at least 0: %w", opts.KeepRecent, flox.ErrBadInput)
	}
	setDefault(&opts.KeepRecent, DefaultKeepRecent)
	if st := s.node.Status(); st.State != "leader" && !opts.DryRun {
		return fmt.Errorf("collect: this server does not lead, %q does: ask that one: %w", st.Leader, flox.ErrUnreachable)
	}
	if !s.collecting.TryLock() {
		return fmt.Errorf("collect: a collection is running already, in its phase %q: wait for it, or stop it: %w", s.collectPhase(), flox.ErrBusy)
	}
	defer s.collecting.Unlock()
	defer s.phase.Store(nil)
	caller := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c := &collection{Server: s, opts: opts, tell: progress, session: s.node.NewSession(), began: time.Now(), give: cancel, grace: s.cfg.CollectGrace}
	if opts.Machine != nil {
		c.grace = 0
	}
	if err := c.run(ctx); err != nil {
		if caller.Err() == nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("collect: %s: %w", c.now.GetPhase(), err)
	}
	c.now.Finished = true
	c.report()
	return nil
}

// collection is one run of Collect.
type collection struct {
	*Server
	opts    CollectOptions
	tell    func(*floxv1.CollectProgress)
	session *cluster.Session
	began   time.Time
	give    context.CancelCauseFunc // gives the collection up
	grace   time.Duration           // from condemning to removing
	now     floxv1.CollectProgress
}

func (c *collection) run(ctx context.Context) error {
	if !c.opts.Resume {
		if err := c.condemn(ctx); err != nil || c.opts.DryRun {
			return err
		}
	}
	last, err := c.wait(ctx)
	if err != nil || c.opts.DryRun {
		return err
	}
	if err := c.remove(ctx, last); err != nil {
		return err
	}
	c.begin(phaseSweep, 0)
	freed, err := c.sweepAll(ctx, c.step)
	c.now.FreedBytes += uint64(max(freed, 0)) //nolint:gosec // not negative
	return err
}

// begin says that a phase begins.
func (c *collection) begin(phase string, total uint64) {
	c.phase.Store(&phase)
	c.now.Phase, c.now.Done, c.now.Total = phase, 0, total
	c.report()
}

// collectPhase is the phase of the collection that runs here, "" without one.
func (s *Server) collectPhase() string {
	if phase := s.phase.Load(); phase != nil {
		return *phase
	}
	return ""
}

// step says how far a phase is.
func (c *collection) step(done, total uint64) {
	c.now.Done, c.now.Total = done, total
	c.report()
}

// report says how far the collection is. It is given up once another server leads:
// that one may begin another.
func (c *collection) report() {
	if st := c.node.Status(); st.State != "leader" && !c.opts.DryRun {
		c.give(fmt.Errorf("this server leads no more; go on with what is condemned at the one that does: %w", flox.ErrUnreachable))
	}
	if c.tell != nil {
		c.tell(proto.Clone(&c.now).(*floxv1.CollectProgress))
	}
	c.now.Paths = nil
}

// condemn marks what is live and condemns the rest.
func (c *collection) condemn(ctx context.Context) error {
	// A use is noted once in a while only, so what seems older may have been used since.
	since := c.began.Add(-c.opts.KeepRecent - c.touchEvery()).UnixMilli()
	c.now.UsedSinceUnixMs = since
	if c.opts.Machine != nil {
		since, c.now.UsedSinceUnixMs = math.MaxInt64, 0 // nothing stays for its age
	}
	c.begin(phaseMark, 0)
	if !c.opts.DryRun {
		if err := c.forgetRoots(ctx, c.began); err != nil {
			return err
		}
	}
	m, err := c.mark(ctx, since, c.opts.Machine, c.step)
	if err != nil {
		return err
	}
	c.now.LivePaths = m.count
	c.now.DeadPaths = 0
	if !c.opts.DryRun {
		if err := c.reviveLive(ctx, m); err != nil {
			return err
		}
	}
	c.begin(phaseCondemn, m.deadCount())
	return c.eachDead(ctx, m, func(names []string, bytes uint64) error {
		c.now.DeadPaths += uint64(len(names))
		c.now.DeadBytes += bytes
		if c.opts.DryRun {
			c.now.Paths = names
		} else if err := c.condemnPaths(ctx, m, since, names); err != nil {
			return err
		}
		c.step(c.now.GetDeadPaths(), c.now.GetTotal())
		return nil
	})
}

func (c *collection) condemnPaths(ctx context.Context, m *marking, since int64, names []string) error {
	_, err := propose(freeing(ctx), c.session, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Condemn{Condemn: &floxv1.CondemnPaths{
		Paths: names, AsOf: m.asOf, UnusedSinceUnixMs: since,
	}}})
	return err
}

// eachDead calls f with the paths that are not reached, some at a time, and the
// bytes of their NARs. Those that became valid after the mark are not among them.
func (c *collection) eachDead(ctx context.Context, m *marking, f func(names []string, bytes uint64) error) error {
	return c.pages(ctx, infoKey, func(page [][2][]byte) error {
		var names []string
		bytes := uint64(0)
		info := &floxv1.PathInfo{}
		for _, kv := range page {
			if !m.dead(string(kv[0])) || !c.opts.Machine.may(string(kv[0])) {
				continue
			}
			if err := proto.Unmarshal(kv[1], info); err != nil {
				return fmt.Errorf("facts of %q: %w: %w", kv[0], err, flox.ErrCorrupt)
			}
			names = append(names, info.GetPath())
			bytes += info.GetNarSize()
		}
		if len(names) == 0 {
			return nil
		}
		return f(names, bytes)
	})
}

// pages calls f with everything under a kind of key, without that kind, a page at a
// time and each of a state of its own, so that none is held for long.
func (s *Server) pages(ctx context.Context, kind byte, f func(page [][2][]byte) error) error {
	var from []byte
	for {
		var page [][2][]byte
		err := s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
			return r.Iterate([]byte{kind}, from, func(key, value []byte) bool {
				page = append(page, [2][]byte{append([]byte(nil), key[1:]...), append([]byte(nil), value...)})
				return len(page) < collectBatch
			})
		})
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || len(page) == 0 {
			return err
		}
		from = append(hashKey(kind, string(page[len(page)-1][0])), 0)
		if err := f(page); err != nil {
			return err
		}
	}
}

// reviveLive takes the marks of an earlier collection off what is live now.
func (c *collection) reviveLive(ctx context.Context, m *marking) error {
	return c.pages(ctx, condemnedKey, func(page [][2][]byte) error {
		var hashParts []string
		for _, kv := range page {
			if !m.dead(string(kv[0])) {
				hashParts = append(hashParts, string(kv[0]))
			}
		}
		return c.reviveUsed(ctx, hashParts)
	})
}

// reviveRoots takes the marks off what became a root meanwhile.
func (c *collection) reviveRoots(ctx context.Context) error {
	var hashParts []string
	flush := func() error {
		err := c.reviveUsed(ctx, hashParts)
		hashParts = hashParts[:0]
		return err
	}
	err := c.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		return c.eachRootOf(ctx, r, c.opts.Machine, func(at root) error {
			if hashParts = append(hashParts, at.hashPart); len(hashParts) < collectBatch {
				return nil
			}
			return flush()
		})
	})
	if err != nil {
		return err
	}
	return flush()
}

// wait waits until every mark is older than the grace, and gives the log index up
// to which marks count.
func (c *collection) wait(ctx context.Context) (last uint64, err error) {
	c.now.DeadPaths, c.now.DeadBytes = 0, 0
	newest := int64(0)
	err = c.pages(ctx, condemnedKey, func(page [][2][]byte) error {
		for _, kv := range page {
			mark, err := parseCondemnation(kv[1])
			if err != nil {
				return err
			}
			newest, last = max(newest, mark.at), max(last, mark.index)
			c.now.DeadPaths++
			c.now.DeadBytes += mark.narSize
		}
		return nil
	})
	if err != nil || last == 0 || c.opts.DryRun {
		return last, err
	}
	ready := time.UnixMilli(newest).Add(c.grace + time.Millisecond)
	c.begin(phaseWait, uint64(c.grace/time.Second))
	for {
		left := time.Until(ready)
		if left <= 0 {
			return last, nil
		}
		timer := time.NewTimer(min(left, progressEvery))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return 0, ctx.Err()
		}
		c.step(uint64(max(c.grace-time.Until(ready), 0)/time.Second), c.now.GetTotal()) //nolint:gosec // not negative
	}
}

// touchEvery is the constant of that name, or a test's.
func (s *Server) touchEvery() time.Duration {
	if s.cfg.touchEvery != 0 {
		return s.cfg.touchEvery
	}
	return touchEvery
}
