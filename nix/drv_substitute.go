package nix

import "encoding/json"

// AllowsSubstitutes reports whether outputs of a derivation may come from caches: its
// attribute allowSubstitutes, which is true where it is not set (Nix 2.8
// src/libstore/parsed-derivations.cc).
func (d *Derivation) AllowsSubstitutes() bool {
	const attribute = "allowSubstitutes"
	if text, structured := d.Env["__json"]; structured {
		var attrs map[string]json.RawMessage
		if json.Unmarshal([]byte(text), &attrs) != nil {
			return true
		}
		return string(attrs[attribute]) != "false"
	}
	value, set := d.Env[attribute]
	return !set || value == "1"
}
