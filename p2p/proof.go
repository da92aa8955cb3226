package p2p

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/sec"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
)

// securityID is what both ends negotiate instead of libp2p's "/tls/1.0.0". A
// host that is no member shares no security protocol with us at all; one that
// copies the name still has to prove that it knows the secret.
const securityID = protocol.ID("/flox/tls/1")

const (
	proofVersion = 2
	nonceSize    = 32
	macSize      = 32
	proofTimeout = 5 * time.Second
)

// What a machine says it is, in the dialer's first message.
const (
	asMember = iota
	asGuest
)

// Verdicts. Codes are part of the protocol; one that is not known is a refusal.
const (
	verdictOK = iota
	verdictMember
	verdictSecret
	verdictVersion
	verdictInvite
	verdictWindow
	verdictDoor
	verdictGuests
	verdictFar
)

// verdicts are what a refusal means to the one that is refused.
var verdicts = map[byte]error{
	verdictMember:  refusedMember,
	verdictSecret:  refusedSecret,
	verdictVersion: refusedVersion,
	verdictInvite:  refusedInvite,
	verdictWindow:  refusedWindow,
	verdictDoor:    refusedDoor,
	verdictGuests:  errGuests,
	verdictFar:     refusedFar,
}

// proofTransport is libp2p's TLS 1.3 followed by a mutual proof of membership.
// It stands in the handshake, below the multiplexer, so no protocol (identify
// and the DHT included) ever runs with a peer that has not proven it. It needs
// no libp2p host: any net.Conn will do.
//
// Where both ends are sure of each other's key (Config.Vouched), a MAC with a key
// that is no secret will do.
//
// TLS has authenticated both peer IDs by then. Each side answers the other's
// fresh nonce with a MAC over its own direction, both IDs, both nonces and a
// value only the two ends of this TLS channel know, so a proof can be neither
// replayed nor passed on by a third party. Who is refused is told why.
type proofTransport struct {
	tls     *libp2ptls.Transport
	self    peer.ID
	members membership
}

var _ sec.SecureTransport = (*proofTransport)(nil)

// newProofOf gives the constructor libp2p.Security wants.
func newProofOf(m membership) func(protocol.ID, crypto.PrivKey, []upgrader.StreamMuxer) (*proofTransport, error) {
	return func(id protocol.ID, key crypto.PrivKey, muxers []upgrader.StreamMuxer) (*proofTransport, error) {
		inner, err := libp2ptls.New(id, key, muxers)
		if err != nil {
			return nil, err
		}
		self, err := peer.IDFromPrivateKey(key)
		if err != nil {
			return nil, err
		}
		return &proofTransport{tls: inner, self: self, members: m}, nil
	}
}

func (t *proofTransport) ID() protocol.ID { return securityID }

func (t *proofTransport) SecureInbound(ctx context.Context, insecure net.Conn, p peer.ID) (sec.SecureConn, error) {
	conn, err := t.tls.SecureInbound(ctx, insecure, p)
	if err != nil {
		return nil, err
	}
	from := insecure.RemoteAddr()
	return t.prove(conn, func(conn sec.SecureConn) error {
		err := t.accept(conn, from)
		var no refusal
		if t.members.refused != nil && errors.As(err, &no) {
			t.members.refused(Refusal{Peer: PeerID(conn.RemotePeer().String()), Addr: from.String(), Why: err})
		}
		return err
	})
}

func (t *proofTransport) SecureOutbound(ctx context.Context, insecure net.Conn, p peer.ID) (sec.SecureConn, error) {
	conn, err := t.tls.SecureOutbound(ctx, insecure, p)
	if err != nil {
		return nil, err
	}
	// The dialer's context ends when its caller gives up; the proof must not outlive it.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	return t.prove(conn, t.offer)
}

