package nix

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"unicode/utf8"

	"github.com/floxctl/flox"
)

// MaxListing is the most bytes a .ls file may have: about 500,000 files.
const MaxListing = 64 << 20

// maxListingNodes bounds what a Listing costs in memory beyond its text.
const maxListingNodes = 1 << 20

// ParseListing parses a .ls file. Unknown fields are skipped, as newer Nix may
// add some; names, depth and kinds must be such as a NAR could hold. Files with
// names that are not UTF-8 cannot be told apart in JSON and are refused. The
// error is ErrBadInput.
func ParseListing(b []byte) (*Listing, error) {
	if len(b) > MaxListing {
		return nil, fmt.Errorf("listing of %d bytes, at most %d are read: %w", len(b), MaxListing, flox.ErrBadInput)
	}
	if !utf8.Valid(b) {
		return nil, fmt.Errorf("listing is not UTF-8: %w", flox.ErrBadInput)
	}
	p := &listingParser{dec: json.NewDecoder(bytes.NewReader(b))}
	p.dec.UseNumber()
	root, err := p.file()
	if err != nil {
		return nil, fmt.Errorf("listing at byte %d: %w: %w", p.dec.InputOffset(), err, flox.ErrBadInput)
	}
	return root, nil
}

type listingParser struct {
	dec   *json.Decoder
	nodes int
}

func (p *listingParser) file() (root *Listing, err error) {
	version := ""
	err = p.object(func(key string) error {
		switch key {
		case "version":
			n, err := p.dec.Token()
			if err == nil {
				version = fmt.Sprint(n)
			}
			return err
		case "root":
			root, err = p.node(1)
			return err
		}
		return p.skip()
	})
	switch {
	case err != nil:
		return nil, err
	case version != "1":
		return nil, fmt.Errorf("version %s, want 1", quote(version))
	case root == nil:
		return nil, errors.New("no root")
	}
	if _, err := p.dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the listing")
	}
	return root, nil
}

// object reads an object and calls field with each key, which reads the value.
// A key that comes twice is refused: readers would differ about it.
func (p *listingParser) object(field func(key string) error) error {
	if err := p.delim('{'); err != nil {
		return err
	}
	seen := make(map[string]bool)
	for p.dec.More() {
		key, err := p.text()
		if err != nil {
			return err
		}
		if seen[key] {
			return fmt.Errorf("%s comes twice", quote(key))
		}
		seen[key] = true
		if err := field(key); err != nil {
			return err
		}
	}
	return p.delim('}')
}

// node reads one node; its recursion ends at MaxNarDepth.
func (p *listingParser) node(depth int) (*Listing, error) {
	if depth > MaxNarDepth {
		return nil, fmt.Errorf("more than %d levels", MaxNarDepth)
	}
	if p.nodes++; p.nodes > maxListingNodes {
		return nil, fmt.Errorf("more than %d entries", maxListingNodes)
	}
	var l Listing
	kind := ""
	err := p.object(func(key string) (err error) {
		switch key {
		case "type":
			kind, err = p.text()
		case "size":
			l.Size, err = p.number()
		case "narOffset":
			l.NarOffset, err = p.number()
		case "executable":
			l.Executable, err = p.boolean()
		case "target":
			l.Target, err = p.text()
		case "entries":
			l.Entries, err = p.entries(depth)
		default:
			err = p.skip()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return &l, l.setKind(kind)
}

// setKind checks that the fields are those of the kind.
func (l *Listing) setKind(kind string) error {
	for _, k := range []flox.Kind{flox.Regular, flox.Directory, flox.Symlink} {
		if k.String() == kind {
			l.Kind = k
		}
	}
	if l.Kind == 0 {
		return fmt.Errorf("type %s, want regular, directory or symlink", quote(kind))
	}
	if (l.Kind == flox.Directory) != (l.Entries != nil) {
		return fmt.Errorf("a %s must not lack or have entries", kind)
	}
	if l.Kind != flox.Regular && l.NarOffset != 0 {
		return fmt.Errorf("a %s has no narOffset", kind)
	}
	e := NarEntry{Kind: l.Kind, Executable: l.Executable, Size: l.Size, Target: l.Target}
	if why := e.check(); why != "" {
		return errors.New(why)
	}
	return nil
}

func (p *listingParser) entries(depth int) (map[string]*Listing, error) {
	entries := make(map[string]*Listing)
	err := p.object(func(name string) (err error) {
		if why := checkNarName(name); why != "" {
			return errors.New(why)
		}
		entries[name], err = p.node(depth + 1)
		return err
	})
	return entries, err
}

func (p *listingParser) delim(want json.Delim) error {
	got, err := p.dec.Token()
	if err == nil && got != want {
		err = fmt.Errorf("want %s", want)
	}
	return noEOF(err)
}

func (p *listingParser) text() (string, error) {
	t, err := p.dec.Token()
	s, ok := t.(string)
	if err == nil && !ok {
		err = errors.New("want a string")
	}
	return s, noEOF(err)
}

func (p *listingParser) number() (uint64, error) {
	t, err := p.dec.Token()
	if err != nil {
		return 0, noEOF(err)
	}
	n, ok := t.(json.Number)
	if !ok {
		return 0, errors.New("want a number")
	}
	v, err := strconv.ParseUint(string(n), 10, 63)
	if err != nil {
		return 0, fmt.Errorf("number %s: want a whole one from 0 to 2^63-1", quote(string(n)))
	}
	return v, nil
}

func (p *listingParser) boolean() (bool, error) {
	t, err := p.dec.Token()
	v, ok := t.(bool)
	if err == nil && !ok {
		err = errors.New("want true or false")
	}
	return v, noEOF(err)
}

// skip reads a value nobody needs.
func (p *listingParser) skip() error {
	var ignored json.RawMessage
	return noEOF(p.dec.Decode(&ignored))
}

// noEOF makes the end of input inside a value an error like others.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
