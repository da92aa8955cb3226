package nix

import (
	"bytes"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

// copyNar reads a NAR from r to its end and no further.
func copyNar(r io.Reader) ([]byte, error) {
	var nar bytes.Buffer
	n := NewNarReader(io.TeeReader(r, &nar))
	for {
		if _, err := n.Next(); errors.Is(err, io.EOF) {
			return nar.Bytes(), nil
		} else if err != nil {
			return nil, err
		}
	}
}

// readExport reads an export and writes it again.
func readExport(r io.Reader, dir flox.StoreDir) (infos []*flox.PathInfo, again []byte, err error) {
	var out bytes.Buffer
	e, w := NewExportReader(r, dir), NewExportWriter(&out, dir)
	for {
		more, err := e.Next()
		if err != nil {
			return infos, nil, err
		}
		if !more {
			err := w.Close()
			return infos, out.Bytes(), err
		}
		nar, err := copyNar(r)
		if err != nil {
			return infos, nil, err
		}
		info, err := e.Facts()
		if err != nil {
			return infos, nil, err
		}
		infos = append(infos, info)
		err = w.Path(info, func(w io.Writer) error { _, err := w.Write(nar); return err })
		if err != nil {
			return infos, nil, err
		}
	}
}

func TestExportAgreesWithNix(t *testing.T) {
	needNix(t)
	tmp := t.TempDir()
	dir := flox.StoreDir(filepath.Join(tmp, "my", "store"))
	h := newNixHost(t, "NIX_STORE_DIR="+string(dir), "NIX_STATE_DIR="+tmp+"/var", "NIX_LOG_DIR="+tmp+"/log", "NIX_DATA_DIR="+tmp+"/share")
	unseal(t, tmp)
	out := h.run("nix-build", "--no-out-link", "-E", `with import `+mustAbs(t, "testdata/drvs.nix")+`; user`)
	closure := strings.Fields(h.run("nix-store", "-qR", out))
	text := h.run("nix-store", append([]string{"--export"}, closure...)...)
	b := []byte(text)
	infos, again, err := readExport(bytes.NewReader(b), dir)
	if err != nil || !bytes.Equal(again, b) {
		t.Fatalf("%d bytes of Nix are %d of ours, %v", len(b), len(again), err)
	}
	for i, p := range closure {
		refs := strings.Fields(h.run("nix-store", "-q", "--references", p))
		var ours []string
		for _, r := range infos[i].References {
			ours = append(ours, dir.Join(r))
		}
		if dir.Join(infos[i].Path) != p || !slices.Equal(refs, ours) {
			t.Errorf("%s: we read %+v", p, infos[i])
		}
	}
	// And Nix takes what we wrote, in a store that has none of it.
	h.run("nix-store", "--delete", out, "--ignore-liveness")
	cmd := exec.CommandContext(t.Context(), "nix-store", "--import")
	cmd.Env, cmd.Stdin = h.env, bytes.NewReader(again)
	if said, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(said), out) {
		t.Errorf("nix-store --import: %v: %s", err, said)
	}
}

func TestExportRefuses(t *testing.T) {
	const dir = flox.DefaultStoreDir
	info := &flox.PathInfo{
		Path: "00000000000000000000000000000000-x", Deriver: "11111111111111111111111111111111-x.drv",
		References: []flox.StorePath{"22222222222222222222222222222222-y"},
	}
	var b bytes.Buffer
	w := NewExportWriter(&b, dir)
	nar := encode(t, []node{file("", "content")})
	if err := errors.Join(w.Path(info, func(w io.Writer) error { _, err := w.Write(nar); return err }), w.Close()); err != nil {
		t.Fatal(err)
	}
	good := b.Bytes()
	infos, again, err := readExport(bytes.NewReader(good), dir)
	if err != nil || !bytes.Equal(again, good) || cmp.Diff([]*flox.PathInfo{info}, infos) != "" {
		t.Fatal(infos, err)
	}
	for n := range good { // cut anywhere
		if _, _, err := readExport(bytes.NewReader(good[:n]), dir); err == nil {
			t.Fatalf("%d bytes of %d are taken", n, len(good))
		}
	}
	change := func(at int, to byte) []byte {
		c := bytes.Clone(good)
		c[at] = to
		return c
	}
	facts := 8 + len(nar)
	for what, b := range map[string][]byte{
		"a mark that is none": change(0, 2), "another magic": change(facts, 1), "a long text": change(facts+8+2, 1),
		"another store": change(facts+16+1, 'g'), "many references": change(facts+16+len(dir.Join(info.Path))+int(narPadding(uint64(len(dir.Join(info.Path)))))+4, 1),
	} {
		if _, _, err := readExport(bytes.NewReader(b), dir); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestRealisationIsNixs(t *testing.T) {
	const text = `{"dependentRealisations":{"sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad!out":"00000000000000000000000000000000-dep"},` +
		`"id":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855!dev","outPath":"11111111111111111111111111111111-x-dev","signatures":["a:b","c:d"]}`
	r, err := ParseRealisation([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if got := string(r.Marshal()); got != text {
		t.Errorf("we write %s", got)
	}
	want := strings.Replace(text, `,"signatures":["a:b","c:d"]`, "", 1)
	if got := r.Fingerprint(); got != want {
		t.Errorf("its fingerprint is %s", got)
	}
	r.Signatures, r.Dependencies = nil, nil
	bare := string(r.Marshal())
	if !strings.HasPrefix(bare, `{"dependentRealisations":{},`) || !strings.HasSuffix(bare, `,"signatures":[]}`) {
		t.Errorf("without both it is %s", bare)
	}
	for _, bad := range []string{
		"", "{}", strings.Replace(text, "!dev", "", 1), strings.Replace(text, "!dev", "!d/v", 1), strings.Replace(text, "sha256:e3", "sha1:e3", 1),
		strings.Replace(text, "-x-dev", "", 1), strings.Replace(text, "000-dep", "000-d/p", 1), strings.Replace(text, "ba78", "zz78", 1), text + "x",
	} {
		if got, err := ParseRealisation([]byte(bad)); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: got %v, %v", bad, got, err)
		}
	}
}

// Where a mention lies, and how the text is cut, must not matter to its finding.
func TestModuloHashFindsMentionsAnywhere(t *testing.T) {
	const self = "0123456789abcdfghijklmnpqrsvwxyz"
	zeros := strings.Repeat("\x00", 32)
	text := "xx" + self + self + strings.Repeat("y", 100) + self[:31] + self + "z" + self
	plain := SHA256.New()
	io.WriteString(plain, "xx"+zeros+zeros+strings.Repeat("y", 100)+self[:31]+zeros+"z"+zeros+"|2|34|197|230")
	want := Hash{Algo: SHA256, Sum: plain.Sum(nil)}
	for step := 1; step <= len(text); step++ {
		m := NewModuloHash(SHA256, self)
		for rest := text; rest != ""; {
			n := min(step, len(rest))
			if _, err := m.Write([]byte(rest[:n])); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if got := m.Sum(); !got.Equal(want) {
			t.Fatalf("in pieces of %d it is another hash", step)
		}
	}
}
