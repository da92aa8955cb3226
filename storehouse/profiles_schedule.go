package storehouse

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/profile"
	"github.com/floxctl/flox/profile/upgrade"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// upgradeEvery is how often the leader looks for profiles that are due.
	upgradeEvery = time.Minute
	// upgradesAtOnce is how many profiles are upgraded at once.
	upgradesAtOnce = 4
	// upgradeWait bounds what is made for one upgrade; what is not made by then is left out.
	upgradeWait = time.Hour
	// packagesAtOnce is how many packages of one profile are made at once.
	packagesAtOnce = 4
	// reasonSchedule is why a generation was made that nobody asked for.
	reasonSchedule = "schedule"
)

// setSchedule says when a profile is upgraded by itself.
func (p *profiles) setSchedule(ctx context.Context, who person, q *floxv1.SetProfileScheduleRequest) (*floxv1.SetProfileScheduleResponse, error) {
	reply, err := p.propose(ctx, who, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Schedule{Schedule: &floxv1.SetSchedule{
		Profile: q.GetName(), Schedule: q.GetSchedule(),
	}}})
	out := &floxv1.SetProfileScheduleResponse{Profile: reply.GetProfile()}
	if err == nil {
		err = p.view(ctx, cluster.Local, func(r *cluster.Reader) (err error) {
			_, out.NextRunUnixMs, err = runsOf(r, out.GetProfile())
			return err
		})
	}
	return out, err
}

// runsOf gives what the last upgrade of a profile by schedule came to, and when the next
// one is due.
func runsOf(r *cluster.Reader, p *floxv1.Profile) (last *floxv1.ProfileRun, next int64, err error) {
	if last, err = profile.LastRun(r, p.GetName()); err != nil {
		return nil, 0, err
	}
	if at := upgrade.Next(p, last, time.Now()); !at.IsZero() {
		next = at.UnixMilli()
	}
	return last, next, nil
}

// upgrades are what this server upgrades now because of schedules.
type upgrades struct {
	p     *profiles
	slots chan struct{}
	all   sync.WaitGroup

	mu      sync.Mutex
	running map[string]bool // folded names; at most upgradesAtOnce
}

func newUpgrades(p *profiles) *upgrades {
	return &upgrades{p: p, slots: make(chan struct{}, upgradesAtOnce), running: map[string]bool{}}
}

// upgradeLoop upgrades on the leader what schedules say, until ctx ends.
func (p *profiles) upgradeLoop(ctx context.Context) error {
	u := newUpgrades(p)
	defer u.all.Wait()
	return p.s.asLeader(ctx, upgradeEvery, nil, "upgrade profiles that have a schedule", u.begin)
}

// dueProfile is one that is to be upgraded.
type dueProfile struct {
	*floxv1.Profile
	at time.Time
}

// begin begins to upgrade the profiles whose schedules say so at a time, who waits longest
// first, and gives once the last of them has begun: one that takes long, or hangs, keeps
// the others waiting only if as many do as may run at once.
func (u *upgrades) begin(ctx context.Context, now time.Time) error {
	if u.p.s.node.Status().Level < schedulesLevel {
		return nil // a server is too old to take any of it
	}
	due, err := u.due(ctx, now)
	slices.SortStableFunc(due, func(x, y dueProfile) int { return x.at.Compare(y.at) })
	for _, of := range due {
		select {
		case u.slots <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		if ctx.Err() != nil || u.p.s.node.Status().State != "leader" {
			<-u.slots
			break // whoever leads now goes on
		}
		u.run(ctx, of)
	}
	return err
}

// run upgrades a profile beside others, in the slot that its caller took.
func (u *upgrades) run(ctx context.Context, of dueProfile) {
	name := profile.Folded(of.GetName())
	u.mu.Lock()
	u.running[name] = true
	u.mu.Unlock()
	u.all.Go(func() {
		err := u.p.upgradeOne(ctx, of)
		u.mu.Lock()
		delete(u.running, name)
		u.mu.Unlock()
		<-u.slots
		if err != nil && ctx.Err() == nil {
			u.p.s.cfg.Log.Warn("a profile that is due is upgraded later", "profile", of.GetName(), "error", err)
		}
	})
}

// due gives the profiles that are due at a time and are not being upgraded.
func (u *upgrades) due(ctx context.Context, now time.Time) (due []dueProfile, err error) {
	u.mu.Lock()
	running := maps.Clone(u.running) // before the facts are read: what has ended by then is noted there
	u.mu.Unlock()
	err = u.p.view(ctx, cluster.Local, func(r *cluster.Reader) error {
		var bad error
		err := profile.List(r, "", "", func(of *floxv1.Profile) bool {
			if upgrade.Of(of).GetEveryMinutes() == 0 || running[profile.Folded(of.GetName())] {
				return true
			}
			var last *floxv1.ProfileRun
			if last, bad = profile.LastRun(r, of.GetName()); bad != nil {
				return false
			}
			if at := upgrade.Next(of, last, now); !at.After(now) {
				due = append(due, dueProfile{of, at})
			}
			return ctx.Err() == nil
		})
		return errors.Join(err, bad)
	})
	return due, err
}

// upgradeOne upgrades a profile, and notes what that came to. What it gives is to be
// tried again: somebody changed the profile in this moment, or the server stops.
func (p *profiles) upgradeOne(ctx context.Context, of dueProfile) error {
	run, err := p.upgrade(ctx, of.Profile)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, flox.ErrBusy):
		return err
	case err != nil:
		p.s.cfg.Log.Warn("a profile that was due could not be upgraded", "profile", of.GetName(), "error", err)
		run = &floxv1.ProfileRun{Result: profile.RunFailed, Detail: err.Error(), Generation: of.GetLive()}
	}
	run.DueUnixMs, run.Detail = of.at.UnixMilli(), profile.Cut(run.GetDetail())
	_, err = p.propose(ctx, p.s.itself(), &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Run{Run: &floxv1.NoteRun{
		Profile: of.GetName(), Created: of.GetCreatedIndex(), Run: run,
	}}})
	if errors.Is(err, flox.ErrNotFound) {
		return nil // it was deleted or renamed meanwhile
	}
	return err
}
