package nix

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/floxctl/flox"
)

// Marshal gives the bytes of the .drv file, as Nix writes them (Nix 2.8
// Derivation::unparse). ErrBadInput: a name that is written as it is holds a
// quote or a backslash.
func (d *Derivation) Marshal(dir flox.StoreDir) ([]byte, error) {
	inputs := make([]drvInput, 0, len(d.Inputs))
	for _, p := range slices.Sorted(maps.Keys(d.Inputs)) {
		inputs = append(inputs, drvInput{dir.Join(p), d.Inputs[p]})
	}
	return d.marshal(dir, inputs, false)
}

// drvInput is an input derivation, by its path or its hash, and what of it is needed.
type drvInput struct {
	name    string
	outputs []string
}

// marshal writes the derivation with other inputs, and with its own output
// paths left out if mask is set.
func (d *Derivation) marshal(dir flox.StoreDir, inputs []drvInput, mask bool) ([]byte, error) {
	w := drvWriter{b: make([]byte, 0, 4096)}
	w.text("Derive([")
	for i, name := range d.OutputNames() {
		path, algo, hash := d.Outputs[name].Fields(dir)
		if mask {
			path = ""
		}
		w.comma(i)
		w.tuple(name, path, algo, hash)
	}
	w.text("],[")
	for i, in := range inputs {
		w.comma(i)
		w.text("(")
		w.plain(in.name)
		w.text(",[")
		for j, output := range in.outputs {
			w.comma(j)
			w.plain(output)
		}
		w.text("])")
	}
	w.text("],[")
	for i, p := range d.Sources {
		w.comma(i)
		w.plain(dir.Join(p))
	}
	w.text("],")
	w.plain(d.Platform)
	w.text(",")
	w.str(d.Builder)
	w.text(",[")
	for i, arg := range d.Args {
		w.comma(i)
		w.str(arg)
	}
	w.text("],[")
	for i, key := range slices.Sorted(maps.Keys(d.Env)) {
		value := d.Env[key]
		if _, output := d.Outputs[key]; mask && output {
			value = ""
		}
		w.comma(i)
		w.text("(")
		w.str(key)
		w.text(",")
		w.str(value)
		w.text(")")
	}
	w.text("])")
	if w.bad != "" {
		return nil, fmt.Errorf("derivation %s: %s holds a quote or a backslash: %w", quote(d.Name), quote(w.bad), flox.ErrBadInput)
	}
	return w.b, nil
}

type drvWriter struct {
	b   []byte
	bad string // the first string that cannot be written
}

func (w *drvWriter) text(s string) { w.b = append(w.b, s...) }

func (w *drvWriter) comma(i int) {
	if i > 0 {
		w.text(",")
	}
}

func (w *drvWriter) tuple(fields ...string) {
	w.text("(")
	for i, s := range fields {
		w.comma(i)
		w.plain(s)
	}
	w.text(")")
}

// plain writes a string as it is.
func (w *drvWriter) plain(s string) {
	if w.bad == "" && strings.ContainsAny(s, "\"\\") {
		w.bad = s
	}
	w.b = append(append(append(w.b, '"'), s...), '"')
}

// str writes a string with escapes.
func (w *drvWriter) str(s string) {
	w.b = append(w.b, '"')
	for i := range len(s) {
		switch c := s[i]; c {
		case '"', '\\':
			w.b = append(w.b, '\\', c)
		case '\n':
			w.b = append(w.b, '\\', 'n')
		case '\r':
			w.b = append(w.b, '\\', 'r')
		case '\t':
			w.b = append(w.b, '\\', 't')
		default:
			w.b = append(w.b, c)
		}
	}
	w.b = append(w.b, '"')
}

// DrvPath is the path of the .drv file, and text its bytes.
func (d *Derivation) DrvPath(dir flox.StoreDir) (path flox.StorePath, text []byte, err error) {
	if text, err = d.Marshal(dir); err != nil {
		return "", nil, err
	}
	path, err = TextPath(dir, d.Name+DrvExtension, sha256.Sum256(text), d.References())
	return path, text, err
}
