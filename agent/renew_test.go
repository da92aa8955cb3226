package agent

import (
	"slices"
	"testing"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
)

// What an agent tells others while the storehouse is away has to be signed with a
// key that they trust: known facts are asked for again when their key has retired.
func TestFactsSignedWithARetiredKeyAreRenewed(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var infos []*flox.PathInfo
	for _, name := range []string{"one", "two"} {
		infos = append(infos, h.make(t, name, nil, testFile{name: "f", data: []byte(name)}))
	}
	gone := h.make(t, "gone", nil, testFile{name: "f", data: []byte("x")}) // not valid any more
	a, _ := runAgent(t, h, nil, func(a *Agent) {
		if err := a.facts.put(append(slices.Clone(infos), gone)...); err != nil {
			t.Fatal(err)
		}
	})
	following(t, a)
	a.facts.mu.RLock()
	first := a.facts.trust
	a.facts.mu.RUnlock()
	next := testKey(t, "next-1")
	both, b2 := trustList(t, first, h.key, h.key, next)
	last, b3 := trustList(t, both, next, next)
	h.set(func() {
		h.lists = append(h.lists, b2, b3)
		for _, info := range infos {
			signed := *info
			sign(&signed, next)
			h.infos[info.Path.HashPart()] = api.FromPathInfo(&signed)
		}
	})
	h.endStreams()
	until(t, "known facts are signed with the new key", func() bool {
		return !slices.ContainsFunc(infos, func(info *flox.PathInfo) bool {
			known, ok := a.facts.get(info.Path.HashPart())
			return !ok || last.VerifyInfo(testStore, known) != nil
		})
	})
	if _, ok := a.facts.get(gone.Path.HashPart()); !ok {
		t.Error("a path nobody said is gone was forgotten")
	}
}
