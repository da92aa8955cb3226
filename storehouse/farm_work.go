package storehouse

import (
	"cmp"
	"context"
	"errors"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/buildfarm/queue"
)

// leased is a build that this server has a lease of.
type leased struct {
	lease  *floxv1.BuildLease
	build  *floxv1.QueuedBuild
	events *journal
	cancel context.CancelFunc
}

// holds has this server do what the lease of a build says: begin it, or end one that does
// not count any more. It needs f.mu.
func (f *farming) holds(key string, b *floxv1.QueuedBuild) {
	l := b.GetLease()
	mine := l.GetWorker() == f.id()
	for token, run := range f.runs { // a few
		if run.lease.GetKey() == key && !(mine && token == l.GetToken()) {
			run.cancel()
		}
	}
	if !mine || f.runs[l.GetToken()] != nil || f.work == nil {
		return
	}
	ctx, cancel := context.WithCancel(f.ctx)
	run := &leased{lease: l, build: b, events: newJournal(f.s.cfg.StateDir), cancel: cancel}
	f.runs[l.GetToken()] = run
	f.work.Go(func() error {
		defer cancel()
		f.carryOut(ctx, run)
		f.mu.Lock()
		delete(f.runs, l.GetToken())
		f.mu.Unlock()
		run.events.close()
		return nil
	})
}

// finishPause is how long the end of a build is not told again after that failed.
const finishPause = time.Second

// carryOut builds what a lease is of, and tells what came of it.
func (f *farming) carryOut(ctx context.Context, run *leased) {
	drv, check, err := queue.Split(run.lease.GetKey())
	if err == nil {
		err = f.s.builds.ready(ctx)
	}
	is := &buildFlight{
		key: buildKey{drv, check}, asked: run.build.GetOwner(), options: run.build.GetOptions(),
		lease: &floxv1.UnderLease{Build: run.lease.GetKey(), Token: run.lease.GetToken()},
	}
	if err == nil {
		is, err = f.s.builds.want(ctx, is, run.events)
	}
	run.events.end()
	if ctx.Err() != nil && f.ctx.Err() == nil {
		return // the lease does not count any more
	}
	if f.ctx.Err() != nil || errors.Is(err, errStopping) {
		if f.s.cfg.keepsLeases {
			return
		}
		// Others need not wait until this server is missed.
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
		defer cancel()
		if _, err := f.propose(limited, f.s.node.NewSession(), releasing([]*floxv1.BuildLease{run.lease}, "")); err != nil {
			f.s.cfg.Log.Info("a lease is not given back; it is taken when this server is missed", "build", run.lease.GetKey(), "error", err)
		}
		return
	}
	f.finish(ctx, came(run, is, err))
}

// came says what came of a lease. What could not be tried is tried again, unless
// that would be the same.
func came(run *leased, of *buildFlight, err error) *floxv1.FinishBuild {
	c := &floxv1.FinishBuild{Key: run.lease.GetKey(), Token: run.lease.GetToken()}
	switch {
	case errors.Is(err, flox.ErrUnreachable): // also where something was not found because of that
		c.Fault = clip(err.Error())
	case errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrBadInput):
		c.Outcome = failedOutcome(buildfarm.MiscFailure, "%s", clip(err.Error()))
	case err != nil:
		c.Fault = clip(err.Error())
	default:
		c.Outcome, c.Evidence = of.outcome, of.measured
		c.Outcome.Message = clip(c.GetOutcome().GetMessage())
		for i, line := range c.GetOutcome().GetTail() {
			c.Outcome.Tail[i] = clip(line)
		}
	}
	return c
}

// maxSaid bounds what the queue keeps of an error, in bytes.
const maxSaid = 16 << 10

func clip(text string) string { return strings.ToValidUTF8(text[:min(len(text), maxSaid)], "") }

// finish tells the queue what came of a lease, until it knows or the lease is lost.
func (f *farming) finish(ctx context.Context, c *floxv1.FinishBuild) {
	session := f.s.node.NewSession()
	for {
		_, err := f.propose(ctx, session, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Finish{Finish: c}})
		if err == nil || ctx.Err() != nil {
			return
		}
		f.s.cfg.Log.Warn("the queue is not told what came of a build, trying again", "build", c.GetKey(), "error", err)
		if errors.Is(err, flox.ErrBadInput) { // it does not take this
			c.Outcome, c.Evidence, c.Fault = nil, nil, clip(err.Error())
		}
		select {
		case <-time.After(finishPause):
		case <-ctx.Done():
			return
		}
	}
}

// will reports whether this server builds, or is about to.
func (b *builds) will() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.worker != nil || b.s.cfg.Builds.On && (errors.Is(b.why, errNoBuilder) || errors.Is(b.why, errStopping))
}

// system is this machine's, in Nix's words.
func system() string {
	return cmp.Or(map[string]string{"amd64": "x86_64", "arm64": "aarch64", "386": "i686"}[runtime.GOARCH], runtime.GOARCH) + "-" + runtime.GOOS
}

// self is what this server is as a worker; nil = it builds nothing now.
func (b *builds) self() *floxv1.FarmWorker {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.worker == nil {
		return nil
	}
	w := &floxv1.FarmWorker{
		Id: string(b.s.id.peer), Name: b.s.cfg.Name, Slots: uint32(max(b.s.cfg.Builds.Jobs, 1)), //nolint:gosec // a few
		Systems: []string{system()}, Features: []string{"benchmark", "big-parallel", "nixos-test"},
	}
	if m, ok := b.s.roster.machine(b.s.id.peer); ok {
		w.Name = m.GetName()
	}
	if system() == "x86_64-linux" {
		w.Systems = append(w.Systems, "i686-linux") // Nix's extra-platforms there
	}
	for line := range strings.Lines(b.s.cfg.Builds.Settings) {
		name, value, _ := strings.Cut(line, "=")
		words := strings.Fields(value)
		switch name = strings.TrimSpace(name); {
		case name == "system" && len(words) == 1:
			w.Systems[0] = words[0]
		case name == "extra-platforms":
			w.Systems = append(w.Systems[:1], words...)
		case name == "system-features":
			w.Features = words
		case name == "extra-system-features":
			w.Features = append(w.Features, words...)
		}
	}
	for _, list := range []*[]string{&w.Systems, &w.Features} {
		*list = slices.Compact(slices.Sorted(slices.Values(*list)))
	}
	return w
}
