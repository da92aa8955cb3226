package raft

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// editor is a Processor that does all a Tx can: the first byte of a command says
// what, the others are a key. It reads what it wrote; "fail" and "stop" write first.
type editor struct{}

func (editor) Apply(tx *Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	key := command[1:]
	seen := []byte(fmt.Sprint(index, " ", at.UnixMilli()))
	if err := tx.Iterate(key[:1], nil, func(k, v []byte) bool { seen = append(append(seen, k...), v...); return len(seen) < 200 }); err != nil {
		return nil, err
	}
	before, err := tx.Get(key)
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return nil, err
	}
	switch command[0] {
	case 's':
		err = tx.Set(key, append(before[:len(before)/2:len(before)/2], seen[:8]...))
	case 'd':
		err = tx.Delete(key)
	case 'r':
		err = tx.DeleteRange(key[:1], key)
	case 'b': // refused without a change
		return nil, fmt.Errorf("%s: %w", key, flox.ErrBadInput)
	default:
		err = errors.Join(tx.DeleteRange(key[:1], prefixEnd(key[:1])), tx.Set(key, []byte("refused")))
		if command[0] == 'f' && err == nil {
			return nil, fmt.Errorf("%s after %d: %w", key, len(seen), flox.ErrDenied)
		}
		if err == nil {
			err = ErrUnknownCommand
		}
	}
	return seen, err
}

// newMachine gives a state machine with nothing around it.
func newMachine(t *testing.T) *machine {
	t.Helper()
	s, err := openState(vfs.Default, filepath.Join(t.TempDir(), "state"), 1<<20, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	return &machine{
		state: s, closed: make(chan struct{}), known: map[string]record{}, members: func() error { return nil },
		processors: map[uint32]Processor{memberKind: members{firstLevel}, testKind: editor{}},
	}
}

// whole gives all keys and values of the state, and what the machine knows of it.
func (m *machine) whole(t *testing.T) []string {
	t.Helper()
	db, err := m.state.acquire()
	if err != nil {
		t.Fatal(err)
	}
	defer db.release()
	all := []string{fmt.Sprint(m.applied(), m.time)}
	for _, space := range [][]byte{{ownSpace}, {kindSpace}} {
		err := iterate(db, space, nil, nil, func(k, v []byte) bool { all = append(all, fmt.Sprintf("%x%x=%x", space, k, v)); return true })
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// entries makes n entries of all sorts: sessions that repeat, skip and expire,
// clocks that go back, refusals, changes of members, entries of raft's own.
func entries(t *testing.T, rng *rand.Rand, n int) (logs []*raft.Log) {
	t.Helper()
	clock, next := int64(1_000_000), map[string]uint64{}
	for i := range n {
		l := &raft.Log{Index: uint64(i + 1), Type: raft.LogCommand}
		logs = append(logs, l)
		if rng.IntN(20) == 0 {
			l.Type = raft.LogConfiguration
			continue
		}
		clock += rng.Int64N(2000) - 500
		if rng.IntN(40) == 0 {
			clock += SessionTTL.Milliseconds() / 2
		}
		e := &floxv1.Envelope{Version: EnvelopeVersion, TimeUnixMs: clock, Kind: testKind}
		e.Command = append([]byte{"ssssdrbf"[rng.IntN(8)]}, fmt.Sprintf("%c%d", 'a'+rng.IntN(3), rng.IntN(5))...)
		if rng.IntN(3) > 0 {
			e.Session = fmt.Sprint("c", rng.IntN(6))
			next[e.Session]++
			e.Sequence = next[e.Session]
			switch rng.IntN(12) {
			case 0: // asked again
				e.Sequence = 1 + rng.Uint64N(next[e.Session])
			case 1: // begins again
				next[e.Session], e.Sequence = 1, 1
			}
		}
		if rng.IntN(25) == 0 {
			c := (&Node{}).decide(&floxv1.ServersCommand{Command: &floxv1.ServersCommand_Add{Add: &floxv1.ServerAdd{Id: fmt.Sprint(rng.IntN(4)), Voter: true}}})
			e.Kind, e.Command = c.Kind, c.Command
		}
		l.Data = encoded(t, e)
	}
	return logs
}

func encoded(t *testing.T, e *floxv1.Envelope) []byte {
	t.Helper()
	b, err := encodeEntry(e)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// said is an answer in a form to compare.
func said(a any) string {
	b := a.(answer)
	if b.refused != nil {
		return fmt.Sprintf("refused %v %v", b.refused.kind, b.refused)
	}
	return fmt.Sprintf("%x %v", b.reply, b.err)
}

// However the entries are cut into batches, every answer and every byte of the
// state is as if each had been applied by itself.
func TestBatchesLeadToTheSameState(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for round := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, round))
		logs := entries(t, rng, 600)
		one, many := newMachine(t), newMachine(t)
		refused := 0
		for len(logs) > 0 {
			part := logs[:min(len(logs), 1+rng.IntN(64))]
			logs = logs[len(part):]
			got := many.ApplyBatch(part)
			for i, l := range part {
				want := one.Apply(l)
				if said(want) != said(got[i]) {
					t.Fatalf("entry %d: answered %s in a batch, %s alone", l.Index, said(got[i]), said(want))
				}
				if want.(answer).refused != nil {
					refused++
				}
			}
			if rng.IntN(4) == 0 { // as after a restart: what is only remembered makes no difference
				if err := one.load(); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(one.whole(t), many.whole(t)); diff != "" {
				t.Fatalf("after entry %d (alone -, in a batch +):\n%s", part[len(part)-1].Index, diff)
			}
		}
		if refused < 50 {
			t.Errorf("only %d commands were refused", refused)
		}
	}
}

// An entry that cannot be applied stops the node at that entry, in the middle of
// a batch too: those before it are in the state and answered, nothing of it is,
// and nothing behind it is looked at.
func TestStopInTheMiddleOfABatch(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	for at := range 40 {
		logs := entries(t, rng, 40)
		logs[at].Type = raft.LogCommand
		logs[at].Data = encoded(t, &floxv1.Envelope{Version: EnvelopeVersion, TimeUnixMs: 9_000_000_000, Kind: testKind, Command: []byte("!a0")})
		if at%4 == 0 {
			logs[at].Data[len(logs[at].Data)-1] ^= 1
		}
		one, many := newMachine(t), newMachine(t)
		for i, got := range many.ApplyBatch(logs) {
			want := one.Apply(logs[i])
			if i < at && said(want) != said(got) {
				t.Errorf("stop at %d, entry %d: answered %s in a batch, %s alone", at, i, said(got), said(want))
			}
			if i >= at && got.(answer).err == nil {
				t.Errorf("stop at %d, entry %d: answered %s, want an error", at, i, said(got))
			}
		}
		if why := many.stopped.Load(); why == nil || !errors.Is(*why, ErrUnknownCommand) && !errors.Is(*why, flox.ErrCorrupt) {
			t.Errorf("stop at %d: the node did not stop", at)
		}
		if diff := cmp.Diff(one.whole(t), many.whole(t)); diff != "" {
			t.Errorf("stop at %d (alone -, in a batch +):\n%s", at, diff)
		}
	}
}
