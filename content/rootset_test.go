package content

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/floxctl/flox"
)

func randomPath(rng *rand.Rand) flox.StorePath {
	var b strings.Builder
	for range flox.HashPartLen {
		b.WriteByte(base32[rng.IntN(len(base32))])
	}
	return flox.StorePath(b.String() + "-x")
}

// A set holds exactly what it was made of, whatever the order, and reads back.
func TestRootSetHoldsWhatItWasMadeOf(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var paths []flox.StorePath
	var want []string
	for range 500 {
		p := randomPath(rng)
		paths = append(paths, p, p)
		want = append(want, p.HashPart())
	}
	slices.Sort(want)
	s, err := MakeRootSet(paths)
	if err != nil {
		t.Fatal(err)
	}
	rng.Shuffle(len(paths), func(i, j int) { paths[i], paths[j] = paths[j], paths[i] })
	if again, err := MakeRootSet(paths); err != nil || again.ID() != s.ID() {
		t.Errorf("another order: %v", err)
	}
	parsed, err := ParseRootSet(bytes.Clone(s))
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Collect(parsed.Each); !slices.Equal(got, want) {
		t.Errorf("got %d paths, not those given", len(got))
	}
	for i := range 500 {
		if !s.Has(want[i]) {
			t.Errorf("%s is missing", want[i])
		}
		if p := randomPath(rng); s.Has(p.HashPart()) {
			t.Errorf("%s is in it", p)
		}
	}
}

// What is no set is refused.
func TestRootSetRefusesBadInput(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	s, err := MakeRootSet([]flox.StorePath{randomPath(rng), randomPath(rng)})
	if err != nil {
		t.Fatal(err)
	}
	swapped := append(bytes.Clone(s[rootSize:]), s[:rootSize]...)
	twice := append(bytes.Clone(s[:rootSize]), s[:rootSize]...)
	for name, b := range map[string][]byte{"cut": s[:len(s)-1], "out of order": swapped, "twice": twice, "too many": make([]byte, (MaxRootSet+1)*rootSize)} {
		if _, err := ParseRootSet(b); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := MakeRootSet([]flox.StorePath{"x"}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("no store path: %v", err)
	}
	many := make([]flox.StorePath, MaxRootSet+1)
	for i := range many {
		many[i] = randomPath(rng)
	}
	if _, err := MakeRootSet(many); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("too many: %v", err)
	}
}
