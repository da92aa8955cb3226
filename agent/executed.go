package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p"
)

// maxExecuted is how many store paths this machine is announced under.
const maxExecuted = 256

// maxAnnounced is how many keys there are with the kept paths.
const maxAnnounced = maxExecuted + maxExecuted/8

const (
	// announceEvery is how often a changed set is announced.
	announceEvery = 2 * time.Second
	// trackerEvery is how often the tracker is told of a set that does not
	// change; it forgets after 15 minutes.
	trackerEvery = 5 * time.Minute
	// trackerRetry is when it is told again if that failed.
	trackerRetry = 15 * time.Second
)

// executed remembers the store paths whose programs and libraries were used last,
// newest first. They are what this machine is found under by its peers; the
// list survives a restart.
type executed struct {
	file string

	mu    sync.Mutex
	paths []flox.StorePath
	dirty bool
}

// loadExecuted reads the list; a missing or damaged file is an empty list.
func loadExecuted(file string) *executed {
	e := &executed{file: file, dirty: true}
	var names []string
	if b, err := os.ReadFile(file); err == nil && json.Unmarshal(b, &names) == nil {
		for _, name := range names {
			if p, err := flox.ParseStorePath(name); err == nil && len(e.paths) < maxExecuted {
				e.paths = append(e.paths, p)
			}
		}
	}
	return e
}

// touch puts p in front. The order among the newest few is not kept up, so that
// a program's many starts cost nothing.
func (e *executed) touch(p flox.StorePath) {
	e.mu.Lock()
	defer e.mu.Unlock()
	at := -1
	for i, have := range e.paths {
		if have == p {
			at = i
			break
		}
	}
	switch {
	case at >= 0 && at < maxExecuted/4:
		return
	case at >= 0:
		copy(e.paths[1:at+1], e.paths[:at])
	case len(e.paths) < maxExecuted:
		e.paths = append(e.paths, "")
		copy(e.paths[1:], e.paths)
	default:
		copy(e.paths[1:], e.paths)
	}
	e.paths[0] = p
	e.dirty = true
}

// again makes the list count as changed: it was not told to everybody, or what
// is announced beside it changed.
func (e *executed) again() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.dirty = true
}

// changed gives the list if it changed since the last call.
func (e *executed) changed() ([]flox.StorePath, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.dirty {
		return nil, false
	}
	e.dirty = false
	return append([]flox.StorePath(nil), e.paths...), true
}

func (e *executed) save(paths []flox.StorePath) error {
	b, err := json.Marshal(paths)
	if err != nil {
		return err
	}
	tmp := e.file + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, e.file)
}

// announce tells the swarm under which keys this machine is found, whenever
// they change: executed paths and kept paths. The storehouse's tracker is told
// again before it forgets, and whenever it comes back.
func (a *Agent) announce(ctx context.Context) error {
	tick := time.NewTicker(announceEvery)
	defer tick.Stop()
	var keys []flox.CID
	var told time.Time // the tracker; zero = not
	for {
		if paths, ok := a.executed.changed(); ok {
			now, err := a.announcePaths(ctx, paths)
			if err != nil && ctx.Err() == nil {
				a.log.Warn("announcement failed", "error", err)
			}
			if now != nil {
				keys, told = now, time.Time{}
			}
		}
		connected := a.follower.state().connected
		if !connected {
			told = time.Time{}
		}
		if connected && time.Since(told) > trackerEvery {
			told = time.Now()
			if err := a.tellTracker(ctx, keys); err != nil {
				a.log.Debug("tracker not told", "error", err)
				told = told.Add(trackerRetry - trackerEvery)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// announcePaths announces paths and what is kept, and gives the keys. The list
// is saved in any case.
func (a *Agent) announcePaths(ctx context.Context, paths []flox.StorePath) ([]flox.CID, error) {
	saved := a.executed.save(paths)
	kept, err := a.cache.Keeps(ctx)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("kept paths: %w", err), saved)
	}
	keys := make([]flox.CID, 0, maxAnnounced)
	for _, p := range paths {
		keys = append(keys, p2p.PathKey(p))
	}
	for _, k := range kept {
		if p, err := flox.ParseStorePath(k.Owner); err == nil && len(keys) < maxAnnounced && !slices.Contains(paths, p) {
			keys = append(keys, p2p.PathKey(p))
		}
	}
	return keys, errors.Join(a.host.Announce(keys), saved)
}
