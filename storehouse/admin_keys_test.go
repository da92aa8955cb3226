package storehouse

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/nix"
)

// soonSigned has signing wait for nobody.
func soonSigned(c *Config) { c.signSettle = 10 * time.Millisecond }

// rotateAt rotates at a server.
func rotateAt(t *testing.T, s *Server, use string, overlap time.Duration) *floxv1.RotateKeysResponse {
	t.Helper()
	out, err := newAdmin(s, t.Context()).rotateKeys(within(t), &floxv1.Actor{User: "test"}, &floxv1.RotateKeysRequest{Use: use, OverlapSeconds: uint64(overlap / time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// keysAt lists the public keys of a use at a server.
func keysAt(t *testing.T, s *Server, use string) (list []string) {
	t.Helper()
	out, err := s.listKeys(within(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range out.GetKeys() {
		if k.GetUse() == use {
			list = append(list, k.GetPublic())
		}
	}
	return list
}

// factsOf gives the facts of a valid path.
func factsOf(t *testing.T, s *Server, p testPath) *flox.PathInfo {
	t.Helper()
	info, err := s.Info(within(t), p.info.Path.HashPart())
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// nixSigned reports whether a public key signed a path for stock Nix.
func nixSigned(t *testing.T, s *Server, p testPath, public string) bool {
	t.Helper()
	key, err := nix.ParsePublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	info := factsOf(t, s, p)
	_, ok := nix.NewKeyRing(key).Verify([]byte(nix.Fingerprint(s.cfg.StoreDir, info)), info.Signatures)
	return ok
}

// chain gives all trust lists, of which each has to follow the one before.
func chain(t *testing.T, s *Server) (lists []*content.TrustList) {
	t.Helper()
	all, err := s.trustLists(within(t), 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range all {
		list, err := content.ParseTrustList(b)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(lists); n > 0 {
			if err := content.Newer(lists[n-1], list); err != nil {
				t.Errorf("who is at version %d: %v", lists[n-1].Version, err)
			}
		}
		lists = append(lists, list)
	}
	return lists
}

// Old and new keys hold together, everything valid is signed by the new ones, and
// then the old ones go: for readers who kept up, were away, or know one key only.
func TestKeysAreReplacedWithAnOverlap(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	soonSigned(&cfg)
	s, _ := start(t, cfg)
	before := makePath(t, "before", 1000)
	publish(t, s, before)
	oldNix, oldManifest := keysAt(t, s, useNix)[0], keysAt(t, s, useManifest)[0]
	first := newest(t, s)

	made := rotateAt(t, s, "", time.Hour).GetMade()
	if len(made) != 4 || !strings.HasPrefix(made[0], "nix test-2:") || !strings.HasPrefix(made[1], "manifest test-3:") || made[2] != "swarm" || made[3] != "cluster" {
		t.Fatalf("made %v", made)
	}
	newNix := strings.TrimPrefix(made[0], "nix ")
	if s.PublicKey() != newNix {
		t.Errorf("new readers are told %s", s.PublicKey())
	}
	during := makePath(t, "during", 1000)
	publish(t, s, during)
	both := newest(t, s)
	if len(both.NixKeys) != 2 || len(both.ManifestKeys) != 2 {
		t.Fatalf("the list of the overlap trusts %v and %v", both.NixKeys, both.ManifestKeys)
	}
	eventually(t, "what was valid is signed with the new key", func() bool { return nixSigned(t, s, before, newNix) })
	for _, p := range []testPath{before, during} {
		for _, public := range []string{oldNix, newNix} {
			if !nixSigned(t, s, p, public) {
				t.Errorf("%s is not signed with %s", p.info.Path, public)
			}
		}
		for _, list := range []*content.TrustList{first, both} { // who has not heard of the rotation, and who has
			if err := list.VerifyInfo(s.cfg.StoreDir, factsOf(t, s, p)); err != nil {
				t.Error(err)
			}
		}
	}
	if secrets := s.id.ring.secrets(); len(secrets) != 2 {
		t.Errorf("members may prove %d secrets", len(secrets))
	}

	// A second rotation shortens what is under way.
	rotateAt(t, s, "", time.Second)
	eventually(t, "what was replaced is gone", func() bool {
		return len(keysAt(t, s, useNix)) == 1 && len(keysAt(t, s, useManifest)) == 1 && len(s.id.ring.secrets()) == 1
	})
	last := newest(t, s)
	if slices.Contains(last.ManifestKeys, oldManifest) || slices.Contains(last.NixKeys, oldNix) {
		t.Error("a retired key is trusted still")
	}
	eventually(t, "the signing is over", func() bool { return !s.id.ring.now.Load().all.GetUnsigned() })
	for _, p := range []testPath{before, during} {
		if err := last.VerifyInfo(s.cfg.StoreDir, factsOf(t, s, p)); err != nil {
			t.Error(err)
		}
		if !nixSigned(t, s, p, s.PublicKey()) {
			t.Errorf("%s is not signed with the newest key", p.info.Path)
		}
		if !nixSigned(t, s, p, oldNix) {
			t.Errorf("%s cannot be read any more by who knows the first key only", p.info.Path)
		}
	}
	// Who was away over both walks there, and no retired key leads anywhere.
	lists := chain(t, s)
	if lists[0].Version != 1 || len(lists) < 4 {
		t.Fatalf("the chain has %d lists", len(lists))
	}
	if err := content.Newer(first, last); !errors.Is(err, flox.ErrUntrusted) {
		t.Errorf("a list behind a gap: %v", err)
	}
}

// When a key retires is known to whoever leads then, and to a server that starts again.
func TestRetirementIsNotForgotten(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3, soonSigned)
	p := makePath(t, "kept", 1000)
	publish(t, h.servers[0], p)
	old := keysAt(t, h.servers[0], useManifest)
	eventually(t, "the third server has the keys", func() bool { _, _, err := h.servers[2].keysInForce(); return err == nil })
	rotateAt(t, h.servers[2], useManifest, 2*time.Second) // whoever is asked
	if got := keysAt(t, h.servers[2], useManifest); len(got) != 2 || got[1] != old[0] {
		t.Errorf("keys %v, want the new one and %v", got, old)
	}
	h.stops[0]() // it led
	eventually(t, "the next leader retires the key", func() bool {
		got := keysAt(t, h.servers[1], useManifest)
		return len(got) == 1 && got[0] != old[0]
	})
	eventually(t, "the path is verified by the new key", func() bool {
		return newest(t, h.servers[1]).VerifyInfo(h.servers[1].cfg.StoreDir, factsOf(t, h.servers[1], p)) == nil
	})
	chain(t, h.servers[1])
	h.start(0) // it was away over all of it
	if got := keysAt(t, h.servers[0], useManifest); len(got) != 1 || got[0] == old[0] {
		t.Errorf("the server that was away signs with %v", got)
	}
	publish(t, h.servers[0], makePath(t, "back", 1000))
}

func TestRotationsAtOnceLoseNoKey(t *testing.T) {
	t.Parallel()
	h := newHouse(t, 3)
	var group sync.WaitGroup
	made := make([]string, 3)
	for i, s := range h.servers {
		eventually(t, "the server has the keys", func() bool { _, _, err := s.keysInForce(); return err == nil })
		group.Go(func() {
			out, err := newAdmin(s, t.Context()).rotateKeys(within(t), &floxv1.Actor{User: "test"}, &floxv1.RotateKeysRequest{Use: useNix})
			if err != nil {
				t.Error(err)
				return
			}
			made[i] = strings.TrimPrefix(out.GetMade()[0], "nix ")
		})
	}
	group.Wait()
	for i, s := range h.servers {
		eventually(t, "every server has all keys", func() bool { return len(keysAt(t, s, useNix)) == 4 })
		for _, key := range made {
			if !slices.Contains(keysAt(t, s, useNix), key) {
				t.Errorf("server %d does not sign with %s", i, key)
			}
		}
	}
	list := newest(t, h.servers[0])
	if len(list.NixKeys) != 4 {
		t.Errorf("the list trusts %v", list.NixKeys)
	}
	_, err := newAdmin(h.servers[0], t.Context()).rotateKeys(within(t), &floxv1.Actor{}, &floxv1.RotateKeysRequest{Use: useNix})
	if !errors.Is(err, flox.ErrBusy) {
		t.Errorf("one more: %v, want ErrBusy", err)
	}
}

func TestPublishersGoOnWhenTheTokenIsReplaced(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	old := uploadToken(t, s)
	rotateAt(t, s, useToken, time.Hour)
	eventually(t, "the file holds the new token", func() bool { return uploadToken(t, s) != old })
	second := uploadToken(t, s)
	for _, token := range []string{old, second} {
		if _, err := s.CheckToken(token); err != nil {
			t.Errorf("during the overlap: %v", err)
		}
	}
	rotateAt(t, s, useToken, time.Second) // which shortens the overlap under way
	eventually(t, "the file holds the newest token", func() bool { return uploadToken(t, s) != second })
	eventually(t, "the old token is refused", func() bool {
		_, err := s.CheckToken(old)
		return errors.Is(err, flox.ErrDenied)
	})
	if _, err := s.CheckToken(uploadToken(t, s)); err != nil {
		t.Errorf("behind the overlap: %v", err)
	}
	eventually(t, "it is forgotten", func() bool { return len(s.id.ring.now.Load().all.GetOldTokens()) == 0 })
}

// Members hear of a new secret on the stream they have open, and new ones get it.
func TestMembersHearOfANewSwarmSecret(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, soonSigned)
	eventually(t, "the keys are sealed", func() bool { return s.sealed.Load() > 0 })
	laptop := newComputer(t)
	joined, err := laptop.join(s, makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent}), "laptop")
	if err != nil {
		t.Fatal(err)
	}
	keep, err := api.ParseInvite(joined.GetInvite())
	if err != nil {
		t.Fatal(err)
	}
	laptop.online(s, keep.Secret)
	stream, err := floxv1connect.NewMembershipClient(laptop.web(s), "http://storehouse").WatchMembers(within(t), connect.NewRequest(&floxv1.WatchMembersRequest{}))
	if err != nil || !stream.Receive() {
		t.Fatalf("watch: %v", err)
	}
	req := connect.NewRequest(&floxv1.RotateKeysRequest{Use: useSwarm})
	req.Header().Set(UserHeader, "alice")
	remote := floxv1connect.NewAdminClient(laptop.web(s), "http://storehouse")
	if _, err := remote.RotateKeys(within(t), req); !errors.Is(api.FromConnect(err), flox.ErrDenied) {
		t.Errorf("a member that is no admin rotated keys: %v", err)
	}
	if _, err := remote.ListKeys(within(t), connect.NewRequest(&floxv1.ListKeysRequest{})); err != nil {
		t.Errorf("a member may not list keys: %v", err)
	}
	if _, err := admin.RotateKeys(within(t), req); err != nil {
		t.Fatal(err)
	}
	var heard [][]byte
	for len(heard) < 2 && stream.Receive() {
		heard = stream.Msg().GetSwarmSecrets()
	}
	if len(heard) != 2 || string(heard[1]) != string(keep.Secret) || string(heard[0]) == string(keep.Secret) {
		t.Errorf("the stream told of %d secrets, want the new one before the old: %v", len(heard), stream.Err())
	}
	eventually(t, "the invite file has the new one", func() bool {
		inv, err := api.LoadInvite(stateFile(s, "invite.json"))
		return err == nil && string(inv.Secret) == string(heard[0])
	})
	want := "!key.rotate keys.seal key.rotate"
	if got := strings.Join(auditOf(t, admin, &floxv1.AuditRequest{Limit: 3}), " "); got != want {
		t.Errorf("the audit log ends with %q, want %q", got, want)
	}
}

func TestBadKeysAreNotImportedAndNotShown(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, nil)
	good, err := nix.GenerateKey("cache.example.org-1")
	if err != nil {
		t.Fatal(err)
	}
	other, err := nix.GenerateKey("test-1") // a name that is ours
	if err != nil {
		t.Fatal(err)
	}
	text := good.String()
	for name, c := range map[string]struct {
		key  string
		want error
	}{
		"cut":           {text[:len(text)-8], flox.ErrBadInput},
		"wrong half":    {text[:len(text)-12] + "AAAAAAAAAA==", flox.ErrBadInput},
		"a public key":  {good.Public().String(), flox.ErrBadInput},
		"no key at all": {"", flox.ErrBadInput},
		"our name":      {other.String(), flox.ErrBusy},
	} {
		_, err := admin.ImportKey(within(t), connect.NewRequest(&floxv1.ImportKeyRequest{SecretKey: c.key}))
		if err = api.FromConnect(err); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
			continue
		}
		if _, secret, _ := strings.Cut(c.key, ":"); secret != "" && strings.Contains(err.Error(), secret[:16]) {
			t.Errorf("%s: the answer shows the key: %v", name, err)
		}
	}
	if got := keysAt(t, s, useNix); len(got) != 1 {
		t.Errorf("keys %v", got)
	}
	for range 2 { // told twice
		if _, err := admin.ImportKey(within(t), connect.NewRequest(&floxv1.ImportKeyRequest{SecretKey: text})); err != nil {
			t.Fatal(err)
		}
	}
	if got := keysAt(t, s, useNix); len(got) != 2 || got[1] != good.Public().String() || s.PublicKey() != got[0] {
		t.Errorf("keys %v, new readers are told %s", got, s.PublicKey())
	}
	if b, err := os.ReadFile(stateFile(s, "invite.json")); err != nil || strings.Contains(string(b), text) {
		t.Errorf("invite.json: %v, or it shows the key", err)
	}
	// It stays when our own is replaced, and goes when it is told to.
	rotateAt(t, s, useNix, time.Hour)
	out, err := s.listKeys(within(t))
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(out.GetKeys(), func(k *floxv1.KeyState) bool { return k.GetPublic() == good.Public().String() })
	if i < 0 || !out.GetKeys()[i].GetImported() || out.GetKeys()[i].GetRetiresUnix() != 0 {
		t.Errorf("the imported key is %v", out.GetKeys())
	}
	rotateAt(t, s, useImported, time.Hour)
	if out, err = s.listKeys(within(t)); err != nil || out.GetKeys()[i].GetRetiresUnix() == 0 {
		t.Errorf("the imported key does not go: %v, %v", out, err)
	}
}

// Users of a cache whose key was imported go on with the public key they have.
func TestNixReadsWithAnImportedKey(t *testing.T) {
	t.Parallel()
	n, s := nixAndServer(t)
	app := n.build("imported", small)
	n.run("nix", "copy", "--to", cacheURL(s)+"?compression=zstd", app)
	key, err := nix.GenerateKey("cache.example.org-1")
	if err != nil {
		t.Fatal(err)
	}
	reader := func() *stockNix { // which has not asked yet
		r := newNix(t, n.storeDir)
		r.configure("substituters = " + cacheURL(s) + "\ntrusted-public-keys = " + key.Public().String() + "\n")
		return r
	}
	reader().refused([]string{"lacks a valid signature"}, "nix", "copy", "--from", cacheURL(s), app)
	if err := importNow(s, key); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what is valid already is signed with it", func() bool {
		info, err := s.Info(within(t), flox.StorePath(filepath.Base(app)).HashPart())
		if err != nil {
			t.Fatal(err)
		}
		return slices.Contains(info.Signatures, key.Sign([]byte(nix.Fingerprint(s.cfg.StoreDir, info))))
	})
	r := reader()
	r.run("nix", "copy", "--from", cacheURL(s), app)
	after := n.build("after", small)
	n.run("nix", "copy", "--to", cacheURL(s)+"?compression=zstd", after)
	r.run("nix", "copy", "--from", cacheURL(s), after)
	r.run("nix-store", "--verify", "--check-contents")
}

