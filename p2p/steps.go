package p2p

import (
	"time"

	"github.com/floxctl/flox"
)

// StepKind is what kind of step it is.
type StepKind uint8

// The kinds of steps.
const (
	StepSearch StepKind = iota + 1 // a look-up of who holds it begins
	StepFound                      // the look-up is over; Count machines were met
	StepAsked                      // Peer is asked for Block
	StepLate                       // Peer took longer than it usually does: somebody else is asked, too
	StepGave                       // Peer gave Block, of Bytes, Took after it was asked
	StepSent                       // Peer, a storehouse, sent this machine to Count others
	StepFailed                     // Peer did not give Block; Why says why
)

// String is one word for the kind.
func (k StepKind) String() string {
	names := [...]string{"", "search", "found", "asked", "late", "gave", "sent", "failed"}
	if int(k) < len(names) {
		return names[k]
	}
	return ""
}

// Step is one thing done to get the blocks of a Fetch: for people who ask how
// something came, or why it does not.
type Step struct {
	At    time.Time
	Kind  StepKind
	Peer  PeerID // "" = nobody in particular
	Tier  Tier   // of Peer
	Block flox.CID
	Count int
	Bytes int           // plain bytes
	Took  time.Duration // since what the step ends began; 0 = it ends nothing
	Why   string        // in words
}

// tell lets those who wait for f hear of a step; peerTable.mu is held.
func (s *scheduler) tell(f *flight, step Step) {
	var last *call
	for _, w := range f.waiters {
		if w.c == last || w.c.steps == nil {
			continue
		}
		last = w.c
		if step.At.IsZero() {
			step.At, step.Block = time.Now(), f.key.id
		}
		w.c.steps(step)
	}
}

// tellOf is tell of what a peer did, or was asked to do.
func (s *scheduler) tellOf(f *flight, kind StepKind, r *remote, step Step) {
	step.Kind, step.Peer, step.Tier = kind, r.name, r.tier
	s.tell(f, step)
}

// waited is how long ago it was sent; 0 = it still is in the queue.
func (a *attempt) waited(now time.Time) time.Duration {
	if a.sent.IsZero() {
		return 0
	}
	return now.Sub(a.sent)
}
