package storehouse

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// lookUpstream gives what an upstream has of the path with a hash part, signed as it
// has to be, and how many bytes fetching it takes (0 = its upstream does not say). The
// info has no manifest. Nothing is fetched or made valid. ErrNotFound when no upstream
// has it; one that does not answer does not have it, the error says so.
func (s *Server) lookUpstream(ctx context.Context, hashPart string) (info *flox.PathInfo, downloadSize uint64, err error) {
	o, err := s.upstreams.find(ctx, hashPart, nil)
	if err != nil {
		return nil, 0, err
	}
	return &o.Info, o.downloadSize(), nil
}

// find asks the upstreams for a path, the next when one does not have it or takes
// long. Those in but are left out.
func (u *upstreams) find(ctx context.Context, hashPart string, but map[string]error) (*offer, error) {
	if !flox.ValidHashPart(hashPart) {
		return nil, fmt.Errorf("hash part %.64q: want %d characters of nix-base32: %w", hashPart, flox.HashPartLen, flox.ErrBadInput)
	}
	all, err := u.current(ctx, cluster.Local)
	if err != nil {
		return nil, err
	}
	list := make([]*upstream, 0, len(all))
	var no noAnswers
	for _, up := range all {
		if why, left := but[up.url()]; left {
			no.add(up, why)
		} else {
			list = append(list, up)
		}
	}
	// The first that said something good lately is asked no more.
	for _, up := range list {
		a, known := up.answers.get(hashPart)
		if known && a.offer != nil && a.err == nil {
			return a.offer, nil
		}
		if !known {
			break
		}
	}
	return u.hedged(ctx, hashPart, list, &no)
}

// asked is what one upstream said.
type asked struct {
	up    *upstream
	offer *offer
	err   error
}

// hedged asks upstreams in turn, and more than one at once when they take long.
func (u *upstreams) hedged(ctx context.Context, hashPart string, list []*upstream, no *noAnswers) (*offer, error) {
	ctx, cancel := context.WithCancel(ctx)
	var askers sync.WaitGroup
	defer askers.Wait()
	defer cancel() // they wait for this and for answers only
	said := make(chan asked, len(list))
	hedge := time.NewTimer(u.limits.hedge)
	defer hedge.Stop()
	busy := 0
	ask := func() {
		up := list[0]
		list = list[1:]
		busy++
		hedge.Reset(u.limits.hedge)
		askers.Go(func() {
			o, err := u.ask(ctx, up, hashPart)
			said <- asked{up, o, err}
		})
	}
	for {
		if busy == 0 {
			if len(list) == 0 {
				return nil, no.err(hashPart)
			}
			ask()
		}
		select {
		case a := <-said:
			busy--
			if a.err == nil {
				return a.offer, nil
			}
			if errors.Is(a.err, flox.ErrClosed) {
				return nil, a.err
			}
			no.add(a.up, a.err)
			if len(list) > 0 {
				ask()
			}
		case <-hedge.C:
			if len(list) > 0 {
				ask()
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// noAnswers gathers why upstreams do not give a path.
type noAnswers struct{ why []string }

func (r *noAnswers) add(up *upstream, err error) {
	if !errors.Is(err, flox.ErrNotFound) {
		r.why = append(r.why, up.url()+": "+err.Error())
	}
}

func (r *noAnswers) err(hashPart string) error {
	if len(r.why) == 0 {
		return fmt.Errorf("no upstream has what %s names: %w", hashPart, flox.ErrNotFound)
	}
	return fmt.Errorf("no upstream gives what %s names (%s): %w", hashPart, strings.Join(r.why, "; "), flox.ErrNotFound)
}

// question is one that an upstream is asked, for everybody who waits for it.
type question struct {
	done  chan struct{}
	offer *offer
	err   error
}

// ask asks an upstream for a path, unless it is known what it says.
func (u *upstreams) ask(ctx context.Context, up *upstream, hashPart string) (*offer, error) {
	if a, known := up.answers.get(hashPart); known {
		return a.offer, a.err
	}
	q, err := u.join(ctx, up, hashPart)
	if err != nil {
		return nil, err
	}
	select {
	case <-q.done:
		return q.offer, q.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// join gives the question that an upstream is being asked, a new one if need be.
func (u *upstreams) join(ctx context.Context, up *upstream, hashPart string) (*question, error) {
	up.mu.Lock()
	q := up.asking[hashPart]
	up.mu.Unlock()
	if q != nil {
		return q, nil
	}
	select {
	case up.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	free := func() { <-up.slots }
	up.mu.Lock()
	defer up.mu.Unlock()
	if q := up.asking[hashPart]; q != nil {
		free()
		return q, nil
	}
	if err := up.breaker.enter(); err != nil {
		free()
		return nil, err
	}
	q = &question{done: make(chan struct{})}
	err := u.work(func() {
		defer free()
		u.answer(up, hashPart, q)
	})
	if err != nil {
		up.breaker.leave(context.Canceled)
		free()
		return nil, err
	}
	up.asking[hashPart] = q
	return q, nil
}

// answer asks an upstream and remembers what it says.
func (u *upstreams) answer(up *upstream, hashPart string, q *question) {
	ctx, cancel := context.WithTimeout(u.life, u.limits.ask)
	defer cancel()
	up.asked.Add(1)
	q.offer, q.err = u.read(ctx, up, hashPart)
	if errors.Is(ctx.Err(), context.DeadlineExceeded) && q.err != nil {
		q.err = fmt.Errorf("no answer within %s: %w: %w", u.limits.ask, context.DeadlineExceeded, flox.ErrUnreachable)
	}
	up.breaker.leave(blame(q.err))
	switch {
	case q.err == nil:
		up.had.Add(1)
		up.answers.put(hashPart, cacheAnswer{offer: q.offer}, u.limits.positive)
	case blame(q.err) == nil:
		up.answers.put(hashPart, cacheAnswer{err: q.err}, u.limits.negative)
	default:
		u.log.Debug("an upstream does not answer", "upstream", up.url(), "error", q.err)
	}
	up.mu.Lock()
	delete(up.asking, hashPart)
	up.mu.Unlock()
	close(q.done)
}

// read reads and checks what an upstream says of a path, or by the id of an output of
// what that became.
func (u *upstreams) read(ctx context.Context, up *upstream, hashPart string) (*offer, error) {
	source, done, err := up.use(u.limits)
	if err != nil {
		return nil, err
	}
	defer done()
	if id, err := nix.ParseRealisationID(hashPart); err == nil {
		return up.readRealisation(ctx, source, id)
	}
	info, err := readNarInfo(ctx, source, u.s.cfg.StoreDir, hashPart)
	if err != nil {
		return nil, err
	}
	if err := trusted(u.s.cfg.StoreDir, up.keys, &info.Info); err != nil {
		return nil, err
	}
	return &offer{NarInfo: info, from: up.url()}, nil
}
