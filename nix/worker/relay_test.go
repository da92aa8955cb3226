package worker

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/nextnix"
)

// shapes is the protocol's table of operations, written down apart from the
// code under test: fields of the request, "/", fields of the reply. p path, P
// set of paths, o path or none, s string, S strings, n word, b bool, D derived
// paths, m settings, M content addresses by path, O outputs, F framed stream,
// N NAR, V derivation, I path and info, ? valid and info, Q substitutable
// infos, R realisation, r realisations, x derivation output, B build result, K
// targets' results, G roots.
var shapes = map[Op]string{
	1: "p/b", 6: "p/P", 7: "ssPbF/I", 9: "Dn/n", 10: "p/n", 11: "p/n", 12: "s/n", 13: "/n", 14: "/G",
	19: "bbbnnnnnnnnbm/", 20: "nPbnnnn/Snn", 23: "/P", 26: "p/?", 29: "s/o", 30: "M/Q", 31: "Pb/P", 32: "P/P", 33: "p/P",
	34: "/n", 35: "bb/b", 36: "pVn/B", 37: "pS/n", 38: "p/N", 39: "posPnnbSsbbF/", 40: "D/PPPnn", 41: "p/O", 42: "R/", 43: "x/r",
	44: "bbF/", 45: "sF/n", 46: "Dn/K",
}

// relay stands between a stock client and a stock daemon. It decodes and
// encodes again everything either says, and compares with what was said.
type relay struct {
	dir flox.StoreDir

	mu      sync.Mutex
	seen    map[Op]int
	version Version // the highest that was spoken
}

// half is one direction: bytes are handed on as they are read.
type half struct {
	d    *decoder
	raw  bytes.Buffer // since the last check
	want *encoder     // writes to again
	got  bytes.Buffer
	path flox.StorePath // the last one read
}

func newHalf(from io.Reader, to io.Writer, dir flox.StoreDir, v Version) *half {
	h := &half{}
	h.d = newDecoder(io.TeeReader(from, io.MultiWriter(to, &h.raw)), dir)
	h.want = newEncoder(&h.got, dir)
	h.d.version, h.want.version = v, v
	return h
}

// check compares what was read with what this package would have written.
func (h *half) check(what string) error {
	if h.d.err != nil {
		return fmt.Errorf("%s: %w", what, h.d.err)
	}
	if err := h.want.flush(); err != nil {
		return err
	}
	if !bytes.Equal(h.raw.Bytes(), h.got.Bytes()) {
		return fmt.Errorf("%s: it was\n%s\nwe write\n%s", what, hex.Dump(h.raw.Bytes()), hex.Dump(h.got.Bytes()))
	}
	h.raw.Reset()
	h.got.Reset()
	h.d.begin()
	return nil
}

// word reads a word and writes it again.
func (h *half) word() uint64 {
	n := h.d.u64()
	h.want.u64(n)
	return n
}

func (h *half) str() string {
	s := h.d.str(maxText)
	h.want.str(s)
	return s
}

// field reads one field of a message and writes it again.
func (h *half) field(letter rune) {
	d, e := h.d, h.want
	switch letter {
	case 'p':
		h.path = d.path()
		e.path(h.path)
	case 'P':
		e.paths(d.paths())
	case 'o':
		e.opath(d.opath())
	case 's':
		h.str()
	case 'S':
		e.strs(d.strs())
	case 'n':
		h.word()
	case 'b':
		e.bool(d.bool())
	case 'D':
		e.derived(d.derived())
	case 'm':
		e.settings(d.settings(maxText))
	case 'M':
		for range h.count() {
			e.path(d.path())
			e.str(d.ca())
		}
	case 'O':
		e.outputs(d.outputs())
	case 'V':
		drv := d.derivation(h.path)
		e.derivation(&drv)
	case 'I':
		info := d.keyed()
		e.keyed(&info)
	case '?':
		if h.word() != 0 {
			info := d.info("")
			e.info(&info)
		}
	case 'Q':
		for range h.count() {
			p := d.path()
			e.path(p)
			s := d.substitutable(p)
			e.substitutable(&s)
		}
	case 'R':
		r := d.realisation()
		e.realisation(&r)
	case 'r':
		for range h.count() {
			r := d.realisation()
			e.realisation(&r)
		}
	case 'x':
		e.str(d.drvOutput().String())
	case 'B':
		r := d.buildResult()
		e.buildResult(&r)
	case 'K':
		for range h.count() {
			e.str(d.derivedPath().text(d.dir))
			r := d.buildResult()
			e.buildResult(&r)
		}
	case 'G':
		for range h.count() {
			h.str()
			e.path(d.path())
		}
	default:
		d.fail(fmt.Errorf("letter %c is not in the table", letter))
	}
}

