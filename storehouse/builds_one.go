package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/nix"
)

// statusResolves is Nix's ResolvesToAlreadyValid: with its inputs known, it turned
// out to be something that was built before.
const statusResolves = 13

// buildOne builds the derivation of a flight, whose inputs have been built, and
// publishes what comes of it.
func (b *builds) buildOne(ctx context.Context, f *buildFlight) (*floxv1.BuildOutcome, error) {
	if err := b.s.catchUpReads(ctx); err != nil {
		return nil, err
	}
	n := &node{path: f.key.drv, wanted: map[string]bool{}}
	var err error
	if n.drv, err = b.s.derivation(ctx, n.path); err != nil {
		return nil, err
	}
	names := n.drv.OutputNames()
	for _, name := range names {
		n.wanted[name] = true
	}
	if have, err := b.haveOutputs(ctx, n); err != nil || have && !f.key.check {
		out := &floxv1.BuildOutcome{Status: uint32(buildfarm.AlreadyValid)}
		if err == nil {
			out.Outputs, err = b.built(ctx, n.drv, names)
		}
		return out, err
	}
	job, inputs, err := b.job(ctx, n)
	if err != nil {
		return nil, err
	}
	release, err := b.s.Hold(ctx, append(slices.Clone(job.Inputs), n.path)...)
	if err != nil {
		return nil, err
	}
	defer release()
	made := &making{builds: b, f: f, node: n, job: job, inputs: inputs}
	if made.isResolved() && !f.key.check {
		if out, err := made.resolvesToValid(ctx); out != nil || err != nil {
			return out, err
		}
	}
	return made.run(ctx)
}

// job says what a builder has to do for a derivation. inputs are the realisations
// it is made with.
func (b *builds) job(ctx context.Context, n *node) (job *buildfarm.Job, inputs []*floxv1.RealisedInput, err error) {
	job = &buildfarm.Job{Drv: n.path, Plan: n.drv}
	known := map[flox.StorePath]map[string]flox.StorePath{}
	for in, outputs := range n.drv.Inputs {
		d, err := b.s.derivation(ctx, in)
		if err != nil {
			return nil, nil, err
		}
		known[in] = map[string]flox.StorePath{}
		for _, name := range outputs {
			p, err := b.outputPath(ctx, d, name)
			if err == nil && p == "" {
				err = fmt.Errorf("output %s of %s, which %s needs, is not known: %w", name, in, n.path, flox.ErrNotFound)
			}
			if err != nil {
				return nil, nil, err
			}
			known[in][name] = p
			job.Inputs = append(job.Inputs, p)
			if d.Outputs[name].Path == "" {
				id, err := b.hasher.Realise(ctx, d, name)
				if err != nil {
					return nil, nil, err
				}
				inputs = append(inputs, &floxv1.RealisedInput{Id: id.String(), Path: string(p)})
			}
		}
	}
	slices.Sort(job.Inputs)
	job.Inputs = slices.Compact(job.Inputs)
	if len(inputs) == 0 {
		return job, nil, nil
	}
	slices.SortFunc(inputs, func(x, y *floxv1.RealisedInput) int { return strings.Compare(x.GetId(), y.GetId()) })
	// Its text has places to be filled in with what its inputs came to.
	job.Plan, err = n.drv.Resolve(b.s.cfg.StoreDir, func(drv flox.StorePath, output string) (flox.StorePath, bool) {
		p, ok := known[drv][output]
		return p, ok
	})
	if err == nil {
		job.Drv, _, err = job.Plan.DrvPath(b.s.cfg.StoreDir)
	}
	return job, inputs, err
}

// making is a build under way.
type making struct {
	*builds
	f      *buildFlight
	node   *node
	job    *buildfarm.Job
	inputs []*floxv1.RealisedInput
}

// isResolved reports whether what is built is not the derivation asked for but what it
// is once its inputs are known.
func (m *making) isResolved() bool { return m.job.Drv != m.node.path }

