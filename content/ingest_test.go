package content

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// What is no NAR, or not only a NAR, is refused with a reason; so is a NAR cut off
// anywhere.
func TestIngestRefuses(t *testing.T) {
	ctx := context.Background()
	nar := narOf(t, smallTree())
	for name, b := range map[string][]byte{
		"empty": nil, "rubbish": []byte("rubbish"), "trailing byte": append(bytes.Clone(nar), 0), "twice": append(bytes.Clone(nar), nar...),
	} {
		if _, err := Ingest(ctx, bytes.NewReader(b), &Memory{}, IngestOptions{}); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for at := 0; at < len(nar); at += 1 + at/50 {
		if _, err := Ingest(ctx, bytes.NewReader(nar[:at]), &discard{}, IngestOptions{}); !errors.Is(err, flox.ErrBadInput) {
			t.Fatalf("cut at %d: %v", at, err)
		}
	}
	if _, err := Ingest(ctx, bytes.NewReader(nar), &Memory{}, IngestOptions{Params: Params{MinChunk: 1}}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("parameters: %v", err)
	}
}

// A NAR inside a stream is taken without a byte of what follows.
func TestIngestEmbedded(t *testing.T) {
	nar := narOf(t, smallTree())
	r := bytes.NewReader(append(bytes.Clone(nar), "more"...))
	got, err := Ingest(context.Background(), slowReader{r}, &Memory{}, IngestOptions{Embedded: true})
	if err != nil || got.NarSize != uint64(len(nar)) {
		t.Fatalf("%+v: %v", got, err)
	}
	if rest, _ := io.ReadAll(r); string(rest) != "more" {
		t.Fatalf("left %q", rest)
	}
}

// The result does not depend on workers or on how the stream arrives.
func TestIngestIsDeterministic(t *testing.T) {
	ctx := context.Background()
	nar := narOf(t, append(smallTree(), fileNode("zz", random(9, 3<<20))))
	var want *Ingested
	for _, workers := range []int{1, 2, 7} {
		for _, r := range []io.Reader{bytes.NewReader(nar), slowReader{bytes.NewReader(nar)}} {
			got, err := Ingest(ctx, r, &Memory{}, IngestOptions{Workers: workers})
			if err != nil {
				t.Fatal(err)
			}
			if want == nil {
				want = got
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatal(diff)
			}
		}
	}
}

type failingSink struct {
	discard
	after int64
}

var errSink = errors.New("sink failed")

func (f *failingSink) Put(ctx context.Context, id flox.CID, b []byte) error {
	if f.blocks.Load() >= f.after {
		return errSink
	}
	return f.discard.Put(ctx, id, b)
}

// A sink that fails ends the ingest with its error, at whatever block, and nothing
// is synced; so does a context that ends.
func TestIngestStops(t *testing.T) {
	nar := narOf(t, append(hugeFileTree(), bigTree(50)[1:]...)[:3])
	for _, after := range []int64{0, 1, 700, 1400} {
		sink := &failingSink{after: after}
		if _, err := Ingest(context.Background(), bytes.NewReader(nar), sink, IngestOptions{}); !errors.Is(err, errSink) || sink.syncs.Load() != 0 {
			t.Errorf("after %d blocks: %v, %d syncs", after, err, sink.syncs.Load())
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := io.MultiReader(bytes.NewReader(nar[:1<<20]), readerFunc(func(p []byte) (int, error) {
		cancel()
		clear(p)
		return len(p), nil
	}))
	if _, err := Ingest(ctx, r, &discard{}, IngestOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

const (
	pathA = flox.StorePath("0c5b8vw40dy178xlpddw65q9gf1h2186-a")
	pathB = flox.StorePath("1i9cqlwa5ddqd5yi6dv6x09kl1wq6h1c-b")
	pathC = flox.StorePath("sjbl5a9y0rk1y0i7v1ff3nxvp3zrcv2z-c")
)

// References are found wherever they stand, also across buffers, and only whole.
func TestReferences(t *testing.T) {
	filler := strings.Repeat("0123456789abcdfghijklmnpqrsvwxyz-", 9000)
	for name, data := range map[string]string{
		"plain":  "x /nix/store/" + string(pathB) + "/bin",
		"buffer": filler[:tapBuffer-500] + pathB.HashPart() + filler,
		"end":    filler + pathB.HashPart(),
	} {
		for shift := range 40 {
			nar := narOf(t, []node{dirNode(""), fileNode("f", []byte(filler[:shift*13]+data)), linkNode("l", "/nix/store/"+string(pathA)), fileNode("z", []byte(pathC.HashPart()[:31]))})
			got, err := Ingest(context.Background(), slowReader{bytes.NewReader(nar)}, &discard{}, IngestOptions{Candidates: []flox.StorePath{pathC, pathB, pathA}})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]flox.StorePath{pathA, pathB}, got.References); diff != "" || !got.Scanned {
				t.Fatalf("%s, shift %d: %s", name, shift, diff)
			}
		}
	}
}

// Check says what differs, with both values.
func TestCheck(t *testing.T) {
	good := Ingested{NarHash: [32]byte{1}, NarSize: 100, Scanned: true, References: []flox.StorePath{pathA}}
	info := flox.PathInfo{Path: pathB, NarHash: [32]byte{1}, NarSize: 100, References: []flox.StorePath{pathA, pathB}}
	if err := Check(&info, &good); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*flox.PathInfo)
		says   []string
	}{
		"hash":      {func(i *flox.PathInfo) { i.NarHash[0] = 2 }, []string{nix.SHA256Hash([32]byte{1}).String(), nix.SHA256Hash([32]byte{2}).String()}},
		"size":      {func(i *flox.PathInfo) { i.NarSize = 99 }, []string{"99", "100"}},
		"reference": {func(i *flox.PathInfo) { i.References = nil }, []string{string(pathA)}},
	} {
		bad := info
		c.change(&bad)
		err := Check(&bad, &good)
		if !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, s := range append(c.says, string(pathB)) {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: %q does not name %s", name, err, s)
			}
		}
	}
}

