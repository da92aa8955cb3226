package agent

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/p2p"
)

const (
	// renewRoots is how often, about, the storehouse hears what this machine holds
	// on to: what ran meanwhile is told of no sooner, so that a fleet of laptops
	// does not fill its log.
	renewRoots = 4 * time.Hour
	// rootsSoon is how long a change that somebody asked for waits for others.
	rootsSoon = 10 * time.Second
	// rootsCondemned is within which time they are told when a collection begins:
	// spread, as all machines are told of it at once, and far below its grace.
	rootsCondemned = 5 * time.Minute
	// rootsRetryMin and rootsRetryMax bound the pause after the storehouse could not
	// be told.
	rootsRetryMin, rootsRetryMax = 15 * time.Second, 30 * time.Minute
	// rootsTimeout bounds one attempt.
	rootsTimeout = time.Minute
)

// rootKeeper tells the storehouse which store paths this machine holds on to, so
// that none of them is collected: what is kept, what is to be here offline, and
// what ran here last.
type rootKeeper struct {
	a         *Agent
	soon      chan struct{} // a change that somebody asked for
	condemned chan struct{} // a collection began
	// every, wait and spread are the constants above, shorter in tests.
	every, wait, spread time.Duration
}

func newRootKeeper(a *Agent) *rootKeeper {
	return &rootKeeper{
		a: a, soon: make(chan struct{}, 1), condemned: make(chan struct{}, 1),
		every: renewRoots, wait: rootsSoon, spread: rootsCondemned,
	}
}

// changed says that what is kept became another set.
func (k *rootKeeper) changed() { poke(k.soon) }

// collects says that a collection condemned paths.
func (k *rootKeeper) collects() { poke(k.condemned) }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run tells the storehouse until ctx ends.
func (k *rootKeeper) run(ctx context.Context) error {
	pause := rootsRetryMin
	next := time.NewTimer(k.wait)
	defer next.Stop()
	due := time.Now().Add(k.wait)
	sooner := func(in time.Duration) {
		if at := time.Now().Add(in); at.Before(due) {
			due = at
			next.Reset(in)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-k.soon:
			sooner(k.wait)
			continue
		case <-k.condemned:
			sooner(rand.N(k.spread)) //nolint:gosec // spreads a load
			continue
		case <-next.C:
		}
		wait := k.every + rand.N(k.every/4+1) //nolint:gosec // spreads a load
		if err := k.tell(ctx); err != nil && ctx.Err() == nil {
			k.a.log.Debug("the storehouse was not told what this machine holds on to", "error", err)
			wait, pause = pause, min(2*pause, rootsRetryMax)
		} else {
			pause = rootsRetryMin
		}
		due = time.Now().Add(wait)
		next.Reset(wait)
	}
}

// tell renews this machine's set at the storehouse, or sends it whole.
func (k *rootKeeper) tell(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, rootsTimeout)
	defer cancel()
	set, err := k.set(ctx)
	if err != nil {
		return err
	}
	house := k.a.houses.first()
	err = k.tellTo(ctx, house, set)
	if away(err) && ctx.Err() == nil {
		k.a.houses.failed(house) // the next attempt is at another one
	}
	return err
}

// tellTo is tell at one server.
func (k *rootKeeper) tellTo(ctx context.Context, house p2p.PeerID, set content.RootSet) error {
	members := k.a.calls.members(house)
	if set.Len() > 0 {
		id := set.ID()
		resp, err := members.RenewRoots(ctx, connect.NewRequest(&floxv1.RenewRootsRequest{Set: id[:]}))
		if err != nil {
			return fmt.Errorf("renew roots: %w", api.FromConnect(err))
		}
		if !resp.Msg.GetUnknown() {
			return nil
		}
	}
	if _, err := members.SetRoots(ctx, connect.NewRequest(&floxv1.SetRootsRequest{Hashes: set})); err != nil {
		return fmt.Errorf("set roots: %w", api.FromConnect(err))
	}
	return nil
}

// set is what this machine holds on to. What somebody asked to keep comes first,
// should it be too much.
func (k *rootKeeper) set(ctx context.Context) (content.RootSet, error) {
	owners, err := k.a.cache.Owners(ctx)
	if err != nil {
		return nil, err
	}
	have := make(map[flox.StorePath]bool)
	add := func(p flox.StorePath) {
		if _, err := flox.ParseStorePath(string(p)); err == nil && len(have) < content.MaxRootSet {
			have[p] = true
		}
	}
	for _, o := range owners {
		add(flox.StorePath(o)) // an owner of another kind has no name of a path
		for _, p := range k.a.policies.of(o).Paths {
			add(p)
		}
	}
	for _, p := range k.a.profiles.list() { // those of the storehouse, too: what lives and what did before
		add(p.Path)
	}
	made, err := k.a.nix.roots.find(ctx)
	if err != nil {
		return nil, err
	}
	for _, r := range made {
		add(r.Target)
	}
	for _, p := range k.a.ran.both() {
		add(p.Path)
	}
	paths := make([]flox.StorePath, 0, len(have))
	for p := range have {
		paths = append(paths, p)
	}
	return content.MakeRootSet(paths)
}
