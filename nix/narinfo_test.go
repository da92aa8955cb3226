package nix

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

const (
	pathA = "00000000000000000000000000000000-a"
	pathB = "11111111111111111111111111111111-b"
)

// fields of a narinfo; test cases change one.
func sampleNarInfo(change ...string) string {
	lines := []string{
		"StorePath: /nix/store/" + pathA, "URL: nar/x.nar.xz", "Compression: xz", "FileHash: sha256:" + strings.Repeat("0", 52), "FileSize: 10",
		"NarHash: sha256:" + strings.Repeat("1", 52), "NarSize: 120", "References: " + pathA + " " + pathB, "Deriver: " + pathB, "System: x86_64-linux",
		"Sig: k:AAAA", "Sig: l:BBBB", "CA: fixed:r:sha256:" + strings.Repeat("1", 52),
	}
	for _, c := range change {
		key, _, _ := strings.Cut(c, ":")
		for i, l := range lines {
			if strings.HasPrefix(l, key+":") {
				lines[i] = c
				c = ""
			}
		}
		if c != "" {
			lines = append(lines, c)
		}
	}
	var out strings.Builder
	for _, l := range lines {
		// "Key:-" takes a line away.
		if !strings.HasSuffix(l, ":-") {
			out.WriteString(l + "\n")
		}
	}
	return out.String()
}

func TestNarInfoRoundTrip(t *testing.T) {
	text := sampleNarInfo()
	n, err := ParseNarInfo(flox.DefaultStoreDir, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(text, string(n.Marshal(flox.DefaultStoreDir))); d != "" {
		t.Error(d)
	}
	want := flox.PathInfo{
		Path: pathA, NarHash: n.Info.NarHash, NarSize: 120, References: []flox.StorePath{pathA, pathB}, Deriver: pathB,
		Signatures: []string{"k:AAAA", "l:BBBB"}, CA: "fixed:r:sha256:" + strings.Repeat("1", 52),
	}
	if d := cmp.Diff(want, n.Info); d != "" {
		t.Error(d)
	}
}

func TestNarInfoAccepts(t *testing.T) {
	for name, c := range map[string]struct {
		text  string
		check func(n *NarInfo) bool
	}{
		"no compression is bzip2": {sampleNarInfo("Compression:-"), func(n *NarInfo) bool { return n.Compression == "bzip2" }},
		"unknown deriver":         {sampleNarInfo("Deriver: unknown-deriver"), func(n *NarInfo) bool { return n.Info.Deriver == "" }},
		"no references":           {sampleNarInfo("References: "), func(n *NarInfo) bool { return len(n.Info.References) == 0 }},
		"references unsorted":     {sampleNarInfo("References: " + pathB + "  " + pathA + " " + pathB), func(n *NarInfo) bool { return len(n.Info.References) == 2 && n.Info.References[0] == pathA }},
		"unknown field":           {sampleNarInfo("Flavour: vanilla"), func(n *NarInfo) bool { return n.URL == "nar/x.nar.xz" }},
		"no file hash":            {sampleNarInfo("FileHash:-", "FileSize:-"), func(n *NarInfo) bool { return n.FileHash.IsZero() && n.FileSize == 0 }},
		"hash in hex":             {sampleNarInfo("NarHash: sha256:" + strings.Repeat("ab", 32)), func(n *NarInfo) bool { return n.Info.NarHash[5] == 0xab }},
		"hash as SRI":             {sampleNarInfo("NarHash: " + SHA256Hash([32]byte{7}).SRI()), func(n *NarInfo) bool { return n.Info.NarHash == [32]byte{7} }},
		"address in hex":          {sampleNarInfo("CA: fixed:sha256:" + strings.Repeat("00", 32)), func(n *NarInfo) bool { return n.Info.CA == "fixed:sha256:"+strings.Repeat("0", 52) }},
		"value with colon":        {sampleNarInfo("URL: https://x.example: 1/y"), func(n *NarInfo) bool { return n.URL == "https://x.example: 1/y" }},
	} {
		n, err := ParseNarInfo(flox.DefaultStoreDir, []byte(c.text))
		if err != nil || !c.check(n) {
			t.Errorf("%s: %+v, %v", name, n, err)
		}
	}
}

func TestNarInfoRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"empty":                "",
		"no path":              sampleNarInfo("StorePath:-"),
		"no URL":               sampleNarInfo("URL:-"),
		"empty URL":            sampleNarInfo("URL: "),
		"no NarHash":           sampleNarInfo("NarHash:-"),
		"no NarSize":           sampleNarInfo("NarSize:-"),
		"NarSize 0":            sampleNarInfo("NarSize: 0"),
		"NarSize negative":     sampleNarInfo("NarSize: -1"),
		"NarSize too large":    sampleNarInfo("NarSize: 9223372036854775808"),
		"NarSize with unit":    sampleNarInfo("NarSize: 1k"),
		"FileSize not decimal": sampleNarInfo("FileSize: 0x10"),
		"base name as path":    sampleNarInfo("StorePath: " + pathA),
		"other store":          sampleNarInfo("StorePath: /gnu/store/" + pathA),
		"path inside":          sampleNarInfo("StorePath: /nix/store/" + pathA + "/bin"),
		"full reference":       sampleNarInfo("References: /nix/store/" + pathA),
		"bad deriver":          sampleNarInfo("Deriver: x.drv"),
		"hash without algo":    sampleNarInfo("NarHash: " + strings.Repeat("1", 52)),
		"hash of other algo":   sampleNarInfo("NarHash: sha1:" + strings.Repeat("1", 32)),
		"bad address":          sampleNarInfo("CA: fixed:sha256:x"),
		"path twice":           sampleNarInfo() + "StorePath: /nix/store/" + pathB + "\n",
		"references twice":     sampleNarInfo() + "References: \n",
		"no line end":          strings.TrimSuffix(sampleNarInfo(), "\n"),
		"no space":             sampleNarInfo("URL:nar/x"),
		"Windows line ends":    strings.ReplaceAll(sampleNarInfo(), "\n", "\r\n"),
		"no colon":             sampleNarInfo() + "hello\n",
		"empty line":           sampleNarInfo() + "\n",
		"too large":            sampleNarInfo() + "X: " + strings.Repeat("x", MaxNarInfo) + "\n",
		"many signatures":      sampleNarInfo() + strings.Repeat("Sig: k:AAAA\n", MaxSignatures),
		"HTML":                 "<!DOCTYPE html>\n<title>404: Not Found</title>\n",
	} {
		if n, err := ParseNarInfo(flox.DefaultStoreDir, []byte(text)); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %+v, %v", name, n, err)
		}
	}
}

