package members

import (
	"errors"
	"fmt"
	"strings"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// Machine gives a member by its peer ID. ErrNotFound.
func Machine(r *raft.Reader, peer string) (*floxv1.Machine, error) {
	return load(r, textKey(machineKey, peer), &floxv1.Machine{})
}

// Machines calls yield with every member, in the order of their peer IDs, until
// it returns false.
func Machines(r *raft.Reader, yield func(*floxv1.Machine) bool) error {
	return each(r, []byte{machineKey}, nil, yield)
}

// Find gives the one machine that is meant by a name (in any case), a peer ID,
// or the beginning of one, of 6 characters at least. ErrNotFound; ErrBadInput if
// several begin so.
func Find(r *raft.Reader, what string) (*floxv1.Machine, error) {
	if m, err := Machine(r, what); !errors.Is(err, flox.ErrNotFound) {
		return m, err
	}
	peer, err := r.Get(textKey(nameKey, folded(what)))
	if err == nil {
		return Machine(r, string(peer))
	}
	if !errors.Is(err, flox.ErrNotFound) {
		return nil, err
	}
	var found []*floxv1.Machine
	if len(what) >= 6 {
		err = Machines(r, func(m *floxv1.Machine) bool {
			// All peer IDs begin alike: the part behind that counts too.
			if strings.HasPrefix(m.GetPeer(), what) || strings.HasPrefix(strings.TrimPrefix(m.GetPeer(), keyPrefix), what) {
				found = append(found, m)
			}
			return len(found) < 2
		})
		if err != nil {
			return nil, err
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("no machine has the name, the peer ID or the beginning of one %q; see: floxctl machine list: %w", what[:min(len(what), 80)], flox.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("%q is the beginning of several peer IDs, of %s and %s among them: give more of it: %w", what, found[0].GetName(), found[1].GetName(), flox.ErrBadInput)
}

// Revocation says that a key was revoked. ErrNotFound if it was not.
func Revocation(r *raft.Reader, peer string) (*floxv1.Revoked, error) {
	return load(r, textKey(revokedKey, peer), &floxv1.Revoked{})
}

// Revocations calls yield with every key that was revoked, in the order of the
// peer IDs, until it returns false.
func Revocations(r *raft.Reader, yield func(*floxv1.Revoked) bool) error {
	return each(r, []byte{revokedKey}, nil, yield)
}

// Invite gives an invite as the log knows it: it may have expired meanwhile, and
// one that is used up only answers again those who joined with it. ErrNotFound.
func Invite(r *raft.Reader, id string) (*floxv1.InviteRecord, error) {
	return load(r, textKey(inviteKey, id), &floxv1.InviteRecord{})
}

// Invites calls yield with every invite until it returns false.
func Invites(r *raft.Reader, yield func(*floxv1.InviteRecord) bool) error {
	return each(r, []byte{inviteKey}, nil, yield)
}

// Audit calls yield with the records behind a log index, oldest first, until it
// returns false.
func Audit(r *raft.Reader, after uint64, yield func(*floxv1.AuditRecord) bool) error {
	return each(r, []byte{auditKey}, indexKey(auditKey, after+1), yield)
}

// Secrets gives the cluster's sealed secrets. ErrNotFound before there are any.
func Secrets(r *raft.Reader) (*floxv1.SealedSecrets, error) {
	return load(r, []byte{secretsKey}, &floxv1.SealedSecrets{})
}

// Changes gives the peers whose record changed or went behind a log index, each
// once. ok is false when that is no longer all known: read everybody.
func Changes(r *raft.Reader, after uint64) (peers []string, ok bool, err error) {
	c, err := loadCounts(r)
	if err != nil || after == 0 || after < c.dropped || after > r.Index() {
		return nil, false, err
	}
	seen := map[string]bool{}
	err = each(r, []byte{changeKey}, indexKey(changeKey, after+1), func(c *floxv1.MembersChange) bool {
		for _, p := range c.GetPeers() {
			if !seen[p] {
				seen[p] = true
				peers = append(peers, p)
			}
		}
		return true
	})
	return peers, true, err
}

// IsSecrets reports whether a record of the members' state is what Secrets gives.
func IsSecrets(key []byte) bool { return len(key) == 1 && key[0] == secretsKey }

// Redacted gives the value of a record of the members' state as a backup may hold
// it in the clear: of an invite, nothing that lets somebody join with it. It is over.
func Redacted(key, value []byte) ([]byte, error) {
	if len(key) == 0 || key[0] != inviteKey {
		return value, nil
	}
	invite := &floxv1.InviteRecord{}
	if err := decode(key, value, invite); err != nil {
		return nil, err
	}
	invite.Verifier, invite.ExpiresUnixMs = nil, min(invite.GetExpiresUnixMs(), invite.GetMadeUnixMs())
	return stable.Marshal(invite)
}
