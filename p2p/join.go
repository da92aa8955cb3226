package p2p

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/sec"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	"github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	mss "github.com/multiformats/go-multistream"

	"github.com/floxctl/flox"
)

// Guest is what a machine has that is no member yet.
type Guest struct {
	// InviteID names an invite, at most 128 bytes. "" asks for a window in which
	// the storehouse takes machines without one.
	InviteID string
	// Secret of the invite, at least 16 bytes. It is proven, never sent.
	Secret []byte
}

// DialGuest opens a connection to a storehouse that this machine is no member
// of, to speak a protocol that it takes guests for. Each end has proven its
// identity and that it knows the invite's secret. The connection is closed after
// 30 s. Errors: ErrBadInput; ErrDenied with words for the person at this machine
// (an invite that is not valid, no window, another machine at that address);
// ErrBusy if there are too many guests; ErrUnreachable.
func DialGuest(ctx context.Context, key ed25519.PrivateKey, to PeerAddr, g Guest, proto string) (net.Conn, error) {
	if err := g.check(); err != nil {
		return nil, err
	}
	if err := checkProtocol(proto); err != nil {
		return nil, err
	}
	if len(key) != ed25519.PrivateKeySize {
		return nil, fmt.Errorf("dial storehouse: a machine key is needed: %w", flox.ErrBadInput)
	}
	info, err := to.addrInfo()
	if err != nil {
		return nil, fmt.Errorf("dial storehouse: %w", err)
	}
	if len(info.Addrs) == 0 {
		return nil, fmt.Errorf("dial storehouse %s: no address is given: %w", to.ID, flox.ErrBadInput)
	}
	d := guestDial{Guest: g, proto: proto, want: info.ID}
	if err := d.setKey(key); err != nil {
		return nil, err
	}
	var failed []error
	for _, addr := range info.Addrs {
		conn, err := d.dial(ctx, addr)
		if err == nil {
			return &guestConn{Conn: conn, invite: g.InviteID, self: PeerID(d.self.String()), peer: to.ID}, nil
		}
		err = fmt.Errorf("storehouse %s at %s: %w", to.ID, addr, err)
		if final(err) || ctx.Err() != nil {
			return nil, err // it would say the same at another address
		}
		failed = append(failed, err)
	}
	return nil, errors.Join(failed...)
}

func (g Guest) check() error {
	switch {
	case len(g.InviteID) > maxInviteID:
		return fmt.Errorf("invite: its name has %d bytes, want at most %d: %w", len(g.InviteID), maxInviteID, flox.ErrBadInput)
	case g.InviteID != "" && len(g.Secret) < minSecret:
		return fmt.Errorf("invite %q: its secret has %d bytes, want at least %d: %w", g.InviteID, len(g.Secret), minSecret, flox.ErrBadInput)
	case g.InviteID == "" && len(g.Secret) > 0:
		return fmt.Errorf("invite: a secret without the invite's name: %w", flox.ErrBadInput)
	}
	return nil
}

// checkProtocol takes what Listen and ListenGuests can be asked for.
func checkProtocol(proto string) error {
	if !strings.HasPrefix(proto, "/flox/") || len(proto) > maxGuestProto {
		return fmt.Errorf("protocol %q: want /flox/name/version, at most %d bytes: %w", proto, maxGuestProto, flox.ErrBadInput)
	}
	return nil
}

// refusedImpostor: TLS has shown another key than the invite names.
const refusedImpostor = refusal("another machine answers there than the one that is asked for: the storehouse was installed anew (ask for a new invite), or somebody is in between")

// final reports whether err is the answer of the right machine.
func final(err error) bool {
	var no refusal
	return errors.As(err, &no) && no != refusedImpostor || errors.Is(err, errGuests)
}

// guestDial is one DialGuest.
type guestDial struct {
	Guest
	proto      string
	self, want peer.ID
	tls        *libp2ptls.Transport
}

func (d *guestDial) setKey(key ed25519.PrivateKey) error {
	secret, err := crypto.UnmarshalEd25519PrivateKey(key)
	if err == nil {
		d.self, err = peer.IDFromPrivateKey(secret)
	}
	if err == nil {
		d.tls, err = libp2ptls.New(securityID, secret, nil)
	}
	if err != nil {
		return fmt.Errorf("machine key: %w: %w", err, flox.ErrBadInput)
	}
	return nil
}

// dial tries one address.
func (d *guestDial) dial(ctx context.Context, addr multiaddr.Multiaddr) (sec.SecureConn, error) {
	network, hostPort, err := manet.DialArgs(addr)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, flox.ErrBadInput)
	}
	tcp, err := dialer(addr)
	if err != nil {
		return nil, err
	}
	dialCtx, stop := context.WithTimeout(ctx, patientDial)
	raw, err := tcp.DialContext(dialCtx, network, hostPort)
	stop()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", flox.ErrUnreachable, err)
	}
	ctx, cancel := context.WithTimeout(ctx, proofTimeout)
	defer cancel()
	giveUp := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	conn, err := d.greet(ctx, raw)
	if !giveUp() && err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		return conn, nil
	}
	var other sec.ErrPeerIDMismatch
	switch {
	case errors.As(err, &other):
		err = fmt.Errorf("%w (it is %s)", refusedImpostor, other.Actual)
	case !final(err):
		err = fmt.Errorf("%w: %w", flox.ErrUnreachable, err)
	}
	return nil, errors.Join(err, ignoreClosed(raw.Close()))
}

// greet runs the handshake as a guest.
func (d *guestDial) greet(ctx context.Context, raw net.Conn) (sec.SecureConn, error) {
	if _, err := mss.SelectOneOf([]protocol.ID{securityID}, raw); err != nil {
		return nil, fmt.Errorf("no flox storehouse answers: %w", err)
	}
	conn, err := d.tls.SecureOutbound(ctx, raw, d.want)
	if err != nil {
		return nil, err
	}
	p, err := newProving(conn, d.self, d.want)
	if err != nil {
		return nil, err
	}
	p.keys, p.claims = keysOf(guestProof, d.Secret), []string{d.InviteID, d.proto}
	rand.Read(p.dialed[:])
	hello := append([]byte{proofVersion, asGuest}, p.dialed[:]...)
	for _, claim := range p.claims {
		hello = append(append(hello, byte(len(claim))), claim...)
	}
	if _, err := conn.Write(hello); err != nil {
		return nil, err
	}
	if err := p.answer(conn); err != nil {
		return nil, err
	}
	last := make([]byte, 2) // whether there is room
	if _, err := io.ReadFull(conn, last); err != nil {
		return nil, err
	}
	return conn, verdict(last[1])
}
