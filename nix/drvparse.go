package nix

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/floxctl/flox"
)

// ParseDerivation parses the .drv file of the derivation called name (Nix 2.8
// src/libstore/derivations.cc parseDerivation). It accepts what Nix writes and
// nothing else: lists in order, no escape that is not needed, output paths as
// hashes demand; so what is accepted encodes to the same bytes. Whether
// input-addressed paths are right, CheckOutputs says. The error is ErrBadInput.
func ParseDerivation(dir flox.StoreDir, name string, b []byte) (*Derivation, error) {
	if len(b) > MaxDerivation {
		return nil, fmt.Errorf("derivation %s: %d bytes, at most %d are read: %w", quote(name), len(b), MaxDerivation, flox.ErrBadInput)
	}
	p := drvParser{dir: dir, in: b}
	d := p.derivation(name)
	if p.err == nil && p.at < len(b) {
		p.fail("bytes behind its end")
	}
	if p.err != nil {
		return nil, fmt.Errorf("derivation %s: %w", quote(name), p.err)
	}
	_, err := d.Kind()
	return d, err
}

// drvParser reads what comes next; after the first error it reads nothing.
type drvParser struct {
	dir flox.StoreDir
	in  []byte
	at  int
	err error
}

func (p *drvParser) fail(why string) {
	if p.err == nil {
		p.err = fmt.Errorf("at byte %d: %s: %w", p.at, why, flox.ErrBadInput)
	}
}

func (p *drvParser) derivation(name string) *Derivation {
	d := &Derivation{Name: name, Outputs: map[string]DrvOutput{}, Inputs: map[flox.StorePath][]string{}, Env: map[string]string{}}
	p.token("Derive(")
	last := ""
	p.list(func() { p.output(d, &last) })
	p.token(",")
	var before flox.StorePath
	p.list(func() { p.input(d, &before) })
	p.token(",")
	p.list(func() {
		d.Sources = append(d.Sources, p.path())
		if n := len(d.Sources); n > 1 && d.Sources[n-2] >= d.Sources[n-1] {
			p.fail("sources are not in order")
		}
	})
	p.token(",")
	d.Platform = p.plain()
	p.token(",")
	d.Builder = p.str()
	p.token(",")
	p.list(func() { d.Args = append(d.Args, p.str()) })
	p.token(",")
	last = ""
	p.list(func() {
		p.token("(")
		key := p.str()
		p.token(",")
		if key <= last && len(d.Env) > 0 {
			p.fail("environment is not in order")
		}
		last, d.Env[key] = key, p.str()
		p.token(")")
	})
	p.token(")")
	return d
}

func (p *drvParser) output(d *Derivation, last *string) {
	p.token("(")
	name := p.plain()
	p.token(",")
	path := p.plain()
	p.token(",")
	algo := p.plain()
	p.token(",")
	hash := p.plain()
	p.token(")")
	if p.err != nil {
		return
	}
	if name <= *last { // nor may a name be empty
		p.fail("outputs are not in order")
		return
	}
	o, err := ParseDrvOutput(p.dir, d.Name, name, path, algo, hash)
	if err != nil {
		p.err = err
		return
	}
	*last, d.Outputs[name] = name, o
}

func (p *drvParser) input(d *Derivation, before *flox.StorePath) {
	p.token("(")
	drv := p.path()
	p.token(",")
	var names []string
	p.list(func() {
		names = append(names, p.plain())
		if n := len(names); n > 1 && names[n-2] >= names[n-1] {
			p.fail("outputs of an input are not in order")
		}
	})
	p.token(")")
	switch {
	case p.err != nil:
		return
	case !strings.HasSuffix(string(drv), DrvExtension):
		p.fail("input " + quote(string(drv)) + " is no derivation")
	case drv <= *before:
		p.fail("inputs are not in order")
	}
	*before, d.Inputs[drv] = drv, names
}

// token reads exactly s.
func (p *drvParser) token(s string) {
	if p.err != nil {
		return
	}
	if !bytes.HasPrefix(p.in[p.at:], []byte(s)) {
		p.fail("want " + quote(s))
		return
	}
	p.at += len(s)
}

// list reads "[", elements with commas between them, "]".
func (p *drvParser) list(element func()) {
	p.token("[")
	for first := true; p.err == nil; first = false {
		if p.at < len(p.in) && p.in[p.at] == ']' {
			p.at++
			return
		}
		if !first {
			p.token(",")
		}
		if p.err == nil {
			element()
		}
	}
}

// path reads a store path.
func (p *drvParser) path() flox.StorePath {
	s := p.plain()
	if p.err != nil {
		return ""
	}
	path, err := p.dir.Parse(s)
	if err != nil {
		p.err = err
	}
	return path
}

// plain reads a string of the kind Nix writes without escapes.
func (p *drvParser) plain() string {
	p.token(`"`)
	if p.err != nil {
		return ""
	}
	n := bytes.IndexAny(p.in[p.at:], "\"\\")
	if n < 0 || p.in[p.at+n] == '\\' {
		p.fail("want a string without escapes")
		return ""
	}
	s := string(p.in[p.at : p.at+n])
	p.at += n + 1
	return s
}

// drvEscapes are the characters behind a backslash and what they stand for.
var drvEscapes = map[byte]byte{'n': '\n', 'r': '\r', 't': '\t', '"': '"', '\\': '\\'}

// str reads a string.
func (p *drvParser) str() string {
	p.token(`"`)
	if p.err != nil {
		return ""
	}
	var b strings.Builder
	for {
		rest := p.in[p.at:]
		n := bytes.IndexAny(rest, "\"\\\n\r\t")
		if n < 0 {
			p.fail("a string without an end")
			return ""
		}
		if rest[n] == '"' && b.Len() == 0 {
			p.at += n + 1
			return string(rest[:n])
		}
		b.Write(rest[:n])
		p.at += n + 1
		switch rest[n] {
		case '"':
			return b.String()
		case '\\':
			c, ok := byte(0), false
			if n+1 < len(rest) {
				c, ok = drvEscapes[rest[n+1]]
			}
			if !ok {
				p.fail("want n, r, t, a quote or a backslash behind a backslash")
				return ""
			}
			b.WriteByte(c)
			p.at++
		default:
			p.fail("a line end or tab inside a string that is not escaped")
			return ""
		}
	}
}
