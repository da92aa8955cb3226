package p2p

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"lukechampine.com/blake3/bao"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p/wire"
)

const (
	maxServed   = 4 // block streams of one peer
	slotWait    = 100 * time.Millisecond
	readTimeout = 10 * time.Second
	sendTimeout = 30 * time.Second
	// unread is how long a peer may take nothing of an answer while others wait
	// for a slot; with sendPiece, 32 KiB/s are enough to keep it.
	unread    = 2 * time.Second
	sendPiece = 64 << 10
	serveIdle = 10 * time.Minute
	minPacked = 512 // smaller blocks are sent as they are
)

// server answers /flox/blocks/1.
type server struct {
	served atomic.Uint64 // plain bytes of blocks, to whomever
	h      *Host
	slots  chan struct{} // upload slots

	mu      sync.Mutex
	streams map[peer.ID]int
	writing map[*upload]time.Time // those with a slot: when the peer last took something

	waiting waitingRoom
	crowd   *crowd // of a storehouse; else nil
}

func newServer(h *Host) *server {
	v := &server{h: h, slots: make(chan struct{}, h.cfg.Limits.UploadSlots), streams: map[peer.ID]int{}, writing: map[*upload]time.Time{}}
	v.waiting.waits = map[flox.CID][]*aside{}
	if h.cfg.Role == Storehouse {
		v.crowd = newCrowd()
	}
	return v
}

// upload is one block stream that a peer opened. Its queue is bounded by the
// protocol, so a peer that does not read costs one block and little else.
type upload struct {
	srv   *server
	r     *remote
	s     network.Stream
	items chan upItem
	mu    sync.Mutex
	off   map[uint32]bool // ids cancelled and not yet answered
	due   map[uint32]struct{}
	told  map[*remote]struct{} // whose addresses the peer knows; of the sender
}

type upItem struct {
	id    uint32
	flags uint8
	item  wire.Item
	has   bool
}

func (v *server) accept(s network.Stream) {
	id := s.Conn().RemotePeer()
	v.mu.Lock()
	ok := v.streams[id] < maxServed
	if ok {
		v.streams[id]++
	}
	v.mu.Unlock()
	if !ok {
		drop(s)
		return
	}
	release := func() {
		drop(s)
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.streams[id]--; v.streams[id] == 0 {
			delete(v.streams, id)
		}
	}
	if !v.h.spawn(func() { defer release(); v.serve(s) }) {
		release()
	}
}

func (v *server) serve(s network.Stream) {
	ctx, cancel := context.WithCancel(v.h.base)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { drop(s) })
	defer stop()
	v.h.peers.mu.Lock()
	r := v.h.peers.remotes[s.Conn().RemotePeer()]
	v.h.peers.mu.Unlock()
	if r == nil {
		return // gone already
	}
	up := &upload{srv: v, r: r, s: s, items: make(chan upItem, laneItems), off: map[uint32]bool{}, due: map[uint32]struct{}{}, told: map[*remote]struct{}{}}
	done := make(chan struct{})
	if !v.h.spawn(func() {
		defer close(done)
		defer cancel()
		if err := up.send(ctx); err != nil && ctx.Err() == nil {
			v.h.log.Debug("upload ended", "peer", r.name, "err", err)
		}
	}) {
		return
	}
	err := up.read(ctx, s)
	if errors.Is(err, flox.ErrCorrupt) {
		v.h.log.Warn("peer breaks the block protocol", "peer", r.name, "err", err)
	}
	cancel()
	<-done
}

