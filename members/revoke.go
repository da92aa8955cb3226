package members

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// maxRevoked bounds the keys that are never let in again. A member that is
// revoked is a member no more in any case; the list keeps its key from joining
// with another invite and, with open membership, from coming as everybody does.
const maxRevoked = 1 << 16

// keyPrefix is what the peer IDs of Ed25519 keys begin with.
const keyPrefix = "12D3KooW"

// revoke lists a key as one that is never let in again. If there are too many,
// the oldest makes room, and the audit log says so.
func (a *applying) revoke(peer, name, reason string) error {
	reason = reason[:min(len(reason), maxText)]
	detail := reason
	if a.level >= 2 {
		reason = strings.ToValidUTF8(reason, "")
		gone, err := a.oldestRevoked()
		if err != nil {
			return err
		}
		detail = reason
		if gone != nil {
			if err := a.tx.Delete(textKey(revokedKey, gone.GetPeer())); err != nil {
				return err
			}
			detail = strings.TrimSpace(fmt.Sprintf("%s (only %d revocations are kept: that of %s, %s, on %s is forgotten)", reason, a.maxRevoked,
				gone.GetName(), gone.GetPeer(), time.UnixMilli(gone.GetTimeUnixMs()).UTC().Format(time.DateOnly)))
		}
	}
	err := a.put(textKey(revokedKey, peer), &floxv1.Revoked{Peer: peer, Name: name, Reason: reason, TimeUnixMs: a.at.UnixMilli()})
	return errors.Join(err, a.note("machine.revoke", name, detail, false))
}

// oldestRevoked gives the revocation that makes room for another one; nil if
// there is room.
func (a *applying) oldestRevoked() (oldest *floxv1.Revoked, err error) {
	n := 0
	err = each(a.tx, []byte{revokedKey}, nil, func(r *floxv1.Revoked) bool {
		n++
		if oldest == nil || r.GetTimeUnixMs() < oldest.GetTimeUnixMs() {
			oldest = r
		}
		return true
	})
	if n < a.maxRevoked {
		oldest = nil
	}
	return oldest, err
}

// revokeStranger revokes a key that is no member's: with open membership its
// machine comes all the same. unknown is the answer if that cannot be a key.
func (a *applying) revokeStranger(c *floxv1.RemoveMachine, unknown error) error {
	peer := c.GetPeer()
	if !IsPeer(peer) {
		return unknown
	}
	switch err := a.notRevoked(peer); {
	case errors.Is(err, flox.ErrDenied):
		return nil // told twice
	case err != nil:
		return err
	}
	a.peers = append(a.peers, peer)
	return a.revoke(peer, peer, c.GetReason())
}

// IsPeer reports whether a text looks like a whole peer ID, as opposed to a name
// or the beginning of one.
func IsPeer(text string) bool {
	return strings.HasPrefix(text, keyPrefix) && len(text) == 52
}
