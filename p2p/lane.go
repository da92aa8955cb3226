package p2p

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/zeebo/blake3"
	"lukechampine.com/blake3/bao"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p/wire"
)

// sliceGroup is the Bao group: verification works on 1024 << 4 = 16 KiB.
const sliceGroup = 4

// sliceOverhead is the most that a slice of n bytes takes beyond them: its
// length, the rest of the first and last group, and the parents on the way.
func sliceOverhead(n uint32) int {
	const group = 1024 << sliceGroup
	return 8 + 2*group + 64*(int(n)/group+24)
}

// runLane opens a block stream and asks on it until it is idle or broken.
func (h *Host) runLane(l *lane) {
	err := h.serveLane(l)
	h.sched.laneEnded(l, err)
}

func (h *Host) serveLane(l *lane) error {
	ctx, cancel := context.WithCancel(h.base)
	defer cancel()
	s, err := h.openLane(ctx, l.r)
	if err != nil {
		return fmt.Errorf("%w: %w", errLost, err)
	}
	defer drop(s)
	h.peers.mu.Lock()
	l.stream = s
	closed := l.closed
	h.peers.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { drop(s) })
	defer stop()
	done := make(chan error, 1)
	if closed || !h.spawn(func() {
		err := h.readLane(l, wire.NewReader(s, 64<<10))
		cancel() // ends the writer
		done <- err
	}) {
		return errLost
	}
	werr := h.writeLane(ctx, l)
	cancel()
	err = <-done
	if werr == nil {
		return nil // idle; the reader ended because the writer did
	}
	if errors.Is(err, flox.ErrCorrupt) {
		h.peers.mu.Lock()
		h.peers.punish(l.r, h.cfg.Limits.Ban, err.Error())
		h.peers.mu.Unlock()
		return err
	}
	return fmt.Errorf("%w: %w", errLost, werr)
}

// openLane connects if need be. The last resort is given more time to answer,
// unless it did not last time; a stream on a living connection may take longer
// on a busy machine, and who is in a hurry asks others meanwhile.
func (h *Host) openLane(ctx context.Context, r *remote) (network.Stream, error) {
	h.peers.mu.Lock()
	limit := h.cfg.Limits.DialTimeout
	if r.storehouse && !r.failed {
		limit = max(limit, patientDial)
	}
	h.peers.mu.Unlock()
	dialCtx, connected := context.WithTimeout(ctx, limit)
	defer connected()
	err := h.reach(dialCtx, r.id)
	h.peers.dialed(r, err)
	if err != nil {
		return nil, err
	}
	openCtx, opened := context.WithTimeout(ctx, helloTimeout)
	defer opened()
	// Its role gives weight to its "not found".
	if err := h.peers.waitReady(openCtx, r.id); err != nil {
		return nil, err
	}
	return h.net.NewStream(network.WithNoDial(openCtx, "blocks"), r.id, protoBlocks)
}

func (h *Host) writeLane(ctx context.Context, l *lane) error {
	idle := time.NewTimer(laneIdle)
	defer idle.Stop()
	var buf []byte
	for {
		req, cancels, open := h.sched.take(l)
		if !open {
			return errLost
		}
		buf = buf[:0]
		if len(req.Items) > 0 {
			buf = wire.AppendRequest(buf, req)
		}
		if len(cancels) > 0 {
			buf = wire.AppendCancel(buf, cancels)
		}
		if len(buf) > 0 {
			if err := l.stream.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
				return err
			}
			if _, err := l.stream.Write(buf); err != nil {
				return err
			}
			idle.Reset(laneIdle)
			continue
		}
		select {
		case <-l.wake:
		case <-ctx.Done():
			return ctx.Err()
		case <-idle.C:
			if h.sched.retire(l) {
				return nil
			}
			idle.Reset(laneIdle)
		}
	}
}

// retire closes an idle lane unless something is due on it.
func (s *scheduler) retire(l *lane) bool {
	t := s.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(l.out) > 0 || l.r.link.pending > l.r.link.inflight {
		return false
	}
	l.closed = true
	return true
}

