package buildfarm

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// evaluateNix lists and describes derivations.
//
//go:embed evaluate.nix
var evaluateNix string

// Bounds of an evaluation.
const (
	evaluateTime   = 30 * time.Minute // of one run of Nix
	maxEvaluated   = 256 << 20        // bytes of its answer
	maxAttributes  = 200_000
	batchAttrs     = 512      // attributes that one run describes
	batchBytes     = 64 << 10 // of their names, which are an argument
	maxEvalRuns    = 4_000
	maxInstantiate = 100_000 // store paths of one derivation's graph
	maxFailure     = 1 << 10 // bytes of what is said of an attribute that cannot be evaluated
)

// Expression is a Nix expression in the store, evaluated where it sees nothing but what
// it refers to: no file of this machine, no network, nothing built.
type Expression struct {
	Source flox.StorePath // the expression, or a directory it is in
	File   string         // below Source; "" = Source itself
	System string         // builtins.currentSystem
}

// Attribute is what an expression has to be installed.
type Attribute struct {
	Attr        string                    `json:"attr"` // names joined by dots; "" = the expression itself
	Name        string                    `json:"name"`
	Version     string                    `json:"version"`
	Description string                    `json:"description"`
	System      string                    `json:"system"`
	Drv         flox.StorePath            `json:"drv"`
	Outputs     []string                  `json:"outputs"`
	Paths       map[string]flox.StorePath `json:"paths"`   // by output; "" = known when it is built
	Install     []string                  `json:"install"` // outputs
	Priority    *int                      `json:"priority"`
	Error       string                    `json:"error"` // why it cannot be evaluated; then there is nothing else
}

// evaluating is an expression in a place of its own.
type evaluating struct {
	*place
	Expression
	runs   int
	inputs map[flox.StorePath]bool
}

// evaluate makes a place in which an expression can be evaluated. It is to be closed.
func (b *Builder) evaluate(ctx context.Context, x *Expression, from Source) (*evaluating, error) {
	if err := b.inputs.trim(b.cfg.MaxDisk); err != nil {
		return nil, fmt.Errorf("make room for an evaluation: %w", err)
	}
	if x.File != "" && !filepath.IsLocal(x.File) {
		return nil, fmt.Errorf("expression %s of %s: want a file below it: %w", x.File, x.Source, flox.ErrBadInput)
	}
	p, err := b.place()
	if err != nil {
		return nil, err
	}
	e := &evaluating{place: p, Expression: *x, inputs: map[flox.StorePath]bool{}}
	closure, err := from.Closure(ctx, []flox.StorePath{x.Source})
	if err == nil {
		err = p.lay(ctx, closure, from)
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("fetch %s to evaluate it: %w", x.Source, err)
	}
	for _, info := range closure {
		e.inputs[info.Path] = true
	}
	return e, nil
}

// nix has Nix evaluate evaluate.nix. write makes it write derivations, too.
func (e *evaluating) nix(ctx context.Context, paths string, write bool, into any) error {
	if e.runs++; e.runs > maxEvalRuns {
		return fmt.Errorf("more than %d runs of Nix: too much of it cannot be evaluated: %w", maxEvalRuns, flox.ErrBadInput)
	}
	ctx, cancel := context.WithTimeout(ctx, evaluateTime)
	defer cancel()
	dir := string(e.b.cfg.StoreDir)
	args := []string{
		"--eval", "--strict", "--json", "--option", "restrict-eval", "true", "--option", "allow-import-from-derivation", "false",
		"--option", "system", e.System, "-I", "source=" + filepath.Join(dir, string(e.Source)),
		"--argstr", "file", filepath.Join(dir, string(e.Source), e.File), "--argstr", "system", e.System, "--argstr", "paths", paths, "-E", evaluateNix,
	}
	if write {
		args = append(args, "--read-write-mode")
	}
	out, err := e.say(ctx, "nix-instantiate", args...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, into); err != nil {
		return fmt.Errorf("answer of Nix %.100q: %w: %w", out, err, flox.ErrCorrupt)
	}
	return nil
}

// errEvaluation: Nix says that what it was given is wrong.
var errEvaluation = fmt.Errorf("the evaluation failed: %w", flox.ErrBadInput)