// resolvesToValid finds whether the derivation, with its inputs known, is one whose
// outputs are valid. nil = it is not.
func (m *making) resolvesToValid(ctx context.Context) (*floxv1.BuildOutcome, error) {
	paths := map[string]flox.StorePath{}
	for name := range m.job.Plan.Outputs {
		p, err := m.outputPath(ctx, m.job.Plan, name)
		if err != nil || p == "" {
			return nil, err
		}
		if valid, err := m.s.isValid(ctx, p); err != nil || !valid {
			return nil, err
		}
		paths[name] = p
	}
	out := &floxv1.BuildOutcome{Status: statusResolves}
	var err error
	if out.Outputs, err = m.outputs(ctx, paths); err == nil {
		err = m.record(ctx, out.GetOutputs(), nil)
	}
	return out, err
}

// run has it built.
func (m *making) run(ctx context.Context) (*floxv1.BuildOutcome, error) {
	log, err := os.CreateTemp(m.s.cfg.StateDir, "build-log-")
	if err != nil {
		return nil, fmt.Errorf("build log: %w", err)
	}
	defer func() {
		_ = log.Close()
		_ = os.Remove(log.Name())
	}()
	m.job.Timeout = time.Duration(min(m.f.options.GetTimeoutSeconds(), 1<<31)) * time.Second     //nolint:gosec // bounded
	m.job.MaxSilent = time.Duration(min(m.f.options.GetMaxSilentSeconds(), 1<<31)) * time.Second //nolint:gosec // bounded
	m.job.Cores = int(min(m.f.options.GetCores(), 1<<16))
	m.job.Take = m.take
	if m.f.key.check {
		if err := m.compareWith(ctx); err != nil {
			return nil, err
		}
	}
	began := time.Now()
	r, err := m.worker.Build(ctx, m.job, buildSource{m.s}, log, func(e buildfarm.Event) { m.heard(m.f, e) })
	if err != nil {
		return nil, err
	}
	out := &floxv1.BuildOutcome{Status: uint32(r.Status), Message: r.Message, StartUnix: seconds(r.Started), StopUnix: seconds(r.Stopped)}
	out.NonDeterministic = r.Status == buildfarm.NotDeterministic
	if r.Status.OK() {
		out.Status, out.TimesBuilt = uint32(buildfarm.Built), 1
		paths := map[string]flox.StorePath{}
		for name, info := range r.Outputs {
			paths[name] = info.Path
		}
		if out.Outputs, err = m.outputs(ctx, paths); err != nil {
			return nil, err
		}
	} else {
		out.Tail = r.Tail
	}
	m.measure(began, r)
	extra, err := m.resolved(ctx, r)
	if err != nil {
		return nil, err
	}
	record, err := m.keepLog(ctx, log, r)
	if err != nil {
		m.s.cfg.Log.Warn("the log of a build is not kept", "derivation", string(m.node.path), "error", err)
	}
	return out, m.record(ctx, append(extra, out.GetOutputs()...), record)
}

// measure notes how long the parts of a build took.
func (m *making) measure(began time.Time, r *buildfarm.Result) {
	ms := func(from, to time.Time) uint64 { return uint64(max(to.Sub(from).Milliseconds(), 0)) } //nolint:gosec // not negative
	if r.Started.IsZero() {
		return
	}
	e := &floxv1.BuildEvidence{FetchingMs: ms(began, r.Started), BuildingMs: ms(r.Started, r.Stopped), UploadingMs: ms(r.Stopped, time.Now())}
	for _, out := range r.Outputs {
		e.Uploaded += out.NarSize
	}
	m.f.measured = e
}

// resolved gives the realisations of what the derivation was resolved to: another
// one may resolve to the same.
func (m *making) resolved(ctx context.Context, r *buildfarm.Result) (outputs []*floxv1.BuiltOutput, err error) {
	if !m.isResolved() || !r.Status.OK() {
		return nil, nil
	}
	have, err := m.s.id.ring.get()
	if err != nil {
		return nil, err
	}
	for name, info := range r.Outputs {
		if m.job.Plan.Outputs[name].Path != "" {
			continue
		}
		id, err := m.hasher.Realise(ctx, m.job.Plan, name)
		if err != nil {
			return nil, err
		}
		outputs = append(outputs, &floxv1.BuiltOutput{
			Name: name, Path: string(info.Path), Id: id.String(),
			Realisation: have.signRealisation(&floxv1.Realisation{Id: id.String(), Path: string(info.Path)}),
		})
	}
	return outputs, nil
}

