package nix

import "testing"

func TestAllowsSubstitutes(t *testing.T) {
	for _, tt := range []struct {
		env  map[string]string
		want bool
	}{
		{nil, true},
		{map[string]string{"allowSubstitutes": "1"}, true},
		{map[string]string{"allowSubstitutes": ""}, false},
		{map[string]string{"__json": `{"name":"x"}`}, true},
		{map[string]string{"__json": `{"allowSubstitutes":false}`}, false},
		{map[string]string{"__json": `{"allowSubstitutes":true}`, "allowSubstitutes": ""}, true},
		{map[string]string{"__json": `{`}, true},
	} {
		if got := (&Derivation{Env: tt.env}).AllowsSubstitutes(); got != tt.want {
			t.Errorf("%v: %v", tt.env, got)
		}
	}
}
