package nix

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/floxctl/flox"
)

// DrvExtension ends the name of a store path that holds a derivation.
const DrvExtension = ".drv"

// MaxDerivation is the most bytes of a derivation that are read. The largest
// ones people have, with whole files in their environment, are far smaller.
const MaxDerivation = 64 << 20

// Derivation says how something is built: the content of a .drv file, less its
// name, which is that of the file without DrvExtension.
type Derivation struct {
	Name     string
	Outputs  map[string]DrvOutput        // by name; never empty in a parsed one
	Inputs   map[flox.StorePath][]string // derivations, and the outputs of them that are needed, sorted
	Sources  []flox.StorePath            // sorted, without duplicates
	Platform string
	Builder  string
	Args     []string
	// Env is the environment. Structured attributes are the one variable
	// "__json" of it, and nothing here looks into it.
	Env map[string]string
}

// OutputKind says how an output of a derivation gets its path.
type OutputKind uint8

// The kinds of Nix 2.8 src/libstore/derivations.hh.
const (
	// OutputInputAddressed has a path that follows from the derivation.
	OutputInputAddressed OutputKind = iota + 1
	// OutputFixed has a path that follows from the hash its content must have.
	OutputFixed
	// OutputFloating gets its path from its content once it was built.
	OutputFloating
	// OutputDeferred is input-addressed, by inputs whose paths are not known yet.
	OutputDeferred
	// OutputImpure is floating and built anew each time.
	OutputImpure
)

func (k OutputKind) String() string {
	switch k {
	case OutputInputAddressed:
		return "input-addressed"
	case OutputFixed:
		return "fixed"
	case OutputFloating:
		return "content-addressed"
	case OutputDeferred:
		return "deferred"
	case OutputImpure:
		return "impure"
	}
	return "unknown"
}

// DrvOutput is one output of a derivation.
type DrvOutput struct {
	Kind OutputKind
	// Path is that of an input-addressed or fixed output, "" of any other.
	Path flox.StorePath
	// Recursive and Algo say what of the content is hashed (its NAR, or the bytes
	// of the one file it is) and how; for fixed, floating and impure outputs.
	Recursive bool
	Algo      HashAlgo
	// Hash is what a fixed output must have.
	Hash Hash
}

// ContentAddress is that of a fixed output, zero of any other.
func (o DrvOutput) ContentAddress() ContentAddress {
	switch {
	case o.Kind != OutputFixed:
		return ContentAddress{}
	case o.Recursive:
		return ContentAddress{Method: CANar, Hash: o.Hash}
	}
	return ContentAddress{Method: CAFlat, Hash: o.Hash}
}

// impure stands where the hash of an impure output would.
const impure = "impure"

// Fields are the three texts that say what an output is, in a .drv file and in
// the worker protocol: path, method and algorithm, hash.
func (o DrvOutput) Fields(dir flox.StoreDir) (path, algo, hash string) {
	if o.Path != "" {
		path = dir.Join(o.Path)
	}
	switch o.Kind {
	case OutputFixed:
		hash = o.Hash.Hex()
	case OutputImpure:
		hash = impure
	}
	if o.Algo != "" && o.Recursive {
		return path, "r:" + string(o.Algo), hash
	}
	return path, string(o.Algo), hash
}

// ParseDrvOutput is the inverse of DrvOutput.Fields for the output called name
// of the derivation called drvName. The path of a fixed output follows from the
// rest and must be the one given. The error is ErrBadInput.
func ParseDrvOutput(dir flox.StoreDir, drvName, name, path, algo, hash string) (DrvOutput, error) {
	o, err := parseDrvOutput(dir, OutputName(drvName, name), path, algo, hash)
	if err != nil {
		return DrvOutput{}, fmt.Errorf("output %s of derivation %s: %w", quote(name), quote(drvName), err)
	}
	return o, nil
}

