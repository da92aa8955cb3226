package p2p

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/p2p/wire"
)

const (
	helloVersion = 1
	helloTimeout = 5 * time.Second
	// mute is how long a connection may be without a hello stream.
	mute = 10 * time.Second
	// deltaPause gathers additions into one delta.
	deltaPause = time.Second
	pingEvery  = 20 * time.Second
	// defaultPongWait is how long a pong may take while nothing else comes either.
	defaultPongWait = 5 * time.Second
)

// session is one hello stream: who the other is, what it holds, and whether it
// is alive. Both sides speak alike.
type session struct {
	h    *Host
	r    *remote
	s    network.Stream
	pong chan uint64   // nonces to send back
	ping chan struct{} // asks for a ping now

	// of the reader
	filling *filter
	gen     uint32
	filled  int // words received
	booked  int // bytes of the filter budget taken by filling
	asked   chan probe
}

type probe struct {
	nonce uint64
	at    time.Time
}

// openHello is run by the side that dialed.
func (h *Host) openHello(id peer.ID) {
	ctx, cancel := context.WithTimeout(h.base, helloTimeout)
	s, err := h.net.NewStream(network.WithNoDial(ctx, "hello"), id, protoHello)
	cancel()
	if err != nil {
		h.log.Debug("cannot greet peer", "peer", id, "err", err)
		return // watch closes the connection
	}
	h.runSession(s)
}

func (h *Host) acceptHello(s network.Stream) {
	if !h.spawn(func() { h.runSession(s) }) {
		drop(s)
	}
}

func (h *Host) runSession(s network.Stream) {
	defer drop(s)
	ses := &session{h: h, s: s, pong: make(chan uint64, 4), ping: make(chan struct{}, 1), asked: make(chan probe, 4)}
	if !ses.enter(s.Conn().RemotePeer()) {
		return
	}
	defer ses.leave()
	ctx, cancel := context.WithCancel(h.base)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { drop(s) })
	defer stop()
	done := make(chan struct{})
	if !h.spawn(func() {
		defer close(done)
		defer cancel()
		if err := ses.write(ctx); err != nil && ctx.Err() == nil {
			h.log.Debug("hello stream ended", "peer", ses.r.name, "err", err)
		}
	}) {
		return
	}
	err := ses.read()
	if errors.Is(err, flox.ErrCorrupt) {
		h.log.Warn("peer breaks the hello protocol", "peer", ses.r.name, "err", err)
	}
	cancel()
	<-done
}

func (ses *session) enter(id peer.ID) bool {
	t := ses.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.remotes[id]
	if r == nil || len(r.sessions) >= maxSessions {
		return false
	}
	ses.r = r
	r.sessions = append(r.sessions, ses)
	return true
}

func (ses *session) leave() {
	ses.book(0)
	t := ses.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	r := ses.r
	r.sessions = slices.DeleteFunc(r.sessions, func(s *session) bool { return s == ses })
	if len(r.sessions) == 0 {
		r.since = time.Now() // watch gives it a moment to open another
	}
}

// write sends the hello, the filter and its deltas, pings and pongs.
func (ses *session) write(ctx context.Context) error {
	h := ses.h
	silent := h.held.silent
	err := ses.send(wire.AppendHello(nil, wire.Hello{
		Version: helloVersion, Role: uint8(h.cfg.Role), NoFilter: silent,
		Site: h.cfg.Site, Addrs: h.Addrs(),
	}))
	if err != nil {
		return err
	}
	if err := ses.sendPing(); err != nil { // measures the round trip at once
		return err
	}
	ticker := time.NewTicker(pingEvery)
	defer ticker.Stop()
	var gen uint32
	var pos uint64
	pause := time.NewTimer(0) // when the next delta may go
	defer pause.Stop()
	var changed <-chan struct{}
	if silent {
		pause.Stop()
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
			err = ses.sendPing()
		case <-ses.ping:
			err = ses.sendPing()
		case nonce := <-ses.pong:
			err = ses.send(wire.AppendPing(nil, wire.TypePong, nonce))
		case <-changed:
			changed = nil
			pause.Reset(deltaPause)
		case <-pause.C:
			var u update
			u, changed = h.held.since(gen, pos)
			gen, pos = u.gen, u.pos
			err = ses.sendUpdate(u)
		}
		if err != nil {
			return err
		}
	}
}

func (ses *session) send(b []byte) error {
	if err := ses.s.SetWriteDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return err
	}
	_, err := ses.s.Write(b)
	return err
}

func (ses *session) sendPing() error {
	p := probe{rand.Uint64(), time.Now()}
	select {
	case ses.asked <- p:
	default:
		return nil // four are unanswered already
	}
	t := ses.h.peers
	t.mu.Lock()
	if ses.r.askedAt.IsZero() {
		ses.r.askedAt = p.at
	}
	t.mu.Unlock()
	return ses.send(wire.AppendPing(nil, wire.TypePing, p.nonce))
}

func (ses *session) sendUpdate(u update) error {
	if u.whole != nil {
		head := wire.FilterBegin{Gen: u.gen, Words: uint32(len(u.whole.words)), Hashes: filterHashes, Count: uint32(u.whole.count)}
		if err := ses.send(wire.AppendFilterBegin(nil, head)); err != nil {
			return err
		}
		for off := 0; off < len(u.whole.words); off += wire.MaxFilterPart {
			part := u.whole.words[off:min(off+wire.MaxFilterPart, len(u.whole.words))]
			raw := make([]byte, 0, 8*len(part))
			for _, w := range part {
				raw = binary.LittleEndian.AppendUint64(raw, w)
			}
			if err := ses.send(wire.AppendFilterPart(nil, wire.FilterPart{Gen: u.gen, Offset: uint32(off), Data: raw})); err != nil {
				return err
			}
		}
	}
	for keys := range slices.Chunk(u.keys, wire.MaxFilterAdd) {
		if err := ses.send(wire.AppendFilterAdd(nil, u.gen, keys)); err != nil {
			return err
		}
	}
	return nil
}

