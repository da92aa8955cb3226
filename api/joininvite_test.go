package api

import (
	"bytes"
	"encoding/base64"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
)

func joinInvite() *JoinInvite {
	return &JoinInvite{
		ID: "7F3KQ2WX5M", Secret: bytes.Repeat([]byte{7}, 32), Role: "agent", Name: "s1",
		Storehouse: []InvitePeer{{ID: "12D3KooWA", Addrs: []string{"10.0.0.1:7781", "/dns4/s1.example/tcp/7781"}}},
		TrustList:  flox.CID{1, 0x55, 0x1e, 0x20, 9}, StoreDir: flox.DefaultStoreDir, Expires: time.Unix(1_800_000_000, 0).UTC(),
	}
}

func encoded(t testing.TB, j *JoinInvite) string {
	t.Helper()
	text, err := j.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestJoinInviteSurvivesAPaste(t *testing.T) {
	lan := joinInvite()
	lan.LAN, lan.Secret = true, nil
	for _, j := range []*JoinInvite{joinInvite(), lan} {
		text := encoded(t, j)
		if strings.ContainsAny(text, " \n+/=") {
			t.Errorf("%s is not one word that can be pasted anywhere", text)
		}
		for _, pasted := range []string{text, " " + text + "\r\n", text[:40] + "\n" + text[40:80] + "\r\n  " + text[80:]} {
			got, err := ParseJoinInvite(pasted)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(j, got); diff != "" {
				t.Error(diff)
			}
		}
	}
}

// TestEveryCutOfAJoinInviteIsToldApart cuts it anywhere, and changes every
// character of it.
func TestEveryCutOfAJoinInviteIsToldApart(t *testing.T) {
	text := encoded(t, joinInvite())
	for n := len(joinPrefix); n < len(text); n++ {
		_, err := ParseJoinInvite(text[:n])
		if !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "end is missing") {
			t.Fatalf("cut to %d of %d: %v", n, len(text), err)
		}
	}
	for n := range text {
		changed := []byte(text)
		if changed[n]++; changed[n] == '[' || changed[n] == '{' || changed[n] == ':' {
			changed[n] = '0'
		}
		if _, err := ParseJoinInvite(string(changed)); !errors.Is(err, flox.ErrBadInput) {
			t.Fatalf("character %d changed: %v", n, err)
		}
	}
}

func TestWhatIsNoJoinInvite(t *testing.T) {
	text := encoded(t, joinInvite())
	for _, tt := range []struct{ name, text, want string }{
		{"empty", "", "nothing of it"},
		{"something else", "ssh-ed25519 AAAA", `begins with "ssh-e"`},
		{"twice", text + text, "behind its end"},
		{"foreign character", text[:20] + "*" + text[21:], "no invite has"},
		{"huge", strings.Repeat("x", 1<<20), "more than any invite has"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseJoinInvite(tt.text)
			if !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			if err != nil && len(err.Error()) > 300 {
				t.Errorf("an error of %d characters", len(err.Error()))
			}
		})
	}
}

func TestJoinInvitesThatLackSomething(t *testing.T) {
	for name, spoil := range map[string]func(*JoinInvite){
		"ID":         func(j *JoinInvite) { j.ID = "x" },
		"secret":     func(j *JoinInvite) { j.Secret = j.Secret[:15] },
		"lan":        func(j *JoinInvite) { j.LAN = true },
		"role":       func(j *JoinInvite) { j.Role = "admin" },
		"name":       func(j *JoinInvite) { j.Name = "" },
		"servers":    func(j *JoinInvite) { j.Storehouse = nil },
		"addresses":  func(j *JoinInvite) { j.Storehouse[0].Addrs = nil },
		"trust list": func(j *JoinInvite) { j.TrustList = flox.CID{} },
		"expiry":     func(j *JoinInvite) { j.Expires = time.Time{} },
		"store":      func(j *JoinInvite) { j.StoreDir = "nix/store" },
	} {
		j := joinInvite()
		spoil(j)
		if _, err := j.Encode(); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("without a good %s: %v", name, err)
		}
	}
}

func TestInviteProofHidesTheSecret(t *testing.T) {
	j := joinInvite()
	proof, err := j.Proof()
	if err != nil || len(proof) != 32 || bytes.Contains(proof, j.Secret[:8]) {
		t.Fatalf("proof %x: %v", proof, err)
	}
	other, err := InviteProof("another-id", j.Secret)
	if err != nil || bytes.Equal(proof, other) {
		t.Errorf("two invites with one secret have one proof: %v", err)
	}
	if _, err := InviteProof("some-id-1", nil); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("without a secret: %v", err)
	}
}

func FuzzParseJoinInvite(f *testing.F) {
	f.Add(encoded(f, joinInvite()))
	f.Add("flox1")
	f.Add("flox1" + base64.RawURLEncoding.EncodeToString([]byte("\x00\x02\x44\x13\x6f\xa3{}")))
	f.Fuzz(func(t *testing.T, text string) {
		j, err := ParseJoinInvite(text)
		if err != nil {
			if !errors.Is(err, flox.ErrBadInput) {
				t.Fatalf("%v is not ErrBadInput", err)
			}
			return
		}
		if again := encoded(t, j); again != strings.Join(strings.Fields(text), "") {
			t.Fatalf("two texts of one invite: %q and %q", text, again)
		}
	})
}
