package buildfarm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Status is Nix's build status, in its numbers (Nix 2.8 src/libstore/build-result.hh).
type Status uint8

// What a build can come to.
const (
	Built            Status = 0
	Substituted      Status = 1
	AlreadyValid     Status = 2
	PermanentFailure Status = 3
	InputRejected    Status = 4
	OutputRejected   Status = 5
	TransientFailure Status = 6
	TimedOut         Status = 8
	MiscFailure      Status = 9
	DependencyFailed Status = 10
	LogLimitExceeded Status = 11
	NotDeterministic Status = 12
	NoSubstituters   Status = 14

	// resolves is what Nix has for a derivation that it made another one of first.
	resolves Status = 13
)

// OK reports whether the outputs are valid.
func (s Status) OK() bool { return s <= AlreadyValid }

// tailLines is how many of the last lines of a log come with a result.
const tailLines = 25

// maxTailLine bounds each of them.
const maxTailLine = 4 << 10

// Job is one derivation to build. All it needs is valid in the Source.
type Job struct {
	Drv  flox.StorePath  // name of the derivation
	Plan *nix.Derivation // what it says
	// Inputs are the outputs of its input derivations; its sources and, without
	// Text, itself need not be among them.
	Inputs []flox.StorePath
	// Valid has it built again and compared with what is valid, by output. Outputs that
	// come out otherwise are taken, as what they would be, with the Status
	// NotDeterministic. nil = nothing is compared.
	Valid map[string]*flox.PathInfo
	// Timeout, MaxSilent and Cores; 0 = the builder's.
	Timeout, MaxSilent time.Duration
	Cores              int
	// Take is called with every output before Build returns, one that another
	// refers to before that; nar writes its NAR.
	Take func(ctx context.Context, output string, info *flox.PathInfo, nar func(io.Writer) error) error
}

// Result is what became of a job.
type Result struct {
	Status           Status
	Message          string // Nix's, when it failed
	Started, Stopped time.Time
	Outputs          map[string]*flox.PathInfo // by name, when it did not fail
	Tail             []string                  // last lines of the log
}

// Build builds a derivation. It calls emit, from one goroutine, with what happens,
// and writes what the builder prints to log. A build that fails is a Result, not an
// error; an error says that it could not be tried, or that ctx ended. When it returns,
// nothing of it runs any more.
func (b *Builder) Build(ctx context.Context, job *Job, from Source, log io.Writer, emit func(Event)) (*Result, error) {
	if err := b.inputs.trim(b.cfg.MaxDisk); err != nil {
		return nil, fmt.Errorf("make room for a build: %w", err)
	}
	p, err := b.place()
	if err != nil {
		return nil, err
	}
	defer p.close()
	closure, err := from.Closure(ctx, job.sources())
	if err == nil {
		err = p.lay(ctx, closure, from)
	}
	if err != nil {
		return nil, fmt.Errorf("fetch what %s needs: %w", job.Drv, err)
	}
	result, claims, err := p.realise(ctx, job, log, emit)
	if err != nil || !result.Status.OK() {
		return result, err
	}
	made, err := p.collect(ctx, job, claims, closure)
	defer func() {
		for _, m := range made {
			b.inputs.done(m.input)
		}
	}()
	if errors.Is(err, errRejected) {
		result.Status, result.Message = OutputRejected, err.Error()
		return result, nil
	}
	if err == nil {
		err = b.give(ctx, job, made, result)
	}
	if err != nil {
		return nil, err
	}
	return result, nil
}

// sources are the inputs of a job, whatever they come from.
func (job *Job) sources() []flox.StorePath {
	all := slices.Concat(job.Inputs, job.Plan.Sources)
	slices.Sort(all)
	return slices.Compact(all)
}

// realise runs Nix on the derivation, and gives what it claims to have made, by output.
// When it returns nothing runs there any more.
func (p *place) realise(ctx context.Context, job *Job, log io.Writer, emit func(Event)) (*Result, map[string]*flox.PathInfo, error) {
	b := p.b
	most := func(asked, most time.Duration) time.Duration {
		if asked <= 0 || asked > most {
			asked = most
		}
		return max(asked, time.Second) // 0 = for ever
	}
	args := []string{"--log-format", "internal-json"}
	if job.Cores > 0 {
		args = append(args, "--cores", fmt.Sprint(job.Cores))
	}
	h := &happening{Result: &Result{Started: time.Now()}, log: log, emit: emit}
	events := newLogReader(b.cfg.StoreDir, h.take)
	s, err := p.serve(ctx, events, args...)
	if err != nil {
		return nil, nil, err
	}
	said := s.build(job.Drv, job.Plan, job.sources(), most(job.MaxSilent, b.cfg.MaxSilent), most(job.Timeout, b.cfg.Timeout), b.cfg.MaxLog)
	claims := map[string]*flox.PathInfo{}
	if s.err == nil && (said.status.OK() || said.status == resolves) {
		said.status = Built
		for name, o := range job.Plan.Outputs {
			path := o.Path
			if path == "" {
				path = said.paths[name]
			}
			for _, info := range s.infos([]flox.StorePath{path}) {
				claims[name] = info
			}
		}
	}
	s.end()
	events.end()
	h.Stopped = time.Now()
	if ctx.Err() != nil {
		return nil, nil, ctx.Err()
	}
	h.Status, h.Message = said.status, said.message
	if s.err != nil {
		h.Status = TransientFailure
		h.Message = fmt.Sprintf("Nix did not come to an end with '%s': %v: %s", b.cfg.StoreDir.Join(job.Drv), s.err, h.last)
	} else if !h.Status.OK() && h.Message == "" {
		h.Message = fmt.Sprintf("build of '%s' failed: status %d: %s", b.cfg.StoreDir.Join(job.Drv), h.Status, h.last)
	}
	return h.Result, claims, nil
}

// happening collects what is told of a build.
type happening struct {
	*Result
	log   io.Writer
	emit  func(Event)
	began bool
	last  string // that Nix, or who starts it, said
}

func (h *happening) take(e Event) {
	switch {
	case e.Kind == EventStart && !h.began:
		h.began, h.Started = true, time.Now()
	case e.Kind == EventLine:
		if len(h.Tail) == tailLines {
			h.Tail = append(h.Tail[:0], h.Tail[1:]...)
		}
		h.Tail = append(h.Tail, short(e.Text))
		_, _ = io.WriteString(h.log, e.Text+"\n") // who keeps it knows when it fails
	case e.Kind == EventMessage:
		h.last = short(e.Text)
	}
	h.emit(e)
}

// short is the beginning of a line, without a character that is cut or none.
func short(line string) string {
	return strings.ToValidUTF8(line[:min(len(line), maxTailLine)], "")
}