func (t *proofTransport) prove(conn sec.SecureConn, run func(sec.SecureConn) error) (sec.SecureConn, error) {
	if err := conn.SetDeadline(time.Now().Add(proofTimeout)); err != nil {
		conn.Close()
		return nil, err
	}
	if err := run(conn); err != nil {
		conn.Close()
		return nil, fmt.Errorf("membership proof with %s: %w", conn.RemotePeer(), err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// offer is the dialing side: nonce out; nonce and proofs in; proof out.
func (t *proofTransport) offer(conn sec.SecureConn) error {
	if !t.members.member(conn.RemotePeer()) {
		return noMember
	}
	p, err := newProving(conn, t.self, conn.RemotePeer())
	if err != nil {
		return err
	}
	p.keys = t.members.keys(conn.RemotePeer())
	rand.Read(p.dialed[:])
	if _, err := conn.Write(append([]byte{proofVersion, asMember}, p.dialed[:]...)); err != nil {
		return err
	}
	return p.answer(conn)
}

// answer proves to the listener, who has to prove first, what it asks for.
func (p *proving) answer(conn io.ReadWriter) error {
	theirs, err := p.readAnswer(conn)
	if err != nil {
		return err
	}
	for _, key := range p.keys {
		i := slices.IndexFunc(theirs, func(mac []byte) bool { return hmac.Equal(mac, p.mac("accept", key)) })
		if i < 0 {
			continue
		}
		_, err := conn.Write(append([]byte{verdictOK, byte(i)}, p.mac("offer", key)...))
		return err
	}
	_, err = conn.Write([]byte{verdictSecret})
	return errors.Join(refusedSecret, err)
}

// readAnswer takes the listener's verdict, nonce and proofs.
func (p *proving) readAnswer(conn io.Reader) ([][]byte, error) {
	head := make([]byte, 2)
	if _, err := io.ReadFull(conn, head); err != nil {
		return nil, err
	}
	// The verdict stands at the same place in every version.
	if err := verdict(head[1]); err != nil {
		return nil, err
	}
	if head[0] != proofVersion {
		return nil, refusedVersion
	}
	var count [1]byte
	if _, err := io.ReadFull(conn, p.accepted[:]); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(conn, count[:]); err != nil {
		return nil, err
	}
	if count[0] == 0 || count[0] > maxSecrets {
		return nil, fmt.Errorf("it offers %d proofs, want 1 to %d: %w", count[0], maxSecrets, flox.ErrCorrupt)
	}
	macs := make([]byte, int(count[0])*macSize)
	if _, err := io.ReadFull(conn, macs); err != nil {
		return nil, err
	}
	return slices.Collect(slices.Chunk(macs, macSize)), nil
}

// accept is the listening side.
func (t *proofTransport) accept(conn sec.SecureConn, from net.Addr) error {
	head := make([]byte, 2)
	if _, err := io.ReadFull(conn, head); err != nil {
		return err
	}
	p, err := newProving(conn, conn.RemotePeer(), t.self)
	if err != nil {
		return err
	}
	if head[0] != proofVersion || head[1] > asGuest {
		return refuse(conn, refusedVersion, verdictVersion)
	}
	if _, err := io.ReadFull(conn, p.dialed[:]); err != nil {
		return err
	}
	if head[1] == asGuest {
		return t.members.guests.welcome(conn, p, from)
	}
	p.keys = t.members.keys(conn.RemotePeer())
	switch {
	case !t.members.member(conn.RemotePeer()):
		return refuse(conn, noMember, verdictMember)
	case len(p.keys) == 0:
		return refuse(conn, refusedSecret, verdictSecret)
	}
	return p.demand(conn)
}

// demand proves to the dialer what is known here and asks for its proof.
func (p *proving) demand(conn io.ReadWriter) error {
	rand.Read(p.accepted[:])
	answer := append([]byte{proofVersion, verdictOK}, p.accepted[:]...)
	answer = append(answer, byte(len(p.keys)))
	for _, key := range p.keys {
		answer = append(answer, p.mac("accept", key)...)
	}
	if _, err := conn.Write(answer); err != nil {
		return err
	}
	return p.readProof(conn)
}

// readProof takes the dialer's last word.
func (p *proving) readProof(conn io.Reader) error {
	head := make([]byte, 1)
	if _, err := io.ReadFull(conn, head); err != nil {
		return err
	}
	if err := verdict(head[0]); err != nil {
		return err
	}
	proof := make([]byte, 1+macSize)
	if _, err := io.ReadFull(conn, proof); err != nil {
		return err
	}
	if i := int(proof[0]); i >= len(p.keys) || !hmac.Equal(proof[1:], p.mac("offer", p.keys[i])) {
		return refusedSecret // it was never proven, whatever the peer says
	}
	return nil
}

// verdict is the error the other side's verdict stands for.
func verdict(code byte) error {
	if code == verdictOK {
		return nil
	}
	if no, ok := verdicts[code]; ok {
		return no
	}
	return refusedOther
}

// refuse is the listener's last word. It takes in what the dialer still sends,
// because closing before would make the system throw the word away.
func refuse(conn io.ReadWriter, why error, code byte) error {
	if _, err := conn.Write([]byte{proofVersion, code}); err != nil {
		return errors.Join(why, err)
	}
	_, _ = io.CopyN(io.Discard, conn, 4096) // ends with the dialer or the time for a proof
	return why
}

// proving is one handshake: what goes into its MACs.
type proving struct {
	keys             [][32]byte // one for each secret, newest first
	dialer, listener peer.ID
	dialed, accepted [nonceSize]byte
	channel          []byte   // known to the ends of this TLS channel only
	claims           []string // of a guest: its invite, and what it wants to speak
}

func newProving(conn sec.SecureConn, dialer, listener peer.ID) (*proving, error) {
	channel, ok := conn.(interface{ ConnectionState() tls.ConnectionState })
	if !ok {
		return nil, fmt.Errorf("%T is no TLS connection", conn)
	}
	state := channel.ConnectionState()
	value, err := state.ExportKeyingMaterial("EXPORTER-flox-membership", nil, 32)
	return &proving{dialer: dialer, listener: listener, channel: value}, err
}

// What a secret is for: proofs of one kind are worth nothing as the other.
const (
	memberProof = "flox 2026-01 membership proof"
	guestProof  = "flox 2026-01 guest proof"
	keyProof    = "flox 2026-11 proof by key alone"
)

func keysOf(purpose string, secrets ...[]byte) [][32]byte {
	keys := make([][32]byte, len(secrets))
	for i, secret := range secrets {
		blake3.DeriveKey(purpose, secret, keys[i][:])
	}
	return keys
}

// mac is keyed BLAKE3. Every part is preceded by its length.
func (p *proving) mac(side string, key [32]byte) []byte {
	h, err := blake3.NewKeyed(key[:])
	if err != nil {
		panic(err) // the key has 32 bytes
	}
	parts := []string{side, string(p.dialer), string(p.listener), string(p.dialed[:]), string(p.accepted[:]), string(p.channel)}
	for _, part := range append(parts, p.claims...) {
		_, _ = h.Write([]byte{byte(len(part))}) // a hash gives no error
		_, _ = h.WriteString(part)
	}
	return h.Sum(nil)
}
