// Package profile has the rules of profiles: shared, versioned sets of packages, each
// with one name everywhere. A change is one entry in the replicated log, made on a
// generation; changes of different packages merge, others are refused. Processor applies
// them; the rest reads what it wrote, and says what a change would make.
//
// It knows nothing of stores, machines or people but their names.
package profile

import (
	"encoding/binary"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// Kind is the kind of ProfilesCommand in the log. Kinds are never reused.
const Kind = 6

// Level is the level of a ProfilesCommand; see the storehouse.
func Level(c *floxv1.ProfilesCommand) uint32 {
	switch c.GetCommand().(type) {
	case *floxv1.ProfilesCommand_Rename, *floxv1.ProfilesCommand_Retention, *floxv1.ProfilesCommand_Tag, *floxv1.ProfilesCommand_Prune,
		*floxv1.ProfilesCommand_Assign, *floxv1.ProfilesCommand_Schedule, *floxv1.ProfilesCommand_Run:
		return 6
	}
	if c.GetChange().GetAutomatic() {
		return 6
	}
	return 5
}

// Bounds of what is kept. They are part of the state machine.
const (
	maxProfiles    = 100_000
	maxGenerations = 1000 // of one profile; then the oldest goes that does not live
	maxEvents      = 4000 // of one profile; then the oldest goes
	maxPackages    = 4096 // of one generation
	maxSystems     = 16
	maxPaths       = 32 // outputs of a package for one system
	maxGrants      = 256
	maxText        = 512 // bytes of a version, a source, a reason
	maxChanges     = 1 << 14
	maxTags        = 64
	maxAssigned    = 256 // of one profile
	maxDays        = 36_500
	maxFormerly    = 8 // names that a profile had; then the oldest is free
)

// Roles of a person in a profile; the later ones may do what the earlier may.
const (
	Reader = "reader"
	Writer = "writer"
	Owner  = "owner"
)

// DefaultPriority is that of a package for which none is given, as in Nix.
const DefaultPriority = 5

// The keys of the state. NAME is folded, numbers are big-endian.
//
//	'p' NAME            Profile
//	'g' NAME 0 NUMBER   Generation, with package_ids
//	'k' HASH            PackageRecord
//	'h' NAME 0 INDEX    ProfileEvent
//	'c' INDEX           name of the profile that changed, and behind a 0 the one it had until then
//	'r' NAME            name of the profile that had this one
//	'u' NAME            ProfileRun
//	'n'                 counts
const (
	profileKey    = 'p'
	generationKey = 'g'
	packageKey    = 'k'
	eventKey      = 'h'
	changeKey     = 'c'
	countsKey     = 'n'
	renamedKey    = 'r'
	runKey        = 'u'
)

func textKey(kind byte, text string) []byte { return append([]byte{kind}, text...) }

func numberKey(kind byte, name string, number uint64) []byte {
	return binary.BigEndian.AppendUint64(append(textKey(kind, Folded(name)), 0), number)
}

func indexKey(index uint64) []byte { return binary.BigEndian.AppendUint64([]byte{changeKey}, index) }

// Folded is a name as it is compared.
func Folded(name string) string { return strings.ToLower(name) }

// Split gives the owner and the rest of a profile's name, and refuses what is no such
// name: OWNER/NAME, each of 1 to 63 letters, digits, '-', '.' and '_', the first a letter
// or digit. ErrBadInput.
func Split(name string) (owner, rest string, err error) {
	owner, rest, ok := strings.Cut(name, "/")
	if !ok || !word(owner) || !word(rest) {
		return "", "", fmt.Errorf("profile %q: want OWNER/NAME, such as acme/ci, of letters, digits, '-', '.' and '_': %w", short(name), flox.ErrBadInput)
	}
	return owner, rest, nil
}

func word(s string) bool {
	for i, r := range s {
		alnum := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !alnum && (i == 0 || !strings.ContainsRune("-._", r)) {
			return false
		}
	}
	return len(s) > 0 && len(s) <= 63
}

// packageName reports whether s can be the name of a package: what can be part of a
// store path's name, and '@' of nothing.
func packageName(s string) bool {
	for _, r := range s {
		alnum := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !alnum && !strings.ContainsRune("-._+?=", r) {
			return false
		}
	}
	return len(s) > 0 && len(s) <= 128
}

// system reports whether s looks like x86_64-linux.
func system(s string) bool {
	arch, os, ok := strings.Cut(s, "-")
	return ok && word(arch) && word(os)
}

func short(s string) string { return strings.ToValidUTF8(s[:min(len(s), 80)], "") }

// Rank orders roles: 0 = none.
func Rank(role string) int {
	switch role {
	case Reader:
		return 1
	case Writer:
		return 2
	case Owner:
		return 3
	}
	return 0
}

// Role is what a person may do with a profile: the owner in its name may do everything, and
// so may who has a grant for it. "" = nothing.
func Role(p *floxv1.Profile, user string) string {
	owner, _, _ := strings.Cut(p.GetName(), "/")
	if user != "" && Folded(owner) == Folded(user) {
		return Owner
	}
	for _, g := range p.GetGrants() {
		if g.GetUser() == "*" || user != "" && Folded(g.GetUser()) == Folded(user) {
			return g.GetRole()
		}
	}
	return ""
}

// May refuses somebody who has not at least a role in a profile. ErrDenied.
func May(p *floxv1.Profile, user, role string) error {
	have := Role(p, user)
	if Rank(have) >= Rank(role) {
		return nil
	}
	if have == "" {
		have = "none"
	}
	return fmt.Errorf("profile %s: this needs the role %s there, and %s has %s: an owner of it can give it with: floxctl profile grant %s %s=%s: %w",
		p.GetName(), role, nameOr(user, "nobody"), have, p.GetName(), nameOr(user, "USER"), role, flox.ErrDenied)
}

func nameOr(name, other string) string {
	if name == "" {
		return other
	}
	return name
}

// getter is a transaction or a reader.
type getter = raft.Getter

// load reads one message of the state. ErrNotFound.
func load[M proto.Message](g getter, key []byte, into M) (M, error) {
	return raft.LoadRecord(g, "profiles", key, into)
}

func decode(key, value []byte, into proto.Message) error {
	return raft.DecodeRecord("profiles", key, value, into)
}

// counts are kept so that nobody has to count.
type counts struct {
	profiles uint64
	changes  uint64
	dropped  uint64 // index of the last change that is no longer kept
}

func (c *counts) fields() []*uint64 { return []*uint64{&c.profiles, &c.changes, &c.dropped} }

func loadCounts(g getter) (c counts, err error) {
	err = raft.LoadCounts(g, "profiles", []byte{countsKey}, c.fields())
	return c, err
}
