package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	chunkers "github.com/PlakarKorp/go-cdc-chunkers"
	_ "github.com/PlakarKorp/go-cdc-chunkers/chunkers/fastcdc" // registers the algorithm below
	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// fastCDC is the library's name for the algorithm DESIGN.md defines: its masks
// follow from the average size, unlike those of its older "fastcdc".
const fastCDC = "fastcdc-v1.0.0"

// slabSize is how many bytes of chunks go to a worker at once. It holds at least
// one of the largest; small files share a slab, so that a file costs less than a
// hand-over between goroutines.
const slabSize = 512 << 10

// treeReader cuts a NAR into entries and chunks.
type treeReader struct {
	ctx    context.Context // of the one Ingest the reader lives in
	cancel context.CancelCauseFunc
	nar    *nix.NarReader
	sink   flox.BlockSink
	p      Params
	got    Ingested

	recs []rec
	dirs []uint32 // indices of the directories that hold the current entry
	open []openFile
	inl  []byte // content of an inline file

	cut  *chunkers.Chunker
	file *blake3.Hasher

	batches chan *batch
	free    chan *batch
	cur     *batch
}

// batch is a slab of chunks on its way to a worker.
type batch struct {
	data   []byte
	chunks []batchChunk
}

// batchChunk is one chunk of a slab; a worker writes its name to id.
type batchChunk struct {
	end   int
	id    *flox.CID
	named *sync.WaitGroup // nil = nobody waits
}

// openFile is a file whose chunks do not fit its entry. Their lists go to the
// sink while the file is read, so that its size costs no memory; groups are what
// was not written yet.
type openFile struct {
	file   *fileRec
	groups []*chunkGroup
}

// chunkGroup is the chunks of one list; named ends when all have their names.
type chunkGroup struct {
	chunks []flox.Chunk
	named  sync.WaitGroup
}

func newTreeReader(ctx context.Context, cancel context.CancelCauseFunc, r io.Reader, sink flox.BlockSink, opt IngestOptions) (*treeReader, error) {
	cut, err := newChunker(r, opt.Params)
	if err != nil {
		return nil, err
	}
	n := 2*opt.Workers + 2
	t := &treeReader{
		ctx: ctx, cancel: cancel, nar: nix.NewNarReader(r), sink: sink, p: opt.Params, cut: cut, file: blake3.New(),
		batches: make(chan *batch, n), free: make(chan *batch, n),
	}
	size := max(slabSize, int(opt.Params.MaxChunk))
	for range n {
		t.free <- &batch{data: make([]byte, 0, size)}
	}
	return t, nil
}

func newChunker(r io.Reader, p Params) (*chunkers.Chunker, error) {
	cut, err := chunkers.NewChunker(fastCDC, r, &chunkers.ChunkerOpts{MinSize: int(p.MinChunk), NormalSize: int(p.AvgChunk), MaxSize: int(p.MaxChunk)})
	if err != nil {
		return nil, fmt.Errorf("chunker: %w", err)
	}
	return cut, nil
}

// read takes the whole NAR.
func (t *treeReader) read() error {
	for {
		e, err := t.nar.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := t.ctx.Err(); err != nil {
			return err
		}
		if err := t.entry(&e); err != nil {
			return fmt.Errorf("entry %q: %w", e.Path, err)
		}
	}
	t.closeDirs(0)
	t.got.NarSize, t.got.Root = t.nar.Offset(), t.recs[0].kind
	t.got.Entries = uint32(len(t.recs))
	t.dispatch()
	return nil
}

// entry takes one entry of the NAR, content included.
func (t *treeReader) entry(e *nix.NarEntry) error {
	if len(t.recs) >= maxEntries {
		return fmt.Errorf("more than %d entries: %w", maxEntries, flox.ErrBadInput)
	}
	depth := e.Depth()
	t.closeDirs(depth)
	if e.Kind == flox.Directory && depth > 0 {
		t.recs[t.dirs[depth-1]].dirs++
	}
	r := rec{
		name: e.Path[strings.LastIndexByte(e.Path, '/')+1:], kind: e.Kind, exec: e.Executable,
		size: e.Size, offset: e.Offset, depth: uint8(depth), data: e.Target,
	}
	// The name is a part of the path: a copy of its own lets go of the rest.
	r.name = strings.Clone(r.name)
	switch e.Kind {
	case flox.Directory:
		t.dirs = append(t.dirs, uint32(len(t.recs)))
	case flox.Regular:
		t.got.Files++
		t.got.Bytes += e.Size
		if err := t.content(&r); err != nil {
			return err
		}
	}
	t.recs = append(t.recs, r)
	return nil
}

// closeDirs notes the span of the directories that end before an entry of depth.
func (t *treeReader) closeDirs(depth int) {
	for len(t.dirs) > depth {
		i := t.dirs[len(t.dirs)-1]
		t.recs[i].span = uint32(len(t.recs)) - i - 1
		t.dirs = t.dirs[:len(t.dirs)-1]
	}
}

// content takes the content of a regular file.
func (t *treeReader) content(r *rec) error {
	switch {
	case r.size <= uint64(t.p.InlineLimit):
		t.inl = append(t.inl[:0], make([]byte, r.size)...)
		if _, err := io.ReadFull(t.nar, t.inl); err != nil {
			return err
		}
		r.data = string(t.inl)
		return nil
	case r.size <= uint64(t.p.MinChunk):
		// The chunker would not cut it either.
		r.file = &fileRec{}
		b, err := t.room(int(r.size))
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(t.nar, b); err != nil {
			return err
		}
		t.push(&r.file.id, nil)
		return nil
	}
	r.file = &fileRec{}
	return t.cutFile(r.file, r.size)
}

