package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	flox "github.com/floxctl/flox"
)

// What a newer version wrote is left as it is, by an agent and by its parent, and
// the refusal says which version to start. What an older one wrote is taken over.
func TestStateOfAnotherVersion(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	dir := t.TempDir()
	_, stop := runAgent(t, h, func(cfg *Config) { cfg.StateDir, cfg.Version = dir, "1.0" }, nil)
	stop()
	mark := filepath.Join(dir, "format.json")
	want := func(text string) {
		t.Helper()
		if b, err := os.ReadFile(mark); err != nil || string(b) != text {
			t.Errorf("marked %s, want %s: %v", b, text, err)
		}
	}
	want(fmt.Sprintf(`{"format":%d,"version":"1.0"}`, StateFormat))
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(mark, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for text, says := range map[string][]string{
		fmt.Sprintf(`{"format":%d,"version":"9.9"}`, StateFormat+1): {dir, `floxd "9.9"`, `this is floxd "1.0"`, "--state-dir"},
		`{`: {mark, "delete"}, `{"format":0}`: {mark, "delete"},
	} {
		write(text)
		_, err := New(Config{StateDir: dir, Socket: filepath.Join(dir, "s"), Invite: h.invite, Version: "1.0"})
		for _, err := range []error{err, CheckState(dir, "1.0")} {
			if !errors.Is(err, flox.ErrBadInput) {
				t.Fatalf("%s: %v", text, err)
			}
			for _, part := range says {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%s: %v does not say %s", text, err, part)
				}
			}
		}
		want(text)
	}
	write(`{"format":1,"version":"0.9"}`)
	_, stop = runAgent(t, h, func(cfg *Config) { cfg.StateDir, cfg.Version = dir, "1.0" }, nil)
	stop()
	want(fmt.Sprintf(`{"format":%d,"version":"1.0"}`, StateFormat))
}
