package backup

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// A content object holds blocks, and is never changed. Its name is the BLAKE3 of
// all of it. Integers are big endian:
//
//	"flxback1"
//	the blocks as they are stored, one behind the other
//	the index: for each block its CID (32), plain size (4), stored size (4) with
//	           the highest bit set if it is zstd
//	number of blocks (4)  BLAKE3-256 of the index (32)  "flxindex"
const (
	objectMagic = "flxback1"
	objectEnd   = "flxindex"
	entrySize   = flox.CIDSize + 4 + 4
	trailerSize = 4 + 32 + len(objectEnd)

	zstdBit = 1 << 31
	// ObjectSize is when an object is closed and the next begun, unless it is said otherwise.
	ObjectSize = 32 << 20
	// maxObject is the largest object that is read, maxEntries the most blocks in it.
	maxObject  = 64 << 20
	maxEntries = 1 << 19
	// tailSize is how much of an object's end is read at first: mostly all its index.
	tailSize = 64 << 10
)

// entry is a block in an object.
type entry struct {
	id            flox.CID
	plain, stored uint32
	zstd          bool
}

// put appends the entry to b.
func (e entry) put(b []byte) []byte {
	b = append(b, e.id[:]...)
	b = binary.BigEndian.AppendUint32(b, e.plain)
	stored := e.stored
	if e.zstd {
		stored |= zstdBit
	}
	return binary.BigEndian.AppendUint32(b, stored)
}

// parseEntry reads what put wrote; b has entrySize bytes.
func parseEntry(b []byte) entry {
	stored := binary.BigEndian.Uint32(b[flox.CIDSize+4:])
	return entry{
		id: flox.CID(b[:flox.CIDSize]), plain: binary.BigEndian.Uint32(b[flox.CIDSize:]),
		stored: stored &^ zstdBit, zstd: stored&zstdBit != 0,
	}
}

// objectName is where an object with a BLAKE3 digest lies.
func objectName(digest string) string { return contentPrefix + digest[:2] + "/" + digest }

// objectDigest is the other way round; false for what is no content object.
func objectDigest(name string) (string, bool) {
	digest := name[strings.LastIndexByte(name, '/')+1:]
	raw, err := hex.DecodeString(digest)
	return digest, err == nil && len(raw) == 32 && digest == strings.ToLower(digest) && objectName(digest) == name
}

// builder makes one object in memory.
type builder struct {
	buf     []byte
	entries []entry
}

func newBuilder() *builder { return &builder{buf: []byte(objectMagic)} }

// full reports whether the object is large enough.
func (b *builder) full(size int) bool { return len(b.buf) >= size || len(b.entries) == maxEntries }

// add appends a block and says where it begins.
func (b *builder) add(e entry, stored []byte) (off uint32) {
	off = uint32(len(b.buf)) //nolint:gosec // far below
	b.buf, b.entries = append(b.buf, stored...), append(b.entries, e)
	return off
}

// finish gives the object's bytes and its digest.
func (b *builder) finish() (digest string, object []byte) {
	first := len(b.buf)
	for _, e := range b.entries {
		b.buf = e.put(b.buf)
	}
	sum := blake3.Sum256(b.buf[first:])
	b.buf = binary.BigEndian.AppendUint32(b.buf, uint32(len(b.entries))) //nolint:gosec // at most maxEntries
	b.buf = append(append(b.buf, sum[:]...), objectEnd...)
	all := blake3.Sum256(b.buf)
	return hex.EncodeToString(all[:]), b.buf
}

// parseTail reads the index in the last bytes of an object of size bytes. It asks
// for more of them with need > 0.
func parseTail(tail []byte, size int64) (entries []entry, need int64, err error) {
	bad := func(format string, args ...any) ([]entry, int64, error) {
		return nil, 0, fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), flox.ErrCorrupt)
	}
	if len(tail) < trailerSize || string(tail[len(tail)-len(objectEnd):]) != objectEnd {
		return bad("it does not end as a content object does: it is cut off, or none")
	}
	trailer := tail[len(tail)-trailerSize:]
	count := binary.BigEndian.Uint32(trailer)
	if count > maxEntries {
		return bad("an index of %d blocks, want at most %d", count, maxEntries)
	}
	length := int64(count)*entrySize + int64(trailerSize)
	if length > size-int64(len(objectMagic)) {
		return bad("an index of %d blocks in %d bytes", count, size)
	}
	if length > int64(len(tail)) {
		return nil, length, nil
	}
	raw := tail[int64(len(tail))-length : len(tail)-trailerSize]
	if sum := blake3.Sum256(raw); !bytes.Equal(sum[:], trailer[4:36]) {
		return bad("its index does not match its sum")
	}
	end := int64(len(objectMagic))
	for ; len(raw) > 0; raw = raw[entrySize:] {
		e := parseEntry(raw)
		if e.plain > content.MaxBlock || e.stored > e.plain || !e.zstd && e.stored != e.plain {
			return bad("block %s of %d bytes stored in %d", e.id, e.plain, e.stored)
		}
		entries = append(entries, e)
		end += int64(e.stored)
	}
	if end != size-length {
		return bad("%d bytes of blocks, its index says %d", size-length, end)
	}
	return entries, 0, nil
}

// readIndex reads the index of an object, and its size once more from that.
func (p *Place) readIndex(ctx context.Context, name string, size int64) ([]entry, error) {
	want := min(size, tailSize)
	for {
		tail, err := p.part(ctx, name, size-want, want, want)
		if err != nil {
			return nil, err
		}
		if int64(len(tail)) != want {
			return nil, fmt.Errorf("%s: %s ends at %d of %d bytes: %w", p, name, size-want+int64(len(tail)), size, flox.ErrCorrupt)
		}
		entries, need, err := parseTail(tail, size)
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %w", p, name, err)
		}
		if need == 0 {
			return entries, nil
		}
		want = need
	}
}

// readObject reads a whole object, checks that it is what its name says, and calls
// f with every block. stored is f's only until it returns.
func (p *Place) readObject(ctx context.Context, o Object, f func(e entry, stored []byte) error) error {
	name := objectName(o.Digest)
	if o.Size > maxObject {
		return fmt.Errorf("%s: %s of %d bytes, want at most %d: %w", p, name, o.Size, maxObject, flox.ErrCorrupt)
	}
	b, err := p.part(ctx, name, 0, -1, o.Size+1)
	if err != nil {
		return err
	}
	sum := blake3.Sum256(b)
	if int64(len(b)) != o.Size || hex.EncodeToString(sum[:]) != o.Digest {
		return fmt.Errorf("%s: the %d bytes of %s are not those that its name says: %w", p, len(b), name, flox.ErrCorrupt)
	}
	entries, need, err := parseTail(b, o.Size)
	if err == nil && (need > 0 || !bytes.HasPrefix(b, []byte(objectMagic))) {
		err = fmt.Errorf("no content object: %w", flox.ErrCorrupt)
	}
	if err != nil {
		return fmt.Errorf("%s: %s: %w", p, name, err)
	}
	at := len(objectMagic)
	for _, e := range entries {
		if err := f(e, b[at:at+int(e.stored)]); err != nil {
			return err
		}
		at += int(e.stored)
	}
	return nil
}
