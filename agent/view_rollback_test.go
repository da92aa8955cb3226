package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// writable is a profile that a user may change.
func writable(number, index uint64) *floxv1.ProfilesEvent {
	n := news("Anna/default", number, index, true)
	n.Writers = []string{"anna"}
	return &floxv1.ProfilesEvent{Index: index, Put: []*floxv1.ProfileNews{n}}
}

// Without a network a rollback counts on this machine, also for the next process, until the
// storehouse tells of the profile.
func TestRollbackWithoutNetwork(t *testing.T) {
	for what, after := range map[string]struct {
		told    *floxv1.ProfilesEvent
		lives   uint64
		refused string
	}{
		"it is passed on":             {told: writable(41, 60), lives: 41},
		"something else changed":      {told: writable(42, 60), lives: 41},
		"somebody else was first":     {told: writable(43, 60), lives: 43, refused: "generation 43 lives since somebody changed the profile"},
		"the storehouse was restored": {told: &floxv1.ProfilesEvent{Index: 5, Reset_: true, Users: []string{"anna"}, Put: writable(40, 4).GetPut()}, lives: 40},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			r := newViewRig(t, dir, "x86_64-linux")
			first := writable(42, 50)
			first.Reset_, first.Users = true, []string{"anna", "bob"}
			r.take(t, first)
			for who, q := range map[string]*floxv1.RollbackHereRequest{
				"bob":  {Name: "anna/default"},
				"anna": {Name: "anna/default", To: 7}, // not known here
				"Anna": {Name: "anna/none"},
			} {
				if got, err := r.rollback(t.Context(), who, q); err == nil {
					t.Errorf("%s: %v: %v", who, q, got)
				}
			}
			r.shown = nil
			got, err := r.rollback(t.Context(), "anna", &floxv1.RollbackHereRequest{Name: "ANNA/default", Reason: "broken"})
			if err != nil || got.GetName() != "Anna/default" || got.GetFrom() != 42 || got.GetTo() != 41 {
				t.Fatalf("%v, %v", got, err)
			}
			if fmt.Sprint(r.shown) != "[Anna/default]" {
				t.Errorf("the kernel was told of %q", r.shown)
			}
			for _, r := range []*viewRig{r, newViewRig(t, dir, "x86_64-linux")} {
				r.leads(t, "anna/default", 41, nil)
				r.leads(t, "anna/default@42", 42, nil)
			}
			if after.told.GetReset_() {
				if err := r.watch.take(t.Context(), []*floxv1.ProfilesEvent{after.told}, 2); err != nil {
					t.Fatal(err)
				}
			} else {
				r.take(t, after.told)
			}
			r.leads(t, "anna/default", after.lives, nil)
			here := r.now.Load().profiles["anna/default"].GetHere()
			if why := here.GetRefused(); after.refused == "" && why != "" || !strings.HasPrefix(why, after.refused) {
				t.Errorf("refused %q, want %q", why, after.refused)
			}
			if passed := after.told.GetPut()[0].GetLive().GetNumber() != 42; passed && after.refused == "" && here != nil {
				t.Errorf("it is to be passed on again: %v", here)
			}
		})
	}
}

// Back to where the storehouse is, nothing is left to be passed on.
func TestRollbackWithoutNetworkTakenBack(t *testing.T) {
	r := newViewRig(t, t.TempDir(), "x86_64-linux")
	first := writable(42, 50)
	first.Reset_, first.Users = true, []string{"anna"}
	r.take(t, first)
	for _, to := range []uint64{41, 42} {
		if _, err := r.rollback(t.Context(), "anna", &floxv1.RollbackHereRequest{Name: "anna/default", To: to}); err != nil {
			t.Fatal(err)
		}
		r.leads(t, "anna/default", to, nil)
	}
	if h := r.now.Load().profiles["anna/default"].GetHere(); h != nil {
		t.Errorf("%v", h)
	}
}

// What was gone back to is passed on until the storehouse answers, for whom it was; what it
// refuses does not count any more, and is said.
func TestRollbacksArePassedOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newViewRig(t, t.TempDir(), "x86_64-linux")
		first := writable(42, 50)
		first.Reset_, first.Users = true, []string{"anna"}
		r.take(t, first)
		if _, err := r.rollback(t.Context(), "anna", &floxv1.RollbackHereRequest{Name: "anna/default", Reason: "broken"}); err != nil {
			t.Fatal(err)
		}
		answers := []error{flox.ErrUnreachable, flox.ErrUnreachable, fmt.Errorf("not you: %w", flox.ErrDenied)}
		asked := 0
		r.watch.roll = func(_ context.Context, user string, q *floxv1.RollbackProfileRequest) error {
			if user != "anna" || q.GetName() != "Anna/default" || q.GetTo() != 41 || q.GetLive() != 42 || q.GetReason() != "broken" {
				t.Errorf("%s asks %v", user, q)
			}
			asked++
			return answers[min(asked, len(answers))-1]
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.watch.passRollbacks(ctx) }()
		poke(r.rolled)
		synctest.Wait()
		if asked != 0 {
			t.Error("asked while nobody was connected")
		}
		r.connected.Store(true)
		poke(r.rolled)
		time.Sleep(time.Minute)
		synctest.Wait()
		if asked != 3 {
			t.Errorf("asked %d times, want 3", asked)
		}
		r.leads(t, "anna/default", 42, nil)
		if h := r.now.Load().profiles["anna/default"].GetHere(); !strings.Contains(h.GetRefused(), "not you") {
			t.Errorf("%v", h)
		}
		stop()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
