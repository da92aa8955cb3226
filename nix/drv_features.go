package nix

import (
	"encoding/json"
	"strings"
)

// RequiredFeatures are the features that whoever builds a derivation must have: its
// attribute requiredSystemFeatures (Nix 2.8 src/libstore/parsed-derivations.cc).
func (d *Derivation) RequiredFeatures() (features []string) {
	const attribute = "requiredSystemFeatures"
	if text, structured := d.Env["__json"]; structured {
		var attrs map[string]json.RawMessage
		if json.Unmarshal([]byte(text), &attrs) != nil || json.Unmarshal(attrs[attribute], &features) != nil {
			return nil
		}
		return features
	}
	return strings.Fields(d.Env[attribute])
}
