package ctl

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseNetrc(t *testing.T) {
	for text, want := range map[string][]login{
		"":                             nil,
		"machine a login b password c": {{"a", "b", "c"}},
		"machine a\n\tpassword c\n\tlogin b\nmachine d":           {{"a", "b", "c"}, {"d", "", ""}},
		"machine a login login password password":                 {{"a", "login", "password"}},
		"machine a account x login b password #c # machine z":     {{"a", "b", "#c"}},
		"# machine z\ndefault login b password c":                 {{"", "b", "c"}},
		"machine a login b\nmacdef m\nmachine z\n\npassword c":    {{"a", "b", "c"}},
		"machine a login macdef password machine machine d":       {{"a", "macdef", "machine"}, {"d", "", ""}},
		"login x password y machine a nonsense b login c extra d": {{"a", "c", ""}},
		"machine": nil,
	} {
		if diff := cmp.Diff(want, parseNetrc(text), cmp.AllowUnexported(login{})); diff != "" {
			t.Errorf("%q: %s", text, diff)
		}
	}
}

// Whatever a file holds, a login is of words in it.
func FuzzParseNetrc(f *testing.F) {
	f.Add("machine a login b password c\nmacdef x\n\ndefault login d")
	f.Fuzz(func(t *testing.T, text string) {
		words := map[string]bool{"": true}
		for _, w := range strings.Fields(text) {
			words[w] = true
		}
		for _, l := range parseNetrc(text) {
			if !words[l.machine] || !words[l.name] || !words[l.password] {
				t.Errorf("%q: %+v", text, l)
			}
		}
	})
}