func (h *half) count() int {
	n := h.d.count()
	h.want.u64(uint64(n))
	return n
}

// skip reads what the table knows only the end of.
func (h *half) skip(r interface{ drain() error }) {
	if err := h.check("before a stream"); err != nil {
		h.d.fail(err)
		return
	}
	if err := r.drain(); err != nil {
		h.d.fail(err)
	}
	h.raw.Reset()
}

// oneNar reads a NAR to its end.
type oneNar struct{ r io.Reader }

func (o oneNar) drain() error {
	n := nix.NewNarReader(o.r)
	for {
		if _, err := n.Next(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// logStream reads the log to LAST (true) or ERROR (false).
func (h *half) logStream() (bool, error) {
	for {
		tag := h.word()
		switch tag {
		case tagLast:
			return true, h.check("LAST")
		case tagNext:
			h.str()
		case tagStart:
			h.word()
			h.word()
			h.word()
			h.str()
			h.want.fields(h.d.fields())
			h.word()
		case tagStop:
			h.word()
		case tagRes:
			h.word()
			h.word()
			h.want.fields(h.d.fields())
		case tagError:
			h.str()
			h.word()
			h.str()
			h.str()
			h.word()
			for range h.count() {
				h.word()
				h.str()
			}
			return false, h.check("ERROR")
		default:
			return false, fmt.Errorf("log frame %#x, %w", tag, errors.Join(h.d.err, flox.ErrBadInput))
		}
		if err := h.check("log frame"); err != nil {
			return false, err
		}
	}
}

// converse relays one connection to its end.
func (r *relay) converse(client, daemon io.ReadWriter) error {
	up, down := newHalf(client, daemon, r.dir, 0), newHalf(daemon, client, r.dir, 0)
	if up.word() != clientMagic {
		return fmt.Errorf("the client's magic is another: %w", errors.Join(up.d.err, flox.ErrBadInput))
	}
	if down.word() != serverMagic {
		return fmt.Errorf("the daemon's magic is another: %w", errors.Join(down.d.err, flox.ErrBadInput))
	}
	v := min(Version(down.word()), Version(up.word()))
	for _, h := range []*half{up, down} {
		h.d.version, h.want.version = v, v
		if v >= v38 { // features
			h.want.strs(h.d.strs())
		}
	}
	up.word()
	up.word()
	r.mu.Lock()
	r.version = max(r.version, v)
	r.mu.Unlock()
	if v >= v33 {
		down.str()
	}
	if v >= v35 {
		down.word()
	}
	if err := errors.Join(up.check("greeting"), down.check("greeting")); err != nil {
		return err
	}
	if ok, err := down.logStream(); err != nil || !ok {
		return err
	}
	for {
		code := Op(up.word())
		if errors.Is(up.d.err, io.ErrUnexpectedEOF) && up.raw.Len() == 0 {
			return nil
		}
		if err := r.operation(code, up, down); err != nil {
			return fmt.Errorf("operation %d: %w", code, err)
		}
	}
}

func (r *relay) operation(code Op, up, down *half) error {
	shape, ok := shapes[code]
	if !ok {
		return fmt.Errorf("not in the table: %w", flox.ErrBadInput)
	}
	if _, ok := operations[code]; !ok {
		return fmt.Errorf("the server does not know it: %w", flox.ErrBadInput)
	}
	r.mu.Lock()
	r.seen[code]++
	r.mu.Unlock()
	request, reply, _ := strings.Cut(shape, "/")
	request, framed := strings.CutSuffix(request, "F")
	for _, letter := range request {
		up.field(letter)
	}
	if err := up.check("request"); err != nil {
		return err
	}
	sent := make(chan error, 1)
	if framed {
		go func() {
			up.skip(&frameReader{r: up.d.r})
			sent <- up.d.err
		}()
	}
	ok, err := down.logStream()
	if framed {
		err = errors.Join(err, <-sent)
	}
	if err != nil || !ok {
		return err
	}
	for _, letter := range reply {
		if letter == 'N' {
			down.skip(oneNar{down.d.r})
			continue
		}
		down.field(letter)
	}
	return down.check("reply")
}

// TestTableAgreesWithStockNix relays real work of a stock client on a stock
// daemon; every byte of both sides has to be as this package would write it.
func TestTableAgreesWithStockNix(t *testing.T) {
	needNix(t)
	for _, bin := range []string{"", nextnix.Bin(t)} {
		t.Run(generation(t, bin), func(t *testing.T) { t.Parallel(); testTable(t, bin) })
	}
}

// generation is the version of the Nix in a directory, "" = the installed one.
func generation(t *testing.T, bin string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), filepath.Join(bin, "nix"), "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	words := strings.Fields(string(out))
	return words[len(words)-1]
}

func testTable(t *testing.T, bin string) {
	dir := flox.StoreDir(t.TempDir() + "/store")
	behind := newStock(t, dir, "").with(bin)
	t.Cleanup(func() { unseal(t, string(dir)) })
	r := &relay{dir: dir, seen: make(map[Op]int)}
	socket := listen(t, func(_ context.Context, conn net.Conn) {
		defer conn.Close()
		cmd := behind.command("nix-daemon", "--stdio")
		if err := r.spawn(cmd, conn); err != nil {
			t.Error(err)
		}
	})
	n := newStock(t, dir, "unix://"+socket).with(bin)
	// The client opens files, and reads logs, where the daemon has them.
	for i := range n.env {
		if strings.HasPrefix(n.env[i], "NIX_STATE_DIR=") || strings.HasPrefix(n.env[i], "NIX_LOG_DIR=") {
			n.env[i] = strings.Replace(n.env[i], n.tmp, behind.tmp, 1)
		}
	}
	stockWork(t, n)
	if bin != "" && r.version < MaxVersion {
		t.Errorf("the newer Nix speaks %s, want %s", r.version, MaxVersion)
	}
	for _, code := range []Op{1, 6, 7, 9, 10, 11, 12, 14, 19, 20, 23, 26, 31, 35, 37, 38, 39, 40, 41, 44, 46} {
		if code == OpNarFromPath && r.version >= v38 {
			continue // such a client reads the files itself, also behind ssh-ng://localhost
		}
		if r.seen[code] == 0 {
			t.Errorf("operation %d was never sent", code)
		}
	}
	t.Logf("operations seen: %v", r.seen)
}

// spawn relays conn to a daemon of its own.
func (r *relay) spawn(cmd *exec.Cmd, conn net.Conn) error {
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	var bad bytes.Buffer
	cmd.Stderr = &bad
	if err := cmd.Start(); err != nil {
		return err
	}
	err = r.converse(conn, struct {
		io.Reader
		io.Writer
	}{out, in})
	conn.Close()
	in.Close()
	if werr := cmd.Wait(); err != nil && werr != nil {
		return fmt.Errorf("%w; %w: %s", err, werr, bad.Bytes())
	}
	return err
}

// stockWork does a bit of everything.
func stockWork(t *testing.T, n *stock) {
	t.Helper()
	source := n.run("nix-store", "--add", tree(t, map[string]string{"a": "1", "b/c": "2"}))
	n.run("nix-store", "--add-fixed", "sha256", source+"/a")
	expr := `let dep = builtins.toFile "dep" "dep"; in derivation {
		name = "made"; system = builtins.currentSystem; builder = "/bin/sh"; outputs = [ "out" "dev" ];
		args = [ "-c" "echo building; echo ${dep} > $out; echo $out > $dev" ]; }`
	out := lines(n.run("nix-build", "--no-out-link", "-E", expr))[0]
	n.run("nix", "build", "--no-link", "--impure", "--expr", expr)
	n.run("nix-build", "-E", expr)
	n.run("nix-store", "-qR", out)
	n.run("nix-store", "-q", "--referrers", out)
	n.run("nix-store", "-q", "--outputs", n.run("nix-store", "-q", "--deriver", out))
	n.run("nix", "path-info", "--all", "--json")
	n.run("nix-build", "--dry-run", "-E", expr)
	if _, bad, err := n.try("nix-build", "--no-out-link", "-E", `derivation { name = "bad"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo no; exit 3" ]; }`); err == nil || !strings.Contains(bad, "exit code 3") {
		t.Errorf("failing build: %v, %s", err, bad)
	}
	n.run("nix-build", "--no-out-link", "-E", `derivation { name = "ca"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo ca > $out" ];
		__contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; }`)
	cache := "file://" + n.tmp + "/cache"
	n.run("nix", "copy", "--to", cache, out)
	n.run("sh", "-c", "nix key generate-secret --key-name k > key && nix store sign -k key "+out)
	n.run("nix-store", "--export", out)
	n.run("nix-store", "--gc", "--print-roots")
	n.run("nix-store", "--gc", "--print-dead")
	n.run("nix-store", "--verify", "--check-contents")
	n.run("nix-store", "--verify")
	n.run("nix-store", "--optimise")
	n.run("sh", "-c", "rm -f result*; nix-collect-garbage")
	n.run("nix", "copy", "--no-check-sigs", "--from", cache, out)
	n.run("sh", "-c", "nix-store --export "+out+" > e; nix-store --import < e")
	n.run("sh", "-c", "nix store dump-path --store ssh-ng://localhost "+out+" > nar")
	n.run("nix-store", "-r", out)
}
