package content

import (
	"encoding/binary"

	"github.com/floxctl/flox"
)

// appendChunks encodes chunks behind their number.
func appendChunks(b []byte, chunks []flox.Chunk) []byte {
	b = binary.AppendUvarint(b, uint64(len(chunks)))
	for _, c := range chunks {
		b = binary.AppendUvarint(b, uint64(c.Size))
		b = append(b, c.ID[:]...)
	}
	return b
}

// encodeList is a chunk-list block.
func encodeList(chunks []flox.Chunk) []byte {
	return appendChunks([]byte(magicList), chunks)
}

// chunkBytes is the least an encoded chunk takes.
const chunkBytes = 1 + flox.CIDSize

// chunks reads what appendChunks wrote, of least..listChunks chunks. Only the
// file's very last chunk may be shorter than the chunker's minimum. Without keep
// it only checks.
func (d *decoder) chunks(p Params, least uint64, last, keep bool) (chunks []flox.Chunk, size uint64) {
	n := d.uvarint("number of chunks", listChunks)
	if d.err == nil && (n < least || int(n) > d.rest()/chunkBytes) {
		d.fail("%d chunks in %d bytes, want at least %d", n, d.rest(), least)
	}
	if d.err == nil && keep {
		chunks = make([]flox.Chunk, 0, n)
	}
	for i := uint64(0); i < n && d.err == nil; i++ {
		c := d.chunk(p, last && i == n-1)
		if keep {
			chunks = append(chunks, c)
		}
		size += uint64(c.Size)
	}
	return chunks, size
}

func (d *decoder) chunk(p Params, last bool) flox.Chunk {
	size := d.uvarint("size of a chunk", uint64(p.MaxChunk))
	if d.err == nil && (size == 0 || !last && size < uint64(p.MinChunk)) {
		d.fail("a chunk of %d bytes, want at least %d", size, p.MinChunk)
	}
	return flox.Chunk{Size: uint32(size), ID: d.cid()}
}

// decodeList reads a chunk-list block that covers size bytes of a file.
func decodeList(b []byte, p Params, size uint64, last bool) ([]flox.Chunk, error) {
	d := &decoder{b: b}
	d.magic(magicList)
	chunks, got := d.chunks(p, 1, last, true)
	if d.err == nil && !last && len(chunks) != listChunks {
		d.fail("a list of %d chunks before the last, want %d", len(chunks), listChunks)
	}
	if d.err == nil && d.rest() != 0 {
		d.fail("%d bytes behind the end", d.rest())
	}
	if d.err == nil && got != size {
		d.fail("chunks of %d bytes together, want %d", got, size)
	}
	return chunks, d.err
}

// listRef is a chunk-list block as an entry names it.
type listRef struct {
	id    flox.CID
	bytes uint64 // of the file
}

// lists reads the chunk-list blocks of an entry.
func (d *decoder) lists(p Params, keep bool) (refs []listRef, size uint64) {
	n := d.uvarint("number of chunk lists", maxLists)
	if d.err == nil && n < 2 {
		d.fail("%d chunk lists, want at least 2", n)
	}
	if d.err == nil && int(n) > d.rest()/chunkBytes {
		d.fail("%d chunk lists in %d bytes", n, d.rest())
	}
	if d.err == nil && keep {
		refs = make([]listRef, 0, n)
	}
	for i := uint64(0); i < n && d.err == nil; i++ {
		r := listRef{bytes: d.uvarint("bytes of a chunk list", listChunks*uint64(p.MaxChunk))}
		if least := uint64(listChunks) * uint64(p.MinChunk); d.err == nil && (r.bytes == 0 || i < n-1 && r.bytes < least) {
			d.fail("a chunk list of %d bytes, want at least %d", r.bytes, least)
		}
		r.id = d.cid()
		if keep {
			refs = append(refs, r)
		}
		size += r.bytes
	}
	return refs, size
}