// say runs a program of Nix and gives what it prints, if that is not too much. Errors:
// errEvaluation with what it said.
func (e *evaluating) say(ctx context.Context, program string, args ...string) ([]byte, error) {
	r, err := e.room(ctx, program, args...)
	if err != nil {
		return nil, err
	}
	out, said := &limited{left: maxEvaluated}, &capture{}
	r.Stdout, r.Stderr = out, said
	if err = r.start(); err != nil {
		return nil, err
	}
	if err = r.wait(); err == nil {
		return out.Bytes(), nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return nil, fmt.Errorf("evaluate %s: %w", e.Source, cause)
	}
	words := strings.TrimSpace(plain(said.buf.String()))
	if out.left < 0 {
		words = fmt.Sprintf("its answer is longer than %d bytes", maxEvaluated)
	}
	return nil, fmt.Errorf("%w: %s", errEvaluation, words)
}

// limited keeps what is written, up to a bound.
type limited struct {
	bytes.Buffer
	left int
}

// Write implements io.Writer.
func (l *limited) Write(p []byte) (int, error) {
	if l.left -= len(p); l.left < 0 {
		return 0, flox.ErrBadInput
	}
	return l.Buffer.Write(p)
}

// Catalogue gives all an expression has to be installed, in the order of its names,
// also what of it cannot be evaluated. tell hears how far it is. Errors: ErrBadInput with
// Nix's words.
func (b *Builder) Catalogue(ctx context.Context, x *Expression, from Source, tell func(done, all int)) ([]Attribute, error) {
	e, err := b.evaluate(ctx, x, from)
	if err != nil {
		return nil, err
	}
	defer e.close()
	var all []Attribute
	paths, looked := [][]string{{}}, 0
	for len(paths) > 0 {
		n, size := 0, 0
		for n < min(len(paths), batchAttrs) && size < batchBytes {
			for _, name := range paths[n] {
				size += len(name) + 3
			}
			n++
		}
		some, inside, err := e.look(ctx, paths[:n])
		if err != nil {
			return nil, err
		}
		all, paths, looked = append(all, some...), append(paths[n:], inside...), looked+n
		if looked+len(paths) > maxAttributes {
			return nil, fmt.Errorf("%s has more than %d attributes: %w", x.Source, maxAttributes, flox.ErrBadInput)
		}
		tell(looked, looked+len(paths))
	}
	slices.SortFunc(all, func(x, y Attribute) int { return strings.Compare(x.Attr, y.Attr) })
	return all, nil
}

// item is what Nix says of a path: an attribute, or one to be looked at as well.
type item struct {
	Attribute
	Inside []string `json:"inside"`
}

// look has attributes described, and gives the paths of those in sets among them. Nix
// gives up on all of them where one is wrong in a way that no expression can catch: then
// it is looked for, by halves.
func (e *evaluating) look(ctx context.Context, paths [][]string) (all []Attribute, inside [][]string, err error) {
	found, err := e.items(ctx, paths, false)
	switch {
	case err == nil:
		for _, items := range found {
			for i := range items {
				if items[i].Inside != nil {
					inside = append(inside, items[i].Inside)
					continue
				}
				a := items[i].Attribute
				if err := e.check(&a); err != nil {
					a = Attribute{Attr: a.Attr, Error: err.Error()}
				}
				all = append(all, a)
			}
		}
		return all, inside, nil
	case !errors.Is(err, errEvaluation) || len(paths[0]) == 0:
		return nil, nil, err
	case len(paths) == 1:
		words := err.Error()
		return []Attribute{{Attr: strings.Join(paths[0], "."), Error: words[max(0, len(words)-maxFailure):]}}, nil, nil
	}
	half := len(paths) / 2
	for _, part := range [][][]string{paths[:half], paths[half:]} {
		some, more, err := e.look(ctx, part)
		if err != nil {
			return nil, nil, err
		}
		all, inside = append(all, some...), append(inside, more...)
	}
	return all, inside, nil
}

// items has Nix look at paths.
func (e *evaluating) items(ctx context.Context, paths [][]string, write bool) (found [][]item, err error) {
	text, err := json.Marshal(paths)
	if err != nil {
		return nil, err
	}
	err = e.nix(ctx, string(text), write, &found)
	if err == nil && len(found) != len(paths) {
		err = fmt.Errorf("answer of Nix with %d attributes, want %d: %w", len(found), len(paths), flox.ErrCorrupt)
	}
	return found, err
}

