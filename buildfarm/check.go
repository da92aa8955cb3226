package buildfarm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// errRejected: what was built is not what it has to be.
var errRejected = errors.New("output rejected")

// made is an output of a job: a copy nobody can write to, and what is known of it.
type made struct {
	*input
	info *flox.PathInfo
}

// collect copies the outputs of a job and finds what is known of them. Nix has said
// which they are and what they refer to, but a build may have had it say so: what must
// be true of them is looked at in the copy. Errors: errRejected.
func (p *place) collect(ctx context.Context, job *Job, claims map[string]*flox.PathInfo, closure []*flox.PathInfo) (outputs map[string]*made, err error) {
	outputs = map[string]*made{}
	allowed := map[flox.StorePath]bool{}
	for _, info := range closure {
		allowed[info.Path] = true
	}
	for _, claim := range claims {
		allowed[claim.Path] = true
	}
	reject := func(output, format string, args ...any) error {
		return fmt.Errorf("output '%s' of '%s' %s: %w", output, p.b.cfg.StoreDir.Join(job.Drv), fmt.Sprintf(format, args...), errRejected)
	}
	for name, o := range job.Plan.Outputs {
		claim := claims[name]
		switch {
		case claim == nil:
			return outputs, reject(name, "is not among what Nix says it built")
		case o.Path != "" && claim.Path != o.Path, claim.Path.Name() != nix.OutputName(job.Plan.Name, name):
			return outputs, reject(name, "cannot be %s", claim.Path)
		}
		for _, ref := range claim.References {
			if !allowed[ref] {
				return outputs, reject(name, "refers to %s, which is none of its inputs", ref)
			}
		}
		in, err := p.b.inputs.adopt(ctx, filepath.Join(p.dir, "store", string(claim.Path)))
		if errors.Is(err, flox.ErrBadInput) || errors.Is(err, fs.ErrNotExist) {
			return outputs, reject(name, "cannot be read: %v", err)
		}
		if err != nil {
			return outputs, err
		}
		m := &made{in, &flox.PathInfo{Path: claim.Path, NarHash: in.hash, NarSize: in.size, References: slices.Sorted(slices.Values(claim.References)), Deriver: job.Drv}}
		outputs[name] = m
		if o.Algo == "" {
			continue
		}
		ca, err := m.address(ctx, o.Recursive, o.Algo)
		if err != nil {
			return outputs, err
		}
		m.info.CA = ca.String()
		others := slices.DeleteFunc(slices.Clone(m.info.References), func(ref flox.StorePath) bool { return ref == claim.Path })
		if is, err := ca.Path(p.b.cfg.StoreDir, claim.Path.Name(), others, len(others) < len(m.info.References)); err != nil || is != claim.Path {
			return outputs, reject(name, "has the content address %s, which is not that of %s (%v)", ca, claim.Path, err)
		}
	}
	return outputs, nil
}

// address computes the content address of an output.
func (m *made) address(ctx context.Context, recursive bool, algo nix.HashAlgo) (nix.ContentAddress, error) {
	if recursive {
		self := ""
		if slices.Contains(m.info.References, m.info.Path) {
			self = m.info.Path.HashPart()
		}
		h := nix.NewModuloHash(algo, self)
		err := nix.DumpPath(ctx, h, m.file)
		return nix.ContentAddress{Method: nix.CANar, Hash: h.Sum()}, err
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(nix.DumpPath(ctx, w, m.file)) }()
	defer r.Close()
	nar := nix.NewNarReader(r)
	e, err := nar.Next()
	if err != nil {
		return nix.ContentAddress{}, err
	}
	if e.Kind != flox.Regular || e.Executable {
		return nix.ContentAddress{Method: nix.CAFlat}, nil // of no path
	}
	h := algo.New()
	if _, err := io.Copy(h, nar); err != nil {
		return nix.ContentAddress{}, err
	}
	return nix.ContentAddress{Method: nix.CAFlat, Hash: nix.Hash{Algo: algo, Sum: h.Sum(nil)}}, nil
}

// give has the outputs taken, in the order in which they refer to each other.
func (b *Builder) give(ctx context.Context, job *Job, outputs map[string]*made, r *Result) error {
	r.Outputs = make(map[string]*flox.PathInfo, len(outputs))
	for name, m := range outputs {
		r.Outputs[name] = m.info
	}
	left := slices.Sorted(maps.Keys(outputs))
	for len(left) > 0 {
		i := slices.IndexFunc(left, func(name string) bool {
			return !slices.ContainsFunc(left, func(other string) bool {
				return other != name && slices.Contains(r.Outputs[name].References, r.Outputs[other].Path)
			})
		})
		if i < 0 {
			return fmt.Errorf("outputs of %s refer to each other in a circle: %w", job.Drv, flox.ErrBadInput)
		}
		m := outputs[left[i]]
		valid := job.Valid[left[i]]
		if valid != nil && (valid.Path != m.info.Path || valid.NarHash != m.info.NarHash) && r.Status == Built {
			r.Status = NotDeterministic
			r.Message = fmt.Sprintf("derivation '%s' may not be deterministic: output '%s' differs", b.cfg.StoreDir.Join(job.Drv), b.cfg.StoreDir.Join(valid.Path))
		}
		if valid == nil || valid.Path == m.info.Path { // else it is another one's
			if err := job.Take(ctx, left[i], m.info, func(w io.Writer) error { return nix.DumpPath(ctx, w, m.file) }); err != nil {
				return err
			}
		}
		left = slices.Delete(left, i, i+1)
	}
	if !r.Status.OK() {
		r.Outputs = nil
	}
	return nil
}
