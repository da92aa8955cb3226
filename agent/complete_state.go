package agent

import (
	"context"
	"time"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

const (
	// surveyFor is how long a survey is told again.
	surveyFor = 2 * time.Second
	// surveyTime bounds one: what was not looked at by then does not count as here.
	surveyTime = time.Second
	// maxOfflineShown bounds the paths listed that are not ready.
	maxOfflineShown = 64
)

// survey is what was found out last.
type survey struct {
	at      time.Time
	changes uint64 // of what ran, as of then
	message *floxv1.OfflineState
}

// state says what is ready to go offline. It asks the disk only, and for no
// longer than surveyTime.
func (c *completer) state(ctx context.Context) *floxv1.OfflineState {
	c.surveying.Lock() // for surveyTime at most
	defer c.surveying.Unlock()
	if s := c.survey; s.message != nil && time.Since(s.at) < c.surveyFor && s.changes == c.ran.changed() {
		return s.message
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), surveyTime)
	defer cancel()
	s := survey{at: time.Now(), changes: c.ran.changed()}
	w, err := c.wishes(ctx)
	if err != nil {
		return &floxv1.OfflineState{Policy: c.a.cfg.Offline} // the agent stops
	}
	s.message = c.sumUp(ctx, w)
	c.survey = s
	return s.message
}

// resurvey forgets the last survey: what is wanted changed.
func (c *completer) resurvey() {
	c.surveying.Lock() // for surveyTime at most
	defer c.surveying.Unlock()
	c.survey.message = nil
}

// lack is what one path lacks.
type lack struct {
	bytes  map[flox.StorePath]uint64 // by store path: goals overlap
	lacks  bool
	reason string
}

func (l *lack) add(g goal, bytes uint64, reason string) {
	if l.bytes == nil {
		l.bytes = make(map[flox.StorePath]uint64)
	}
	l.bytes[g.path] = max(l.bytes[g.path], bytes)
	if !l.lacks || l.reason == reasonFetching {
		l.reason = reason
	}
	l.lacks = true
}

func (l *lack) sum() (n uint64) {
	for _, b := range l.bytes {
		n += b
	}
	return n
}

// reasonFetching is that of what is on its way.
const reasonFetching = "being fetched"

// sumUp goes through all goals and sums up by owner.
func (c *completer) sumUp(ctx context.Context, w *wishes) *floxv1.OfflineState {
	c.mu.Lock()
	followed := c.settled > w.changes
	c.mu.Unlock()
	used, kept, all := make(map[flox.StorePath]*lack), make(map[flox.StorePath]*lack), &lack{}
	for ph := range phases {
		for _, g := range c.goalsOf(ctx, w, ph, c.linksKnown) {
			bytes, whole := c.missing(ctx, g)
			if whole {
				continue
			}
			owners := used
			if g.kept {
				owners = kept
			}
			if owners[g.owner] == nil {
				owners[g.owner] = &lack{}
			}
			owners[g.owner].add(g, bytes, c.reason(ctx, g))
			if g.wanted() {
				all.add(g, bytes, "")
			}
		}
	}
	m := &floxv1.OfflineState{Policy: w.standard, MissingBytes: all.sum()}
	show := func(p flox.StorePath, policy string, l *lack) {
		if len(m.Missing) < maxOfflineShown {
			m.Missing = append(m.Missing, &floxv1.OfflinePath{
				Path: c.a.cfg.StoreDir.Join(p), Policy: policy, MissingBytes: l.sum(), Reason: l.reason,
			})
		}
	}
	for _, r := range w.ran {
		m.Used++
		l := used[r.Path]
		if l == nil && r.Program && w.off == "" && w.policy(r.Path) == policyUsed && !followed {
			l = &lack{reason: "it is being looked what its programs need"}
		}
		if l != nil {
			show(r.Path, w.policy(r.Path), l)
			continue
		}
		m.UsedComplete++
	}
	for _, o := range w.kept {
		p, policy := flox.StorePath(o), w.policies[o]
		l := kept[p]
		m.Kept++
		if policy == policyUsed && l == nil {
			if l = used[p]; l != nil { // listed above
				continue
			}
		}
		if l != nil {
			show(p, policy, l)
			continue
		}
		m.KeptComplete++
	}
	m.Profiles = c.profiles(w, used, kept)
	return m
}

// reason says why a goal is not here.
func (c *completer) reason(ctx context.Context, g goal) string {
	if ctx.Err() != nil {
		return "not looked at yet"
	}
	if !g.wanted() {
		return g.not
	}
	c.mu.Lock()
	why := c.standing(g.key()).why
	c.mu.Unlock()
	if why != "" {
		return why
	}
	return reasonFetching
}