// stream generates the NAR of one file of size bytes.
func stream(t *testing.T, size int64) io.Reader {
	t.Helper()
	var f nix.NarFramer
	var head []byte
	for _, n := range []node{dirNode(""), {NarEntry: nix.NarEntry{Path: "huge", Kind: flox.Regular, Size: uint64(size)}}} {
		b, err := f.Next(n.NarEntry)
		if err != nil {
			t.Fatal(err)
		}
		head = append(head, b...)
	}
	tail, err := f.End()
	if err != nil {
		t.Fatal(err)
	}
	block, at := random(1, 1<<20), uint64(0)
	body := readerFunc(func(p []byte) (int, error) {
		n := copy(p, block[at%uint64(len(block)):])
		at += uint64(n)
		if at%uint64(len(block)) == 0 {
			block[at>>20%uint64(len(block))]++ // never quite the same again
		}
		return n, nil
	})
	return io.MultiReader(bytes.NewReader(head), io.LimitReader(body, size), bytes.NewReader(tail))
}

// The memory an ingest needs does not grow with the size of a file.
func TestIngestMemoryIsBounded(t *testing.T) {
	size := int64(2 << 30)
	if testing.Short() || raceEnabled {
		size = 256 << 20
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	peak := uint64(0)
	r := stream(t, size)
	read := int64(0)
	watched := readerFunc(func(p []byte) (int, error) {
		n, err := r.Read(p)
		if read += int64(n); read>>27 != (read-int64(n))>>27 { // every 128 MiB
			runtime.ReadMemStats(&after)
			peak = max(peak, after.HeapAlloc)
		}
		return n, err
	})
	got, err := Ingest(context.Background(), watched, &discard{}, IngestOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got.Bytes != uint64(size) || got.ManifestBlocks < 3 || peak == 0 {
		t.Fatalf("%+v", got)
	}
	if grown := int64(peak) - int64(before.HeapAlloc); grown > 48<<20 {
		t.Fatalf("heap grew by %d MiB over %d MiB of content", grown>>20, size>>20)
	}
}

// The NAR real Nix makes of a real tree is the one that comes back.
func TestRealNar(t *testing.T) {
	if _, err := exec.LookPath("nix-store"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	const tree = "/usr/lib/git-core" // links, hard links, executables, directories
	if _, err := os.Stat(tree); err != nil {
		t.Fatal(err)
	}
	tmp := t.TempDir()
	cmd := exec.Command("nix-store", "--dump", tree)
	cmd.Env = append(os.Environ(), "NIX_STORE_DIR="+tmp+"/store", "NIX_STATE_DIR="+tmp+"/state", "NIX_LOG_DIR="+tmp+"/log", "NIX_CONF_DIR="+tmp+"/conf")
	nar, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	mem := &Memory{}
	got, err := IngestPath(ctx, tree, mem, IngestOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := OpenManifest(ctx, got.Manifest, mem)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := m.WriteNar(ctx, &b, mem, 0, -1); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b.Bytes(), nar) {
		t.Fatalf("the NAR of %s differs from nix-store's: %d bytes, want %d", tree, b.Len(), len(nar))
	}
}

// A tree that cannot be read is refused with its name.
func TestIngestPathRefuses(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	if _, err := IngestPath(context.Background(), missing, &discard{}, IngestOptions{}); err == nil || !strings.Contains(err.Error(), missing) {
		t.Fatal(err)
	}
	sink := &failingSink{}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "big"), random(1, 4<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := IngestPath(context.Background(), dir, sink, IngestOptions{}); !errors.Is(err, errSink) {
		t.Fatal(err)
	}
}
