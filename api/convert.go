package api

import (
	"fmt"
	"sort"
	"time"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// maxListed bounds every list of names and signatures in a message.
const maxListed = 1 << 16

// FromPathInfo converts to the message.
func FromPathInfo(p *flox.PathInfo) *floxv1.PathInfo {
	m := &floxv1.PathInfo{
		Path:               string(p.Path),
		NarHash:            p.NarHash[:],
		NarSize:            p.NarSize,
		Deriver:            string(p.Deriver),
		Ca:                 p.CA,
		Signatures:         p.Signatures,
		Manifest:           p.Manifest[:],
		ManifestSignatures: p.ManifestSignatures,
	}
	if !p.Registered.IsZero() {
		m.RegisteredUnix = p.Registered.Unix()
	}
	for _, r := range p.References {
		m.References = append(m.References, string(r))
	}
	return m
}

// ToPathInfo converts from the message and checks everything that can be
// checked without a key: names, sizes of hashes, order. ErrBadInput.
func ToPathInfo(m *floxv1.PathInfo) (*flox.PathInfo, error) {
	path, err := flox.ParseStorePath(m.GetPath())
	if err != nil {
		return nil, err
	}
	p := &flox.PathInfo{
		Path:               path,
		NarSize:            m.GetNarSize(),
		CA:                 m.GetCa(),
		Signatures:         m.GetSignatures(),
		ManifestSignatures: m.GetManifestSignatures(),
	}
	bad := func(format string, args ...any) (*flox.PathInfo, error) {
		return nil, fmt.Errorf("path info of %s: %s: %w", path, fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	if len(m.GetNarHash()) != len(p.NarHash) {
		return bad("NAR hash of %d bytes, want %d", len(m.GetNarHash()), len(p.NarHash))
	}
	p.NarHash = [32]byte(m.GetNarHash())
	if len(m.GetManifest()) != flox.CIDSize {
		return bad("manifest CID of %d bytes, want %d", len(m.GetManifest()), flox.CIDSize)
	}
	p.Manifest = flox.CID(m.GetManifest())
	if p.NarSize == 0 {
		return bad("NAR size 0")
	}
	if len(m.GetReferences()) > maxListed || len(p.Signatures)+len(p.ManifestSignatures) > maxListed {
		return bad("more than %d references or signatures", maxListed)
	}
	if s := m.GetRegisteredUnix(); s != 0 {
		p.Registered = time.Unix(s, 0).UTC()
	}
	if d := m.GetDeriver(); d != "" {
		if p.Deriver, err = flox.ParseStorePath(d); err != nil {
			return bad("deriver: %v", err)
		}
	}
	for _, r := range m.GetReferences() {
		ref, err := flox.ParseStorePath(r)
		if err != nil {
			return bad("reference: %v", err)
		}
		p.References = append(p.References, ref)
	}
	sorted := sort.SliceIsSorted(p.References, func(i, j int) bool { return p.References[i] < p.References[j] })
	if !sorted {
		return bad("references are not sorted")
	}
	return p, nil
}
