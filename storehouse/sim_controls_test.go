package storehouse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/profile"
	cluster "github.com/floxctl/flox/raft"
	"github.com/floxctl/flox/raft/raftsim"
)

// The negative controls: whoever forgets a registration now and then, lets an invite
// be used once more, forgets a revocation, merges a report twice, takes another salt,
// reads from a server that may be behind, or keeps no record of what it did, is found out;
// and so is who changes a profile that is not as its author saw it, forgets that in its
// history, or counts its packages wrong.
func TestSimulationCanFail(t *testing.T) {
	t.Parallel()
	var s *simulation
	dir := raftsim.Dir(t)
	synctest.Test(t, func(t *testing.T) {
		s = newSimulation(t, raftsim.Config{Dir: dir, Seed: 3}, broken)
		s.careless = simUpstreams{}
		s.run(16 * time.Minute)
	})
	wrong := s.judge(t)
	for what, err := range map[string]error{"an audit log with gaps": s.audit, "counters that are wrong": s.counts, "states that are too old": s.tooOld} {
		if !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("of %s is said: %v", what, err)
		}
	}
	for _, words := range []string{"is 0 times in the history", " came on ", " is counted in "} {
		if !errors.Is(s.profiles, flox.ErrCorrupt) || !strings.Contains(s.profiles.Error(), words) {
			t.Errorf("of profiles is said %v, and nothing with %q", s.profiles, words)
		}
	}
	for what, is := range map[string]func(simSubject) bool{
		"a registration is forgotten":    func(w simSubject) bool { return w.part == simPaths{} },
		"an invite is used once more":    func(w simSubject) bool { return w.part == simMembers{} && w.serial%2 == 0 },
		"a revocation is forgotten":      func(w simSubject) bool { return w.part == simMembers{} && w.serial%2 == 1 },
		"a report is merged twice":       func(w simSubject) bool { return w.part == simStarts{} },
		"the salt becomes another":       func(w simSubject) bool { return w.part == simSalt{} },
		"a read is from who lags behind": func(w simSubject) bool { return w.part == simUpstreams{} },
		"a change is of what moved":      func(w simSubject) bool { return w.part == simProfiles{} && w.serial%2 == 0 },
		"a deleted profile is":           func(w simSubject) bool { return w.part == simProfiles{} && w.serial%2 == 1 },
	} {
		if !slices.ContainsFunc(wrong, is) {
			t.Errorf("%s, and nobody says so", what)
		}
	}
}

// broken gives a processor that breaks a rule, the same on every server.
func broken(kind uint32, p cluster.Processor) cluster.Processor {
	switch kind {
	case pathsKind:
		return forgetful{p}
	case members.Kind:
		return generous{p}
	case tracesKind:
		return eager{p}
	case profile.Kind:
		return pliable{p}
	}
	return p
}

// forgetful forgets what is valid when it is registered again, now and then.
type forgetful struct{ cluster.Processor }

func (p forgetful) Apply(tx *cluster.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	c := &floxv1.PathsCommand{}
	if err := proto.Unmarshal(command, c); err != nil {
		return nil, err
	}
	if index%3 == 0 {
		for _, path := range c.GetAdd().GetPaths() {
			if err := tx.Delete(hashKey(infoKey, flox.StorePath(path.GetPath()).HashPart())); err != nil {
				return nil, err
			}
		}
	}
	return p.Processor.Apply(tx, command, at, index)
}

// generous gives back a use of an invite to machines of every other subject, and
// takes back the revocation of the others. Of some joins it keeps no record.
type generous struct{ cluster.Processor }

func (p generous) Apply(tx *cluster.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	c := &floxv1.MembersCommand{}
	if err := proto.Unmarshal(command, c); err != nil {
		return nil, err
	}
	redeem, serial, which := c.GetRedeem(), uint64(0), 0
	if redeem == nil {
		return p.Processor.Apply(tx, command, at, index)
	}
	if _, err := fmt.Sscanf(redeem.GetInvite(), "invite-%d-%d", &serial, &which); err != nil {
		return nil, err
	}
	if serial%2 == 1 {
		if err := tx.Delete([]byte("x" + redeem.GetMachine().GetPeer())); err != nil {
			return nil, err
		}
	}
	reply, err := p.Processor.Apply(tx, command, at, index)
	if err == nil && index%3 == 0 {
		err = tx.Delete(indexKey('a', index))
	}
	if err != nil || serial%2 == 1 {
		return reply, err
	}
	key, invite := []byte("i"+redeem.GetInvite()), &floxv1.InviteRecord{}
	if err := readMessage(tx, key, invite); errors.Is(err, flox.ErrNotFound) {
		return reply, nil
	} else if err != nil {
		return nil, err
	}
	invite.Uses++
	b, err := stable.Marshal(invite)
	return reply, errors.Join(err, tx.Set(key, b))
}

// eager merges reports twice, and takes the last salt, now and then.
type eager struct{ cluster.Processor }

func (p eager) Apply(tx *cluster.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	c := &floxv1.TracesCommand{}
	if err := proto.Unmarshal(command, c); err != nil {
		return nil, err
	}
	if index%3 == 0 {
		err := error(nil)
		if c.GetMerge() != nil {
			_, err = p.Processor.Apply(tx, command, at, index)
		} else {
			err = tx.Delete([]byte{saltKey})
		}
		if err != nil {
			return nil, err
		}
	}
	return p.Processor.Apply(tx, command, at, index)
}

// pliable changes a profile whatever lives there, keeps it when it is deleted, keeps no
// record of a change, or counts a package once more, now and then.
type pliable struct{ cluster.Processor }

func (p pliable) Apply(tx *cluster.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	c := &floxv1.ProfilesCommand{}
	if err := proto.Unmarshal(command, c); err != nil {
		return nil, err
	}
	change := c.GetChange()
	switch {
	case c.GetDelete() != "" && index%2 == 0:
		return nil, nil
	case change == nil:
		return p.Processor.Apply(tx, command, at, index)
	case index%3 == 0:
		if now, err := profile.Find(tx, change.GetProfile()); err == nil {
			change.Live = now.GetLive()
		}
	}
	command, err := proto.Marshal(c)
	if err != nil {
		return nil, err
	}
	reply, err := p.Processor.Apply(tx, command, at, index)
	switch key := append([]byte("h"+profile.Folded(change.GetProfile())), 0); {
	case err == nil && index%3 == 1:
		err = tx.Delete(binary.BigEndian.AppendUint64(key, index))
	case err == nil && index%3 == 2:
		err = p.countMore(tx)
	}
	return reply, err
}

// countMore counts one more use of a package.
func (pliable) countMore(tx *cluster.Tx) error {
	var first []byte
	r := &floxv1.PackageRecord{}
	err := tx.Iterate([]byte("k"), nil, func(key, _ []byte) bool {
		first = slices.Clone(key)
		return false
	})
	if err != nil || first == nil {
		return err
	}
	if err := readMessage(tx, first, r); err != nil {
		return err
	}
	r.Users++
	b, err := stable.Marshal(r)
	return errors.Join(err, tx.Set(first, b))
}
