package nix

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/floxctl/flox"
)

// MaxRealisation is the most bytes of a realisation that are read.
const MaxRealisation = 1 << 20

// RealisationID names an output of a derivation by the derivation's hash
// (HashModulo with mask true).
type RealisationID struct {
	DrvHash [32]byte
	Output  string
}

// ParseRealisationID parses "sha256:<hex>!<output>". The error is ErrBadInput.
func ParseRealisationID(s string) (RealisationID, error) {
	hash, output, ok := strings.Cut(s, "!")
	h, err := ParseHash(hash, "")
	if !ok || err != nil || h.Algo != SHA256 || !validOutputName(output) {
		return RealisationID{}, fmt.Errorf("derivation output %s: want sha256:<64 hex digits>!<output name>: %w", quote(s), flox.ErrBadInput)
	}
	return RealisationID{DrvHash: [32]byte(h.Sum), Output: output}, nil
}

// validOutputName says whether a name can stand in the name of a store path.
func validOutputName(s string) bool {
	_, err := flox.ParseStorePath(strings.Repeat("0", flox.HashPartLen) + "-a-" + s)
	return s != "" && err == nil
}

// String gives the form ParseRealisationID reads.
func (id RealisationID) String() string {
	return "sha256:" + hex.EncodeToString(id.DrvHash[:]) + "!" + id.Output
}

// Realisation says which path an output of a content-addressed derivation got,
// in the form of protocol 1.31 (Nix 2.8 src/libstore/realisation.cc).
type Realisation struct {
	ID         RealisationID
	Path       flox.StorePath
	Signatures []string // over Fingerprint, each "keyname:base64"; sorted
	// Dependencies are the realisations of inputs it was made with.
	Dependencies map[RealisationID]flox.StorePath
}

// realisationJSON has its fields in the order Nix writes them: by name.
type realisationJSON struct {
	Dependencies map[string]string `json:"dependentRealisations"`
	ID           string            `json:"id"`
	OutPath      string            `json:"outPath"`
	Signatures   *[]string         `json:"signatures,omitempty"`
}

// ParseRealisation parses the JSON form. The error is ErrBadInput.
func ParseRealisation(b []byte) (*Realisation, error) {
	bad := func(err error) (*Realisation, error) {
		return nil, fmt.Errorf("realisation %s: %w: %w", quote(b), err, flox.ErrBadInput)
	}
	if len(b) > MaxRealisation {
		return bad(fmt.Errorf("%d bytes, at most %d are read", len(b), MaxRealisation))
	}
	var m realisationJSON
	if err := json.Unmarshal(b, &m); err != nil {
		return bad(err)
	}
	r := &Realisation{}
	var err error
	if r.ID, err = ParseRealisationID(m.ID); err != nil {
		return bad(err)
	}
	if r.Path, err = flox.ParseStorePath(m.OutPath); err != nil {
		return bad(err)
	}
	if m.Signatures != nil {
		r.Signatures = *m.Signatures
	}
	if len(r.Signatures) > MaxSignatures {
		return bad(fmt.Errorf("more than %d signatures", MaxSignatures))
	}
	slices.Sort(r.Signatures)
	r.Signatures = slices.Compact(r.Signatures)
	for key, path := range m.Dependencies {
		id, err := ParseRealisationID(key)
		if err != nil {
			return bad(err)
		}
		p, err := flox.ParseStorePath(path)
		if err != nil {
			return bad(err)
		}
		if r.Dependencies == nil {
			r.Dependencies = make(map[RealisationID]flox.StorePath)
		}
		r.Dependencies[id] = p
	}
	return r, nil
}

// Marshal gives the JSON form, as Nix writes it.
func (r *Realisation) Marshal() []byte {
	sigs := slices.Sorted(slices.Values(r.Signatures))
	if sigs == nil {
		sigs = []string{}
	}
	return r.marshal(&sigs)
}

// Fingerprint is what a realisation's signatures are over.
func (r *Realisation) Fingerprint() string { return string(r.marshal(nil)) }

func (r *Realisation) marshal(sigs *[]string) []byte {
	m := realisationJSON{ID: r.ID.String(), OutPath: string(r.Path), Dependencies: map[string]string{}, Signatures: sigs}
	for _, id := range slices.Collect(maps.Keys(r.Dependencies)) {
		m.Dependencies[id.String()] = string(r.Dependencies[id])
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(m); err != nil {
		panic(err) // strings only
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}
