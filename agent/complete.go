package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	flox "github.com/floxctl/flox"
)

const (
	// completeEvery is how often it is looked whether all is still here.
	completeEvery = 30 * time.Second
	// completeSettle is how long what is new may settle: a program that starts
	// maps one object after another.
	completeSettle = time.Second
	// onlineEvery is how often it is looked whether somebody can be reached again,
	// while something could not be fetched.
	onlineEvery = time.Second
	// maxDeadGoals is after how many goals in a row of which not a byte came the
	// others wait too: nobody can be reached.
	maxDeadGoals = 2
)

var (
	// errNoRoom ends a round of completion: more would push out what is in use.
	errNoRoom = fmt.Errorf("the cache is full: %w", flox.ErrFull)
	// errNews ends a round: something ran meanwhile, which comes first.
	errNews = errors.New("something new ran")
	// errAlone is why a round fetches nothing: to try would only take time and
	// power, for hours.
	errAlone error = &unreachable{errors.New("nobody can be reached")}
)

// completer brings here whole what was used, in the background: first the files
// that ran or are mapped, then what looking up their libraries needs, then the
// rest of their store paths, then closures somebody wants to have. What is whole
// is a question to the cache, never a note made earlier: content gets evicted.
type completer struct {
	a        *Agent
	ran      *ran
	policies *policies
	// mapped gives the inodes that processes have mapped; nil = nothing is mounted.
	mapped func(context.Context) ([]uint64, error)
	// reach says who can be asked: reachable, but for tests.
	reach func() reach
	// completeEvery, completeSettle and surveyFor; tests have no time.
	every, settle, surveyFor time.Duration

	surveying sync.Mutex // held by who makes a survey, for surveyTime at most
	survey    survey

	mu           sync.Mutex
	standings    map[goalKey]*standing
	closures     map[flox.StorePath][]flox.StorePath
	linked       map[flox.StorePath]*linked
	reachedGoals uint64 // how many were brought here
	// settled is one more than the changes of ran after which all links were
	// followed as far as they lead, 0 = never.
	settled uint64
}

func newCompleter(a *Agent, r *ran, p *policies) *completer {
	c := &completer{
		a: a, ran: r, policies: p, every: completeEvery, settle: completeSettle, surveyFor: surveyFor,
		standings: make(map[goalKey]*standing), closures: make(map[flox.StorePath][]flox.StorePath),
		linked: make(map[flox.StorePath]*linked),
	}
	c.reach = c.reachable
	if a.cfg.Warden != nil {
		c.mapped = a.cfg.Warden.MappedNodes
	}
	return c
}

// off says why nothing is completed at all, "" if it is.
func (c *completer) off() string {
	if c.a.cfg.NoPrefetch {
		return "prefetching is switched off"
	}
	return ""
}

