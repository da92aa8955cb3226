package staging

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// What was told of realisations outlives the process, each owner's beside the others';
// none takes all the room.
func TestRealisations(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, nil)
	const path, other = flox.StorePath("0123456789abcdfghijklmnpqrsvwxyz-a"), flox.StorePath("0123456789abcdfghijklmnpqrsvwxyz-b")
	id := nix.RealisationID{DrvHash: [32]byte{1}, Output: "out"}
	if s.Realises() {
		t.Error("there are some before any was told")
	}
	for owner, p := range map[uint32]flox.StorePath{Everybody: path, 7: other} {
		for _, sig := range []string{"k:a", "l:b"} {
			if err := s.Realise(owner, &nix.Realisation{ID: id, Path: p, Signatures: []string{sig}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := s.Realise(7, &nix.Realisation{ID: id, Path: path}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("told otherwise: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, nil)
	for owner, p := range map[uint32]flox.StorePath{Everybody: path, 7: other} {
		if r, err := s.Realised(owner, id); err != nil || r.Path != p || len(r.Signatures) != 2 {
			t.Errorf("of %d: %+v, %v", owner, r, err)
		}
	}
	if _, err := s.Realised(8, id); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("of nobody: %v", err)
	}
	big := &nix.Realisation{Path: path, Signatures: []string{"k:" + strings.Repeat("x", nix.MaxRealisation/2)}}
	var err error
	for i := byte(2); err == nil && i < 20; i++ {
		big.ID = nix.RealisationID{DrvHash: [32]byte{i}, Output: "out"}
		err = s.Realise(7, big)
	}
	if !errors.Is(err, flox.ErrFull) {
		t.Errorf("more than there is room for one: %v", err)
	}
	if err := s.Realise(Everybody, big); err != nil {
		t.Errorf("no room for others: %v", err)
	}
	if n, err := s.Unrealise(func(r *Realised) bool { return r.Owner == 7 && r.ID == id }); err != nil || n < 3 || fmt.Sprint(s.told) != fmt.Sprintf("map[7:%d]", s.told[7]) {
		t.Errorf("%d forgotten, %v, bytes left %v", n, err, s.told)
	}
	if err := s.Realise(7, big); err != nil {
		t.Errorf("still no room: %v", err)
	}
}
