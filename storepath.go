package flox

import (
	"fmt"
	"path"
	"strings"
)

// DefaultStoreDir is where Nix keeps its store unless told otherwise.
const DefaultStoreDir StoreDir = "/nix/store"

// Limits of a store path's base name (Nix 2.8 src/libstore/path.cc).
const (
	HashPartLen = 32  // characters of nix-base32: 160 bits
	MaxNameLen  = 211 // bytes of the name behind the hash part
)

// base32Alphabet is Nix's: no e, o, t, u.
const base32Alphabet = "0123456789abcdfghijklmnpqrsvwxyz"

// StoreDir is the absolute directory a store is mounted at. It is part of
// every path hash, so it is configuration and never a constant in code.
type StoreDir string

// ParseStoreDir checks that s is an absolute, clean directory other than "/".
func ParseStoreDir(s string) (StoreDir, error) {
	if !strings.HasPrefix(s, "/") || s == "/" || path.Clean(s) != s {
		return "", fmt.Errorf("store directory %q: want an absolute path such as %s without a trailing slash: %w", s, DefaultStoreDir, ErrBadInput)
	}
	return StoreDir(s), nil
}

// Join gives the absolute path of p, for example /nix/store/<hash>-hello.
func (d StoreDir) Join(p StorePath) string { return string(d) + "/" + string(p) }

// Split parses an absolute path at or below d into its store path and the
// rest ("" or starting with a slash).
func (d StoreDir) Split(abs string) (StorePath, string, error) {
	rel, ok := strings.CutPrefix(abs, string(d)+"/")
	if !ok {
		return "", "", fmt.Errorf("path %q is not in the store directory %s: %w", abs, d, ErrBadInput)
	}
	base, rest := rel, ""
	if i := strings.IndexByte(rel, '/'); i >= 0 {
		base, rest = rel[:i], rel[i:]
	}
	p, err := ParseStorePath(base)
	return p, rest, err
}

// Parse parses an absolute store path, without anything behind it.
func (d StoreDir) Parse(abs string) (StorePath, error) {
	p, rest, err := d.Split(abs)
	if err == nil && rest != "" {
		return "", fmt.Errorf("path %q lies inside a store path, want the store path itself: %w", abs, ErrBadInput)
	}
	return p, err
}

// StorePath is the base name of a store path: "<32 characters>-<name>". Values
// come from ParseStorePath and are therefore well-formed; "" means none.
type StorePath string

// ParseStorePath checks a base name against Nix's rules.
func ParseStorePath(base string) (StorePath, error) {
	bad := func(why string) (StorePath, error) {
		return "", fmt.Errorf("store path name %q: %s: %w", base, why, ErrBadInput)
	}
	if len(base) < HashPartLen+2 || base[HashPartLen] != '-' {
		return bad("want 32 hash characters, a dash and a name")
	}
	if !ValidHashPart(base[:HashPartLen]) {
		return bad("the first 32 characters are not nix-base32")
	}
	name := base[HashPartLen+1:]
	if len(name) > MaxNameLen {
		return bad(fmt.Sprintf("the name is longer than %d bytes", MaxNameLen))
	}
	if name == "." || name == ".." || strings.HasPrefix(name, ".-") || strings.HasPrefix(name, "..-") {
		return bad("the name must not be or begin with a dot component")
	}
	for i := range len(name) {
		if !nameByte(name[i]) {
			return bad(fmt.Sprintf("character %q is not allowed in a name", name[i]))
		}
	}
	return StorePath(base), nil
}

// ValidHashPart reports whether s is 32 characters of nix-base32.
func ValidHashPart(s string) bool {
	if len(s) != HashPartLen {
		return false
	}
	for i := range len(s) {
		if strings.IndexByte(base32Alphabet, s[i]) < 0 {
			return false
		}
	}
	return true
}

func nameByte(c byte) bool {
	switch {
	case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
		return true
	}
	return strings.IndexByte("+-._?=", c) >= 0
}

// HashPart is the 32 characters before the dash: the key of every index.
func (p StorePath) HashPart() string {
	if len(p) < HashPartLen {
		return ""
	}
	return string(p[:HashPartLen])
}

// Name is what stands behind the dash.
func (p StorePath) Name() string {
	if len(p) <= HashPartLen {
		return ""
	}
	return string(p[HashPartLen+1:])
}
