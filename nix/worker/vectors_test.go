package worker

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// The vectors are made by hand from Nix's own description: every letter below
// stands for bytes that were counted, not for what this package writes.

// w is a word: 8 bytes, little endian.
func w(n uint64) string {
	b := make([]byte, 8)
	for i := range b {
		b[i] = byte(n >> (8 * i))
	}
	return string(b)
}

// s is a string, counted and padded.
func s(text string) string {
	return w(uint64(len(text))) + text + strings.Repeat("\x00", (8-len(text)%8)%8)
}

const (
	vDir  = "/nix/store"
	vPath = "0123456789abcdfghijklmnpqrsvwxyz-a"
	vDep  = "1123456789abcdfghijklmnpqrsvwxyz-b"
	vDrv  = "2123456789abcdfghijklmnpqrsvwxyz-a.drv"
	vHash = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" // sha256 of "abc"
	vCA   = "fixed:r:sha256:1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s"
)

func vInfo() Info {
	sum, _ := hex.DecodeString(vHash)
	return Info{
		PathInfo: flox.PathInfo{
			Path: vPath, Deriver: vDrv, NarHash: [32]byte(sum), References: []flox.StorePath{vPath, vDep},
			Registered: time.Unix(0x6553f100, 0), NarSize: 120, Signatures: []string{"k:c2ln"}, CA: vCA,
		},
		Ultimate: true,
	}
}

var vInfoBytes = s(vDir+"/"+vDrv) + s(vHash) + w(2) + s(vDir+"/"+vPath) + s(vDir+"/"+vDep) +
	w(0x6553f100) + w(120) + w(1) + w(1) + s("k:c2ln") + s(vCA)

const vRealisation = `{"dependentRealisations":{"sha256:` + vHash + `!dev":"` + vDep + `"},"id":"sha256:` + vHash + `!out","outPath":"` + vPath + `","signatures":["k:c2ln"]}`

func vRealised() nix.Realisation {
	sum, _ := hex.DecodeString(vHash)
	return nix.Realisation{
		ID: nix.RealisationID{DrvHash: [32]byte(sum), Output: "out"}, Path: vPath, Signatures: []string{"k:c2ln"},
		Dependencies: map[nix.RealisationID]flox.StorePath{{DrvHash: [32]byte(sum), Output: "dev"}: vDep},
	}
}

