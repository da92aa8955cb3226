package worker

import (
	"testing"
	"time"
)

// What stock clients send by the name of a setting counts like what they send by place.
func TestOptionsFromSettings(t *testing.T) {
	for _, tt := range []struct {
		name        string
		settings    map[string]string
		timeout     time.Duration
		substitutes bool
	}{
		{"nothing", nil, 0, true},
		{"timeout", map[string]string{"timeout": "9"}, 9 * time.Second, true},
		{"timeout by its old name", map[string]string{"build-timeout": "8"}, 8 * time.Second, true},
		{"no timeout", map[string]string{"timeout": "0"}, 0, true},
		{"no number", map[string]string{"timeout": "soon"}, 0, true},
		{"no substituters", map[string]string{"substituters": ""}, 0, false},
		{"some", map[string]string{"substituters": "https://c"}, 0, true},
		{"others", map[string]string{"substituters": " ", "extra-substituters": "https://c"}, 0, true},
		{"no others", map[string]string{"extra-substituters": ""}, 0, true},
	} {
		o := Options{UseSubstitutes: true, Settings: tt.settings}
		o.fromSettings()
		if o.Timeout != tt.timeout || o.UseSubstitutes != tt.substitutes {
			t.Errorf("%s: timeout %s, substitutes %v; want %s, %v", tt.name, o.Timeout, o.UseSubstitutes, tt.timeout, tt.substitutes)
		}
	}
}