// read takes frames until the stream ends.
func (ses *session) read() error {
	in := wire.NewReader(ses.s, 4096)
	if err := ses.s.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	for first := true; ; first = false {
		typ, n, err := in.Next()
		if err != nil {
			return err
		}
		body, err := in.Body(n)
		if err != nil {
			return err
		}
		if first != (typ == wire.TypeHello) {
			return fmt.Errorf("peer protocol: frame %d where a hello is due: %w", typ, flox.ErrCorrupt)
		}
		if err := ses.handle(typ, body); err != nil {
			return err
		}
		if first {
			if err := ses.s.SetReadDeadline(time.Time{}); err != nil {
				return err
			}
		}
	}
}

func (ses *session) handle(typ wire.Type, body []byte) error {
	switch typ {
	case wire.TypeHello:
		hello, err := wire.ParseHello(body)
		if err == nil && hello.Version != helloVersion {
			err = fmt.Errorf("peer protocol: hello version %d, want %d: %w", hello.Version, helloVersion, flox.ErrCorrupt)
		}
		if err != nil {
			return err
		}
		if addrs, err := parseAddrs(hello.Addrs); err == nil {
			ses.h.net.Peerstore().AddAddrs(ses.r.id, addrs, time.Hour)
		}
		ses.h.peers.greet(ses.r, hello)
		return nil
	case wire.TypePing:
		nonce, err := wire.ParsePing(body)
		select {
		case ses.pong <- nonce:
		default: // it floods: some pings stay unanswered
		}
		return err
	case wire.TypePong:
		nonce, err := wire.ParsePing(body)
		ses.gotPong(nonce)
		return err
	}
	return ses.handleFilter(typ, body)
}

func (ses *session) gotPong(nonce uint64) {
	for {
		select {
		case p := <-ses.asked:
			if p.nonce != nonce {
				continue
			}
			t := ses.h.peers
			t.mu.Lock()
			defer t.mu.Unlock()
			ses.r.askedAt = time.Time{}
			took := time.Since(p.at)
			if ses.r.rtt == 0 || took < ses.r.rtt {
				ses.r.rtt = took // queueing only ever adds to it
			} else {
				ses.r.rtt += (took - ses.r.rtt) / 8
			}
			ses.r.trip.Store(int64(ses.r.rtt))
			return
		default:
			return
		}
	}
}

func (ses *session) handleFilter(typ wire.Type, body []byte) error {
	switch typ {
	case wire.TypeFilterBegin:
		f, err := wire.ParseFilterBegin(body)
		if err != nil {
			return err
		}
		ses.gen, ses.filled = f.Gen, 0
		usable := f.Hashes == filterHashes && f.Words%filterLine == 0
		if ses.book(8*int(f.Words)) && usable {
			ses.filling = &filter{words: make([]uint64, f.Words), count: int(f.Count)}
		} else {
			ses.install() // nothing: what it holds stays unknown
		}
		return nil
	case wire.TypeFilterPart:
		p, err := wire.ParseFilterPart(body)
		if err != nil || ses.filling == nil || p.Gen != ses.gen {
			return err
		}
		if int(p.Offset) != ses.filled || ses.filled+len(p.Data)/8 > len(ses.filling.words) {
			return fmt.Errorf("peer protocol: filter part at word %d, want %d: %w", p.Offset, ses.filled, flox.ErrCorrupt)
		}
		for ; len(p.Data) > 0; p.Data = p.Data[8:] {
			ses.filling.words[ses.filled] = binary.LittleEndian.Uint64(p.Data)
			ses.filled++
		}
		if ses.filled == len(ses.filling.words) {
			ses.install()
		}
		return nil
	case wire.TypeFilterAdd:
		gen, keys, err := wire.ParseFilterAdd(body)
		if err != nil || gen != ses.gen {
			return err
		}
		t := ses.h.peers
		t.mu.Lock()
		defer t.mu.Unlock()
		if ses.r.filter != nil {
			for ; len(keys) > 0; keys = keys[wire.KeySize:] {
				ses.r.filter.add(filterKey(keys[:wire.KeySize]))
			}
			ses.h.sched.poke()
		}
		return nil
	}
	return fmt.Errorf("peer protocol: frame %d on a hello stream: %w", typ, flox.ErrCorrupt)
}

// book takes n bytes of the budget for the filter that is about to come, and
// gives back what the one before it took; 0 only gives back.
func (ses *session) book(n int) bool {
	t := ses.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	t.filters -= ses.booked
	ses.filling, ses.booked = nil, 0
	if t.filters+n > ses.h.cfg.Limits.FilterBytes {
		return false
	}
	ses.booked = n
	t.filters += n
	return true
}

func (ses *session) install() {
	filling := ses.filling
	ses.book(0)
	t := ses.h.peers
	t.mu.Lock()
	defer t.mu.Unlock()
	if ses.r.connected {
		t.setFilter(ses.r, filling)
		t.markReady(ses.r)
	}
}
