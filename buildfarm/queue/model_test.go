package queue

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
)

// modelBuild is a build as it should be.
type modelBuild struct {
	needs  []string
	wants  map[string]bool
	state  floxv1.BuildState
	status int
	token  uint64
	tries  int
}

// modelQueue is what the queue should hold.
type modelQueue struct {
	*log
	rt     *rapid.T
	check  string // is in every name, so that one log serves for all checks
	builds map[string]*modelBuild
	failed map[string]bool // remembered
	tokens []*floxv1.BuildLease
}

var modelNames = []string{"a", "b", "c", "d", "f"}

func (m *modelQueue) name(of string) string { return of + m.check }

// want wants some builds, with what they need.
func (m *modelQueue) want() {
	want := rapid.SampledFrom([]string{"x", "y", "z"}).Draw(m.rt, "want")
	var list []string
	needs := map[string][]string{}
	for i, n := range modelNames {
		if !rapid.Bool().Draw(m.rt, "wanted") {
			continue
		}
		for _, in := range modelNames[:i] {
			if b := m.builds[in]; slices.Contains(slices.Collect(maps.Keys(needs)), in) && (b == nil || b.state != done) && rapid.Bool().Draw(m.rt, "needed") {
				needs[n] = append(needs[n], in)
			}
		}
		if needs[n] == nil {
			needs[n] = []string{}
		}
		text := m.name(n) + ":"
		for _, in := range needs[n] {
			text += m.name(in) + ","
		}
		list = append(list, text)
	}
	if len(list) == 0 {
		return
	}
	c := enqueue(want+m.check, list...)
	c.Retry = rapid.Bool().Draw(m.rt, "retry")
	m.must(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Enqueue{Enqueue: c}})
	for _, n := range modelNames {
		if needs[n] == nil {
			continue
		}
		if c.GetRetry() {
			delete(m.failed, n)
		}
		b := m.builds[n]
		if b == nil {
			b = &modelBuild{wants: map[string]bool{}}
			if m.failed[n] {
				b.state, b.status = failed, int(buildfarm.PermanentFailure)
			}
			m.builds[n] = b
		} else if c.GetRetry() && b.state == failed {
			b.state, b.tries = waiting, 0
		}
		b.needs, b.wants[want] = needs[n], true
		m.settled(b)
	}
}

// settled is what a build is once what it needs is looked at.
func (m *modelQueue) settled(b *modelBuild) {
	bad := slices.ContainsFunc(b.needs, func(in string) bool { return m.builds[in] != nil && m.builds[in].state == failed })
	switch {
	case bad && b.state == waiting:
		b.state, b.status = failed, int(buildfarm.DependencyFailed)
	case !bad && b.state == failed && b.status == int(buildfarm.DependencyFailed):
		b.state, b.tries = waiting, 0
	}
}

func (m *modelQueue) leaves() {
	want := rapid.SampledFrom([]string{"x", "y", "z"}).Draw(m.rt, "want")
	m.leave(want + m.check)
	for n, b := range m.builds {
		if delete(b.wants, want); len(b.wants) == 0 {
			delete(m.builds, n)
		}
	}
}

func (m *modelQueue) leases() {
	n := rapid.SampledFrom(modelNames).Draw(m.rt, "build")
	b := m.builds[n]
	may := b != nil && b.state == waiting && !slices.ContainsFunc(b.needs, func(in string) bool { return m.builds[in] != nil && m.builds[in].state != done })
	m.now = m.now.Add(Delay(maxTries))
	token := m.lease(m.name(n), "w")
	if (token != 0) != may {
		m.rt.Fatalf("lease of %s: token %d, want one: %t (%+v)", n, token, may, b)
	}
	if may {
		b.state, b.token = leased, token
		m.tokens = append(m.tokens, &floxv1.BuildLease{Key: n, Token: token})
	}
}

// ends ends a lease, one that counts or an old one.
func (m *modelQueue) ends() {
	if len(m.tokens) == 0 {
		return
	}
	l := rapid.SampledFrom(m.tokens).Draw(m.rt, "lease")
	b := m.builds[l.GetKey()]
	counts := b != nil && b.state == leased && b.token == l.GetToken()
	switch how := rapid.SampledFrom([]int{0, 3, -1, -2, -3}).Draw(m.rt, "how"); how {
	case -2, -3:
		m.release(strings.Repeat("lost", how+3), leaseOf(m.name(l.GetKey()), l.GetToken()))
		if counts {
			m.fault(b, how+3)
		}
	default:
		if lost := m.finish(m.name(l.GetKey()), l.GetToken(), how); lost == counts {
			m.rt.Fatalf("end of %v: lost %t, and it counts: %t", l, lost, counts)
		}
		switch {
		case !counts:
		case how < 0:
			m.fault(b, 1)
		case how == 0:
			b.state = done
			delete(m.failed, l.GetKey())
		default:
			b.state, b.status = failed, how
			m.failed[l.GetKey()] = true
		}
	}
}

func (m *modelQueue) fault(b *modelBuild, tries int) {
	b.state = waiting
	if b.tries += tries; b.tries >= maxTries {
		b.state, b.status = failed, int(buildfarm.TransientFailure)
	}
}

func (m *modelQueue) settles() {
	var names []string
	for _, n := range modelNames {
		names = append(names, m.name(n))
		if b := m.builds[n]; b != nil {
			m.settled(b)
		}
	}
	m.settle(names...)
}

func (m *modelQueue) retries() {
	n := rapid.SampledFrom(modelNames).Draw(m.rt, "build")
	m.retry(m.name(n))
	delete(m.failed, n)
	if b := m.builds[n]; b != nil && b.state == failed {
		b.state, b.tries = waiting, 0
	}
}

func (m *modelQueue) same() {
	for _, n := range modelNames {
		have, want := m.build(m.name(n)), m.builds[n]
		say := func(state floxv1.BuildState, wants, tries int, token uint64) string {
			return fmt.Sprint(state, " wants ", wants, " tries ", tries, " token ", token)
		}
		switch {
		case have == nil && want == nil:
			continue
		case have == nil || want == nil:
			m.rt.Fatalf("%s is %v, want %+v", n, have, want)
		}
		token := uint64(0)
		if want.state == leased {
			token = want.token
		}
		got := say(have.GetState(), int(have.GetWants()), int(have.GetTries()), have.GetLease().GetToken())
		if should := say(want.state, len(want.wants), want.tries, token); got != should {
			m.rt.Fatalf("%s is %s, want %s", n, got, should)
		}
	}
}

// Whatever is proposed, in whatever order, the queue is as a simple one in memory: leases
// of what is ready alone, and one at a time; the end of one counts once; failures are
// remembered; and what is wanted stays.
func TestModel(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.register("w")
	checks := 0
	rapid.Check(t, func(rt *rapid.T) {
		checks++
		m := &modelQueue{log: l, rt: rt, check: fmt.Sprint(checks), builds: map[string]*modelBuild{}, failed: map[string]bool{}}
		do := []func(){m.want, m.want, m.leaves, m.leases, m.leases, m.leases, m.ends, m.ends, m.ends, m.settles, m.retries}
		for range rapid.IntRange(1, 25).Draw(rt, "steps") {
			do[rapid.IntRange(0, len(do)-1).Draw(rt, "what")]()
			m.same()
		}
		for _, w := range []string{"x", "y", "z"} {
			l.leave(w + m.check)
		}
	})
}