// read takes requests. It never waits for the sender: a peer that asks for
// more than it may is cut off.
func (up *upload) read(ctx context.Context, s network.Stream) error {
	in := wire.NewReader(s, 8192)
	for ctx.Err() == nil {
		if err := s.SetReadDeadline(time.Now().Add(serveIdle)); err != nil {
			return err
		}
		typ, n, err := in.Next()
		if err != nil {
			return err
		}
		if typ != wire.TypeRequest && typ != wire.TypeCancel {
			return fmt.Errorf("peer protocol: frame %d instead of a request: %w", typ, flox.ErrCorrupt)
		}
		body, err := in.Body(n)
		if err != nil {
			return err
		}
		if typ == wire.TypeCancel {
			ids, err := wire.ParseCancel(body)
			if err != nil {
				return err
			}
			up.cancel(ids)
			continue
		}
		req, err := wire.ParseRequest(body, MaxBlock)
		if err != nil {
			return err
		}
		if err := up.queue(req); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (up *upload) queue(req wire.Request) error {
	has := make([]bool, len(req.Items))
	blocks := up.srv.h.cfg.Blocks
	if _, slow := blocks.(PackedHolder); slow {
		for i := range has {
			has[i] = true // or not: reading it will tell, and is as dear as asking
		}
	} else if blocks != nil {
		ids := make([]flox.CID, len(req.Items))
		for i, it := range req.Items {
			ids[i] = it.ID
		}
		has = blocks.Has(ids)
	}
	up.mu.Lock()
	defer up.mu.Unlock()
	for i, it := range req.Items {
		id := req.Base + uint32(i)
		if _, twice := up.due[id]; twice || len(up.due) >= laneItems {
			return fmt.Errorf("peer protocol: request %d twice, or more than %d at once: %w", id, laneItems, flox.ErrCorrupt)
		}
		up.due[id] = struct{}{}
		up.items <- upItem{id: id, flags: req.Flags, item: it, has: i < len(has) && has[i]} // has room for all that is due
	}
	return nil
}

func (up *upload) cancel(ids []uint32) {
	up.mu.Lock()
	defer up.mu.Unlock()
	for _, id := range ids {
		if _, due := up.due[id]; due {
			up.off[id] = true
		}
	}
}

// settled forgets id, just before its one answer goes out.
func (up *upload) settled(id uint32) {
	up.mu.Lock()
	defer up.mu.Unlock()
	delete(up.due, id)
	delete(up.off, id)
}

func (up *upload) cancelled(id uint32) bool {
	up.mu.Lock()
	defer up.mu.Unlock()
	return up.off[id]
}

// send answers items in order.
func (up *upload) send(ctx context.Context) error {
	w := bufio.NewWriterSize(up, 128<<10)
	for {
		var it upItem
		select {
		case it = <-up.items:
		default:
			if err := w.Flush(); err != nil {
				return err
			}
			select {
			case it = <-up.items:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err := up.s.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
			return err
		}
		if err := up.answer(ctx, w, it); err != nil {
			return err
		}
	}
}

func (up *upload) answer(ctx context.Context, w *bufio.Writer, it upItem) error {
	rep := wire.Reply{ID: it.id}
	var payload []byte
	var others []*remote
	if c := up.srv.crowd; c != nil && it.has && it.flags&wire.FlagSteer != 0 && !up.cancelled(it.id) {
		others = c.steer(it.item.ID, up.r)
	}
	switch {
	case up.cancelled(it.id):
		rep.Status = wire.StatusCancelled
	case !it.has:
		rep.Status = wire.StatusNotFound
	case len(others) > 0:
		rep, payload = up.elsewhere(it.id, others)
	case !up.srv.slot(ctx):
		rep.Status = wire.StatusBusy
	default:
		defer up.srv.release(up)
		rep, payload = up.load(ctx, it)
		up.srv.sending(up)
	}
	if rep.Status == wire.StatusNotFound && up.setAside(it) {
		return nil // it is answered when it is here, or late
	}
	up.noteServed(it, rep)
	up.settled(it.id)
	rep.Payload = len(payload)
	if _, err := w.Write(wire.AppendReply(w.AvailableBuffer(), rep)); err != nil {
		return err
	}
	if _, err := w.Write(payload); err != nil {
		return err
	}
	if rep.Status == wire.StatusData {
		up.r.out.Add(uint64(rep.Size))
		up.srv.served.Add(uint64(rep.Size))
	}
	return nil
}

// Served is how many plain bytes of blocks were served since New, to whomever.
func (h *Host) Served() uint64 { return h.serve.served.Load() }

// noteServed tells the crowd who has a block now that insisted on it, or asked for it
// as an older version does, and who was not given one. Who called it off may have it
// from elsewhere.
func (up *upload) noteServed(it upItem, rep wire.Reply) {
	c := up.srv.crowd
	switch {
	case c == nil || it.item.Length > 0:
	case rep.Status == wire.StatusData && it.flags&wire.FlagSteer == 0:
		c.served(it.item.ID, up.r)
	case rep.Status == wire.StatusNotFound, rep.Status == wire.StatusFailed, rep.Status == wire.StatusBusy:
		c.refused(it.item.ID, up.r, rep.Status != wire.StatusBusy)
	}
}

// slot waits a moment for an upload slot. When there is none, a peer that has
// one and does not read loses it.
func (v *server) slot(ctx context.Context) bool {
	select {
	case v.slots <- struct{}{}:
		return true
	default:
	}
	v.evict(time.Now().Add(-unread))
	wait := time.NewTimer(slotWait)
	defer wait.Stop()
	select {
	case v.slots <- struct{}{}:
		return true
	case <-wait.C:
	case <-ctx.Done():
	}
	return false
}

func (v *server) release(up *upload) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.writing, up)
	<-v.slots
}

// sending notes that up, which has a slot, begins to wait for its peer.
func (v *server) sending(up *upload) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.writing[up] = time.Now()
}