func parseDrvOutput(dir flox.StoreDir, pathName, path, algo, hash string) (o DrvOutput, err error) {
	if path != "" {
		if o.Path, err = dir.Parse(path); err != nil {
			return o, err
		}
	}
	if algo == "" {
		switch {
		case hash != "":
			return o, fmt.Errorf("a hash without an algorithm: %w", flox.ErrBadInput)
		case path == "":
			o.Kind = OutputDeferred
		case o.Path.Name() != pathName:
			return o, fmt.Errorf("path %s, want one named %s: %w", path, quote(pathName), flox.ErrBadInput)
		default:
			o.Kind = OutputInputAddressed
		}
		return o, nil
	}
	algo, o.Recursive = strings.CutPrefix(algo, "r:")
	o.Algo = HashAlgo(algo)
	if o.Algo.Size() == 0 {
		return o, fmt.Errorf("hash algorithm %s: want md5, sha1, sha256 or sha512: %w", quote(algo), flox.ErrBadInput)
	}
	if hash == "" || hash == impure {
		o.Kind = OutputFloating
		if hash == impure {
			o.Kind = OutputImpure
		}
		if path != "" {
			return o, fmt.Errorf("path %s, but the path of a %s output is not known before it was built: %w", path, o.Kind, flox.ErrBadInput)
		}
		return o, nil
	}
	o.Kind = OutputFixed
	sum, err := hex.DecodeString(hash)
	if err != nil || len(sum) != o.Algo.Size() || strings.ToLower(hash) != hash {
		return o, fmt.Errorf("hash %s: want %d lower-case hex digits for %s: %w", quote(hash), 2*o.Algo.Size(), algo, flox.ErrBadInput)
	}
	o.Hash = Hash{Algo: o.Algo, Sum: sum}
	want, err := FixedOutputPath(dir, pathName, o.Recursive, o.Hash, nil, false)
	if err == nil && o.Path != want {
		err = fmt.Errorf("path %s, but its hash leads to %s: %w", quote(path), dir.Join(want), flox.ErrBadInput)
	}
	return o, err
}

// OutputName is the name in the path of an output of a derivation.
func OutputName(drvName, output string) string {
	if output == "out" {
		return drvName
	}
	return drvName + "-" + output
}

// OutputNames are the names of the outputs, sorted.
func (d *Derivation) OutputNames() []string {
	names := make([]string, 0, len(d.Outputs))
	for name := range d.Outputs {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Kind is that of all outputs. ErrBadInput: there are none, or they are of
// different kinds, or not as their kind demands (Nix 2.8
// BasicDerivation::type).
func (d *Derivation) Kind() (OutputKind, error) {
	bad := func(why string) (OutputKind, error) {
		return 0, fmt.Errorf("derivation %s: %s: %w", quote(d.Name), why, flox.ErrBadInput)
	}
	var first DrvOutput
	for _, o := range d.Outputs {
		switch {
		case first.Kind == 0:
			first = o
		case o.Kind != first.Kind:
			return bad("can't mix derivation output types")
		case o.Kind == OutputFloating && o.Algo != first.Algo:
			return bad("all floating outputs must use the same hash type")
		}
	}
	switch {
	case first.Kind == 0:
		return bad("must have at least one output")
	case first.Kind != OutputFixed:
		return first.Kind, nil
	case len(d.Outputs) > 1:
		return bad("only one fixed output is allowed for now")
	case d.Outputs["out"].Kind == 0:
		return bad(`single fixed output must be named "out"`)
	}
	return OutputFixed, nil
}

// References are the paths the .drv file refers to: sources and input
// derivations, sorted.
func (d *Derivation) References() []flox.StorePath {
	refs := slices.Clone(d.Sources)
	for p := range d.Inputs {
		refs = append(refs, p)
	}
	slices.Sort(refs)
	return slices.Compact(refs)
}

// NameAndVersion splits a derivation's name as Nix's builtins.parseDrvName does: the
// version begins behind the first dash that no letter follows.
func NameAndVersion(s string) (name, version string) {
	for i := 0; i+1 < len(s); i++ {
		c := s[i+1]
		if s[i] == '-' && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}
