package fuse

import (
	"testing"
	"time"
)

// However many want a name nobody can tell anything about, they wait one
// deadline and not one after the other, although the kernel asks for one at a
// time; and an answer that came meanwhile is not held back by that.
func TestManyWaitersOfADeadNameWaitOnce(t *testing.T) {
	const lookup, waiters = 2 * time.Second, 12
	m := newMount(t, serveOptions{LookupTimeout: lookup})
	m.ask(t, command{Cmd: "hold", Arg: "lookup " + hungPath})
	var all []*toucher
	for range waiters {
		all = append(all, m.begin(t, op{Do: "stat", Path: hungPath}))
	}
	first := false
	for _, p := range all {
		o := p.wait(t, time.Minute)[0]
		if o.Errno != "EIO" || o.Took > 3*lookup {
			t.Errorf("%q after %v, want EIO after %v", o.Errno, o.Took, lookup)
		}
		first = first || o.Took >= lookup
	}
	if !first {
		t.Error("nobody waited for an answer")
	}
	if n := m.ask(t, command{Cmd: "stats"}).Stats.Requests["LOOKUP"]; n < waiters {
		t.Errorf("%d LOOKUPs of %d processes: the test tests nothing", n, waiters)
	}
	m.touch(t, op{Do: "stat", Path: hungPath}) // whatever comes of it: it is remembered as dead again
	m.ask(t, command{Cmd: "add", Arg: hungPath})
	m.ask(t, command{Cmd: "release", Arg: "lookup " + hungPath})
	if o := m.touch(t, op{Do: "read", Path: hungPath})[0]; o.Text != sum([]byte(hungPath)) {
		t.Errorf("after the answer came: %+v", o)
	}
}
