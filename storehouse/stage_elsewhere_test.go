package storehouse

import (
	"errors"
	"testing"

	"github.com/floxctl/flox"
)

// A NAR and its path info may come to two servers: whoever gets the path info has the
// NAR come from the other, and keeps all of it.
func TestStagedAtAnotherServer(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 2)
	at, other := h.servers[0], h.servers[1]
	p := makePath(t, "elsewhere", 3<<20)
	if _, err := at.Stage(within(t), "ci", "nar/elsewhere.nar", p.reader()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := other.Commit(within(t), "nar/nobody.nar", p.info, "ci"); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a key that nobody knows: %v", err)
	}
	if _, _, err := other.Commit(within(t), "nar/elsewhere.nar", p.info, "somebody"); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("what another publisher put somewhere: %v", err)
	}
	valid, was, err := other.Commit(within(t), "nar/elsewhere.nar", p.info, "ci")
	if err != nil || was || valid.NarHash != p.info.NarHash {
		t.Fatalf("committed at the other server: %v, valid before: %v, %v", valid, was, err)
	}
	if !whole(other, p) || !whole(at, p) {
		t.Error("not every server has all of it")
	}
}
