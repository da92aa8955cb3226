package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// derivation reads a valid .drv file.
func (s *Server) derivation(ctx context.Context, drv flox.StorePath) (*nix.Derivation, error) {
	info, err := s.Info(ctx, drv.HashPart())
	if errors.Is(err, flox.ErrNotFound) || err == nil && info.Path != drv {
		return nil, fmt.Errorf("derivation %s is not valid in the storehouse: upload it with all it refers to: %w", drv, flox.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	text, err := s.fileText(ctx, info, nix.MaxDerivation)
	if err != nil {
		return nil, err
	}
	return nix.ParseDerivation(s.cfg.StoreDir, strings.TrimSuffix(drv.Name(), nix.DrvExtension), text)
}

// fileText reads a store path that is one regular file.
func (s *Server) fileText(ctx context.Context, info *flox.PathInfo, most uint64) ([]byte, error) {
	if info.NarSize > most {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are read: %w", info.Path, info.NarSize, most, flox.ErrBadInput)
	}
	var nar bytes.Buffer
	if err := s.writeNar(ctx, &nar, info); err != nil {
		return nil, err
	}
	r := nix.NewNarReader(&nar)
	e, err := r.Next()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", info.Path, err)
	}
	if e.Kind != flox.Regular {
		return nil, fmt.Errorf("%s is a %s, want a file: %w", info.Path, e.Kind, flox.ErrBadInput)
	}
	return io.ReadAll(r)
}

// writeNar writes the NAR of a valid path.
func (s *Server) writeNar(ctx context.Context, w io.Writer, info *flox.PathInfo) error {
	done, err := s.Reading(ctx, info)
	if err != nil {
		return err
	}
	defer done()
	blocks := s.readable(s.packs)
	m, err := content.OpenManifest(ctx, info.Manifest, blocks)
	if err != nil {
		return fmt.Errorf("manifest of %s: %w", info.Path, err)
	}
	return m.WriteNar(ctx, w, blocks, 0, int64(m.NarSize())) //nolint:gosec // below 2^63
}

// buildSource gives a builder what is valid here.
type buildSource struct{ *Server }

// maxInputs bounds the closure of what one build needs.
const maxInputs = 1 << 20

// Closure is buildfarm.Source.
func (s buildSource) Closure(ctx context.Context, paths []flox.StorePath) (infos []*flox.PathInfo, err error) {
	err = s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		infos, err = closureOf(ctx, r, paths)
		return err
	})
	if errors.Is(err, flox.ErrNotFound) { // this server may lag
		err = s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
			infos, err = closureOf(ctx, r, paths)
			return err
		})
	}
	return infos, err
}

// closureOf lists paths and what they refer to, references first.
func closureOf(ctx context.Context, r *cluster.Reader, paths []flox.StorePath) (infos []*flox.PathInfo, err error) {
	type step struct {
		info *flox.PathInfo
		next int // of its references
	}
	seen := map[flox.StorePath]bool{}
	var stack []*step
	enter := func(p flox.StorePath) error {
		if seen[p] {
			return nil
		}
		if len(seen) >= maxInputs {
			return fmt.Errorf("more than %d paths in a closure: %w", maxInputs, flox.ErrFull)
		}
		m, err := validAs(r, string(p))
		if err == nil && m == nil {
			err = fmt.Errorf("%s is not valid in the storehouse: %w", p, flox.ErrNotFound)
		}
		if err != nil {
			return err
		}
		info, err := api.ToPathInfo(m)
		seen[p] = true
		stack = append(stack, &step{info: info})
		return err
	}
	for _, p := range paths {
		if err := errors.Join(ctx.Err(), enter(p)); err != nil {
			return nil, err
		}
		for len(stack) > 0 {
			top := stack[len(stack)-1]
			if top.next == len(top.info.References) {
				infos = append(infos, top.info)
				stack = stack[:len(stack)-1]
				continue
			}
			top.next++
			if err := enter(top.info.References[top.next-1]); err != nil {
				return nil, err
			}
		}
	}
	return infos, nil
}

// Nar is buildfarm.Source.
func (s buildSource) Nar(ctx context.Context, w io.Writer, info *flox.PathInfo) error {
	return s.writeNar(ctx, w, info)
}

// realised gives the realisation of an output; nil if none is known with a valid path.
func (s *Server) realised(ctx context.Context, id nix.RealisationID) (found *floxv1.Realisation, err error) {
	look := func(r *cluster.Reader) error {
		found, err = readRealisation(r, id.String())
		return err
	}
	err = s.read(ctx, cluster.Local, look)
	if errors.Is(err, flox.ErrNotFound) {
		err = s.read(ctx, cluster.Linearizable, look)
	}
	if errors.Is(err, flox.ErrNotFound) {
		return nil, nil //nolint:nilnil // documented
	}
	return found, err
}

// outputPath gives the path of an output, "" if it is not known yet.
func (b *builds) outputPath(ctx context.Context, drv *nix.Derivation, output string) (flox.StorePath, error) {
	o, ok := drv.Outputs[output]
	if !ok {
		return "", fmt.Errorf("derivation '%s' does not have wanted outputs '%s': %w", drv.Name, output, flox.ErrBadInput)
	}
	if o.Path != "" {
		return o.Path, nil
	}
	if o.Kind == nix.OutputImpure {
		return "", fmt.Errorf("derivation %s is impure, which the storehouse does not build: %w", drv.Name, flox.ErrBadInput)
	}
	id, err := b.hasher.Realise(ctx, drv, output)
	if err != nil {
		return "", err
	}
	r, err := b.s.realised(ctx, id)
	return flox.StorePath(r.GetPath()), err
}

// built gives the outputs of a derivation as callers see them.
func (b *builds) built(ctx context.Context, drv *nix.Derivation, names []string) (outputs []*floxv1.BuiltOutput, err error) {
	for _, name := range names {
		out := &floxv1.BuiltOutput{Name: name}
		path, err := b.outputPath(ctx, drv, name)
		if err != nil {
			return nil, err
		}
		id, err := b.hasher.Realise(ctx, drv, name)
		if err != nil {
			return nil, err
		}
		out.Path, out.Id = string(path), id.String()
		if drv.Outputs[name].Path == "" {
			if out.Realisation, err = b.s.realised(ctx, id); err != nil {
				return nil, err
			}
		}
		outputs = append(outputs, out)
	}
	return outputs, nil
}

// toRealisation is a realisation in Nix's words. What is no id or path of it is left out.
func toRealisation(m *floxv1.Realisation) *nix.Realisation {
	r := &nix.Realisation{Path: flox.StorePath(m.GetPath()), Signatures: m.GetSignatures(), Dependencies: map[nix.RealisationID]flox.StorePath{}}
	r.ID, _ = nix.ParseRealisationID(m.GetId())
	for _, in := range m.GetInputs() {
		if id, err := nix.ParseRealisationID(in.GetId()); err == nil {
			r.Dependencies[id] = flox.StorePath(in.GetPath())
		}
	}
	return r
}