// check makes store paths of what Nix names.
func (e *evaluating) check(a *Attribute) (err error) {
	if a.Error != "" {
		return nil
	}
	if a.Drv, err = e.b.cfg.StoreDir.Parse(string(a.Drv)); err != nil {
		return err
	}
	for output, path := range a.Paths {
		p, err := e.b.cfg.StoreDir.Parse(string(path))
		if err != nil {
			p = "" // a placeholder: it is content-addressed
		}
		a.Paths[output] = p
	}
	for _, output := range a.Install {
		if !slices.Contains(a.Outputs, output) {
			return fmt.Errorf("it wants the output %.80q installed, and has %s: %w", output, strings.Join(a.Outputs, " "), flox.ErrBadInput)
		}
	}
	return nil
}

// Instantiate makes the derivation of one attribute, with all the derivations and
// sources it needs: take is called with each that the expression does not come with,
// one that another refers to before that. Errors: ErrBadInput with Nix's words, ErrNotFound.
func (b *Builder) Instantiate(ctx context.Context, x *Expression, attr string, from Source, take func(ctx context.Context, info *flox.PathInfo, nar func(io.Writer) error) error) (*Attribute, error) {
	e, err := b.evaluate(ctx, x, from)
	if err != nil {
		return nil, err
	}
	defer e.close()
	path := []string{}
	if attr != "" {
		path = strings.Split(attr, ".")
	}
	found, err := e.items(ctx, [][]string{path}, true)
	if err != nil {
		return nil, fmt.Errorf("attribute %s: %w", attr, err)
	}
	if len(found[0]) != 1 || found[0][0].Inside != nil {
		return nil, fmt.Errorf("attribute %s: it is no derivation: %w", attr, errEvaluation)
	}
	a := &found[0][0].Attribute
	if a.Error != "" {
		return nil, fmt.Errorf("attribute %s: %s: %w", attr, a.Error, errEvaluation)
	}
	if err = e.check(a); err == nil {
		err = e.hand(ctx, a.Drv, take)
	}
	if err != nil {
		return nil, fmt.Errorf("attribute %s: %w", attr, err)
	}
	return a, nil
}

// hand gives a derivation and all it needs to take, what was there before left out.
func (e *evaluating) hand(ctx context.Context, drv flox.StorePath, take func(context.Context, *flox.PathInfo, func(io.Writer) error) error) error {
	s, err := e.serve(ctx, &capture{}, "--option", "restrict-eval", "true")
	if err != nil {
		return err
	}
	defer s.end()
	seen := map[flox.StorePath]bool{}
	var visit func(p flox.StorePath) error
	visit = func(p flox.StorePath) error {
		if seen[p] || e.inputs[p] {
			return nil
		}
		if seen[p] = true; len(seen) > maxInstantiate {
			return fmt.Errorf("it needs more than %d derivations and sources: %w", maxInstantiate, flox.ErrBadInput)
		}
		infos := s.infos([]flox.StorePath{p})
		if s.err != nil {
			return s.err
		}
		if len(infos) != 1 {
			return fmt.Errorf("%s was evaluated, and Nix does not know it: %w", p, flox.ErrNotFound)
		}
		for _, ref := range infos[0].References {
			if ref == p {
				continue
			}
			if err := visit(ref); err != nil {
				return err
			}
		}
		return e.give(ctx, infos[0], take)
	}
	return visit(drv)
}

// give gives one path to take: a copy, of which everything is looked at anew.
func (e *evaluating) give(ctx context.Context, claim *flox.PathInfo, take func(context.Context, *flox.PathInfo, func(io.Writer) error) error) error {
	in, err := e.b.inputs.adopt(ctx, filepath.Join(e.dir, "store", string(claim.Path)))
	if err != nil {
		return err
	}
	defer e.b.inputs.done(in)
	m := &made{in, &flox.PathInfo{Path: claim.Path, NarHash: in.hash, NarSize: in.size, References: slices.Sorted(slices.Values(claim.References))}}
	said, err := nix.ParseContentAddress(claim.CA)
	if err != nil {
		return fmt.Errorf("%s: %w", claim.Path, err)
	}
	ca, err := m.address(ctx, said.Method == nix.CANar, said.Hash.Algo)
	if err != nil {
		return err
	}
	ca.Method = said.Method
	self := slices.Contains(m.info.References, claim.Path)
	others := slices.DeleteFunc(slices.Clone(m.info.References), func(ref flox.StorePath) bool { return ref == claim.Path })
	is, err := ca.Path(e.b.cfg.StoreDir, claim.Path.Name(), others, self)
	if err == nil && is != claim.Path {
		err = fmt.Errorf("its content is that of %s: %w", is, flox.ErrCorrupt)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", claim.Path, err)
	}
	m.info.CA = ca.String()
	return take(ctx, m.info, func(w io.Writer) error { return nix.DumpPath(ctx, w, m.file) })
}