// cutFile takes a file that may be more than one chunk.
func (t *treeReader) cutFile(f *fileRec, size uint64) error {
	if t.cut == nil { // most small trees need none
		cut, err := newChunker(t.nar, t.p)
		if err != nil {
			return err
		}
		t.cut = cut
	}
	t.cut.Reset(t.nar)
	t.file.Reset()
	var groups []*chunkGroup
	for left := size; left > 0; {
		chunk, err := t.cut.Next()
		if err != nil && (len(chunk) == 0 || !errors.Is(err, io.EOF)) {
			return err
		}
		b, err := t.room(len(chunk))
		if err != nil {
			return err
		}
		copy(b, chunk)
		if uint64(len(chunk)) == size {
			t.push(&f.id, nil)
			return nil
		}
		t.file.Write(chunk)
		if groups, err = t.group(f, groups, left); err != nil {
			return err
		}
		g := groups[len(groups)-1]
		// It never grows beyond its capacity: workers hold pointers into it.
		g.chunks = append(g.chunks, flox.Chunk{Size: uint32(len(chunk))})
		g.named.Add(1)
		t.push(&g.chunks[len(g.chunks)-1].ID, &g.named)
		left -= uint64(len(chunk))
	}
	t.file.Sum(f.id[:0])
	if len(groups) == 1 && len(f.lists) == 0 {
		f.chunks = groups[0].chunks
		return nil
	}
	t.open = append(t.open, openFile{f, groups})
	return nil
}

// group gives groups a last one with room for a chunk. At most two are open: the
// chunks of the oldest were handed out long ago, so its names are about to be
// there.
func (t *treeReader) group(f *fileRec, groups []*chunkGroup, left uint64) ([]*chunkGroup, error) {
	if n := len(groups); n > 0 && len(groups[n-1].chunks) < listChunks {
		return groups, nil
	}
	if len(groups) == 2 {
		if err := t.writeList(t.ctx, f, groups[0]); err != nil {
			return nil, err
		}
		groups = groups[1:]
	}
	most := min(left/uint64(t.p.MinChunk)+1, listChunks)
	return append(groups, &chunkGroup{chunks: make([]flox.Chunk, 0, most)}), nil
}

// writeList puts a file's next chunk list into the sink.
func (t *treeReader) writeList(ctx context.Context, f *fileRec, g *chunkGroup) error {
	if len(f.lists) == maxLists {
		return fmt.Errorf("a file of more than %d chunks: %w", maxLists*listChunks, flox.ErrBadInput)
	}
	g.named.Wait()
	if err := ctx.Err(); err != nil {
		return err
	}
	ref := listRef{}
	for _, c := range g.chunks {
		ref.bytes += uint64(c.Size)
	}
	b := encodeList(g.chunks)
	ref.id = Hash(b)
	if err := t.sink.Put(ctx, ref.id, b); err != nil {
		return fmt.Errorf("put chunk list %s: %w", ref.id, err)
	}
	f.lists = append(f.lists, ref)
	t.got.ManifestBlocks++
	return nil
}

// room gives n bytes at the end of a slab with room for them.
func (t *treeReader) room(n int) ([]byte, error) {
	if t.cur != nil && cap(t.cur.data)-len(t.cur.data) < n {
		t.dispatch()
	}
	if t.cur == nil {
		select {
		case t.cur = <-t.free:
		case <-t.ctx.Done():
			return nil, t.ctx.Err()
		}
	}
	at := len(t.cur.data)
	t.cur.data = t.cur.data[:at+n]
	return t.cur.data[at:], nil
}

// push makes what room gave a chunk whose name goes to id.
func (t *treeReader) push(id *flox.CID, named *sync.WaitGroup) {
	t.cur.chunks = append(t.cur.chunks, batchChunk{end: len(t.cur.data), id: id, named: named})
	t.got.Chunks++
}

// dispatch hands the slab to a worker. It never blocks: there are as many places
// as slabs. Without workers it does their work.
func (t *treeReader) dispatch() {
	switch {
	case t.cur == nil:
		return
	case t.batches != nil:
		t.batches <- t.cur
	default:
		if err := t.name(t.cur, nil); err != nil {
			t.cancel(err)
		}
	}
	t.cur = nil
}

// work names chunks and puts them into the sink, until there are no more. After
// a failure it goes on without putting, so that nobody waits for a name for ever.
func (t *treeReader) work() error {
	var failed error
	for b := range t.batches {
		if failed = t.name(b, failed); failed != nil {
			t.cancel(failed)
		}
	}
	return failed
}

// name is work on one slab; failed is what went wrong before.
func (t *treeReader) name(b *batch, failed error) error {
	start := 0
	for _, c := range b.chunks {
		data := b.data[start:c.end]
		start = c.end
		*c.id = Hash(data)
		if failed == nil {
			if failed = t.ctx.Err(); failed == nil {
				failed = t.sink.Put(t.ctx, *c.id, data)
			}
		}
		if c.named != nil {
			c.named.Done()
		}
	}
	b.data, b.chunks = b.data[:0], b.chunks[:0]
	t.free <- b
	return failed
}

// finish writes the manifest, once all chunks are named.
func (t *treeReader) finish(ctx context.Context, got *Ingested) error {
	for _, o := range t.open {
		for _, g := range o.groups {
			if err := t.writeList(ctx, o.file, g); err != nil {
				return err
			}
		}
	}
	id, blocks, err := encodeTree(ctx, t.recs, got.NarSize, t.p, t.sink)
	got.Manifest, got.ManifestBlocks = id, t.got.ManifestBlocks+blocks
	return err
}
