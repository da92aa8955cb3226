package storehouse

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox"
)

// A note with any bit flipped, or cut short anywhere but before its sum, is told from a
// whole one, and never read as something else.
func TestNotesAreWholeOrDamaged(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "note.json")
	var got placedMark
	if err := readNote(path, &got); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	want := placedMark{4711}
	if err := writeNote(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, at int, b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		got = placedMark{}
		if err := readNote(path, &got); !errors.Is(err, flox.ErrCorrupt) && (err != nil || got != want) {
			t.Errorf("%s at %d: %v, %v", what, at, got, err)
		}
	}
	for at := range whole {
		for bit := range 8 {
			b := append([]byte(nil), whole...)
			b[at] ^= 1 << bit
			check("flip", at, b)
		}
		check("cut", at, whole[:at])
	}
	check("whole", 0, whole)
	if got != want {
		t.Error(got)
	}
	check("an older version's", 0, []byte("{\"index\":4711}\n"))
	if got != want {
		t.Error(got)
	}
}