// compareWith tells the builder what is valid, to compare with.
func (m *making) compareWith(ctx context.Context) error {
	m.job.Valid = map[string]*flox.PathInfo{}
	for name := range m.job.Plan.Outputs {
		p, err := m.outputPath(ctx, m.node.drv, name)
		if err != nil {
			return err
		}
		info, err := m.s.Info(ctx, p.HashPart())
		if errors.Is(err, flox.ErrNotFound) || err == nil && info.Path != p {
			err = fmt.Errorf("some outputs of '%s' are not valid, so checking is not possible: %w", m.s.cfg.StoreDir.Join(m.node.path), flox.ErrBadInput)
		}
		if err != nil {
			return err
		}
		m.job.Valid[name] = info
	}
	return nil
}

// take publishes an output. What is valid with another NAR stays as it is, and the
// log has recorded the difference.
func (m *making) take(ctx context.Context, _ string, info *flox.PathInfo, nar func(io.Writer) error) error {
	ctx = Essential(ctx)
	info.Deriver = m.node.path
	err := piped(nar, func(r io.Reader) error {
		_, _, err := m.s.Publish(ctx, info, r, m.publisher())
		return err
	})
	if errors.Is(err, errDiffers) {
		return nil
	}
	return err
}

// publisher names a build where it is said who offered a path.
func (m *making) publisher() string {
	return fmt.Sprintf("build of %s on %s", m.node.path, m.s.cfg.Name)
}

// outputs gives outputs as callers see them, with the realisations of those that
// are content-addressed, signed.
func (m *making) outputs(ctx context.Context, paths map[string]flox.StorePath) (outputs []*floxv1.BuiltOutput, err error) {
	have, err := m.s.id.ring.get()
	if err != nil {
		return nil, err
	}
	for _, name := range m.node.drv.OutputNames() {
		id, err := m.hasher.Realise(ctx, m.node.drv, name)
		if err != nil {
			return nil, err
		}
		out := &floxv1.BuiltOutput{Name: name, Path: string(paths[name]), Id: id.String()}
		if m.node.drv.Outputs[name].Path == "" {
			out.Realisation = have.signRealisation(&floxv1.Realisation{Id: out.Id, Path: out.GetPath(), Inputs: m.inputs})
		}
		outputs = append(outputs, out)
	}
	return outputs, nil
}

// record has the log note what was built.
func (m *making) record(ctx context.Context, outputs []*floxv1.BuiltOutput, record *floxv1.BuildRecord) error {
	return m.note(ctx, &floxv1.NoteBuild{Drv: string(m.node.path), Outputs: outputs, Record: record})
}

// note has the log note what is known of a derivation.
func (b *builds) note(ctx context.Context, c *floxv1.NoteBuild) error {
	c.Lease = leaseOf(ctx)
	err := b.s.takesFacts(ctx)
	if err == nil {
		_, err = proposeAt(ctx, b.session, max(buildsLevel, levelOf(c.GetLease())), &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Build{Build: c}})
	}
	if err != nil {
		return fmt.Errorf("record the build of %s: %w", c.GetDrv(), err)
	}
	return nil
}

// maxLogName bounds the name of the store path that holds a log.
const maxLogName = 200

// keepLog publishes the log of a build.
func (m *making) keepLog(ctx context.Context, log *os.File, r *buildfarm.Result) (*floxv1.BuildRecord, error) {
	name := strings.TrimSuffix(m.node.path.Name(), nix.DrvExtension)
	name = name[:min(len(name), maxLogName)] + ".log"
	file, err := filepath.Abs(log.Name())
	if err != nil {
		return nil, err
	}
	var info *flox.PathInfo
	err = piped(func(w io.Writer) error { return nix.DumpPath(ctx, w, file) }, func(r io.Reader) (err error) {
		info, _, err = m.s.PublishSource(Essential(ctx), name, r, m.publisher())
		return err
	})
	if err != nil {
		return nil, err
	}
	record := &floxv1.BuildRecord{
		Drv: string(m.node.path), Log: string(info.Path), Status: uint32(r.Status),
		StartUnixMs: r.Started.UnixMilli(), StopUnixMs: r.Stopped.UnixMilli(), AskedBy: m.f.asked, Server: m.s.cfg.Name,
	}
	for _, out := range r.Outputs {
		record.Outputs = append(record.Outputs, string(out.Path))
	}
	slices.Sort(record.GetOutputs())
	return record, nil
}
