package fuse

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/floxctl/flox"
)

func TestMountRefuses(t *testing.T) {
	needMount(t)
	top := t.TempDir()
	at := func(name string) string { return filepath.Join(top, name) }
	for _, d := range []string{"empty", "full"} {
		if err := os.Mkdir(at(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(at("full/file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		cfg  MountConfig
		want error
		says string
	}{
		{"a directory that is missing", MountConfig{Dir: at("none")}, flox.ErrNotFound, "mkdir -p"},
		{"a file", MountConfig{Dir: at("full/file")}, flox.ErrBadInput, "not a directory"},
		{"a directory with something in it", MountConfig{Dir: at("full")}, flox.ErrBusy, `"file"`},
		{"a mount point", MountConfig{Dir: "/proc"}, flox.ErrBusy, "umount /proc"},
		{"a relative directory", MountConfig{Dir: "empty"}, flox.ErrBadInput, "absolute"},
		{"no device", MountConfig{Dir: at("empty"), DevicePath: at("no-fuse")}, flox.ErrNotFound, "modprobe fuse"},
	} {
		_, err := Mount(c.cfg)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %v saying %q", c.name, err, c.want, c.says)
		}
	}
}

func TestMountWithoutRootSaysSudo(t *testing.T) {
	needMount(t)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	// The test binary lies where only root may go.
	dir, err := os.MkdirTemp("", "flox-noroot")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	prog := filepath.Join(dir, "prog")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(prog, self, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(prog)
	cmd.Env = append(os.Environ(), modeEnv+"=nobody")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// mountAsNobody is run by TestMountWithoutRootSaysSudo as an ordinary user.
func mountAsNobody() error {
	_, err := Mount(MountConfig{Dir: "/"})
	if !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "sudo") {
		return fmt.Errorf("as nobody: %w", err)
	}
	return nil
}

// initBytes is what Mount would have put into Device.Init.
func initBytes(t testing.TB) []byte {
	request := make([]byte, inHeaderSize+64)
	binary.NativeEndian.PutUint32(request, uint32(len(request)))
	binary.NativeEndian.PutUint32(request[4:], opInit)
	binary.NativeEndian.PutUint32(request[inHeaderSize:], 7)
	binary.NativeEndian.PutUint32(request[inHeaderSize+4:], 45)
	binary.NativeEndian.PutUint32(request[inHeaderSize+8:], 128<<10)
	binary.NativeEndian.PutUint32(request[inHeaderSize+12:], math.MaxUint32)
	binary.NativeEndian.PutUint32(request[inHeaderSize+16:], math.MaxUint32>>1)
	opts := options(slog.New(slog.DiscardHandler))
	answer, err := handleInit(fuse.NewProtocolServer(fuse.NewDefaultRawFileSystem(), opts), request)
	if err != nil {
		t.Fatal(err)
	}
	tunedInit(answer)
	return append(request, answer...)
}

func TestInitAsksForWhatTheMountNeeds(t *testing.T) {
	_, answer, err := splitInit(initBytes(t))
	if err != nil {
		t.Fatal(err)
	}
	b := answer[outHeaderSize:]
	flags := uint64(binary.NativeEndian.Uint32(b[12:])) | uint64(binary.NativeEndian.Uint32(b[32:]))<<32
	for name, want := range map[string]uint64{
		"no open": fuse.CAP_NO_OPEN_SUPPORT, "no opendir": fuse.CAP_NO_OPENDIR_SUPPORT, "symlinks": fuse.CAP_CACHE_SYMLINKS,
		"readdirplus": fuse.CAP_READDIRPLUS_AUTO, "resend": fuse.CAP_HAS_RESEND, "parallel": fuse.CAP_PARALLEL_DIROPS,
	} {
		if flags&want == 0 {
			t.Errorf("%s is not asked for", name)
		}
	}
	for name, no := range map[string]uint64{"passthrough": fuse.CAP_PASSTHROUGH, "automatic invalidation": fuse.CAP_AUTO_INVAL_DATA} {
		if flags&no != 0 {
			t.Errorf("%s is asked for", name)
		}
	}
	if w, p := binary.NativeEndian.Uint32(b[20:]), binary.NativeEndian.Uint16(b[28:]); w != 4096 || p != 256 {
		t.Errorf("max_write %d, want 4096; max_pages %d, want 256", w, p)
	}
}

func TestNewServerRefuses(t *testing.T) {
	table := filepath.Join(t.TempDir(), "nodes")
	good := ServerConfig{Device: os.Stdin, Init: initBytes(t), Store: newMemStore(), NodeTable: table}
	if _, err := NewServer(good); err != nil {
		t.Fatal(err)
	}
	junk := filepath.Join(t.TempDir(), "junk")
	if err := os.WriteFile(junk, []byte("not a table, but long enough"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*ServerConfig)
		want   error
	}{
		"no device":       {func(c *ServerConfig) { c.Device = nil }, flox.ErrBadInput},
		"no store":        {func(c *ServerConfig) { c.Store = nil }, flox.ErrBadInput},
		"no table":        {func(c *ServerConfig) { c.NodeTable = "" }, flox.ErrBadInput},
		"negative time":   {func(c *ServerConfig) { c.ReadTimeout = -1 }, flox.ErrBadInput},
		"INIT cut short":  {func(c *ServerConfig) { c.Init = c.Init[:50] }, flox.ErrBadInput},
		"no INIT":         {func(c *ServerConfig) { c.Init = nil }, flox.ErrBadInput},
		"a foreign table": {func(c *ServerConfig) { c.NodeTable = junk }, flox.ErrCorrupt},
	} {
		cfg := good
		c.change(&cfg)
		if _, err := NewServer(cfg); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestNodeTable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nodes")
	a, b, c := flox.CID{1}, flox.CID{2}, flox.CID{3}
	one, err := openNodeTable(path)
	if err != nil {
		t.Fatal(err)
	}
	give := func(table *nodeTable, id flox.CID) uint64 {
		t.Helper()
		node, err := table.give(id)
		if err != nil {
			t.Fatal(err)
		}
		return node
	}
	na, nb := give(one, a), give(one, b)
	if na == nb || na>>32 == 0 || na&math.MaxUint32 != 0 || give(one, a) != na {
		t.Fatalf("nodes %x and %x", na, nb)
	}
	// A record cut off by a crash is dropped, what was whole keeps its number.
	f, _ := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	f.Write([]byte("half a record"))
	f.Close()
	two, err := openNodeTable(path)
	if err != nil {
		t.Fatal(err)
	}
	if n, ok := two.node(b, 7); !ok || n != nb|7 {
		t.Errorf("after reopening: %x, want %x", n, nb|7)
	}
	nc := give(two, c)
	if id, i, ok := two.resolve(nc | 9); !ok || id != c || i != 9 || nc == na || nc == nb {
		t.Errorf("resolve %x: %v %d %v", nc|9, id, i, ok)
	}
	for _, foreign := range []uint64{0, rootNode, 5, na - 1<<32, nc + 1<<32, math.MaxUint64} {
		if _, _, ok := two.resolve(foreign); ok {
			t.Errorf("foreign node %x leads somewhere", foreign)
		}
	}
	// The table of one that was replaced must not be written any more.
	if _, err := one.give(flox.CID{4}); !errors.Is(err, flox.ErrBusy) {
		t.Errorf("two writers: %v", err)
	}
	// A lost table leads nowhere, never into another store path.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	three, err := openNodeTable(path)
	if err != nil {
		t.Fatal(err)
	}
	give(three, c)
	if id, _, ok := three.resolve(na); ok {
		t.Errorf("a node of the lost table leads to %v", id)
	}
}

func FuzzNodeTable(f *testing.F) {
	good := append(append(tableMagic[:len(tableMagic):len(tableMagic)], 1, 0, 0, 0, 0, 0, 0, 0), bytes.Repeat([]byte{7}, 40)...)
	f.Add(good)
	f.Add([]byte("floxnod1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		table := &nodeTable{ordinals: map[flox.CID]uint32{}}
		size, err := table.read(bytes.NewReader(b))
		if err == nil && (size > int64(len(b)) || size != table.size()) {
			t.Errorf("%d of %d bytes", size, len(b))
		}
	})
}

func FuzzRequestHeaders(f *testing.F) {
	f.Add(initBytes(f)[:inHeaderSize+64])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		splitInit(b)
		h, err := parseHeader(b)
		if err != nil {
			return
		}
		if n := payloadSize(h.op, b); n < 0 || n > maxRead {
			t.Errorf("payload of %d bytes", n)
		}
		if name := lookupName(b); strings.Contains(name, "\x00") {
			t.Errorf("name %q", name)
		}
		interrupted(b)
		_ = opNames[slot(h.op)]
	})
}

func TestRootCursor(t *testing.T) {
	name := func(hash string) string { return hash + strings.Repeat("0", 32-len(hash)) + "-x" }
	var names []string
	for i := range 500 {
		names = append(names, manyName(i*7919))
	}
	for i := range 20 { // equal beginnings
		names = append(names, name("abcdfghijkl"+string(base32[i])), name("00000000000"+string(base32[i])))
	}
	names = append(names, name("zzzzzzzzzzzzzzzz"), name("0"))
	slices.Sort(names)
	names = slices.Compact(names)
	// A listing in pieces of any size has every name once.
	for _, piece := range []int{1, 2, 3, 7, 100} {
		var got []string
		off := uint64(firstChild)
		for more := true; more; {
			more = false
			pos, n := newRootCursor(off), 0
			for _, name := range names {
				if name <= pos.after {
					continue
				}
				at, listed := pos.next(name)
				if !listed {
					if n == piece {
						more = true
						break
					}
					if at <= off {
						t.Fatalf("offset %d behind %d", at, off)
					}
					got, off = append(got, name), at
					n++
				}
				pos.pass(name)
			}
		}
		if diff := cmp.Diff(names, got); diff != "" {
			t.Errorf("pieces of %d (-want +got):\n%s", piece, diff)
		}
	}
	// Names that come and go meanwhile do not disturb the others.
	pos := newRootCursor(0)
	off, _ := pos.next(names[250])
	resumed := newRootCursor(off)
	if resumed.after >= names[250] || resumed.after <= names[249] {
		t.Errorf("resumes behind %q, want before %q", resumed.after, names[250])
	}
}

// More names with one beginning than an offset can tell apart must not make a
// listing go round in circles.
func TestRootCursorEnds(t *testing.T) {
	var names []string
	for i := range 100 {
		names = append(names, "abcdfghijkl"+prefixString(uint64(i))+"0000000000-x")
	}
	off := uint64(0)
	for range 200 {
		pos, moved := newRootCursor(off), false
		for _, name := range names {
			if at, listed := pos.next(name); !listed {
				off, moved = at, true
				break
			}
			pos.pass(name)
		}
		if !moved {
			return
		}
	}
	t.Error("a listing does not end")
}

func TestKillPending(t *testing.T) {
	status := func(sig, shd string) []byte {
		return []byte("Name:\tcat\nState:\tD (disk sleep)\nSigQ:\t0/95\nSigPnd:\t" + sig + "\nShdPnd:\t" + shd + "\nSigBlk:\t0000000000000100\n")
	}
	const none, kill, alarm, both = "0000000000000000", "0000000000000100", "0000000000002000", "0000000000002100"
	for _, c := range []struct {
		status []byte
		want   bool
	}{
		{status(none, none), false},
		{status(alarm, alarm), false},
		{status(kill, none), true},
		{status(none, kill), true},
		{status(both, none), true},
		{nil, false},
		{[]byte("\nSigPnd:\tx\n"), false},
	} {
		if got := killPending(c.status); got != c.want {
			t.Errorf("%s: %v", c.status, got)
		}
	}
}

func TestFindMount(t *testing.T) {
	const table = `22 1 254:0 / / rw,relatime - ext4 /dev/root rw
36 22 0:30 / /nix/store ro,nosuid shared:1 - ext4 /dev/sdb rw
40 36 0:47 / /nix/store ro,nosuid,nodev - fuse.floxd floxd rw,user_id=0
41 22 0:48 / /with\040blank rw master:1 shared:2 - tmpfs tm\134pfs rw
broken line
42 22 0:49 / /cut
`
	for dir, want := range map[string]*MountInfo{
		"/nix/store":  {"/nix/store", "0:47", "fuse.floxd", "floxd"},
		"/with blank": {"/with blank", "0:48", "tmpfs", `tm\pfs`},
		"/":           {"/", "254:0", "ext4", "/dev/root"},
		"/nix":        nil, "/cut": nil,
	} {
		if diff := cmp.Diff(want, findMount(table, dir)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", dir, diff)
		}
	}
}

func FuzzMountInfo(f *testing.F) {
	f.Add(`36 35 98:0 /root /dir\040x rw,noatime shared:1 - ext3 /dev/root rw`)
	f.Fuzz(func(t *testing.T, line string) {
		if m, ok := parseMountInfo(line); ok && len(m.Dir) > len(line) {
			t.Error(m)
		}
	})
}

func TestErrno(t *testing.T) {
	for _, c := range []struct {
		err  error
		want fuse.Status
	}{
		{nil, fuse.OK},
		{flox.ErrUnreachable, fuse.EIO},
		{flox.ErrCorrupt, fuse.EIO},
		{flox.ErrFull, fuse.EIO},
		// Only who knows that a name is missing may say ENOENT.
		{flox.ErrNotFound, fuse.EIO},
		{errKilled, fuse.EINTR},
		{flox.ErrDenied, fuse.EACCES},
		{errors.New("x"), fuse.EIO},
	} {
		if got := errno(c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}

// A listed name whose kind nobody knows yet has type 0, DT_UNKNOWN: with that of a
// file, find(1) would not descend into a store path that was never opened.
func TestUnknownKindsAreListedAsUnknown(t *testing.T) {
	nodes, err := openNodeTable(filepath.Join(t.TempDir(), "nodes"))
	if err != nil {
		t.Fatal(err)
	}
	f := &files{s: &Server{nodes: nodes}}
	pos := newRootCursor(0)
	for kind, want := range map[flox.Kind]uint32{0: 0, flox.Directory: syscall.S_IFDIR, flox.Regular: syscall.S_IFREG, flox.Symlink: syscall.S_IFLNK} {
		f.addName(&pos, flox.Named{Name: fmt.Sprintf("%032d-x", kind), Kind: kind}, func(e fuse.DirEntry, _ flox.Entry) bool {
			if got := e.Mode & syscall.S_IFMT; got != want {
				t.Errorf("kind %v is listed with type %o, want %o", kind, got, want)
			}
			return true
		})
	}
}
