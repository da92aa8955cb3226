package need

import (
	"testing"
)

// recorder is a testing.TB that notes how the test was stopped.
type recorder struct {
	testing.TB
	outcome string
}

func (r *recorder) Helper()      {}
func (r *recorder) Fatal(...any) { r.outcome = "failed" }
func (r *recorder) Skip(...any)  { r.outcome = "skipped" }

func TestMissingFailsUnderCI(t *testing.T) {
	tests := []struct{ ci, command, want string }{
		{"", "no-such-program", "skipped"},
		{"false", "no-such-program", "skipped"},
		{"true", "no-such-program", "failed"},
		{"true", "go", ""},
	}
	for _, tt := range tests {
		t.Setenv("CI", tt.ci)
		r := &recorder{TB: t}
		Command(r, tt.command)
		if r.outcome != tt.want {
			t.Errorf("CI=%q, %s: got %q, want %q", tt.ci, tt.command, r.outcome, tt.want)
		}
	}
}
