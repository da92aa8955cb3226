// Package nix speaks Nix's own formats: store path hashes, derivations, NAR archives and
// their listings, narinfo files, keys and signatures, and the compressions a
// binary cache uses.
//
// Everything here is a pure function of bytes, or streams between an
// io.Reader, an io.Writer and a directory. It must not know about manifests,
// chunks, networks or who asks. What it parses comes from strangers: lengths
// are checked before memory is taken, nesting never uses the stack, and what
// is accepted encodes back to the same bytes.
package nix
