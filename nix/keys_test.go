package nix

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/floxctl/flox"
)

func newKey(t testing.TB, name string) SecretKey {
	t.Helper()
	k, err := GenerateKey(name)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestKeysRoundTrip(t *testing.T) {
	k := newKey(t, "cache.example.org-1")
	secret, err := ParseSecretKey(k.String() + "\n")
	if err != nil {
		t.Fatal(err)
	}
	public, err := ParsePublicKey(secret.Public().String())
	if err != nil || !public.Equal(k.Public()) || public.Name() != k.Name() {
		t.Fatalf("%v %v", public, err)
	}
	sig := secret.Sign([]byte("msg"))
	if !public.Verify([]byte("msg"), sig) {
		t.Error("a signature does not verify")
	}
	for name, bad := range map[string]string{
		"other name":   "x" + sig,
		"no name":      strings.TrimPrefix(sig, k.Name()),
		"cut":          sig[:len(sig)-4],
		"longer":       sig + "AAAA",
		"line end":     sig[:30] + "\n" + sig[30:],
		"other bytes":  k.Name() + ":" + strings.Repeat("A", 86) + "==",
		"empty":        "",
		"other signer": newKey(t, k.Name()).Sign([]byte("msg")),
	} {
		if public.Verify([]byte("msg"), bad) {
			t.Errorf("%s verifies", name)
		}
	}
	if public.Verify([]byte("other"), sig) || (PublicKey{}).Verify([]byte("msg"), sig) {
		t.Error("verifies what it must not")
	}
}

func TestKeyRing(t *testing.T) {
	a, b, old, other := newKey(t, "a"), newKey(t, "b"), newKey(t, "a"), newKey(t, "c")
	ring, err := ParseKeyRing([]string{a.Public().String(), b.Public().String(), old.Public().String()})
	if err != nil || ring.Len() != 3 {
		t.Fatal(ring.Len(), err)
	}
	msg := []byte("m")
	for _, c := range []struct {
		sigs []string
		name string
		ok   bool
	}{
		{nil, "", false},
		{[]string{other.Sign(msg)}, "", false},
		{[]string{"nonsense", other.Sign(msg), b.Sign(msg)}, "b", true},
		{[]string{old.Sign(msg)}, "a", true},
		{[]string{a.Sign([]byte("x"))}, "", false},
	} {
		if name, ok := ring.Verify(msg, c.sigs); name != c.name || ok != c.ok {
			t.Errorf("%q: %q %v", c.sigs, name, ok)
		}
	}
	if _, ok := (KeyRing{}).Verify(msg, []string{a.Sign(msg)}); ok {
		t.Error("the empty ring trusts somebody")
	}
}

func TestKeysRefuse(t *testing.T) {
	k := newKey(t, "k")
	zeros := strings.Repeat("A", 86) + "=="
	for _, s := range []string{"", "k", "k:", ":" + zeros, "k:" + zeros, k.Public().String(), "a b" + k.String()[1:], k.String()[:40], k.String()[1:], "k;" + k.String()} {
		if _, err := ParseSecretKey(s); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("secret %q: %v", s, err)
		} else if len(s) > 60 && strings.Contains(err.Error(), s[10:40]) {
			t.Errorf("the error shows the key: %v", err)
		}
	}
	for _, s := range []string{"", "k", "k:", "k:AAAA", k.String(), strings.Repeat("n", MaxKeyName+1) + k.Public().String()} {
		if _, err := ParsePublicKey(s); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("public %q: %v", s, err)
		}
	}
	for _, name := range []string{"", "a:b", "a b", "a\nb", "a;b"} {
		if _, err := GenerateKey(name); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("name %q: %v", name, err)
		}
	}
}

func TestSecretKeyStaysOutOfLogs(t *testing.T) {
	var out bytes.Buffer
	k := newKey(t, "k")
	slog.New(slog.NewTextHandler(&out, nil)).Info("key", "key", k)
	if s := out.String(); strings.Contains(s, k.String()[10:40]) || !strings.Contains(s, "k:") {
		t.Errorf("logged %s", s)
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add("k:" + strings.Repeat("A", 86) + "==")
	f.Add("k:" + strings.Repeat("A", 43) + "=")
	k := newKey(f, "k")
	f.Add(k.String())
	f.Fuzz(func(t *testing.T, s string) {
		trimmed := strings.TrimSpace(s)
		if sk, err := ParseSecretKey(s); err == nil && sk.String() != trimmed {
			t.Fatalf("secret %q became %q", s, sk)
		}
		if pk, err := ParsePublicKey(s); err == nil && pk.String() != trimmed {
			t.Fatalf("public %q became %q", s, pk)
		}
		if k.Public().Verify([]byte("never signed"), s) {
			t.Fatal("forged")
		}
	})
}
