package storehouse

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of asking and fetching.
const (
	// maxAsked is how many narinfos one upstream is asked for at once, and maxFetched
	// how many NARs come at once from all.
	maxAsked   = 24
	maxFetched = 16
	// maxRemembered bounds in bytes what is remembered of one upstream's answers.
	maxRemembered = 8 << 20
)

// upstreamLimits say how patient one is with upstreams, and how they are reached; zero =
// the default.
type upstreamLimits struct {
	ask      time.Duration // for a narinfo
	hedge    time.Duration // after which the next upstream is asked as well
	stall    time.Duration // of a NAR of which nothing comes
	pause    time.Duration // the first time an upstream is left alone
	longest  time.Duration // the longest
	negative time.Duration // how long it is remembered that an upstream does not have a path
	positive time.Duration // and that it does
	ssh      string        // the program that reaches stores behind ssh
}

func (l upstreamLimits) withDefaults() upstreamLimits {
	return upstreamLimits{
		ask: cmp.Or(l.ask, 10*time.Second), hedge: cmp.Or(l.hedge, 500*time.Millisecond), stall: cmp.Or(l.stall, 30*time.Second),
		pause: cmp.Or(l.pause, 30*time.Second), longest: cmp.Or(l.longest, 10*time.Minute),
		negative: cmp.Or(l.negative, 5*time.Minute), positive: cmp.Or(l.positive, 10*time.Minute), ssh: l.ssh,
	}
}

// upstreams asks the upstreams and fetches from them. What is asked and fetched
// belongs to the path, not to who waits for it.
type upstreams struct {
	s      *Server
	log    *slog.Logger
	limits upstreamLimits
	slots  chan struct{} // as many NARs come at once

	life    context.Context //nolint:containedctx // of what is asked and fetched
	end     context.CancelFunc
	gate    sync.Mutex
	ended   bool
	working sync.WaitGroup

	mu      sync.Mutex           // taken before an upstream's
	known   map[string]*upstream // by URL
	flights map[string]*flight   // by hash part
}

func newUpstreams(s *Server) *upstreams {
	u := &upstreams{
		s: s, log: s.cfg.Log.With("part", "upstreams"), limits: s.cfg.upstreams.withDefaults(), slots: make(chan struct{}, maxFetched),
		known: map[string]*upstream{}, flights: map[string]*flight{},
	}
	u.life, u.end = context.WithCancel(context.Background())
	return u
}

// run waits until ctx ends, and then until nothing is asked or fetched any more.
func (u *upstreams) run(ctx context.Context) error {
	<-ctx.Done()
	u.gate.Lock()
	u.ended = true
	u.gate.Unlock()
	u.end()
	u.working.Wait()
	u.mu.Lock()
	defer u.mu.Unlock()
	for url, up := range u.known {
		up.retire()
		delete(u.known, url)
	}
	return nil
}

// work runs something that run waits for. ErrClosed once it has ended.
func (u *upstreams) work(f func()) error {
	u.gate.Lock()
	defer u.gate.Unlock()
	if u.ended {
		return fmt.Errorf("this server of the storehouse ends: %w", flox.ErrClosed)
	}
	u.working.Go(f)
	return nil
}

// upstream is one cache that is asked.
type upstream struct {
	fact  *floxv1.Upstream
	login *floxv1.UpstreamLogin // nil = none
	dir   flox.StoreDir
	keys  nix.KeyRing

	breaker breaker
	answers *answers
	slots   chan struct{} // as many narinfos are asked for at once

	asked, had, fetched, bytes atomic.Uint64

	mu      sync.Mutex
	asking  map[string]*question
	source  cacheSource // nil until it is used
	users   int
	retired bool
}

func (u *upstreams) newUpstream(fact *floxv1.Upstream, login *floxv1.UpstreamLogin) *upstream {
	keys, err := nix.ParseKeyRing(fact.GetKeys())
	if err != nil { // they were checked: then nothing it has may enter
		u.log.Warn("keys of an upstream", "upstream", fact.GetUrl(), "error", err)
	}
	return &upstream{
		fact: fact, login: login, dir: u.s.cfg.StoreDir, keys: keys, answers: newAnswers(maxRemembered), slots: make(chan struct{}, maxAsked), asking: map[string]*question{},
		breaker: breaker{pause: u.limits.pause, longest: u.limits.longest},
	}
}

func (up *upstream) url() string { return up.fact.GetUrl() }

// options say how it is asked.
func (up *upstream) options(limits upstreamLimits) sourceOptions {
	return sourceOptions{jobs: maxAsked, stall: limits.stall, login: up.login.GetLogin(), password: up.login.GetPassword(), dir: up.dir, ssh: limits.ssh}
}

// use gives the cache's source; done has to be called.
func (up *upstream) use(limits upstreamLimits) (source cacheSource, done func(), err error) {
	up.mu.Lock()
	defer up.mu.Unlock()
	if up.retired {
		return nil, nil, notAdded(up.url())
	}
	if up.source == nil {
		up.source, err = openSource(up.url(), up.options(limits))
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", err, flox.ErrUnreachable)
		}
	}
	up.users++
	return up.source, func() {
		up.mu.Lock()
		defer up.mu.Unlock()
		up.users--
		up.closeUnused()
	}, nil
}

// retire closes the source once nobody uses it.
func (up *upstream) retire() {
	up.mu.Lock()
	defer up.mu.Unlock()
	up.retired = true
	up.closeUnused()
}

func (up *upstream) closeUnused() {
	if up.retired && up.users == 0 && up.source != nil {
		_ = up.source.close() // nothing was written
		up.source = nil
	}
}

// current gives the upstreams there are, in the order in which they are asked. What
// is known of one is forgotten when it changes.
func (u *upstreams) current(ctx context.Context, c cluster.Consistency) ([]*upstream, error) {
	facts, err := u.s.readUpstreams(ctx, c)
	if err != nil {
		return nil, err
	}
	logins := map[string]*floxv1.UpstreamLogin{}
	if have := u.s.id.ring.now.Load(); have != nil {
		for _, l := range have.all.GetLogins() {
			logins[l.GetUrl()] = l
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	list := make([]*upstream, 0, len(facts))
	there := map[string]bool{}
	for _, fact := range facts {
		url := fact.GetUrl()
		there[url] = true
		up := u.known[url]
		if up == nil || up.fact.GetChangedIndex() != fact.GetChangedIndex() || !proto.Equal(up.login, logins[url]) {
			if up != nil {
				up.retire()
			}
			up = u.newUpstream(fact, logins[url])
			u.known[url] = up
		}
		list = append(list, up)
	}
	for url, up := range u.known {
		if !there[url] {
			up.retire()
			delete(u.known, url)
		}
	}
	return list, nil
}