// A line end in a value must not become a field.
func TestNarInfoMarshalCannotBeInjected(t *testing.T) {
	n, err := ParseNarInfo(flox.DefaultStoreDir, []byte(sampleNarInfo()))
	if err != nil {
		t.Fatal(err)
	}
	n.Info.Signatures = []string{"k:AAAA\nSig: evil:AAAA", "l:BBBB"}
	n.Info.CA = "x\nSig: evil:AAAA"
	n.System = "x\rSig: evil:AAAA"
	text := string(n.Marshal(flox.DefaultStoreDir))
	if strings.Contains(text, "evil") || !strings.Contains(text, "Sig: l:BBBB\n") {
		t.Error(text)
	}
}

func FuzzParseNarInfo(f *testing.F) {
	f.Add([]byte(sampleNarInfo()))
	f.Add([]byte(sampleNarInfo("CA:-", "References: ", "Deriver: unknown-deriver")))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := ParseNarInfo(flox.DefaultStoreDir, b)
		if err != nil {
			if !errors.Is(err, flox.ErrBadInput) {
				t.Fatal(err)
			}
			return
		}
		text := n.Marshal(flox.DefaultStoreDir)
		again, err := ParseNarInfo(flox.DefaultStoreDir, text)
		if err != nil {
			// Marshal leaves out what would break a line.
			if strings.ContainsAny(string(b), "\r\x00") {
				return
			}
			t.Fatalf("%v in\n%s", err, text)
		}
		if again.Info.NarHash != n.Info.NarHash || Fingerprint(flox.DefaultStoreDir, &again.Info) != Fingerprint(flox.DefaultStoreDir, &n.Info) {
			t.Fatalf("%s\nbecame\n%s", b, text)
		}
	})
}
