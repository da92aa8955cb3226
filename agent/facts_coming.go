package agent

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

const (
	// fewFacts is how many facts of one answer are verified and written before
	// anybody goes on; of more, who asked waits for their own path alone.
	fewFacts = 64
	// maxComing bounds the facts that were answered and are not written yet. What
	// comes beside more is written at once.
	maxComing = 32_768
)

// coming are facts that were answered together and are verified and written behind
// the back of who asked for one of them. That one is verified at once for whoever
// asks for another of them; on the disk they are when written is closed.
type coming struct {
	all     []*comingFact
	written chan struct{}
	dropped map[string]bool // hash parts of what was removed meanwhile; under facts.mu
}

// comingFact is one of them.
type comingFact struct {
	message *floxv1.PathInfo
	hash    string // "" if the message names no store path
	of      *coming

	once sync.Once
	info *flox.PathInfo
	err  error
}

// verified decodes and verifies it, once.
func (c *comingFact) verified(f *facts) (*flox.PathInfo, error) {
	c.once.Do(func() {
		if c.info, c.err = api.ToPathInfo(c.message); c.err == nil {
			c.err = f.verify(c.info)
		}
	})
	return c.info, c.err
}

// vouch verifies an answer as one, if somebody signed it so: what is in it and names a
// key that is trusted still need not be verified by itself then.
func (f *facts) vouch(all []*comingFact, sigs []string) {
	f.mu.RLock()
	trust := f.trust
	f.mu.RUnlock()
	if trust == nil || len(sigs) == 0 {
		return
	}
	infos := make([]*flox.PathInfo, len(all))
	for i, one := range all {
		var err error
		if infos[i], err = api.ToPathInfo(one.message); err != nil {
			return
		}
	}
	if trust.VerifyAnswer(f.dir, infos, sigs) != nil {
		return // each by itself
	}
	for i, one := range all {
		if !infos[i].Manifest.IsZero() && f.holds(infos[i]) {
			one.once.Do(func() { one.info = infos[i] })
		}
	}
}

func newComing(found []*floxv1.PathInfo) *coming {
	c := &coming{all: make([]*comingFact, 0, len(found)), written: make(chan struct{}), dropped: make(map[string]bool)}
	for _, m := range found {
		one := &comingFact{message: m, of: c}
		if p, err := flox.ParseStorePath(m.GetPath()); err == nil {
			one.hash = p.HashPart()
		}
		c.all = append(c.all, one)
	}
	return c
}

// split makes two of it: one fact, and the others.
func (c *coming) split(at int) (one, others *coming) {
	one, others = newComing(nil), newComing(nil)
	for i, fact := range c.all {
		if fact.of = others; i == at {
			fact.of = one
		}
		fact.of.all = append(fact.of.all, fact)
	}
	return one, others
}

// announce has early and get know of facts that are not here, from now on; settle
// has to follow. False: there is no room, and none was taken in.
func (f *facts) announce(all ...*coming) bool {
	var fresh []*comingFact
	for _, c := range all {
		for _, one := range c.all {
			if one.hash != "" && !f.has(one.hash) {
				fresh = append(fresh, one)
			}
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.coming)+len(fresh) > maxComing {
		return false
	}
	for _, one := range fresh {
		if f.coming[one.hash] == nil { // else what came first stays
			f.coming[one.hash] = one
		}
	}
	return true
}

// settle verifies and writes what was announced, and says what was refused. Once ctx has ended nothing more is written.
func (f *facts) settle(ctx context.Context, c *coming, refused func(*floxv1.PathInfo, error)) error {
	defer close(c.written)
	defer f.forgetComing(c)
	f.verifyAll(ctx, c)
	infos := make([]*flox.PathInfo, 0, len(c.all))
	for _, one := range c.all {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		info, err := one.verified(f)
		if err != nil {
			refused(one.message, err)
			continue
		}
		infos = append(infos, info)
	}
	return f.write(infos, c)
}

// verifyAll verifies side by side. One processor is left to who asked, as they go on
// meanwhile.
func (f *facts) verifyAll(ctx context.Context, c *coming) {
	var group sync.WaitGroup
	workers := max(1, runtime.GOMAXPROCS(0)-1)
	for w := range workers {
		group.Go(func() {
			for i := w; i < len(c.all) && ctx.Err() == nil; i += workers {
				_, _ = c.all[i].verified(f) // settle looks at it
			}
		})
	}
	group.Wait()
}

func (f *facts) forgetComing(c *coming) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, one := range c.all {
		if f.coming[one.hash] == one {
			delete(f.coming, one.hash)
		}
	}
}

// dropComing has facts that come not be written: they are valid no longer.
func (f *facts) dropComing(hashPart string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if one := f.coming[hashPart]; one != nil {
		one.of.dropped[hashPart] = true
		delete(f.coming, hashPart)
	}
}

func (f *facts) comes(hashPart string) *comingFact {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.coming[hashPart]
}

// early is get for who tells nobody that outlives this process: what comes counts
// though it is not on the disk yet.
func (f *facts) early(hashPart string) (*flox.PathInfo, bool) {
	if one := f.comes(hashPart); one != nil {
		info, err := one.verified(f)
		return info, err == nil
	}
	return f.read(hashPart)
}

// path is the store path of early's info.
func (f *facts) path(hashPart string) (flox.StorePath, bool) {
	if f.comes(hashPart) != nil {
		info, ok := f.early(hashPart)
		if !ok {
			return "", false
		}
		return info.Path, true
	}
	b, closer, err := f.stored(hashPart)
	if err != nil {
		return "", false
	}
	defer func() { _ = closer.Close() }()
	name, _, ok := api.PeekPathInfo(b)
	return flox.StorePath(name), ok
}

// take keeps the facts of an answer in which p was asked for, with what it refers
// to. Of a large one p is known when it returns, and the rest is coming, on the disk
// behind p. That p is refused is an error.
func (r *resolver) take(from p2p.PeerID, p flox.StorePath, found []*floxv1.PathInfo, sigs []string) error {
	at := slices.IndexFunc(found, func(m *floxv1.PathInfo) bool { return m.GetPath() == string(p) })
	if at < 0 || len(found) <= fewFacts {
		return r.settle(from, p, newComing(found))
	}
	all := newComing(found)
	r.facts.vouch(all.all, sigs)
	first, rest := all.split(at)
	if _, err := first.all[0].verified(r.facts); err != nil || !r.facts.announce(first, rest) {
		return errors.Join(r.settle(from, p, first), r.settle(from, p, rest))
	}
	r.work.Go(func() { // bounded by maxComing
		err := errors.Join(r.settle(from, p, first), r.settle(from, p, rest))
		if err != nil && r.life.Err() == nil {
			r.log.Warn("path infos are not kept", "error", err)
		}
	})
	return nil
}

// settle is facts.settle. What is refused is logged, and p an error.
func (r *resolver) settle(from p2p.PeerID, p flox.StorePath, c *coming) error {
	var failed error
	err := r.facts.settle(r.life, c, func(m *floxv1.PathInfo, err error) {
		r.log.Warn("path info refused", "peer", string(from), "path", m.GetPath(), "error", err)
		if m.GetPath() == string(p) {
			failed = err
		}
	})
	return errors.Join(failed, err)
}