func importNow(s *Server, key nix.SecretKey) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := s.changeKeys(ctx, s.actor(), func(k *floxv1.ClusterSecrets) error { return importKey(k, key) })
	if err == nil {
		_, err = s.settleTrust(ctx)
	}
	return err
}

// Signatures replace those of exactly the path they were made for.
func TestSignaturesOfAnotherPathAreIgnored(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	p := makePath(t, "signed", 1000)
	info := publish(t, s, p)
	sigs := &floxv1.PathSignatures{Path: string(info.Path), NarHash: info.NarHash[:], Manifest: info.Manifest[:], Signatures: []string{"a:1"}, ManifestSignatures: []string{"b:2"}}
	enter := func(change func(*floxv1.PathSignatures)) ([]uint32, error) {
		one := &floxv1.PathSignatures{Path: sigs.GetPath(), NarHash: sigs.GetNarHash(), Manifest: sigs.GetManifest(), Signatures: sigs.GetSignatures(), ManifestSignatures: sigs.GetManifestSignatures()}
		change(one)
		reply, err := propose(within(t), s.node.NewSession(), &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Sign{Sign: &floxv1.SignPaths{Paths: []*floxv1.PathSignatures{one}}}})
		return reply.GetDone(), err
	}
	for name, change := range map[string]func(*floxv1.PathSignatures){
		"another NAR":      func(s *floxv1.PathSignatures) { s.NarHash = make([]byte, 32) },
		"another manifest": func(s *floxv1.PathSignatures) { s.Manifest = make([]byte, 32) },
		"not valid":        func(s *floxv1.PathSignatures) { s.Path = "0" + s.GetPath()[1:] },
	} {
		if done, err := enter(change); err != nil || len(done) > 0 {
			t.Errorf("%s: %v, %v", name, done, err)
		}
	}
	for name, change := range map[string]func(*floxv1.PathSignatures){
		"no statement":  func(s *floxv1.PathSignatures) { s.ManifestSignatures = nil },
		"an empty one":  func(s *floxv1.PathSignatures) { s.Signatures = []string{""} },
		"too many":      func(s *floxv1.PathSignatures) { s.Signatures = slices.Repeat([]string{"a:1"}, maxKeptSigs+1) },
		"no store path": func(s *floxv1.PathSignatures) { s.Path = "x" },
	} {
		if _, err := enter(change); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v, want ErrBadInput", name, err)
		}
	}
	checkWhole(t, s, p)
	if done, err := enter(func(*floxv1.PathSignatures) {}); err != nil || len(done) != 1 {
		t.Fatalf("%v, %v", done, err)
	}
	if got := factsOf(t, s, p); !slices.Equal(got.Signatures, sigs.GetSignatures()) || !slices.Equal(got.ManifestSignatures, sigs.GetManifestSignatures()) {
		t.Errorf("signed %v and %v", got.Signatures, got.ManifestSignatures)
	}
}