// progress notes that up's peer has taken something.
func (v *server) progress(up *upload) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.writing[up]; ok {
		v.writing[up] = time.Now()
	}
}

// Write sends p piece by piece, so that a slow peer can be told from one that
// does not read.
func (up *upload) Write(p []byte) (int, error) {
	sent := 0
	for piece := range slices.Chunk(p, sendPiece) {
		n, err := up.s.Write(piece)
		sent += n
		if err != nil {
			return sent, err
		}
		up.srv.progress(up)
	}
	return sent, nil
}

// evict resets the stream that has waited longest for its peer to read, if that
// is since before limit. Its asker may ask again.
func (v *server) evict(limit time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	var slow *upload
	for up, since := range v.writing {
		if since.Before(limit) {
			slow, limit = up, since
		}
	}
	if slow != nil {
		delete(v.writing, slow)
		v.h.log.Debug("a peer that does not read makes room for others", "peer", slow.r.name)
		go drop(slow.s) // may wait for the connection's write lock
	}
}

func (up *upload) load(ctx context.Context, it upItem) (wire.Reply, []byte) {
	h := up.srv.h
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	if f, ok := h.frames.get(it.item.ID); ok && it.item.Length == 0 && it.flags&packedFlags != 0 && (f.zstd || it.flags&wire.FlagZstd == 0) {
		rep := wire.Reply{ID: it.id, Size: uint32(f.size)} //nolint:gosec // of a block
		if f.zstd {
			rep.Flags = wire.FlagZstd
		}
		return rep, f.data
	}
	if kept, ok := h.cfg.Blocks.(PackedHolder); ok && it.flags&wire.FlagZstd != 0 && it.item.Length == 0 {
		return up.loadPacked(ctx, kept, it.item.ID, it.id)
	}
	data, err := h.cfg.Blocks.Get(ctx, it.item.ID)
	rep := wire.Reply{ID: it.id, Size: uint32(len(data))}
	switch {
	case errors.Is(err, flox.ErrNotFound):
		return wire.Reply{ID: it.id, Status: wire.StatusNotFound}, nil
	case err != nil || len(data) > MaxBlock || int(it.item.Offset)+int(it.item.Length) > len(data):
		h.log.Debug("cannot serve block", "block", it.item.ID, "bytes", len(data), "err", err)
		return wire.Reply{ID: it.id, Status: wire.StatusFailed}, nil
	case it.item.Length > 0:
		payload, err := slice(data, it.item.Offset, it.item.Length)
		if err != nil {
			return wire.Reply{ID: it.id, Status: wire.StatusFailed}, nil
		}
		rep.Flags = wire.FlagSlice
		return rep, payload
	case it.flags&wire.FlagZstd != 0 && len(data) >= minPacked:
		if packed := pack(data); len(packed) < len(data)*15/16 {
			rep.Flags = wire.FlagZstd
			return rep, packed
		}
	}
	return rep, data
}

// loadPacked is load for a block that goes out as it is kept.
func (up *upload) loadPacked(ctx context.Context, from PackedHolder, block flox.CID, id uint32) (wire.Reply, []byte) {
	data, size, packed, err := from.Packed(ctx, block)
	switch {
	case errors.Is(err, flox.ErrNotFound):
		return wire.Reply{ID: id, Status: wire.StatusNotFound}, nil
	case err != nil || size > MaxBlock || len(data) > MaxBlock:
		up.srv.h.log.Debug("cannot serve block", "block", block, "bytes", size, "err", err)
		return wire.Reply{ID: id, Status: wire.StatusFailed}, nil
	}
	rep := wire.Reply{ID: id, Size: uint32(size)}
	if packed {
		rep.Flags = wire.FlagZstd
	}
	return rep, data
}

// slice gives a range of data with the proof that it belongs to data's CID.
func slice(data []byte, off, length uint32) ([]byte, error) {
	tree, _ := bao.EncodeBuf(data, sliceGroup, true)
	const group = 1024 << sliceGroup
	start := int(off) / group * group
	if len(data) <= group {
		start = 0
	}
	var out bytes.Buffer
	err := bao.ExtractSlice(&out, bytes.NewReader(data[start:]), bytes.NewReader(tree), sliceGroup, uint64(off), uint64(length))
	return out.Bytes(), err
}

var encoder = sync.OnceValues(func() (*zstd.Encoder, error) {
	return zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(0), zstd.WithLowerEncoderMem(true))
})

// pack compresses data; it gives data back where that fails.
func pack(data []byte) []byte {
	e, err := encoder()
	if err != nil {
		return data
	}
	return e.EncodeAll(data, make([]byte, 0, len(data)))
}
