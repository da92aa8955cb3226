package agent

import (
	"context"
	"errors"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

const (
	// hungSamples is how often the kernel's count of unanswered requests is
	// compared with ours before what is more there is called lost, and
	// hungPause the time between two: a request is on its way for microseconds.
	hungSamples = 5
	hungPause   = 50 * time.Millisecond
)

// tellWarden tells how far this process has come; the warden shows it to who
// reloads, and does without.
func (a *Agent) tellWarden(tell func(version string) error) {
	if err := tell(a.cfg.Version); err != nil {
		a.log.Debug("tell the warden", "error", err)
	}
}

// doctorTakeover says what a crash of this process costs who reads meanwhile.
func (a *Agent) doctorTakeover(ctx context.Context) *floxv1.Finding {
	const check = "takeover"
	t := a.mount.Takeover()
	if t.Resend {
		return finding(check, "ok", "", "when the agent dies or is reloaded, the kernel asks the next one again")
	}
	how := "the kernel is older than Linux 6.9 and does not ask again what an agent that died was asked"
	hung, err := a.hung(ctx)
	switch {
	case hung > 0:
		return finding(check, "error", "restart the agent (floxd agent or floxd up): that unmounts, and ends them with an error; or start a kernel from 6.9 on, where this cannot happen",
			"%s: %d requests are lost and whoever made them hangs; the last agent's journal gave %d (%s)", how, hung, t.Resumed, orNone(t.Problem))
	case !t.Journal:
		return finding(check, "warning", "make room in the run directory and reload the agent; a kernel from 6.9 on needs no journal",
			"%s, and there is no journal of it: new requests survive, those in flight would hang (%s)", how, orNone(t.Problem))
	case t.Problem != "":
		return finding(check, "warning", "look at the agent's log; from here on the journal is whole again",
			"%s: the journal of the last one was not usable (%s)", how, t.Problem)
	case err != nil && !errors.Is(err, context.Canceled):
		return finding(check, "ok", "", "%s: a journal keeps it; %d requests were taken over from the last one's; whether some hang cannot be seen (%v)", how, t.Resumed, err)
	}
	return finding(check, "ok", "", "%s: a journal keeps it; %d requests were taken over from the last one's, none hangs", how, t.Resumed)
}

func orNone(problem string) string {
	if problem == "" {
		return "it was whole"
	}
	return problem
}

// hung counts the requests the kernel waits for and nobody works on. More may be
// under way for a moment; the least of several counts is what stays.
func (a *Agent) hung(ctx context.Context) (int, error) {
	least := -1
	for range hungSamples {
		ours := a.mount.Stats().InFlight
		kernels, err := a.cfg.Warden.Waiting(ctx)
		if err != nil {
			return 0, err
		}
		if more := max(kernels-ours, 0); least < 0 || more < least {
			least = more
		}
		if least == 0 {
			return 0, nil
		}
		select {
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-time.After(hungPause):
		}
	}
	return least, nil
}