// TestPrimitivesAreNixs checks both directions of every primitive.
func TestPrimitivesAreNixs(t *testing.T) {
	info, real := vInfo(), vRealised()
	user, system := 1500*time.Microsecond, time.Second
	result := BuildResult{Status: NotDeterministic, Error: "x", TimesBuilt: 2, NonDeterministic: true, Start: time.Unix(3, 0), Stop: time.Unix(4, 0), Outputs: []nix.Realisation{real}}
	timed := result
	timed.CPUUser, timed.CPUSystem = &user, &system
	drv := nix.Derivation{
		Name:    "a",
		Outputs: map[string]nix.DrvOutput{"dev": {Kind: nix.OutputFloating, Recursive: true, Algo: nix.SHA256}, "out": {Kind: nix.OutputInputAddressed, Path: vPath}},
		Sources: []flox.StorePath{vDep}, Platform: "x86_64-linux", Builder: "/bin/sh", Args: []string{"-c", ""}, Env: map[string]string{"out": vDir, "a": "b"},
	}
	tests := []struct {
		name    string
		version Version
		encode  func(e *encoder)
		decode  func(d *decoder) any
		value   any
		want    string
	}{
		{"word", 0, func(e *encoder) { e.u64(0x1122334455667788) }, func(d *decoder) any { return d.u64() }, uint64(0x1122334455667788), "\x88\x77\x66\x55\x44\x33\x22\x11"},
		{"bool", 0, func(e *encoder) { e.bool(true) }, func(d *decoder) any { return d.bool() }, true, w(1)},
		{"empty string", 0, func(e *encoder) { e.str("") }, func(d *decoder) any { return d.str(1) }, "", w(0)},
		{"string of 7", 0, func(e *encoder) { e.str("1234567") }, func(d *decoder) any { return d.str(7) }, "1234567", "\x07\x00\x00\x00\x00\x00\x00\x001234567\x00"},
		{"string of 8", 0, func(e *encoder) { e.str("12345678") }, func(d *decoder) any { return d.str(8) }, "12345678", "\x08\x00\x00\x00\x00\x00\x00\x0012345678"},
		{"strings", 0, func(e *encoder) { e.strs([]string{"b", "a"}) }, func(d *decoder) any { return d.strs() }, []string{"b", "a"}, w(2) + s("b") + s("a")},
		{"path", 0, func(e *encoder) { e.path(vPath) }, func(d *decoder) any { return d.path() }, flox.StorePath(vPath), s(vDir + "/" + vPath)},
		{"no path", 0, func(e *encoder) { e.opath("") }, func(d *decoder) any { return d.opath() }, flox.StorePath(""), w(0)},
		{"set", 0, func(e *encoder) { e.paths([]flox.StorePath{vDep, vPath, vDep}) }, func(d *decoder) any { return d.paths() }, []flox.StorePath{vPath, vDep}, w(2) + s(vDir+"/"+vPath) + s(vDir+"/"+vDep)},
		{"settings", 0, func(e *encoder) { e.settings(map[string]string{"b": "1", "a": "2"}) }, func(d *decoder) any { return d.settings(9) }, map[string]string{"b": "1", "a": "2"}, w(2) + s("a") + s("2") + s("b") + s("1")},
		{"outputs", 0, func(e *encoder) { e.outputs(map[string]flox.StorePath{"out": vPath, "dev": ""}) }, func(d *decoder) any { return d.outputs() }, map[string]flox.StorePath{"out": vPath, "dev": ""}, w(2) + s("dev") + w(0) + s("out") + s(vDir+"/"+vPath)},
		{"info", 0, func(e *encoder) { e.info(&info) }, func(d *decoder) any { return d.info(vPath) }, info, vInfoBytes},
		{"keyed info", 0, func(e *encoder) { e.keyed(&info) }, func(d *decoder) any { return d.keyed() }, info, s(vDir+"/"+vPath) + vInfoBytes},
		{
			"derived", 0, func(e *encoder) {
				e.derived([]DerivedPath{{Path: vDrv}, {Path: vDrv, All: true}, {Path: vDrv, Outputs: []string{"dev", "out"}}})
			}, func(d *decoder) any { return d.derived() },
			[]DerivedPath{{Path: vDrv}, {Path: vDrv, All: true}, {Path: vDrv, Outputs: []string{"dev", "out"}}},
			w(3) + s(vDir+"/"+vDrv) + s(vDir+"/"+vDrv+"!*") + s(vDir+"/"+vDrv+"!dev,out"),
		},
		{
			"substitutable", 0, func(e *encoder) {
				e.substitutable(&Substitutable{Deriver: vDrv, References: []flox.StorePath{vDep}, DownloadSize: 1, NarSize: 2})
			}, func(d *decoder) any { return d.substitutable(vPath) },
			Substitutable{Path: vPath, Deriver: vDrv, References: []flox.StorePath{vDep}, DownloadSize: 1, NarSize: 2},
			s(vDir+"/"+vDrv) + w(1) + s(vDir+"/"+vDep) + w(1) + w(2),
		},
		{"realisation", 0, func(e *encoder) { e.realisation(&real) }, func(d *decoder) any { return d.realisation() }, real, s(vRealisation)},
		{
			"build result", v34, func(e *encoder) { e.buildResult(&timed) }, func(d *decoder) any { return d.buildResult() }, result,
			w(12) + s("x") + w(2) + w(1) + w(3) + w(4) + w(1) + s("sha256:"+vHash+"!out") + s(vRealisation),
		},
		{
			"build result with CPU times", v37, func(e *encoder) { e.buildResult(&timed) }, func(d *decoder) any { return d.buildResult() }, timed,
			w(12) + s("x") + w(2) + w(1) + w(3) + w(4) + w(1) + w(1500) + w(1) + w(1_000_000) + w(1) + s("sha256:"+vHash+"!out") + s(vRealisation),
		},
		{
			"derivation", 0, func(e *encoder) { e.derivation(&drv) }, func(d *decoder) any { return d.derivation(vDrv) }, drv,
			w(2) + s("dev") + s("") + s("r:sha256") + s("") + s("out") + s(vDir+"/"+vPath) + s("") + s("") + w(1) + s(vDir+"/"+vDep) +
				s("x86_64-linux") + s("/bin/sh") + w(2) + s("-c") + s("") + w(2) + s("a") + s("b") + s("out") + s(vDir),
		},
		{"fields", 0, func(e *encoder) { e.fields([]Field{Number(9), Text("x")}) }, func(d *decoder) any { return d.fields() }, []Field{Number(9), Text("x")}, w(2) + w(0) + w(9) + w(1) + s("x")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var b bytes.Buffer
			e := newEncoder(&b, vDir)
			e.version = tt.version
			tt.encode(e)
			if err := e.flush(); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(hex.Dump([]byte(tt.want)), hex.Dump(b.Bytes())); d != "" {
				t.Errorf("encoded (-want +got):\n%s", d)
			}
			d := newDecoder(strings.NewReader(tt.want), vDir)
			d.version = tt.version
			got := tt.decode(d)
			if d.err != nil {
				t.Fatal(d.err)
			}
			if diff := cmp.Diff(tt.value, got); diff != "" {
				t.Errorf("decoded (-want +got):\n%s", diff)
			}
			if rest, _ := io.ReadAll(d.r); len(rest) > 0 {
				t.Errorf("%d bytes are left", len(rest))
			}
			// Every prefix breaks off.
			for n := range len(tt.want) {
				d := newDecoder(strings.NewReader(tt.want[:n]), vDir)
				d.version = tt.version
				tt.decode(d)
				if !errors.Is(d.err, io.ErrUnexpectedEOF) {
					t.Fatalf("the first %d bytes: error %v, want an unexpected end", n, d.err)
				}
			}
		})
	}
}

