package storehouse

import (
	"crypto/ed25519"
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

func TestClusterSecretsOpenOnlyForWhomTheyAreSealedTo(t *testing.T) {
	t.Parallel()
	machine := map[p2p.PeerID]ed25519.PrivateKey{}
	to := map[p2p.PeerID][]byte{}
	for _, peer := range []p2p.PeerID{"a", "b", "stranger"} {
		_, key, err := ed25519.GenerateKey(nil)
		if err != nil {
			t.Fatal(err)
		}
		machine[peer] = key
		_, public, err := sealKey(key)
		if err != nil {
			t.Fatal(err)
		}
		if peer != "stranger" {
			to[peer] = public[:]
		}
	}
	want := &floxv1.ClusterSecrets{NixKeys: []string{"n-1:key"}, UploadToken: "token", SwarmSecrets: [][]byte{{1}, {2}}}
	sealed, err := sealSecrets(7, want, to)
	if err != nil {
		t.Fatal(err)
	}
	for _, peer := range []p2p.PeerID{"a", "b"} {
		got, err := openSecrets(sealed, peer, machine[peer])
		if err != nil || !proto.Equal(got, want) {
			t.Errorf("%s opened %v, %v", peer, got, err)
		}
	}
	if _, err := openSecrets(sealed, "stranger", machine["stranger"]); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("a stranger: %v, want ErrDenied", err)
	}
	if _, err := openSecrets(sealed, "a", machine["stranger"]); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("another machine's key under a's name: %v, want ErrCorrupt", err)
	}
	for i := range sealed.GetBox() {
		bad := proto.CloneOf(sealed)
		bad.Box[i] ^= 1
		if _, err := openSecrets(bad, "a", machine["a"]); !errors.Is(err, flox.ErrCorrupt) {
			t.Fatalf("byte %d changed: %v, want ErrCorrupt", i, err)
		}
	}
	if _, err := sealSecrets(1, want, map[p2p.PeerID][]byte{"short": {1, 2}}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("a short key: %v", err)
	}
}

func TestKeysAreTheSameOnEveryServer(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	have, err := s.id.ring.get()
	if err != nil {
		t.Fatal(err)
	}
	there, err := parseKeys(have.message())
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(there.message(), have.message()) || there.nix[0].Public().String() != s.PublicKey() {
		t.Error("keys differ after their way through the log's form")
	}
	for _, bad := range []*floxv1.ClusterSecrets{{}, {NixKeys: []string{"x"}}, {NixKeys: have.message().GetNixKeys(), ManifestKeys: have.message().GetManifestKeys()}} {
		if _, err := parseKeys(bad); !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("%v: %v, want ErrCorrupt", bad, err)
		}
	}
}
