package p2p

import (
	"encoding/hex"
	"fmt"
	"testing"

	"github.com/floxctl/flox"
)

// Machines of different versions compute the same of the same input: where a filter has a
// block's bits, and what proves a member, a guest and a bare key. These are never changed:
// a proof or a filter that means something else needs a version of its own.
func TestGoldenValues(t *testing.T) {
	t.Parallel()
	f := newFilter(0)
	var id flox.CID
	for i := range id {
		id[i] = byte(37 * i)
	}
	f.add(keyOf(id))
	bits := ""
	for i, w := range f.words {
		if w != 0 {
			bits += fmt.Sprintf("%d:%x ", i, w)
		}
	}
	if want := goldenBits; bits != want {
		t.Errorf("the filter of %d words has %q, want %q", len(f.words), bits, want)
	}
	p := &proving{dialer: "dialer", listener: "listener", dialed: [nonceSize]byte{1}, accepted: [nonceSize]byte{2}, channel: []byte("channel"), claims: []string{"invite", "protocol"}}
	for _, purpose := range []string{memberProof, guestProof, keyProof} {
		want := goldenProofs[purpose]
		if got := hex.EncodeToString(p.mac("dialer", keysOf(purpose, []byte("secret"))[0])); got != want {
			t.Errorf("the proof of %q is %s, want %s", purpose, got, want)
		}
	}
}

const goldenBits = "8:80000008000000 10:100000000000 12:14000000000 14:40000 15:10000000 "

var goldenProofs = map[string]string{ // in the words that keys are derived with
	"flox 2026-01 membership proof":   "2e7f088211543b052528ddb44063e59c580c22421d1c822628af47864224f90e",
	"flox 2026-01 guest proof":        "e43c9c7f57dc185e6eb0e1ee23b99d636b13ed5e7b8f5cea7c6cd702dc937a01",
	"flox 2026-11 proof by key alone": "b62c18b6027099fe80ce154a63b86d4772e0748fa3ccd33e08e6dec05af0444a",
}
