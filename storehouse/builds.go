package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// BuildsConfig says whether and how this server builds derivations. A zero field is
// its default.
type BuildsConfig struct {
	// On starts a builder. It needs Nix on this machine, outside of the store directory.
	On bool `json:"on"`
	// Jobs is how many derivations are built at once. Default 1.
	Jobs int `json:"jobs"`
	// Sandbox is auto, on or off. Default auto.
	Sandbox string `json:"sandbox"`
	// SandboxPaths are what builds in a sandbox see beside their inputs.
	SandboxPaths []string `json:"sandbox_paths"`
	// Settings are further lines of the builder's nix.conf.
	Settings string `json:"settings"`
	// Hide are directories that builds must not see, beside StateDir and that of Socket.
	Hide []string `json:"hide"`
	// Disk is how many bytes of store paths are kept for the next build. Default 20 GiB.
	Disk uint64 `json:"disk"`
}

// worker builds one derivation. It is buildfarm.Builder.
type worker interface {
	Build(ctx context.Context, job *buildfarm.Job, from buildfarm.Source, log io.Writer, emit func(buildfarm.Event)) (*buildfarm.Result, error)
}

// builds has derivations built: each once at a time, however many want it.
type builds struct {
	s       *Server
	hasher  *nix.DrvHasher
	session *cluster.Session // records what was built

	mu      sync.Mutex
	worker  worker // nil = none
	why     error  // why there is none
	nix     string // version of the one that builds
	boxed   bool   // builds are sandboxed
	unboxed string // why not
	free    int    // workers that wait
	waiting []*buildFlight
	flights map[buildKey]*buildFlight
	group   *errgroup.Group
	ctx     context.Context //nolint:containedctx // of the builds under way, which outlive who asked first
}

// errNoBuilder answers builds where there is no builder.
var errNoBuilder = fmt.Errorf("this server of the storehouse builds nothing: set builds = true in the part [storehouse] of its configuration (or start it with --builds), and install Nix there (Debian: apt install nix-bin): %w", flox.ErrUnreachable)

func newBuilds(s *Server) *builds {
	b := &builds{s: s, why: errNoBuilder, flights: map[buildKey]*buildFlight{}}
	b.session = s.node.NewSession()
	b.hasher = &nix.DrvHasher{Dir: s.cfg.StoreDir, Read: s.derivation}
	return b
}

// run has a builder until ctx ends. That none can be had is no reason to stop
// anything else: who asks for a build is told.
func (b *builds) run(ctx context.Context) error {
	cfg := b.s.cfg.Builds
	if !cfg.On {
		return nil
	}
	hide := append([]string{b.s.cfg.StateDir}, cfg.Hide...)
	if b.s.cfg.Socket != "" {
		hide = append(hide, filepath.Dir(b.s.cfg.Socket))
	}
	builder, err := buildfarm.New(ctx, buildfarm.Config{
		Dir: filepath.Join(b.s.cfg.StateDir, "builder"), StoreDir: b.s.cfg.StoreDir, Sandbox: buildfarm.Sandbox(cfg.Sandbox),
		SandboxPaths: cfg.SandboxPaths, Hide: hide, Settings: cfg.Settings, MaxDisk: cfg.Disk, Log: b.s.cfg.Log.With("part", "builder"),
	})
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		b.s.cfg.Log.Warn("this server builds nothing", "error", err)
		b.mu.Lock()
		b.why = fmt.Errorf("this server of the storehouse builds nothing: %w", err)
		b.mu.Unlock()
		return nil
	}
	b.mu.Lock()
	b.nix, b.boxed, b.unboxed = builder.Version(), builder.Sandboxed(), builder.Unboxed()
	b.mu.Unlock()
	b.s.cfg.Log.Info("builds run here", "nix", builder.Version(), "sandbox", builder.Sandboxed(), "jobs", max(cfg.Jobs, 1))
	return errors.Join(b.work(ctx, builder, max(cfg.Jobs, 1)), builder.Close())
}

// work has w build until ctx ends, and waits for what is under way to stop.
func (b *builds) work(ctx context.Context, w worker, jobs int) error {
	group, ctx := errgroup.WithContext(ctx)
	b.mu.Lock()
	b.worker, b.free, b.group, b.ctx = w, jobs, group, ctx
	b.mu.Unlock()
	b.s.farm.tended.ring()
	<-ctx.Done()
	b.mu.Lock()
	b.worker, b.why, b.group = nil, errStopping, nil
	b.mu.Unlock()
	return group.Wait()
}

// wait waits for the builder as long as it is being made.
func (b *builds) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readWait)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		b.mu.Lock()
		w, why := b.worker, b.why
		b.mu.Unlock()
		if w != nil {
			return nil
		}
		if !b.s.cfg.Builds.On || !errors.Is(why, errNoBuilder) {
			return why
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the builder is not ready yet: %w: %w", ctx.Err(), flox.ErrUnreachable)
		}
	}
}

// state says whether this server builds, and how.
func (b *builds) state() *floxv1.ServerBuilds {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.worker != nil:
		return &floxv1.ServerBuilds{On: true, Nix: b.nix, Jobs: uint32(max(b.s.cfg.Builds.Jobs, 1)), Sandboxed: b.boxed, Why: b.unboxed} //nolint:gosec // a few
	case !b.s.cfg.Builds.On:
		return &floxv1.ServerBuilds{Why: "it is not told to (builds = true)"}
	case errors.Is(b.why, errNoBuilder):
		return &floxv1.ServerBuilds{Why: "its builder is starting"}
	}
	return &floxv1.ServerBuilds{Why: b.why.Error()}
}