// readLane takes replies until the stream ends. ErrCorrupt says that the peer
// broke the protocol or sent wrong bytes.
func (h *Host) readLane(l *lane, in *wire.Reader) error {
	for {
		typ, n, err := in.Next()
		if err != nil {
			return err
		}
		if typ != wire.TypeReply {
			return fmt.Errorf("peer protocol: frame %d instead of a reply: %w", typ, flox.ErrCorrupt)
		}
		rep, err := in.Reply(n)
		if err != nil {
			return err
		}
		h.peers.mu.Lock()
		a := l.out[rep.ID]
		h.peers.mu.Unlock()
		if a == nil {
			return fmt.Errorf("peer protocol: reply to what was not asked: %w", flox.ErrCorrupt)
		}
		if err := h.takeReply(l, in, a, rep); err != nil {
			return err
		}
	}
}

func (h *Host) takeReply(l *lane, in *wire.Reader, a *attempt, rep wire.Reply) error {
	if rep.Status == wire.StatusElsewhere {
		return h.takeElsewhere(in, a, rep)
	}
	if rep.Status != wire.StatusData {
		if rep.Payload != 0 {
			return fmt.Errorf("peer protocol: %d bytes with status %d: %w", rep.Payload, rep.Status, flox.ErrCorrupt)
		}
		h.peers.mu.Lock()
		defer h.peers.mu.Unlock()
		l.moved = time.Now()
		h.sched.fail(a, rep.Status, statusError(rep.Status))
		h.sched.refill(a.r)
		return nil
	}
	if err := a.fits(rep); err != nil {
		return err
	}
	payload := make([]byte, rep.Payload)
	if err := in.Payload(payload); err != nil {
		return err
	}
	data, err := a.check(rep, payload)
	if err != nil {
		return h.wrongBytes(l, a, err)
	}
	if a.key.length == 0 && h.cfg.Role == Agent && h.cfg.Blocks != nil {
		h.frames.put(a.key.id, frame{data: payload, size: len(data), zstd: rep.Flags&wire.FlagZstd != 0})
		h.serve.waiting.arrived([]flox.CID{a.key.id})
	}
	h.sched.answered(a, data, wire.FrameHeader+wire.ReplyHeader+rep.Payload)
	return nil
}

// takeElsewhere reads who else has the block.
func (h *Host) takeElsewhere(in *wire.Reader, a *attempt, rep wire.Reply) error {
	if rep.Payload > wire.MaxElsewhere {
		return fmt.Errorf("peer protocol: %d bytes that name holders: %w", rep.Payload, flox.ErrCorrupt)
	}
	payload := make([]byte, rep.Payload)
	if err := in.Payload(payload); err != nil {
		return err
	}
	holders, err := wire.ParseHolders(payload)
	if err != nil {
		return err
	}
	return h.sched.elsewhere(a, holders)
}

// wrongBytes ends the lane of a peer, who is then banned. A storehouse whose
// disk spoilt one block is still the last resort for all others: the stream is
// whole, so only this block fails.
func (h *Host) wrongBytes(l *lane, a *attempt, err error) error {
	h.peers.mu.Lock()
	defer h.peers.mu.Unlock()
	if !a.r.storehouse {
		return err
	}
	h.log.Error("storehouse sent wrong bytes", "peer", a.r.name, "block", a.key.id)
	l.moved = time.Now()
	h.sched.fail(a, wire.StatusFailed, err)
	h.sched.refill(a.r)
	return nil
}

func statusError(s wire.Status) error {
	switch s {
	case wire.StatusNotFound:
		return fmt.Errorf("it does not have it: %w", flox.ErrNotFound)
	case wire.StatusBusy:
		return fmt.Errorf("it has no upload slot free: %w", flox.ErrBusy)
	}
	return fmt.Errorf("it could not read it (status %d): %w", s, flox.ErrUnreachable)
}

// fits checks a reply's sizes before any of its payload is read or allocated.
func (a *attempt) fits(rep wire.Reply) error {
	limit := int(rep.Size)
	slice := a.key.length > 0
	if slice {
		limit = int(a.key.length) + sliceOverhead(a.key.length)
	}
	switch {
	case rep.Size > MaxBlock, a.size != 0 && rep.Size != a.size, rep.Payload > limit,
		slice != (rep.Flags&wire.FlagSlice != 0),
		!slice && rep.Flags&wire.FlagZstd == 0 && rep.Payload != limit:
		return fmt.Errorf("block %s: reply of %d bytes for a block of %d, flags %d, want %d: %w", a.key.id, rep.Payload, rep.Size, rep.Flags, a.size, flox.ErrCorrupt)
	}
	return nil
}

