package nix

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"

	"github.com/floxctl/flox"
)

// bzip2Sample is "hello hello hello\n"; nothing we link writes bzip2.
const bzip2Sample = "QlpoOTFBWSZTWeW18wkAAARRAAAQQAACRKAAIbUYDAKQacKjC7kinChIctr5hIA="

func compress(t testing.TB, name string, plain []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch name {
	case "none":
		return plain
	case "xz":
		w, err = xz.NewWriter(&out)
	case "zstd":
		w, err = zstd.NewWriter(&out)
	case "gzip":
		w = gzip.NewWriter(&out)
	case "br":
		w = brotli.NewWriter(&out)
	case "lz4":
		w = lz4.NewWriter(&out)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(plain); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func decompress(name string, r io.Reader, most uint64) ([]byte, error) {
	d, err := Decompressor(name, r, most)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(d)
	return b, errors.Join(err, d.Close())
}

func mixed(n int) []byte {
	r := rand.New(rand.NewPCG(7, 8))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.IntN(1 + i>>10&15))
	}
	return b
}

func TestDecompressor(t *testing.T) {
	plain := mixed(100_000)
	for _, name := range []string{"none", "xz", "zstd", "gzip", "br", "lz4"} {
		packed := compress(t, name, plain)
		for _, src := range []io.Reader{bytes.NewReader(packed), iotest.HalfReader(bytes.NewReader(packed)), iotest.DataErrReader(bytes.NewReader(packed))} {
			if got, err := decompress(name, src, uint64(len(plain))); err != nil || !bytes.Equal(got, plain) {
				t.Errorf("%s: %d bytes, %v", name, len(got), err)
			}
		}
		if name == "none" || name == "br" {
			continue
		}
		// The bytes decide, not the name; two streams one after the other are one.
		for _, lie := range []string{"xz", "zstd", "bzip2", "whatever"} {
			if got, err := decompress(lie, bytes.NewReader(append(packed[:len(packed):len(packed)], packed...)), math.MaxUint64); err != nil || !bytes.Equal(got, append(plain[:len(plain):len(plain)], plain...)) {
				t.Errorf("%s named %s, twice: %d bytes, %v", name, lie, len(got), err)
			}
		}
	}
	packed, err := base64.StdEncoding.DecodeString(bzip2Sample)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := decompress("bzip2", bytes.NewReader(packed), 18); err != nil || string(got) != "hello hello hello\n" {
		t.Errorf("bzip2: %q, %v", got, err)
	}
}

func TestDecompressorRefuses(t *testing.T) {
	plain := mixed(30_000)
	for _, name := range []string{"xz", "zstd", "gzip", "br", "lz4"} {
		packed := compress(t, name, []byte("hello"))
		for n := 1; n < len(packed); n++ {
			if _, err := decompress(name, bytes.NewReader(packed[:n]), math.MaxUint64); !errors.Is(err, flox.ErrBadInput) {
				t.Errorf("%s cut at %d: %v", name, n, err)
			}
		}
		packed = compress(t, name, plain)
		down := errors.New("network down")
		if _, err := decompress(name, io.MultiReader(bytes.NewReader(packed[:len(packed)/2]), iotest.ErrReader(down)), math.MaxUint64); !errors.Is(err, down) || errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s, source fails: %v", name, err)
		}
		got, err := decompress(name, bytes.NewReader(packed), uint64(len(plain)-1))
		if !errors.Is(err, flox.ErrBadInput) || len(got) != len(plain)-1 {
			t.Errorf("%s with a byte too many: %d bytes, %v", name, len(got), err)
		}
	}
	for name, b := range map[string]string{"lzip": "LZIP\x01\x0c", "xz": "nix-archive-1", "": "", "zstd": ""} {
		_, err := decompress(name, strings.NewReader(b), math.MaxUint64)
		if name == "" {
			if err != nil {
				t.Errorf("nothing, uncompressed: %v", err)
			}
			continue
		}
		if !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), knownCompressions) {
			t.Errorf("%s: %v, want the name and what is known", name, err)
		}
	}
}

// A small file that unpacks to very much must end at the announced size.
func TestDecompressorBombs(t *testing.T) {
	for _, name := range []string{"xz", "zstd", "gzip", "br", "lz4"} {
		bomb := compress(t, name, make([]byte, 8<<20))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		d, err := Decompressor(name, bytes.NewReader(bomb), 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, d)
		runtime.ReadMemStats(&after)
		if n != 1<<20 || !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %d bytes of %d packed, %v", name, n, len(bomb), err)
		}
		// The largest window here is xz's own default, 8 MiB.
		if got := after.TotalAlloc - before.TotalAlloc; got > 40<<20 {
			t.Errorf("%s: %d bytes allocated", name, got)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// xzBlocks is a stream of empty blocks, each asking for a dictionary.
func xzBlocks(blocks int, dict byte) []byte {
	out := []byte("\xfd7zXZ\x00\x00\x00")
	out = binary.LittleEndian.AppendUint32(out, crc32.ChecksumIEEE(out[6:8]))
	header := []byte{2, 0, 0x21, 1, dict, 0, 0, 0}
	header = binary.LittleEndian.AppendUint32(header, crc32.ChecksumIEEE(header))
	for range blocks {
		out = append(out, header...)
		out = append(out, 0, 0, 0, 0) // the end of its chunks, and padding
	}
	return out
}

// A header that asks for much memory must be refused before it gets any.
func TestDecompressorMemory(t *testing.T) {
	window := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, (31 - 10) << 3, 0x01, 0x00, 0x00} // of 2^31 bytes
	for name, b := range map[string][]byte{
		"xz with 4 GiB":       xzBlocks(1, 40),
		"xz with 1 GiB":       xzBlocks(1, 36),
		"xz with many blocks": xzBlocks(100_000, 30),
		"zstd with 2 GiB":     window,
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := decompress(strings.Fields(name)[0], bytes.NewReader(b), math.MaxUint64)
		runtime.ReadMemStats(&after)
		if !errors.Is(err, flox.ErrBadInput) || errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v", name, err)
		}
		if got := after.TotalAlloc - before.TotalAlloc; got > 3*MaxDecoderWindow {
			t.Errorf("%s: %d bytes allocated", name, got)
		}
	}
}

// Files as encoders really write them must pass the guard.
func TestXZGuardPassesBlocksAndStreams(t *testing.T) {
	plain := mixed(100_000)
	var out bytes.Buffer
	for range 5 {
		w, err := xz.WriterConfig{BlockSize: 20_000, DictCap: 64 << 10, CheckSum: xz.SHA256}.NewWriter(&out)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(plain); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		out.Write(make([]byte, 8)) // stream padding
	}
	got, err := decompress("xz", iotest.OneByteReader(&out), math.MaxUint64)
	if err != nil || !bytes.Equal(got, bytes.Repeat(plain, 5)) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func FuzzDecompressor(f *testing.F) {
	for _, name := range []string{"xz", "zstd", "gzip", "lz4"} {
		f.Add(compress(f, name, []byte("hello hello hello")))
	}
	f.Add(xzBlocks(3, 0))
	f.Add([]byte("\x1f\x8b\b0000000"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := decompress("xz", bytes.NewReader(b), 1<<20)
		if err != nil && !errors.Is(err, flox.ErrBadInput) {
			t.Fatal(err)
		}
		if len(got) > 1<<20 {
			t.Fatalf("%d bytes", len(got))
		}
	})
}
