package agent

import (
	"context"
	"time"
)

const (
	// goalRetryMin and goalRetryMax bound the pause before something that could
	// not be fetched is tried again.
	goalRetryMin, goalRetryMax = 5 * time.Second, 2 * time.Minute
	// lossPause and lossPauseMax bound the pause before what was evicted again and
	// again is fetched again: the cache is too small for it.
	lossPause, lossPauseMax = time.Minute, time.Hour
	// lookAgain is how long it is believed that something is here whole, if
	// nothing left the cache meanwhile.
	lookAgain = 10 * time.Minute
	// maxStandings bounds what is remembered of goals.
	maxStandings = 65536
)

// standing is what is known of a goal.
type standing struct {
	whole  bool // as of looked, while nothing left the cache since epoch
	epoch  int64
	looked time.Time

	losses int           // how often it was whole and then not any more
	pause  time.Duration // before it is tried again, the last time
	until  time.Time     // not to be tried before
	why    string        // it could not be fetched
	lost   bool          // until is because of losses, not because nobody answered
}

// standing gives what is known of a goal, c.mu being held.
func (c *completer) standing(k goalKey) *standing {
	s, ok := c.standings[k]
	if !ok {
		if len(c.standings) >= maxStandings {
			clear(c.standings)
		}
		s = &standing{}
		c.standings[k] = s
	}
	return s
}

// waiting reports whether a goal is to be left alone for now.
func (c *completer) waiting(g goal) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Before(c.standing(g.key()).until)
}

// reached forgets that a goal failed before.
func (c *completer) reached(g goal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reachedGoals++
	s := c.standing(g.key())
	s.pause, s.until, s.why, s.lost = 0, time.Time{}, "", false
}

// note notes why a goal is not here; it may be tried at once.
func (c *completer) note(g goal, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.standing(g.key()).why = oneLine(err)
}

// failed notes why a goal is not here, and when to try again.
func (c *completer) failed(g goal, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.standing(g.key())
	s.pause = min(max(2*s.pause, goalRetryMin), goalRetryMax)
	s.until, s.why, s.lost = time.Now().Add(s.pause), oneLine(err), false
}

// forgive lets everything be tried again that could not be fetched, and reports
// whether anything waited for that.
func (c *completer) forgive() (waited bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for _, s := range c.standings {
		if !s.lost {
			waited = waited || now.Before(s.until)
			s.pause, s.until, s.why = 0, time.Time{}, ""
		}
	}
	return waited
}

// untilRetry is how long nothing that failed may be tried again.
func (c *completer) untilRetry() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	soonest := c.every
	for _, s := range c.standings {
		if d := time.Until(s.until); d > 0 {
			soonest = min(soonest, d)
		}
	}
	return soonest + onlineEvery
}

// epoch changes whenever something leaves the cache.
func (c *completer) epoch() int64 {
	u := c.a.cache.Usage()
	return u.Evicted + u.Dropped
}

// missing says how many bytes of a goal are not here, as far as that is known,
// and whether it is here whole. It asks nobody else.
func (c *completer) missing(ctx context.Context, g goal) (bytes uint64, whole bool) {
	epoch, key := c.epoch(), g.key()
	c.mu.Lock()
	s := c.standing(key)
	known := s.whole && s.epoch == epoch && time.Since(s.looked) < lookAgain
	c.mu.Unlock()
	if known {
		return 0, true
	}
	bytes, whole = c.look(ctx, g)
	if ctx.Err() != nil {
		return bytes, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s = c.standing(key)
	if whole {
		s.whole, s.epoch, s.looked, s.why = true, epoch, time.Now(), ""
		return 0, true
	}
	if s.whole && !g.kept {
		// Once is somebody's gc. Again and again is a cache that is too small: to
		// fetch at once what goes at once helps nobody.
		if s.losses++; s.losses > 1 {
			pause := lossPause << min(s.losses-2, 10)
			s.until, s.lost = time.Now().Add(min(pause, lossPauseMax)), true
			s.why = "it was evicted again: the cache is too small for all that is used here"
		}
	}
	s.whole = false
	return bytes, false
}
