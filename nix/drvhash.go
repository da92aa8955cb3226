package nix

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/floxctl/flox"
)

// DrvHash stands for a derivation in the hashes of those that need it. It is
// the same for two derivations that differ only in how their fixed-output
// inputs are fetched (Nix 2.8 hashDerivationModulo). All outputs of one
// derivation have it in common.
type DrvHash struct {
	Hash [32]byte
	// Deferred says that output paths do not follow from the hash: some input is
	// content-addressed and not built yet.
	Deferred bool
	// Outputs are the names of the derivation's outputs, sorted.
	Outputs []string
}

// HashModulo computes the hash. Mask leaves the derivation's own output paths
// out of it: so it must be for OutputPath and for the id of a realisation, and
// must not be for what resolve returns. Resolve gives the hash of an input,
// made with mask false; it is called once for each, so a graph of any depth is
// walked by its owner, who remembers what was hashed (DrvHasher does). Errors:
// ErrBadInput, and what resolve returns.
func (d *Derivation) HashModulo(dir flox.StoreDir, mask bool, resolve func(flox.StorePath) (DrvHash, error)) (DrvHash, error) {
	kind, err := d.Kind()
	if err != nil {
		return DrvHash{}, err
	}
	h := DrvHash{Outputs: d.OutputNames()}
	switch kind {
	case OutputFixed:
		path, algo, hash := d.Outputs["out"].Fields(dir)
		h.Hash = sha256.Sum256([]byte("fixed:out:" + algo + ":" + hash + ":" + path))
		return h, nil
	case OutputImpure:
		h.Hash, h.Deferred = sha256.Sum256([]byte(impure)), true
		return h, nil
	case OutputFloating:
		h.Deferred = true
	}
	inputs := make(map[string][]string)
	for p, outputs := range d.Inputs {
		in, err := resolve(p)
		if err != nil {
			return DrvHash{}, fmt.Errorf("hash of derivation %s: %w", quote(d.Name), err)
		}
		h.Deferred = h.Deferred || in.Deferred
		for _, name := range outputs {
			if !slices.Contains(in.Outputs, name) {
				return DrvHash{}, fmt.Errorf("no hash for output %s of derivation %s, which %s needs: %w", quote(name), p, quote(d.Name), flox.ErrBadInput)
			}
			key := hex.EncodeToString(in.Hash[:])
			inputs[key] = append(inputs[key], name)
		}
	}
	sorted := make([]drvInput, 0, len(inputs))
	for _, key := range slices.Sorted(maps.Keys(inputs)) {
		names := inputs[key]
		slices.Sort(names)
		sorted = append(sorted, drvInput{key, slices.Compact(names)})
	}
	text, err := d.marshal(dir, sorted, mask)
	h.Hash = sha256.Sum256(text)
	return h, err
}

// OutputPath is the path of an input-addressed output of the derivation called
// drvName with the given hash, which was made with mask true.
func OutputPath(dir flox.StoreDir, drvName, output string, hash [32]byte) (flox.StorePath, error) {
	return MakeStorePath(dir, "output:"+output, hash, OutputName(drvName, output))
}

// CheckOutputs says whether the output paths are those the derivation leads
// to, in it and in its environment (Nix 2.8 LocalStore::checkDerivationOutputs).
// The error is ErrBadInput, or what resolve returns; see HashModulo.
func (d *Derivation) CheckOutputs(dir flox.StoreDir, resolve func(flox.StorePath) (DrvHash, error)) error {
	kind, err := d.Kind()
	if err != nil {
		return err
	}
	var h DrvHash
	switch kind {
	case OutputInputAddressed:
		if h, err = d.HashModulo(dir, true, resolve); err != nil {
			return err
		}
	case OutputFixed: // its path was checked when it was parsed
	default:
		return nil // no path is known
	}
	for name, o := range d.Outputs {
		if kind == OutputInputAddressed {
			want, err := OutputPath(dir, d.Name, name, h.Hash)
			if err != nil {
				return err
			}
			if o.Path != want {
				return fmt.Errorf("derivation %s has incorrect output %s, should be %s: %w", quote(d.Name), dir.Join(o.Path), dir.Join(want), flox.ErrBadInput)
			}
		}
		if got, ok := d.Env[name]; !ok || got != dir.Join(o.Path) {
			return fmt.Errorf("derivation %s has incorrect environment variable %s, should be %s: %w", quote(d.Name), quote(name), dir.Join(o.Path), flox.ErrBadInput)
		}
	}
	return nil
}

// FillOutputs gives deferred outputs their input-addressed paths, where they
// follow from the inputs, in the derivation and in its environment, as Nix does
// at the end of an evaluation. Outputs that stay deferred are left as they are.
func (d *Derivation) FillOutputs(dir flox.StoreDir, resolve func(flox.StorePath) (DrvHash, error)) error {
	kind, err := d.Kind()
	if err != nil || kind != OutputDeferred {
		return err
	}
	h, err := d.HashModulo(dir, true, resolve)
	if err != nil || h.Deferred {
		return err
	}
	for name := range d.Outputs {
		p, err := OutputPath(dir, d.Name, name, h.Hash)
		if err != nil {
			return err
		}
		d.Outputs[name] = DrvOutput{Kind: OutputInputAddressed, Path: p}
		d.Env[name] = dir.Join(p)
	}
	return nil
}

// Placeholder stands in a derivation for the path of its own output, which is
// not known yet.
func Placeholder(output string) string {
	sum := sha256.Sum256([]byte("nix-output:" + output))
	return "/" + EncodeBase32(sum[:])
}

// DownstreamPlaceholder stands in a derivation for the path of an output of the
// input derivation drv, which is not known yet.
func DownstreamPlaceholder(drv flox.StorePath, output string) string {
	name := strings.TrimSuffix(drv.Name(), DrvExtension)
	sum := sha256.Sum256([]byte("nix-upstream-output:" + drv.HashPart() + ":" + OutputName(name, output)))
	return "/" + EncodeBase32(sum[:])
}

// Resolve gives the derivation with its inputs built: outputs says where each
// needed output of an input is, placeholders are replaced by that, inputs
// become sources, and deferred outputs get their paths (Nix 2.8
// Derivation::tryResolve). ErrNotFound: an output is not known.
func (d *Derivation) Resolve(dir flox.StoreDir, outputs func(drv flox.StorePath, output string) (flox.StorePath, bool)) (*Derivation, error) {
	r := &Derivation{Name: d.Name, Platform: d.Platform, Outputs: maps.Clone(d.Outputs), Sources: slices.Clone(d.Sources), Env: make(map[string]string, len(d.Env))}
	var pairs []string
	for _, drv := range slices.Sorted(maps.Keys(d.Inputs)) {
		for _, name := range d.Inputs[drv] {
			p, ok := outputs(drv, name)
			if !ok {
				return nil, fmt.Errorf("derivation %s: output %s of its input %s is not known: %w", quote(d.Name), quote(name), drv, flox.ErrNotFound)
			}
			pairs = append(pairs, DownstreamPlaceholder(drv, name), dir.Join(p))
			r.Sources = append(r.Sources, p)
		}
	}
	slices.Sort(r.Sources)
	r.Sources = slices.Compact(r.Sources)
	rewrite := strings.NewReplacer(pairs...).Replace
	r.Builder = rewrite(d.Builder)
	for _, arg := range d.Args {
		r.Args = append(r.Args, rewrite(arg))
	}
	for key, value := range d.Env {
		r.Env[rewrite(key)] = rewrite(value)
	}
	return r, r.FillOutputs(dir, nil) // nothing is left to be resolved
}
