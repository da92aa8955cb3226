// Package members says who takes part in a storehouse: machines, the invites
// they join with, the users they may speak for, the log of what was changed, and
// the cluster's sealed secrets. It holds the rules and their Raft processor.
//
// It must not know how machines reach each other, nor open a secret: what it
// keeps of an invite and of the cluster's keys is useless to who reads it.
package members

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// Kind is the kind of MembersCommand in the log. Kinds are never reused.
const Kind = 3

// The roles of a machine.
const (
	Server = "server"
	Agent  = "agent"
	Worker = "worker"
)

// The roles of a person on a machine, each with the rights of those before.
const (
	Member    = "member"
	Publisher = "publisher"
	Admin     = "admin"
)

// Bounds. They are part of the state machine: equal on every server.
const (
	maxMachines = 1 << 17
	maxInvites  = 1 << 14
	maxChanges  = 1 << 14 // entries a watcher may have slept through
	maxLabels   = 32      // of a machine
	maxUsers    = 256
	maxAddrs    = 16
	maxText     = 256 // bytes of a label, a name, an address
	maxDetail   = 4096
)

// Keys of the state:
//
//	'm' peer             Machine
//	'n' name, lower case peer of the machine with that name
//	'x' peer             Revoked
//	'i' ID               InviteRecord
//	'a' log index        AuditRecord
//	'c' log index        MembersChange
//	's'                  SealedSecrets
//	't' peer             when an ephemeral machine was there last, Unix milliseconds
//	'k'                  counts
const (
	machineKey = 'm'
	nameKey    = 'n'
	revokedKey = 'x'
	inviteKey  = 'i'
	auditKey   = 'a'
	changeKey  = 'c'
	secretsKey = 's'
	seenKey    = 't'
	countsKey  = 'k'
)

func textKey(kind byte, text string) []byte { return append([]byte{kind}, text...) }

func indexKey(kind byte, index uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{kind}, index)
}

// getter is a transaction or a reader.
type getter = raft.Getter

// load reads one message of the state. ErrNotFound.
func load[M proto.Message](g getter, key []byte, into M) (M, error) {
	return raft.LoadRecord(g, "members", key, into)
}

func decode(key, value []byte, into proto.Message) error {
	return raft.DecodeRecord("members", key, value, into)
}

// each reads the messages behind a prefix, from a key on.
func each[M any, P interface {
	*M
	proto.Message
}](g getter, prefix, from []byte, yield func(P) bool) error {
	var bad error
	err := g.Iterate(prefix, from, func(key, value []byte) bool {
		m := P(new(M))
		if bad = decode(key, value, m); bad != nil {
			return false
		}
		return yield(m)
	})
	return errors.Join(bad, err)
}

// counts are kept so that nobody has to count.
type counts struct{ machines, invites, changes, dropped uint64 }

func (c *counts) fields() []*uint64 {
	return []*uint64{&c.machines, &c.invites, &c.changes, &c.dropped}
}

func loadCounts(g getter) (c counts, err error) {
	err = raft.LoadCounts(g, "members", []byte{countsKey}, c.fields())
	return c, err
}

// folded is a name as it is compared.
func folded(name string) string { return strings.ToLower(name) }

// CheckName refuses what cannot be a machine's name: 1 to 63 letters, digits,
// '-', '.' and '_', the first a letter or digit. ErrBadInput.
func CheckName(name string) error {
	ok := len(name) > 0 && len(name) <= 63
	for i, r := range name {
		alnum := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		ok = ok && (alnum || i > 0 && strings.ContainsRune("-._", r))
	}
	if !ok {
		return fmt.Errorf("machine name %q: want 1 to 63 letters, digits, '-', '.' or '_', beginning with a letter or digit: %w", name[:min(len(name), 80)], flox.ErrBadInput)
	}
	return nil
}

// CheckRole refuses what is no role of a machine. ErrBadInput.
func CheckRole(role string) error {
	switch role {
	case Server, Agent, Worker:
		return nil
	}
	return fmt.Errorf("role %q: want %s, %s or %s: %w", role, Server, Agent, Worker, flox.ErrBadInput)
}

// Rights ranks the roles of a person: 0 = none, 1 member, 2 publisher, 3 admin.
func Rights(role string) int {
	switch role {
	case Member:
		return 1
	case Publisher:
		return 2
	case Admin:
		return 3
	}
	return 0
}

// UserRole is what a person may do on a machine; "" = nothing: the machine may
// not speak for that person.
func UserRole(m *floxv1.Machine, user string) string {
	for _, u := range m.GetUsers() {
		if u.GetName() == user {
			return u.GetRole()
		}
	}
	return ""
}

// VoterLabel is the label of a server that says whether it votes: "false" = it only
// follows.
const VoterLabel = "voter"

// NoVote reports whether a server shall only follow.
func NoVote(m *floxv1.Machine) bool { return Label(m, VoterLabel) == "false" }

// CheckVoterLabel refuses another value of VoterLabel than true or false, by which
// nobody would know what was meant. ErrBadInput.
func CheckVoterLabel(labels []*floxv1.Label) error {
	for _, l := range labels {
		if l.GetKey() == VoterLabel && l.GetValue() != "true" && l.GetValue() != "false" {
			return fmt.Errorf("label %s=%s: want true, or false of a server that only follows: %w", VoterLabel, l.GetValue(), flox.ErrBadInput)
		}
	}
	return nil
}

// CheckLabelText refuses values of new labels that cannot be shown as they are, in a
// line. The log takes them: older servers did. ErrBadInput.
func CheckLabelText(labels []*floxv1.Label) error {
	for _, l := range labels {
		if !utf8.ValidString(l.GetValue()) || strings.ContainsFunc(l.GetValue(), func(r rune) bool { return !unicode.IsPrint(r) }) {
			return fmt.Errorf("label %s=%q: want printable text behind '=': %w", l.GetKey(), l.GetValue(), flox.ErrBadInput)
		}
	}
	return nil
}

// Label gives a label's value, "" if it has none.
func Label(m *floxv1.Machine, key string) string {
	for _, l := range m.GetLabels() {
		if l.GetKey() == key {
			return l.GetValue()
		}
	}
	return ""
}
