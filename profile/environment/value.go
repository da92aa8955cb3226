package environment

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// maxValueDepth bounds how deep a value's lists and sets are inside each other.
const maxValueDepth = 64

// valueReader reads a value as Nix prints it (src/libexpr/eval.cc, Value::print): strings,
// numbers, true, false and null, lists, sets. What is none of these, such as «repeated» or
// <CODE>, is an opaque.
type valueReader struct{ text string }

type opaque string

// blank passes over blanks.
func (r *valueReader) blank() { r.text = strings.TrimLeft(r.text, " \t\r\n") }

// takes passes over a word if it is next.
func (r *valueReader) takes(word string) bool {
	r.blank()
	rest, ok := strings.CutPrefix(r.text, word)
	if ok {
		r.text = rest
	}
	return ok
}

func (r *valueReader) value(depth int) (any, error) {
	if depth > maxValueDepth {
		return nil, fmt.Errorf("more than %d lists and sets inside each other", maxValueDepth)
	}
	switch {
	case r.takes("["):
		return r.list(depth)
	case r.takes("{"):
		return r.set(depth)
	case strings.HasPrefix(r.text, `"`):
		return r.quoted()
	case r.takes("«"):
		return r.until("»")
	case r.takes("<"):
		return r.until(">")
	}
	word := r.word(" \t\r\n;]}")
	switch word {
	case "":
		return nil, errors.New("it ends where a value is wanted")
	case "true":
		return true, nil
	case "false":
		return false, nil
	case "null":
		return nil, nil //nolint:nilnil // Nix's null
	}
	if n, err := strconv.ParseInt(word, 10, 64); err == nil {
		return n, nil
	}
	return opaque(word), nil
}

// word takes all before one of the ends.
func (r *valueReader) word(ends string) string {
	n := strings.IndexAny(r.text, ends)
	if n < 0 {
		n = len(r.text)
	}
	word := r.text[:n]
	r.text = r.text[n:]
	return word
}

func (r *valueReader) until(end string) (any, error) {
	word, rest, ok := strings.Cut(r.text, end)
	if !ok {
		return nil, fmt.Errorf("want %q", end)
	}
	r.text = rest
	return opaque(word), nil
}

func (r *valueReader) list(depth int) (any, error) {
	list := []any{}
	for !r.takes("]") {
		v, err := r.value(depth + 1)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	return list, nil
}

func (r *valueReader) set(depth int) (any, error) {
	set := map[string]any{}
	for !r.takes("}") {
		name := ""
		if strings.HasPrefix(r.text, `"`) {
			q, err := r.quoted()
			if err != nil {
				return nil, err
			}
			name = q
		} else {
			name = r.word(" \t\r\n=")
		}
		if name == "" || !r.takes("=") {
			return nil, errors.New("want NAME = VALUE; in a set")
		}
		v, err := r.value(depth + 1)
		if err != nil {
			return nil, err
		}
		if set[name] = v; !r.takes(";") {
			return nil, fmt.Errorf("want ; behind %s", name)
		}
	}
	return set, nil
}

// quoted takes a string.
func (r *valueReader) quoted() (string, error) {
	var b strings.Builder
	for i := 1; i < len(r.text); i++ {
		switch c := r.text[i]; c {
		case '"':
			r.text = r.text[i+1:]
			return b.String(), nil
		case '\\':
			if i++; i == len(r.text) {
				continue
			}
			switch c = r.text[i]; c {
			case 'n':
				c = '\n'
			case 'r':
				c = '\r'
			case 't':
				c = '\t'
			}
			b.WriteByte(c)
		default:
			b.WriteByte(c)
		}
	}
	return "", errors.New("a string has no end")
}