// check unpacks and verifies: no byte leaves here that was not proven.
func (a *attempt) check(rep wire.Reply, payload []byte) ([]byte, error) {
	if a.key.length > 0 {
		return a.checkSlice(rep, payload)
	}
	data := payload
	if rep.Flags&wire.FlagZstd != 0 {
		var err error
		if data, err = unzstd(payload, int(rep.Size)); err != nil {
			return nil, fmt.Errorf("block %s: %w: %w", a.key.id, err, flox.ErrCorrupt)
		}
	}
	if blake3.Sum256(data) != a.key.id {
		return nil, fmt.Errorf("block %s: wrong bytes: %w", a.key.id, flox.ErrCorrupt)
	}
	return data, nil
}

func (a *attempt) checkSlice(rep wire.Reply, payload []byte) ([]byte, error) {
	bad := func(why string) ([]byte, error) {
		return nil, fmt.Errorf("block %s: slice %d+%d: %s: %w", a.key.id, a.key.off, a.key.length, why, flox.ErrCorrupt)
	}
	if len(payload) < 8 || binary.LittleEndian.Uint64(payload) != uint64(rep.Size) || a.key.off+a.key.length > rep.Size {
		return bad("wrong length")
	}
	var out bytes.Buffer
	out.Grow(int(a.key.length))
	in := bytes.NewReader(payload)
	ok, err := bao.DecodeSlice(&out, in, sliceGroup, uint64(a.key.off), uint64(a.key.length), a.key.id)
	if !ok || err != nil || in.Len() > 0 || out.Len() != int(a.key.length) {
		return bad("the proof does not hold")
	}
	return out.Bytes(), nil
}

var decoder = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(MaxBlock), zstd.WithDecoderLowmem(true))
})

// unzstd gives exactly size bytes.
func unzstd(b []byte, size int) ([]byte, error) {
	d, err := decoder()
	if err != nil {
		return nil, err
	}
	out, err := d.DecodeAll(b, make([]byte, 0, size))
	if err == nil && len(out) != size {
		err = fmt.Errorf("%d bytes unpacked, want %d", len(out), size)
	}
	return out, err
}

// reach makes sure that there is a connection to id.
func (h *Host) reach(ctx context.Context, id peer.ID) error {
	if h.net.Network().Connectedness(id) == network.Connected {
		return nil
	}
	if !h.cfg.membership().member(id) {
		return fmt.Errorf("peer %s: %w", id, noMember)
	}
	h.clearBackoff(id)
	if len(h.net.Peerstore().Addrs(id)) == 0 {
		info, err := h.dht.FindPeer(ctx, id)
		if err != nil {
			return fmt.Errorf("no address of peer %s is known: %w: %w", id, flox.ErrUnreachable, err)
		}
		return dialError(id, h.net.Connect(ctx, info))
	}
	return dialError(id, h.net.Connect(ctx, peer.AddrInfo{ID: id}))
}

// clearBackoff lets a bootstrap peer be dialed again at once. libp2p would
// not try for up to five minutes a storehouse that was away for long; our own
// pauses between attempts are enough.
func (h *Host) clearBackoff(id peer.ID) {
	h.peers.mu.Lock()
	r := h.peers.remotes[id]
	fixed := r != nil && r.fixed
	h.peers.mu.Unlock()
	if fixed {
		h.forgetBackoff(id)
	}
}

// forgetBackoff lets any peer be dialed again at once.
func (h *Host) forgetBackoff(id peer.ID) {
	if net, ok := h.net.Network().(*swarm.Swarm); ok {
		net.Backoff().Clear(id)
	}
}

// dialError tells a peer that refused us, or that we refuse, from one that is away.
func dialError(id peer.ID, err error) error {
	var no refusal
	switch {
	case err == nil:
		return nil
	case errors.As(err, &no):
		return fmt.Errorf("peer %s: %w", id, no) // the rest says only how libp2p got there
	}
	return fmt.Errorf("peer %s: %w: %w", id, flox.ErrUnreachable, err)
}

// dialed remembers how connecting to r went.
func (t *peerTable) dialed(r *remote, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.failed = err != nil; r.failed {
		r.downUntil = time.Now().Add(downPause)
	}
}