// run completes until ctx ends.
func (c *completer) run(ctx context.Context) error {
	if kept, err := c.a.keptOwners(ctx); err == nil {
		if err := c.policies.retain(func(o string) bool { return kept[o] }); err != nil {
			c.a.log.Warn("offline policies not saved", "error", err)
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { c.watchMapped(ctx); return nil })
	group.Go(func() error { c.rounds(ctx); return nil })
	return group.Wait()
}

// rounds makes one round after another, and saves what ran.
func (c *completer) rounds(ctx context.Context) {
	unsaved := "" // why, as of the last try: a full disk stays full
	for ctx.Err() == nil {
		before, failed := c.reach(), false
		if c.off() == "" {
			err := c.round(ctx)
			failed = err != nil && !errors.Is(err, errNews)
			if failed && ctx.Err() == nil {
				c.a.log.Debug("not all could be completed", "error", err)
			}
			if errors.Is(err, errAlone) {
				before = reach{}
			}
		}
		why := ""
		if err := c.ran.save(); err != nil {
			if why = err.Error(); why != unsaved {
				c.a.log.Warn("list of what ran not saved", "error", err)
			}
		}
		unsaved = why
		c.rest(ctx, failed, before)
	}
}

// rest waits for something to do: something new ran, what failed may be tried
// again, somebody can be reached again, or it is time to look. Before is who could
// be reached when it failed.
func (c *completer) rest(ctx context.Context, failed bool, before reach) {
	next := c.every
	if failed && !before.nobody() {
		next = min(next, c.untilRetry())
	}
	wake := time.NewTimer(next)
	defer wake.Stop()
	look := time.NewTicker(onlineEvery)
	defer look.Stop()
	for {
		select {
		case <-c.ran.news:
			select {
			case <-time.After(c.settle):
			case <-ctx.Done():
			}
			return
		case <-look.C:
			now := c.reach()
			if now.returned(before) && (c.forgive() || failed) {
				return
			}
			before = now
		case <-wake.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// reach is who can be asked, as of one moment.
type reach struct {
	peers      int
	storehouse bool // it answers
}

func (r reach) nobody() bool { return r.peers == 0 && !r.storehouse }

// returned reports whether what failed before may succeed now. One peer more, where
// there are some, is no reason: they come and go all day.
func (r reach) returned(before reach) bool {
	return before.nobody() && !r.nobody() || r.storehouse && !before.storehouse
}

// reachable looks who can be asked. The network itself sees to it that somebody
// can be again.
func (c *completer) reachable() reach {
	return reach{peers: len(c.a.host.Peers()), storehouse: c.a.follower.state().connected}
}

// poke begins a round soon: there may be something to do.
func (c *completer) poke() {
	select {
	case c.ran.news <- struct{}{}:
	default:
	}
}

// round goes through all goals in their order.
func (c *completer) round(ctx context.Context) error {
	began := c.ran.changed()
	r := &round{c: c, news: func() bool { return c.ran.changed() != began }}
	for ph := range phases {
		reached, err := r.phase(ctx, ph)
		// What came may lead on to more.
		for n := 0; ph == phaseLinks && err == nil && reached > 0 && n < maxHops; n++ {
			reached, err = r.phase(ctx, ph)
		}
		if err != nil {
			return err
		}
		if ph == phaseLinks {
			c.mu.Lock()
			c.settled = began + 1
			c.mu.Unlock()
		}
	}
	return r.failed
}

// round is one round under way.
type round struct {
	c      *completer
	news   func() bool
	dead   int   // goals in a row of which nothing came
	failed error // the last failure
	over   error // why nothing more is fetched: nobody can be reached, or there is no room
}

// phase goes through the goals of one phase. An error ends the round.
func (r *round) phase(ctx context.Context, ph phase) (reached int, err error) {
	goals, err := r.c.goals(ctx, ph)
	for _, g := range goals {
		if ctx.Err() != nil {
			return reached, context.Cause(ctx)
		}
		ok, err := r.goal(ctx, g)
		if err != nil {
			return reached, err
		}
		if ok {
			reached++
		}
	}
	return reached, err
}

// goal brings one goal here, if it is not and may be. An error ends the round.
func (r *round) goal(ctx context.Context, g goal) (reached bool, err error) {
	c := r.c
	if c.waiting(g) {
		return false, nil
	}
	if _, whole := c.missing(ctx, g); whole || c.waiting(g) {
		return false, nil
	}
	if r.over == nil && c.reach().nobody() {
		r.over = errAlone
	}
	if r.over != nil {
		r.failed = r.over
		c.note(g, r.over)
		return false, nil
	}
	got, err := c.bring(ctx, g, r.news)
	switch {
	case err == nil:
		r.dead = 0
		c.reached(g)
		return true, nil
	case errors.Is(err, errNews), ctx.Err() != nil:
		return false, err
	case errors.Is(err, errNoRoom):
		r.over = err
		c.note(g, err)
	default:
		c.failed(g, err)
		if r.dead++; got {
			r.dead = 0
		}
		if r.dead >= maxDeadGoals {
			r.over = err
		}
	}
	r.failed = err
	return false, nil
}

// room fails with errNoRoom when the next bytes would make the cache evict others.
func (c *completer) room() error {
	if u := c.a.cache.Usage(); u.Limit <= 0 || u.Bytes >= u.Limit/100*roomPercent {
		return errNoRoom
	}
	return nil
}
