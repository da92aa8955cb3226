package storehouse

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// Watermarks say how full the disk of StateDir may be, in percent of what is not
// the system's own, before less and less is taken in. A zero field is its default.
type Watermarks struct {
	// Slow: from here on uploads are slowed down, the more the fuller. Default 85.
	Slow float64 `json:"slow"`
	// Essential: from here on only profile changes and what running builds need are
	// taken in. No build begins. Default 92.
	Essential float64 `json:"essential"`
	// ReadOnly: from here on nothing is but what makes room, guards what is here
	// from a collection, or changes servers and who may enter. Default 97.
	ReadOnly float64 `json:"read_only"`
}

func (w Watermarks) withDefaults() (Watermarks, error) {
	setDefault(&w.Slow, 85)
	setDefault(&w.Essential, 92)
	setDefault(&w.ReadOnly, 97)
	if !(0 < w.Slow && w.Slow <= w.Essential && w.Essential <= w.ReadOnly && w.ReadOnly <= 100) {
		return w, fmt.Errorf("storehouse: watermarks slow %g, essential %g, read_only %g: want percents of at most 100, each at least the one before: %w",
			w.Slow, w.Essential, w.ReadOnly, flox.ErrBadInput)
	}
	return w, nil
}

type essentialKey struct{}

// Essential marks what a profile change or a running build needs: it is taken in
// above the Essential watermark, and never slowed down.
func Essential(ctx context.Context) context.Context {
	return context.WithValue(ctx, essentialKey{}, true)
}

func isEssential(ctx context.Context) bool { return ctx.Value(essentialKey{}) != nil }

type freeingKey struct{}

// freeing marks commands by which one gets out of a full disk: they may use what is
// kept free for the log.
func freeing(ctx context.Context) context.Context {
	return context.WithValue(ctx, freeingKey{}, true)
}

func isFreeing(ctx context.Context) bool { return ctx.Value(freeingKey{}) != nil }

// takesFacts refuses facts that let the storehouse grow when the disk is read-only.
func (s *Server) takesFacts(ctx context.Context) error {
	_, err := s.disk.admit(Essential(ctx))
	return err
}

// gauge watches the disk of StateDir.
type gauge struct {
	dir   string
	marks Watermarks
	log   *slog.Logger

	mu    sync.Mutex
	level string // last told to the operator
}

// Levels of a disk, as the operator is told.
const (
	levelOK        = "ok"
	levelSlow      = "uploads are slowed down"
	levelEssential = "only profile changes and running builds are taken in"
	levelReadOnly  = "nothing is taken in"
)

// usage is how full the disk is, in percent, as df says it.
func (g *gauge) usage() (float64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(g.dir, &st); err != nil {
		return 0, fmt.Errorf("disk of %s: %w", g.dir, err)
	}
	used := float64(st.Blocks - st.Bfree)
	total := used + float64(st.Bavail)
	if total == 0 {
		return 0, nil
	}
	return 100 * used / total, nil
}

// admit says whether something may be taken in now, and how full the disk is.
// ErrFull names the watermark, how full the disk is, and what to do.
func (g *gauge) admit(ctx context.Context) (usage float64, err error) {
	if usage, err = g.usage(); err != nil {
		return 0, err
	}
	level, mark := levelOK, 0.0
	switch {
	case usage >= g.marks.ReadOnly:
		level, mark = levelReadOnly, g.marks.ReadOnly
	case usage >= g.marks.Essential:
		level, mark = levelEssential, g.marks.Essential
	case usage >= g.marks.Slow:
		level, mark = levelSlow, g.marks.Slow
	}
	g.tell(level, usage)
	if level == levelReadOnly || level == levelEssential && !isEssential(ctx) {
		return usage, fmt.Errorf("the disk of %s is %.1f %% full, and from %g %% on %s: collect garbage, free other space on it, or give it a larger disk, then try again: %w",
			g.dir, usage, mark, level, flox.ErrFull)
	}
	return usage, nil
}

// tell logs when the disk came to another level.
func (g *gauge) tell(level string, usage float64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if before := g.level; before == level || before == "" && level == levelOK {
		return
	}
	g.level = level
	how := slog.LevelWarn
	if level == levelOK {
		how = slog.LevelInfo
	}
	g.log.Log(context.Background(), how, "disk usage came to a watermark", "dir", g.dir, "percent", usage, "now", level)
}

// paceStep is how much is read between two looks at the disk, maxPace how long the
// wait for it is at most, halfPace how long half way between the watermarks.
const (
	paceStep = 1 << 20
	halfPace = 100 * time.Millisecond
	maxPace  = 4 * time.Second
)

// pace is how long an upload waits for each paceStep bytes: nothing at the Slow
// watermark, and longer and longer towards the Essential one.
func (w Watermarks) pace(usage float64) time.Duration {
	if usage <= w.Slow {
		return 0
	}
	if usage >= w.Essential {
		return maxPace
	}
	part := (usage - w.Slow) / (w.Essential - w.Slow)
	return min(maxPace, time.Duration(float64(halfPace)*part/(1-part)))
}

// upload wraps what is taken in: it is refused, slowed down, or refused in the
// middle, as the disk fills up. ErrFull.
func (g *gauge) upload(ctx context.Context, r io.Reader) (io.Reader, error) {
	if _, err := g.admit(ctx); err != nil {
		return nil, err
	}
	return &pacedReader{ctx: ctx, g: g, r: r}, nil
}

// pause is what an upload does after so many steps: it waits as the disk says, or is
// refused. ErrFull.
func (g *gauge) pause(ctx context.Context, steps float64) error {
	usage, err := g.admit(ctx)
	if err != nil || isEssential(ctx) {
		return err
	}
	wait := min(maxPace, time.Duration(steps*float64(g.marks.pace(usage))))
	if wait == 0 {
		return nil
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// pacedReader is an upload under way.
type pacedReader struct {
	ctx context.Context // an io.Reader has no other way to it
	g   *gauge
	r   io.Reader
	n   int // bytes since the last look
}

// Read implements io.Reader.
func (p *pacedReader) Read(b []byte) (int, error) {
	if p.n >= paceStep {
		p.n = 0
		if err := p.g.pause(p.ctx, 1); err != nil {
			return 0, err
		}
	}
	n, err := p.r.Read(b[:min(len(b), paceStep)])
	p.n += n
	return n, err
}
