package storehouse

import (
	"crypto/sha256"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// rotPacks flips bits all over a stopped server's packs.
func rotPacks(t *testing.T, s *Server) {
	t.Helper()
	packs, err := filepath.Glob(stateFile(s, "packs/packs/*.pack"))
	if err != nil || len(packs) == 0 {
		t.Fatalf("packs %v, %v", packs, err)
	}
	for _, f := range packs {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for at := 4096; at < len(b); at += 50_000 {
			b[at] ^= 0x10
		}
		if err := os.WriteFile(f, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// rotten is the third server of a house, the packs of which have rotted, and a path
// that is hurt.
func rotten(t *testing.T) (*Server, testPath) {
	t.Helper()
	h := newHouse(t, 3)
	p := makePath(t, "precious", 1_000_000)
	publish(t, h.servers[0], p)
	eventually(t, "the third has it", func() bool { return whole(h.servers[2], p) })
	h.stops[2]()
	rotPacks(t, h.servers[2])
	h.start(2)
	if bad(t, h.servers[2]) == 0 {
		t.Fatal("nothing is damaged: this shows nothing")
	}
	return h.servers[2], p
}

// bad counts the damaged blocks of a server.
func bad(t *testing.T, s *Server) (n int) {
	t.Helper()
	if err := s.packs.Scrub(within(t), func(flox.CID, error) { n++ }); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestRottenBlocksAreServedFromAnotherServer(t *testing.T) {
	t.Parallel()
	s, p := rotten(t)
	for _, ext := range []string{".nar", ".nar"} { // from the others, and from here again
		req, err := http.NewRequestWithContext(within(t), http.MethodGet, "http://"+s.web.Addr().String()+"/nar/"+narName(p.info)+ext, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		nar, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || sha256.Sum256(nar) != p.info.NarHash {
			t.Fatalf("%s: %d bytes of the NAR, %v", resp.Status, len(nar), err)
		}
		http.DefaultClient.CloseIdleConnections()
	}
	if n := bad(t, s); n != 0 {
		t.Errorf("%d blocks are still damaged after all of them were read", n)
	}
}

// A peer that is refused a rotten block goes elsewhere; the block is put right.
func TestRottenBlocksThatPeersAskForArePutRight(t *testing.T) {
	t.Parallel()
	s, p := rotten(t)
	info, err := s.Info(within(t), p.info.Path.HashPart())
	if err != nil {
		t.Fatal(err)
	}
	m, err := content.OpenManifest(within(t), info.Manifest, s.readable(s.packs))
	if err != nil {
		t.Fatal(err)
	}
	ids := []flox.CID{info.Manifest}
	if err := m.Blocks(within(t), func(id flox.CID, _ uint32) bool { ids = append(ids, id); return true }); err != nil {
		t.Fatal(err)
	}
	for i, id := range ids { // some are refused
		if i%2 == 0 {
			_, _ = held{s.packs, s.mender}.Get(within(t), id)
		} else {
			_, _, _, _ = held{s.packs, s.mender}.Packed(within(t), id)
		}
	}
	eventually(t, "all is whole again", func() bool { return bad(t, s) == 0 })
}