// TestDecoderRefuses feeds the decoder what a strict one must not take.
func TestDecoderRefuses(t *testing.T) {
	tests := []struct {
		name, in, want string
		decode         func(d *decoder)
	}{
		{"padding", w(1) + "a\x00\x00\x00\x00\x00\x00\x01", "non-zero padding", func(d *decoder) { d.str(9) }},
		{"long string", w(10) + strings.Repeat("a", 16), "at most 9", func(d *decoder) { d.str(9) }},
		{"huge string", w(1 << 63), "too long", func(d *decoder) { d.str(maxText) }},
		{"huge list", w(1 << 40), "more than a message holds", func(d *decoder) { d.strs() }},
		{"negative size", w(1 << 63), "too large", func(d *decoder) { d.size() }},
		{"other store", s("/other/" + vPath), "is not in the Nix store", func(d *decoder) { d.path() }},
		{"inside a path", s(vDir + "/" + vPath + "/bin"), "inside a store path", func(d *decoder) { d.path() }},
		{"bad name", s(vDir + "/" + vPath + "\n"), "not allowed", func(d *decoder) { d.path() }},
		{"no path where one must be", s(""), "is not in the Nix store", func(d *decoder) { d.path() }},
		{"bad hash", s("abc"), "hash", func(d *decoder) { d.narHash() }},
		{"bad address", s("fixed:sha256"), "content address", func(d *decoder) { d.ca() }},
		{"git address", s("fixed:git:sha1:" + strings.Repeat("a", 40)), "content address", func(d *decoder) { d.ca() }},
		{"dynamic derivation", w(1) + s(vDir+"/"+vDrv+"!out!out"), "not supported", func(d *decoder) { d.derived() }},
		{"no output", w(1) + s(vDir+"/"+vDrv+"!"), "empty", func(d *decoder) { d.derived() }},
		{"realisation without id", s(`{"outPath":"` + vPath + `"}`), "derivation output", func(d *decoder) { d.realisation() }},
		{"field type", w(1) + w(2), "too large", func(d *decoder) { d.fields() }},
		{"result under another key", w(0) + s("") + w(0) + w(0) + w(0) + w(0) + w(0) + w(0) + w(1) + s("sha256:"+vHash+"!dev") + s(vRealisation), "under the key", func(d *decoder) { d.buildResult() }},
		{"signatures", w(300) + strings.Repeat(s("k:c2ln"), 300), "at most 256", func(d *decoder) { d.signatures() }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := newDecoder(strings.NewReader(tt.in), vDir)
			d.version = MaxVersion
			tt.decode(d)
			if d.err == nil || !errors.Is(d.err, flox.ErrBadInput) || !strings.Contains(d.err.Error(), tt.want) {
				t.Errorf("error %v, want one saying %q", d.err, tt.want)
			}
		})
	}
}

