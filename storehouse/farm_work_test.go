package storehouse

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
)

// lonelyFarm is the part of a server in the queue that has no log.
func lonelyFarm() *farming {
	return &farming{
		s: &Server{id: &identity{peer: "self"}}, wants: map[string]*want{}, watch: map[string]map[*want]bool{},
		beats: map[string]time.Time{}, here: map[string]time.Time{},
	}
}

// What could not be tried because others were not reached is tried again, also if that is
// why something was not found; and what is told of a build is text.
func TestWhatCameOfALease(t *testing.T) {
	t.Parallel()
	run := &leased{lease: &floxv1.BuildLease{Key: "k", Token: 1}}
	gone := fmt.Errorf("block: %w", flox.ErrNotFound)
	for _, c := range []struct {
		err   error
		fault bool
	}{
		{gone, false},
		{fmt.Errorf("derivation: %w", flox.ErrBadInput), false},
		{fmt.Errorf("%w; and %w", gone, flox.ErrUnreachable), true},
		{errors.New("no disk"), true},
	} {
		if got := came(run, nil, c.err); (got.GetFault() != "") != c.fault || (got.GetOutcome() == nil) != c.fault {
			t.Errorf("%v: %v", c.err, got)
		}
	}
	cut := "ä"[:1]
	got := came(run, &buildFlight{outcome: &floxv1.BuildOutcome{Status: uint32(buildfarm.PermanentFailure), Message: "x" + cut, Tail: []string{"a", "b" + cut}}}, nil)
	if _, err := proto.Marshal(got); err != nil || got.GetOutcome().GetTail()[1] != "b" {
		t.Errorf("%v, %v", got, err)
	}
	got.Outcome.Message = cut
	if _, err := lonelyFarm().propose(within(t), nil, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Finish{Finish: got}}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("what is no text is proposed: %v", err)
	}
}

// Who reads what a build says hears that not all of it is kept, behind what is.
func TestJournalIsFull(t *testing.T) {
	t.Parallel()
	j := newJournal(t.TempDir())
	defer j.close()
	j.most = 64
	line := func(text string) *floxv1.BuildEvent {
		return &floxv1.BuildEvent{Event: &floxv1.BuildEvent_Line{Line: &floxv1.BuildLine{Text: text}}}
	}
	read := func(soFar bool) (n int, err error) {
		err = j.read(within(t), soFar, func(*floxv1.BuildEvent) error { n++; return nil })
		return n, err
	}
	j.put(line("first"))
	j.put(line(strings.Repeat("x", 64)))
	j.put(line("third"))
	if n, err := read(false); n != 1 || !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("%d events, %v", n, err)
	}
	if n, err := read(true); n != 1 || err != nil {
		t.Errorf("so far: %d events, %v", n, err)
	}
	j.end()
	if n, err := read(false); n != 1 || !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("once it has ended: %d events, %v", n, err)
	}
	ctx, cancel := context.WithCancel(within(t))
	cancel()
	whole := newJournal(t.TempDir())
	defer whole.close()
	whole.put(line("all"))
	if err := whole.read(ctx, false, func(*floxv1.BuildEvent) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("one that goes on: %v", err)
	}
}

// What a builder says is passed on as text.
func TestEventsAreText(t *testing.T) {
	t.Parallel()
	j := newJournal(t.TempDir())
	defer j.close()
	b := &builds{s: &Server{}}
	b.heard(&buildFlight{sinks: []listener{j}}, buildfarm.Event{Kind: buildfarm.EventMessage, Level: 3, Text: "\xff!"})
	j.end()
	said := ""
	err := j.read(within(t), false, func(e *floxv1.BuildEvent) error {
		said += e.GetNote().GetText()
		return nil
	})
	if err != nil || said != "?!" {
		t.Errorf("%q, %v", said, err)
	}
}
