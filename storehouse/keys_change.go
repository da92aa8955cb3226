package storehouse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// changeTries bounds how often a change of the keys begins again because somebody
	// was faster, or they are not sealed yet; changePause lies between.
	changeTries = 50
	changePause = 100 * time.Millisecond
)

// errUnchanged is what a change of the keys gives when there is nothing to change.
var errUnchanged = errors.New("unchanged")

// keysInForce gives the keys if they are the newest that the log holds, and their version.
func (s *Server) keysInForce() (*keys, uint64, error) {
	sealed := s.roster.now.Load().secrets
	if sealed == nil {
		return nil, 0, fmt.Errorf("the storehouse's keys are not sealed yet: %w", flox.ErrBusy)
	}
	if sealed.GetVersion() != s.sealed.Load() {
		return nil, 0, fmt.Errorf("the storehouse's keys, version %d, are not open on this server: ask another one: %w", sealed.GetVersion(), flox.ErrUnreachable)
	}
	have, err := s.id.ring.get()
	return have, sealed.GetVersion(), err
}

// changeKeys has change alter the cluster's secrets and puts them in force on
// every server. Any server that has them may: the log takes the new ones only in
// place of those that change saw, and change is called again if somebody was faster.
func (s *Server) changeKeys(ctx context.Context, who *floxv1.Actor, change func(*floxv1.ClusterSecrets) error) error {
	for try := 1; ; try++ {
		err := s.changeKeysOnce(ctx, who, change)
		if err == nil || errors.Is(err, errUnchanged) {
			return nil
		}
		if !errors.Is(err, errRetry) || try == changeTries {
			return err
		}
		select {
		case <-time.After(changePause):
		case <-ctx.Done():
			return err
		}
	}
}

// errRetry marks what may go away by itself.
var errRetry = errors.New("trying again did not help")

func (s *Server) changeKeysOnce(ctx context.Context, who *floxv1.Actor, change func(*floxv1.ClusterSecrets) error) error {
	if err := s.seeNow(ctx); err != nil {
		return err
	}
	have, version, err := s.keysInForce()
	if errors.Is(err, flox.ErrBusy) {
		return errors.Join(err, errRetry)
	}
	if err != nil {
		return err
	}
	if s.node.ClusterLevel() < retireLevel {
		return errors.Join(fmt.Errorf("a server runs an older program, which would forget when keys retire: upgrade it (see floxctl storehouse servers): %w", cluster.ErrLevel), errRetry)
	}
	next := have.message()
	if err := change(next); err != nil {
		return err
	}
	if _, err := parseKeys(next); err != nil { // what is sealed has to open
		return err
	}
	to := map[p2p.PeerID][]byte{}
	for _, m := range s.roster.servers() {
		to[p2p.PeerID(m.GetPeer())] = m.GetSealKey()
	}
	if err := s.putSecrets(ctx, who, next, to, version); err != nil {
		if errors.Is(err, flox.ErrBusy) {
			err = errors.Join(err, errRetry)
		}
		return err
	}
	return s.seeNow(ctx)
}

// seeNow brings the member list and the keys here up to what everybody agreed on.
func (s *Server) seeNow(ctx context.Context) error {
	if err := s.viewMembers(ctx, cluster.Linearizable, func(*cluster.Reader) error { return nil }); err != nil {
		return err
	}
	return s.roster.refresh(ctx, s)
}

// settleTrust puts a trust list in force that names the keys and the servers
// there are, unless the newest one does. It gives the version that does.
func (s *Server) settleTrust(ctx context.Context) (version uint64, err error) {
	for try := 1; ; try++ {
		version, err = s.listKeysAndVoters(ctx)
		// Somebody else's list may have come between.
		if err == nil || !errors.Is(err, flox.ErrUntrusted) || try == 3 {
			return version, err
		}
	}
}

func (s *Server) listKeysAndVoters(ctx context.Context) (uint64, error) {
	have, _, err := s.keysInForce()
	if err != nil {
		return 0, err
	}
	old, err := s.newestList(ctx)
	if err != nil {
		return 0, err
	}
	next := *old
	next.NixKeys, next.ManifestKeys, next.Voters = public(have.nix), public(have.manifest), nil
	for _, m := range s.roster.servers() { // sorted
		next.Voters = append(next.Voters, m.GetPeer())
	}
	if sameTrust(old, &next) {
		return old.Version, nil
	}
	if err := s.putTrust(ctx, old, &next); err != nil {
		return 0, err
	}
	return next.Version, nil
}

// sameTrust reports whether two lists trust the same.
func sameTrust(a, b *content.TrustList) bool {
	return slices.Equal(a.NixKeys, b.NixKeys) && slices.Equal(a.ManifestKeys, b.ManifestKeys) && slices.Equal(a.Voters, b.Voters)
}

// retireKeys takes keys out whose overlap is over. The trust list names those
// that stay already.
func (s *Server) retireKeys(ctx context.Context) error {
	have, _, err := s.keysInForce()
	if err != nil {
		return err
	}
	now := time.Now()
	if len(retire(have.message(), now, !have.all.GetUnsigned())) == 0 {
		return nil
	}
	var did []string
	err = s.changeKeys(ctx, s.actor(), func(k *floxv1.ClusterSecrets) error {
		if did = retire(k, now, !k.GetUnsigned()); len(did) == 0 {
			return errUnchanged
		}
		return nil
	})
	if err != nil || len(did) == 0 {
		return err
	}
	s.cfg.Log.Info("keys retired", "keys", strings.Join(did, ", "))
	note := &floxv1.AuditRecord{Action: "key.retire", Subject: strings.Join(did, ", "), Detail: "the overlap is over"}
	_, err = s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: s.actor(), Command: &floxv1.MembersCommand_Note{Note: note}})
	return err
}

// keysKnownTo reports whether the storehouse's keys are sealed to a machine.
func (s *Server) keysKnownTo(peer string) bool {
	sealed := s.roster.now.Load().secrets
	return slices.ContainsFunc(sealed.GetSeals(), func(seal *floxv1.Seal) bool { return seal.GetPeer() == peer })
}

// keysWereKnown has the audit log say what to do because a server that is taken
// out knows the keys. Only the cluster key is replaced by itself.
func (s *Server) keysWereKnown(ctx context.Context, who *floxv1.Actor, m *floxv1.Machine, knew bool) error {
	if !knew {
		return nil
	}
	return s.note(ctx, who, "key.known", m.GetName(), "it knew the storehouse's keys: if it may be in wrong hands, replace them with floxctl key rotate, and floxctl key rotate --use token")
}

// keepFiles writes anew what people read of the keys, after they changed: the
// upload token and invite.json. What retired does not stay in files.
func (s *Server) keepFiles(ctx context.Context) error {
	have, version, err := s.keysInForce()
	if err != nil || version == s.filed {
		return nil //nolint:nilerr // they come later
	}
	if token := have.all.GetUploadToken(); token != "" {
		b, err := os.ReadFile(s.cfg.UploadTokenFile)
		if err != nil || strings.TrimSpace(string(b)) != token {
			if err := writeFile(s.cfg.UploadTokenFile, []byte(token+"\n"), 0o600); err != nil {
				return err
			}
		}
	}
	if inv := s.invite.Load(); string(inv.Secret) != string(have.all.GetSwarmSecrets()[0]) || inv.NixKey != s.PublicKey() {
		trust, err := s.newestTrust(ctx)
		if err != nil {
			return err
		}
		if err := s.writeInvite(trust); err != nil {
			return err
		}
	}
	if err := s.dropKeyFiles(ctx, have); err != nil {
		return err
	}
	s.filed = version
	return nil
}
