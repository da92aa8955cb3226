package p2p

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"fmt"
	"io"
	"net"
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
	proofVersion = 1
	nonceSize    = 32
	macSize      = 32
	proofTimeout = 5 * time.Second
)

// proofTransport is libp2p's TLS 1.3 followed by a mutual proof of the shared
// secret. It stands in the handshake, below the multiplexer, so no protocol
// (identify and the DHT included) ever runs with a peer that has not proven it.
//
// TLS has authenticated both peer IDs by then. Each side answers the other's
// fresh nonce with a MAC over its own direction, both IDs and both nonces, so a
// proof can be neither replayed nor passed on by a third party.
type proofTransport struct {
	tls  *libp2ptls.Transport
	self peer.ID
	key  [32]byte
}

var _ sec.SecureTransport = (*proofTransport)(nil)

// newProof gives the constructor libp2p.Security wants.
func newProof(secret []byte) func(protocol.ID, crypto.PrivKey, []upgrader.StreamMuxer) (*proofTransport, error) {
	return func(id protocol.ID, key crypto.PrivKey, muxers []upgrader.StreamMuxer) (*proofTransport, error) {
		inner, err := libp2ptls.New(id, key, muxers)
		if err != nil {
			return nil, err
		}
		self, err := peer.IDFromPrivateKey(key)
		if err != nil {
			return nil, err
		}
		t := &proofTransport{tls: inner, self: self}
		blake3.DeriveKey("flox 2026-01 membership proof", secret, t.key[:])
		return t, nil
	}
}

func (t *proofTransport) ID() protocol.ID { return securityID }

func (t *proofTransport) SecureInbound(ctx context.Context, insecure net.Conn, p peer.ID) (sec.SecureConn, error) {
	conn, err := t.tls.SecureInbound(ctx, insecure, p)
	if err != nil {
		return nil, err
	}
	return t.prove(conn, t.accept)
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

// offer is the dialing side: nonce out; nonce and proof in; proof out.
func (t *proofTransport) offer(conn sec.SecureConn) error {
	mine := make([]byte, 1+nonceSize)
	mine[0] = proofVersion
	rand.Read(mine[1:])
	if _, err := conn.Write(mine); err != nil {
		return err
	}
	theirs := make([]byte, 1+nonceSize+macSize)
	if _, err := io.ReadFull(conn, theirs); err != nil {
		return err
	}
	if theirs[0] != proofVersion {
		return fmt.Errorf("it speaks version %d, want %d: %w", theirs[0], proofVersion, flox.ErrDenied)
	}
	nonces := [2][]byte{mine[1:], theirs[1 : 1+nonceSize]}
	if !hmac.Equal(theirs[1+nonceSize:], t.mac("accept", t.self, conn.RemotePeer(), nonces)) {
		return fmt.Errorf("it does not know this swarm's secret (another invite?): %w", flox.ErrDenied)
	}
	_, err := conn.Write(t.mac("offer", t.self, conn.RemotePeer(), nonces))
	return err
}

// accept is the listening side.
func (t *proofTransport) accept(conn sec.SecureConn) error {
	theirs := make([]byte, 1+nonceSize)
	if _, err := io.ReadFull(conn, theirs); err != nil {
		return err
	}
	if theirs[0] != proofVersion {
		return fmt.Errorf("it speaks version %d, want %d: %w", theirs[0], proofVersion, flox.ErrDenied)
	}
	mine := make([]byte, 1+nonceSize, 1+nonceSize+macSize)
	mine[0] = proofVersion
	rand.Read(mine[1:])
	nonces := [2][]byte{theirs[1:], mine[1 : 1+nonceSize]}
	if _, err := conn.Write(append(mine, t.mac("accept", conn.RemotePeer(), t.self, nonces)...)); err != nil {
		return err
	}
	proof := make([]byte, macSize)
	if _, err := io.ReadFull(conn, proof); err != nil {
		return err
	}
	if !hmac.Equal(proof, t.mac("offer", conn.RemotePeer(), t.self, nonces)) {
		return fmt.Errorf("it does not know this swarm's secret (another invite?): %w", flox.ErrDenied)
	}
	return nil
}

// mac is keyed BLAKE3. Every part but the last has a fixed length or is preceded by it.
func (t *proofTransport) mac(side string, dialer, listener peer.ID, nonces [2][]byte) []byte {
	h, err := blake3.NewKeyed(t.key[:])
	if err != nil {
		panic(err) // the key has 32 bytes
	}
	for _, part := range []string{side, string(dialer), string(listener), string(nonces[0]), string(nonces[1])} {
		_, _ = h.Write([]byte{byte(len(part))}) // a hash gives no error
		_, _ = h.WriteString(part)
	}
	return h.Sum(nil)
}