// TestMessageIsBounded: however a message is made of allowed parts, it ends.
func TestMessageIsBounded(t *testing.T) {
	part := s(strings.Repeat("a", maxWord))
	d := newDecoder(io.MultiReader(strings.NewReader(w(1000)), repeat(part, 1000)), vDir)
	d.strs()
	if d.err == nil || !strings.Contains(d.err.Error(), "message of more than") {
		t.Errorf("error %v for a message of a gigabyte", d.err)
	}
}

// repeat gives text n times.
func repeat(text string, n int) io.Reader {
	readers := make([]io.Reader, n)
	for i := range readers {
		readers[i] = strings.NewReader(text)
	}
	return io.MultiReader(readers...)
}

// script is a conversation: what the client sends, what it must read back.
type script struct {
	t    *testing.T
	conn net.Conn
}

// newScript connects to a server over store, behind its handshake with version.
func newScript(t *testing.T, store *dirStore, version Version, trust Trust) *script {
	t.Helper()
	c := connect(t, store, trust)
	sc := &script{t: t, conn: c}
	sc.send(w(0x6e697863))
	sc.expect(w(0x6478696f) + w(0x126))
	sc.send(w(uint64(version)))
	if version >= v38 {
		sc.send(w(1) + s("some-feature"))
		sc.expect(w(0))
	}
	sc.send(w(0) + w(0))
	if version >= v33 {
		sc.expect(s("2.8.0 (test)"))
	}
	if version >= v35 {
		sc.expect(w(uint64(trust)))
	}
	sc.expect(w(0x616c7473))
	return sc
}

// connect gives a connection to a server over store.
func connect(t *testing.T, store *dirStore, trust Trust) net.Conn {
	t.Helper()
	client, conn := socketPair(t)
	served := make(chan error, 1)
	server := &Server{Dir: store.dir, Version: "2.8.0 (test)", Open: store.open}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { served <- server.Serve(ctx, conn, Peer{Trust: trust}) }()
	t.Cleanup(func() {
		client.Close()
		<-served
		cancel()
	})
	return client
}

// socketPair gives both ends of a unix connection.
func socketPair(t *testing.T) (client, server net.Conn) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err = new(net.Dialer).DialContext(t.Context(), "unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return client, server
}

func (sc *script) send(bytes string) {
	sc.t.Helper()
	if _, err := sc.conn.Write([]byte(bytes)); err != nil {
		sc.t.Fatal(err)
	}
}

func (sc *script) expect(want string) {
	sc.t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(sc.conn, got)
	if err != nil || string(got) != want {
		sc.t.Fatalf("got %d bytes, %v:\n%s\nwant\n%s", n, err, hex.Dump(got[:n]), hex.Dump([]byte(want)))
	}
}

// end checks that the server closes the connection without another byte.
func (sc *script) end() {
	sc.t.Helper()
	if rest, err := io.ReadAll(sc.conn); err != nil || len(rest) > 0 {
		sc.t.Fatalf("want the end of the connection, got %v and\n%s", err, hex.Dump(rest))
	}
}
