package nix

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"strings"
	"testing"

	"github.com/floxctl/flox"
)

func TestParseHashForms(t *testing.T) {
	for _, algo := range []HashAlgo{MD5, SHA1, SHA256, SHA512} {
		h := algo.New()
		h.Write([]byte("hello"))
		want := Hash{Algo: algo, Sum: h.Sum(nil)}
		base64 := strings.TrimPrefix(want.SRI(), string(algo)+"-")
		for form, hint := range map[string]HashAlgo{
			want.String(): "", want.SRI(): "", string(algo) + ":" + want.Hex(): "", string(algo) + ":" + base64: "",
			EncodeBase32(want.Sum): algo, want.Hex(): algo, strings.ToUpper(want.Hex()): algo, base64: algo, want.String() + "": algo,
		} {
			got, err := ParseHash(form, hint)
			if err != nil || !got.Equal(want) {
				t.Errorf("%q as %q: %v, %v", form, hint, got, err)
			}
		}
	}
}

func TestParseHashRefuses(t *testing.T) {
	sum := sha256.Sum256([]byte("hello"))
	h := SHA256Hash(sum)
	base64 := strings.TrimPrefix(h.SRI(), "sha256-")
	for s, hint := range map[string]HashAlgo{
		"": "", ":": "", "sha256:": "", "sha256-": "", h.Hex(): "", "sha1:" + h.Hex(): "", "sha1:" + EncodeBase32(sum[:]): "", h.String() + "0": "",
		"blake3:" + h.Hex(): "", "SHA256:" + h.Hex(): "", h.SRI(): SHA512, h.String(): MD5, "sha256-" + h.Hex(): "", "sha256:sha256:" + h.Hex(): "",
		"sha256:" + strings.Replace(h.Hex(), "2", "g", 1): "", "sha256:" + strings.Repeat("e", 52): "", "sha256:" + "z" + strings.Repeat("0", 51): "",
		"sha256:" + base64[:20] + "\n" + base64[21:]: "", "sha256-" + base64[:42] + "==": "", "sha256-" + base64[:42] + "9=": "", "sha256-" + base64[:43] + "A": "",
		"sha256:" + h.Hex() + "\n": "", " " + h.String(): "",
	} {
		if got, err := ParseHash(s, hint); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%q as %q: %v, %v", s, hint, got, err)
		}
	}
}

func TestBase32(t *testing.T) {
	for n := range 70 {
		b := bytes.Repeat([]byte{0xa5, 0x01, 0xff}, n)[:n]
		got, err := DecodeBase32(EncodeBase32(b))
		if err != nil || !bytes.Equal(got, b) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	for _, s := range []string{"a", "aaa", "aaaaaa", "e0", "zz", "AA", "0\n", "\x00\x00"} {
		if b, err := DecodeBase32(s); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%q: %x, %v", s, b, err)
		}
	}
}

func TestContentAddressRefuses(t *testing.T) {
	digits := EncodeBase32(make([]byte, 32))
	for _, ca := range []string{
		"", "text", "text:", "fixed:", "fixed:r:", "fixed:r:r:sha256:" + digits, "text:sha1:" + EncodeBase32(make([]byte, 20)), "text:" + digits, "fixed:" + digits,
		"fixed:git:sha256:" + digits, "fixed:r:sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "Fixed:sha256:" + digits, "fixed:sha256:" + digits + " ",
	} {
		if got, err := ParseContentAddress(ca); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%q: %v, %v", ca, got, err)
		}
	}
	ref := []flox.StorePath{"00000000000000000000000000000000-x"}
	for _, c := range []struct {
		ca, name string
		refs     []flox.StorePath
		self     bool
	}{
		{"fixed:sha256:" + digits, "x", ref, false},
		{"fixed:sha256:" + digits, "x", nil, true},
		{"fixed:r:sha1:" + EncodeBase32(make([]byte, 20)), "x", ref, false},
		{"text:sha256:" + digits, "x", nil, true},
		{"text:sha256:" + digits, "", nil, false},
		{"text:sha256:" + digits, "a b", nil, false},
		{"text:sha256:" + digits, strings.Repeat("n", flox.MaxNameLen+1), nil, false},
	} {
		if got, err := ContentAddressPath(flox.DefaultStoreDir, c.name, c.ca, c.refs, c.self); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%+v: %v, %v", c, got, err)
		}
	}
}

// The order callers give references in must not change a path.
func TestPathReferencesAreASet(t *testing.T) {
	a, b := flox.StorePath("00000000000000000000000000000000-x"), flox.StorePath("00000000000000000000000000000001-x")
	one, err := TextPath(flox.DefaultStoreDir, "n", [32]byte{}, []flox.StorePath{a, b})
	two, err2 := TextPath(flox.DefaultStoreDir, "n", [32]byte{}, []flox.StorePath{b, a, b})
	if one != two || err != nil || err2 != nil {
		t.Errorf("%s %v, %s %v", one, err, two, err2)
	}
}

func FuzzParseHash(f *testing.F) {
	for _, s := range []string{"sha256:" + EncodeBase32(make([]byte, 32)), "sha1-AAAAAAAAAAAAAAAAAAAAAAAAAAA=", "md5:00000000000000000000000000000000", "fixed:r:sha1:" + EncodeBase32(make([]byte, 20))} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		h, err := ParseHash(s, "")
		if err != nil && !errors.Is(err, flox.ErrBadInput) {
			t.Fatal(err)
		}
		if err == nil {
			for _, form := range []string{h.String(), h.SRI()} {
				if again, err := ParseHash(form, ""); err != nil || !again.Equal(h) {
					t.Fatalf("%q: %v", form, err)
				}
			}
		}
		if b, err := DecodeBase32(s); err == nil && EncodeBase32(b) != s {
			t.Fatalf("base32 %q encodes back as %q", s, EncodeBase32(b))
		}
		if ca, err := ParseContentAddress(s); err == nil {
			if again, err := ParseContentAddress(ca.String()); err != nil || again.String() != ca.String() {
				t.Fatalf("%q: %v", ca, err)
			}
		}
	})
}
