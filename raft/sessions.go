package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/floxctl/flox"
)

// Bounds of the session table. They are part of the state machine: a server
// with other values would come to other answers.
const (
	// SessionTTL is how long, in log time, a session is remembered after its last command.
	SessionTTL = time.Hour
	// KeptReplies is how many of a session's last replies are remembered, so how
	// many commands a client may have under way at once.
	KeptReplies = 64
	// MaxSessions is how many sessions are remembered at once.
	MaxSessions = 1 << 16
	// maxSessionName bounds a session's name in bytes.
	maxSessionName = 64
	// expirePerEntry is how many expired sessions one entry forgets at most.
	expirePerEntry = 8
)

// Key layout behind ownSpace:
//
//	's' name 0x00            last use (ms) and highest sequence
//	'r' name 0x00 sequence   reply
//	'x' time name            sessions by last use
//	'n'                      how many sessions there are
const (
	sessionKey = 's'
	replyKey   = 'r'
	expiryKey  = 'x'
	countKey   = 'n'
)

// refusalKinds numbers the sentinels a refusal may wrap. The numbers are kept
// in replies, so they never change.
var refusalKinds = []error{
	1: flox.ErrBadInput, 2: flox.ErrNotFound, 3: flox.ErrUnreachable, 4: flox.ErrUntrusted, 5: flox.ErrCorrupt,
	6: flox.ErrFull, 7: flox.ErrBusy, 8: flox.ErrDenied, 9: flox.ErrClosed, expiredKind: ErrSessionExpired,
}

// expiredKind is the number of ErrSessionExpired.
const expiredKind = 10

// Outcomes in a stored reply; above them stand the refusal kinds.
const (
	outcomeOK    = 0
	outcomeOther = 255 // refused, without a sentinel
)

// refusal is a Processor's error as every server and every retry reports it.
type refusal struct {
	kind    error // a sentinel or nil
	message string
}

func (r *refusal) Error() string { return r.message }
func (r *refusal) Unwrap() []error {
	if r.kind == nil {
		return []error{ErrRefused}
	}
	return []error{ErrRefused, r.kind}
}

// outcome is the answer to a command.
type outcome struct {
	reply   []byte
	refused *refusal
}

// refuse turns a Processor's error into what is kept of it.
func refuse(err error) outcome {
	r := &refusal{message: err.Error()}
	if errors.Is(err, ErrSessionExpired) {
		r.kind = ErrSessionExpired
		return outcome{refused: r}
	}
	for _, kind := range refusalKinds {
		if kind != nil && errors.Is(err, kind) {
			r.kind = kind
			break
		}
	}
	return outcome{refused: r}
}

// encode gives the stored form.
func (o outcome) encode() []byte {
	if o.refused == nil {
		return append([]byte{outcomeOK}, o.reply...)
	}
	code := byte(outcomeOther)
	for i, kind := range refusalKinds {
		if kind != nil && kind == o.refused.kind { //nolint:errorlint // identity of the sentinel is meant
			code = byte(i)
		}
	}
	return append([]byte{code}, o.refused.message...)
}

// decodeOutcome undoes encode.
func decodeOutcome(b []byte) (outcome, error) {
	if len(b) == 0 {
		return outcome{}, fmt.Errorf("state: empty reply: %w", flox.ErrCorrupt)
	}
	if b[0] == outcomeOK {
		return outcome{reply: b[1:]}, nil
	}
	r := &refusal{message: string(b[1:])}
	if int(b[0]) < len(refusalKinds) {
		r.kind = refusalKinds[b[0]]
	}
	return outcome{refused: r}, nil
}

// sessions is the session table inside a Tx over ownSpace.
type sessions struct {
	tx *Tx
	// oldest is no later than any session's last use, 0 = unknown. It only saves
	// looking: the first keys by last use are mostly deleted ones.
	oldest *int64
	// known is what the state holds of the sessions used last. It only saves reading.
	known map[string]record
}

// knownSessions bounds what known may hold.
const knownSessions = 4096

func nameKey(kind byte, name string) []byte {
	return append(append([]byte{kind}, name...), 0)
}

func seqKey(name string, sequence uint64) []byte {
	return binary.BigEndian.AppendUint64(nameKey(replyKey, name), sequence)
}

func expiresKey(lastUse int64, name string) []byte {
	return append(binary.BigEndian.AppendUint64([]byte{expiryKey}, uint64(lastUse)), name...)
}

// record is what is kept of a session beside its replies.
type record struct {
	lastUse int64 // Unix milliseconds of log time
	highest uint64
}

func (r record) encode() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, uint64(r.lastUse)), r.highest)
}

// load reads a session; ok is false when there is none.
func (s sessions) load(name string) (r record, ok bool, err error) {
	if r, ok := s.known[name]; ok {
		return r, true, nil
	}
	b, err := s.tx.Get(nameKey(sessionKey, name))
	if errors.Is(err, flox.ErrNotFound) {
		return record{}, false, nil
	}
	if err != nil {
		return record{}, false, err
	}
	if len(b) != 16 {
		return record{}, false, s.tx.fail(fmt.Errorf("state: session of %d bytes: %w", len(b), flox.ErrCorrupt))
	}
	return record{int64(binary.BigEndian.Uint64(b)), binary.BigEndian.Uint64(b[8:])}, true, nil
}

