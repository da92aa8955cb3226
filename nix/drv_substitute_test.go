package nix

import (
	"slices"
	"testing"
)

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

func TestRequiredFeatures(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		env  map[string]string
		want []string
	}{
		{map[string]string{}, nil},
		{map[string]string{"requiredSystemFeatures": "kvm big-parallel"}, []string{"kvm", "big-parallel"}},
		{map[string]string{"__json": `{"requiredSystemFeatures":["kvm"]}`, "requiredSystemFeatures": "other"}, []string{"kvm"}},
		{map[string]string{"__json": `{`}, nil},
	} {
		if got := (&Derivation{Env: c.env}).RequiredFeatures(); !slices.Equal(got, c.want) {
			t.Errorf("%v: %q, want %q", c.env, got, c.want)
		}
	}
}