// check says what to do with a command: done carries the answer it already
// has, or the refusal to look at it; otherwise it is to be applied.
func (s sessions) check(name string, sequence uint64, at int64) (done *outcome, err error) {
	no := func(err error) (*outcome, error) { o := refuse(err); return &o, nil }
	if len(name) > maxSessionName || bytes.IndexByte([]byte(name), 0) >= 0 || sequence == 0 {
		return no(fmt.Errorf("session name of more than %d bytes or with a zero byte, or sequence 0: %w", maxSessionName, flox.ErrBadInput))
	}
	r, ok, err := s.load(name)
	if err != nil {
		return nil, err
	}
	if ok && at-r.lastUse > SessionTTL.Milliseconds() {
		ok = false // forgotten already, only not yet removed
	}
	if !ok && sequence != 1 {
		return no(fmt.Errorf("session %q at sequence %d: begin a new one at sequence 1: %w", name, sequence, ErrSessionExpired))
	}
	if !ok {
		n, err := s.count()
		if err == nil && n >= MaxSessions {
			return no(fmt.Errorf("%d sessions are open: %w", n, flox.ErrFull))
		}
		return nil, err
	}
	if sequence > r.highest {
		return nil, nil // new: there is no reply to look for
	}
	b, err := s.tx.Get(seqKey(name, sequence))
	if err == nil {
		o, err := decodeOutcome(b)
		return &o, s.tx.fail(err)
	}
	if !errors.Is(err, flox.ErrNotFound) {
		return nil, err
	}
	if sequence+KeptReplies <= r.highest {
		return no(fmt.Errorf("session %q: sequence %d is more than %d behind, its reply is forgotten: %w", name, sequence, KeptReplies, flox.ErrClosed))
	}
	return nil, nil
}

// remember keeps the answer of a command that was applied.
func (s sessions) remember(name string, sequence uint64, at int64, o outcome) error {
	r, ok, err := s.load(name)
	if err != nil {
		return err
	}
	if ok && at-r.lastUse > SessionTTL.Milliseconds() {
		if err := s.forget(name, r.lastUse); err != nil {
			return err
		}
		ok = false
	}
	if ok {
		err = s.tx.Delete(expiresKey(r.lastUse, name))
	} else {
		r = record{}
		err = s.addCount(1)
	}
	before := r.highest
	r.lastUse, r.highest = at, max(r.highest, sequence)
	if r.highest > KeptReplies && r.highest > before {
		first := uint64(0)
		if before > KeptReplies {
			first = before - KeptReplies
		}
		err = errors.Join(err, s.dropReplies(name, first, r.highest-KeptReplies))
	}
	if len(s.known) >= knownSessions {
		clear(s.known)
	}
	s.known[name] = r
	return errors.Join(err,
		s.tx.Set(seqKey(name, sequence), o.encode()),
		s.tx.Set(nameKey(sessionKey, name), r.encode()),
		s.tx.Set(expiresKey(at, name), nil))
}

// dropReplies deletes the replies of the sequences from first to last. One by
// one if they are few: a range that is deleted makes every later read slower.
func (s sessions) dropReplies(name string, first, last uint64) error {
	if last-first > KeptReplies {
		return s.tx.DeleteRange(seqKey(name, first), seqKey(name, last+1))
	}
	var err error
	for sequence := first; sequence <= last; sequence++ {
		err = errors.Join(err, s.tx.Delete(seqKey(name, sequence)))
	}
	return err
}

// expire forgets a few sessions that nobody used for SessionTTL.
func (s sessions) expire(at int64) error {
	if *s.oldest != 0 && at-*s.oldest <= SessionTTL.Milliseconds() {
		return nil
	}
	type old struct {
		name    string
		lastUse int64
	}
	var gone []old
	next := at // all that come are used later
	err := s.tx.Iterate([]byte{expiryKey}, expiresKey(*s.oldest, ""), func(key, _ []byte) bool {
		lastUse := int64(binary.BigEndian.Uint64(key[1:9]))
		if at-lastUse <= SessionTTL.Milliseconds() || len(gone) == expirePerEntry {
			next = lastUse
			return false
		}
		gone = append(gone, old{string(key[9:]), lastUse})
		return true
	})
	*s.oldest = next
	for _, g := range gone {
		err = errors.Join(err, s.forget(g.name, g.lastUse))
	}
	return err
}

// forget removes a session and its replies.
func (s sessions) forget(name string, lastUse int64) error {
	replies := nameKey(replyKey, name)
	delete(s.known, name)
	return errors.Join(
		s.tx.Delete(nameKey(sessionKey, name)),
		s.tx.Delete(expiresKey(lastUse, name)),
		s.tx.DeleteRange(replies, prefixEnd(replies)),
		s.addCount(-1))
}

// count is how many sessions there are.
func (s sessions) count() (uint64, error) {
	b, err := s.tx.Get([]byte{countKey})
	if errors.Is(err, flox.ErrNotFound) {
		return 0, nil
	}
	if err == nil && len(b) != 8 {
		err = s.tx.fail(fmt.Errorf("state: session count of %d bytes: %w", len(b), flox.ErrCorrupt))
	}
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}

func (s sessions) addCount(d int64) error {
	n, err := s.count()
	if err != nil {
		return err
	}
	return s.tx.Set([]byte{countKey}, binary.BigEndian.AppendUint64(nil, uint64(int64(n)+d)))
}
