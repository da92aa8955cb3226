package integration

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox/integration/hosts"
)

// operator is who runs a storehouse of three servers, with floxctl on their hosts.
type operator struct{ *house }

// TestOperator: an operator looks at three servers, changes what there is to change,
// makes mistakes, and takes a server out and in again. Whichever server is asked
// answers, writers see nothing of it, and every change is in the audit log.
func TestOperator(t *testing.T) {
	o := &operator{open(t).newServers(t, "--open=false")}
	for _, part := range []struct {
		name string
		do   func()
	}{
		{"Looks", o.looks},
		{"Mistakes", o.mistakes},
		{"HandsOver", o.handsOver},
		{"Machines", o.labels},
		{"Entry", o.entry},
		{"Keys", o.rotates},
		{"Imports", o.imports},
		{"BacksUp", o.backsUp},
		{"Collects", o.collects},
		{"Replaces", o.replaces},
		{"Revokes", o.revokesTheLeader}, // the last: two servers are left
	} {
		if !t.Run(part.name, func(t *testing.T) { o.t = t; part.do() }) {
			return // who knows in which state they are
		}
	}
}

// ctl runs floxctl on a server's host.
func (o *operator) ctl(s *hosts.Storehouse, args ...string) result {
	o.t.Helper()
	return do(o.t, s.Host, o.programs.Floxctl, args...)
}

// roles are the server that leads, and two that follow.
func (o *operator) roles() (leader, follower, third *hosts.Storehouse) {
	o.t.Helper()
	i, leader := o.leader()
	return leader, o.servers[(i+1)%3], o.servers[(i+2)%3]
}

// asks decodes what floxctl prints with --json on a server's host.
func asks[T any](o *operator, s *hosts.Storehouse, args ...string) T {
	o.t.Helper()
	r := o.ctl(s, append(args, "--json")...)
	r.want(o.t, 0)
	all := lines[T](o.t, r.out)
	if len(all) == 0 {
		o.t.Fatalf("floxctl %v --json says nothing", args)
	}
	return all[len(all)-1]
}

// serverTold, machineTold, keysTold, usageTold and auditTold are parts of what
// floxctl prints with --json.
type serverTold struct {
	Peer, Name, Problem                        string
	Leader, Voter, WantsVote, Drained, Healthy bool
	LackingBlocks, LackingBytes, Applied       uint64
}

type houseTold struct {
	Well    bool
	Leader  string
	Servers []serverTold
	Usage   usageTold
}

type usageTold struct{ Paths, NarBytes, CondemnedPaths uint64 }

type machineTold struct {
	Peer, Name, Role string
	Labels           map[string]string
	Users            []struct{ Name, Role string }
	Connected        bool
}

type keysTold struct {
	Keys []struct {
		Public, Use string
		Signs       bool
	}
	TrustVersion uint64
}

type auditTold struct {
	Index                                  uint64
	At                                     time.Time
	Machine, User, Action, Subject, Detail string
	Refused                                bool
}

func (a auditTold) String() string {
	refused := ""
	if a.Refused {
		refused = " REFUSED"
	}
	return fmt.Sprintf("%s%s %s by %s on %s", a.Action, refused, a.Subject, a.User, a.Machine)
}

// log is the audit log.
func (o *operator) log(s *hosts.Storehouse) []auditTold {
	o.t.Helper()
	r := o.ctl(s, "audit", "--limit", "0", "--json")
	r.want(o.t, 0)
	return lines[auditTold](o.t, r.out)
}

// audited does something and checks what the audit log says of it.
func (o *operator) audited(act func(), want ...string) {
	o.t.Helper()
	if d := cmp.Diff(want, o.records(act)); d != "" {
		o.t.Errorf("the audit log (-want +got):\n%s", d)
	}
}

// records does something and gives what the audit log says people did then: what was
// changed, by whom. That it also says when is checked.
func (o *operator) records(act func()) (got []string) {
	o.t.Helper()
	last := uint64(0)
	leader, _, _ := o.roles()
	for _, r := range o.log(leader) {
		last = max(last, r.Index)
	}
	begun := time.Now().Truncate(time.Second)
	act()
	leader, _, _ = o.roles()
	for _, r := range o.log(leader) {
		if r.Index <= last || r.User == "" { // servers also do things by themselves
			continue
		}
		got = append(got, r.String())
		if r.At.Before(begun) || r.At.After(time.Now()) {
			o.t.Errorf("%s: it says that this was at %s, and it was between %s and now", r, r.At, begun)
		}
	}
	return got
}

// by is an audit record of what root did on a server.
func by(s *hosts.Storehouse, what string) string { return what + " by root on " + s.Host.Name }

// standing is what can be changed, as a server tells it.
func (o *operator) standing(s *hosts.Storehouse) string {
	o.t.Helper()
	house := asks[houseTold](o, s, "storehouse", "servers")
	for i := range house.Servers {
		o := &house.Servers[i] // what time and writers change is not looked at
		o.Applied, o.LackingBlocks, o.LackingBytes, o.WantsVote = 0, 0, 0, false
	}
	machines := asks[[]machineTold](o, s, "machine", "list")
	for i := range machines {
		machines[i].Connected = false
	}
	text, err := json.Marshal([]any{house, machines, asks[keysTold](o, s, "key", "list"), o.log(s)})
	must(o.t, err)
	return strings.ReplaceAll(string(text), ",{", ",\n{")
}

// looks: every server says the same, to people and to programs, and that somebody
// looked is written nowhere.
func (o *operator) looks() {
	leader, follower, third := o.roles()
	o.eventually("all are well", func() bool {
		r := o.ctl(follower, "storehouse", "status")
		return r.code == 0
	})
	o.audited(func() {
		for _, s := range o.servers {
			house := asks[houseTold](o, s, "storehouse", "status")
			if !house.Well || house.Leader != leader.Host.Name || len(house.Servers) != 3 {
				o.t.Errorf("%s says %+v, and %s leads", s.Host.Name, house, leader.Host.Name)
			}
			for _, m := range asks[[]machineTold](o, s, "machine", "list") {
				if !m.Connected {
					o.t.Errorf("%s does not see that %s is there", s.Host.Name, m.Name)
				}
			}
			var names []string
			for _, x := range o.servers {
				names = append(names, x.Host.Name)
			}
			o.ctl(s, "storehouse", "servers").want(o.t, 0, append(names, "leads", "votes")...)
			o.ctl(s, "storehouse", "status").want(o.t, 0, "3 of 3 well", leader.Host.Name)
			o.ctl(s, "storehouse", "usage").want(o.t, 0, "0 valid", "none yet")
			o.ctl(s, "storehouse", "gc", "--dry-run").want(o.t, 0, "Nothing was changed")
			o.ctl(s, "machine", "list").want(o.t, 0, names...)
			o.ctl(s, "machine", "show", strings.ToUpper(third.Host.Name)).want(o.t, 0, third.Host.Name, "server", third.Host.Addr().String())
			o.ctl(s, "key", "list").want(o.t, 0, "nix", "manifest", "signs")
			o.ctl(s, "invite", "list").want(o.t, 0, "No invite can be used now") // those of the servers are used up
			o.ctl(s, "store", "roots").want(o.t, 0)
			o.ctl(s, "audit", "--machine", strings.ToUpper(third.Host.Name)).want(o.t, 0, "machine.join "+third.Host.Name)
			o.ctl(s, "doctor").want(o.t, 0, "0 errors")
			if d := cmp.Diff(o.standing(leader), o.standing(s)); d != "" {
				o.t.Errorf("%s and %s tell different things:\n%s", leader.Host.Name, s.Host.Name, d)
			}
		}
	})
}

// mistakes: what cannot be meant is refused, with what was given, what was expected
// and what to do, and changes nothing.
func (o *operator) mistakes() {
	leader, follower, third := o.roles()
	name, none := follower.Host.Name, "floxctl machine list"
	before := o.standing(leader)
	for _, m := range []struct {
		args  string
		code  int
		words []string
	}{
		{"storehouse transfer nobody", 3, []string{`"nobody"`, none}},
		{"storehouse drain nobody", 3, []string{`"nobody"`, none}},
		{"storehouse drain", 2, []string{"SERVER is missing", "--help"}},
		{"storehouse remove nobody --yes", 3, []string{`"nobody"`, none}},
		{"storehouse remove nobody --yes --force", 3, []string{`"nobody"`, none}},
		{"storehouse remove " + name, 2, []string{name, "--yes"}},
		{"storehouse gc --keep-recent soon", 2, []string{`"soon"`, "such as 10m, 1h or 14d"}},
		{"storehouse gc --resume --dry-run", 2, []string{"--resume"}},
		{"storehouse verify", 2, []string{"--from is missing"}},
		{"storehouse backup", 2, []string{"--to is missing"}},
		{"storehouse keep /nix/store/yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy-lib", 3, []string{"yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy-lib", "upload it first"}},
		{"audit --machine nobody", 3, []string{`"nobody"`, none}},
		{"machine show nobody", 3, []string{`"nobody"`, none}},
		{"machine label nobody site=here", 3, []string{`"nobody"`, none}},
		{"machine label " + name + " site", 2, []string{`"site"`, "want KEY=VALUE"}},
		{"machine label " + name + " voter=perhaps", 2, []string{name, "voter=perhaps", "want true, or false"}},
		{"machine label " + name + " site=here\nthere", 2, []string{name, `"here\nthere"`, "printable"}},
		{"machine rename " + name + " " + strings.ToUpper(third.Host.Name), 8, []string{strings.ToUpper(third.Host.Name), "belongs to another machine"}},
		{"machine user " + name + " alice:king", 2, []string{"alice:king", "NAME:admin"}},
		{"machine revoke nobody --yes", 3, []string{`"nobody"`, none}},
		{"invite cancel nothing", 3, []string{"nothing", "floxctl invite list"}},
		{"invite --role king", 2, []string{`"king"`, "want server, agent or worker"}},
		{"key rotate --use nothing", 2, []string{`"nothing"`, "nix,manifest,swarm"}},
		{"key rotate --overlap 9999d", 2, []string{"want at most"}},
		{"import", 2, []string{"--from is missing"}},
		{"import --from /nowhere", 3, []string{"/nowhere"}},
		{"import --from http://127.0.0.1:1", 2, []string{"name the paths"}},
		{"import --from / --key nonsense", 2, []string{`"nonsense"`, "NAME:BASE64"}},
	} {
		// A line break is within a word.
		o.ctl(follower, strings.Split(m.args, " ")...).want(o.t, m.code, m.words...)
	}
	if d := cmp.Diff(before, o.standing(leader)); d != "" {
		o.t.Errorf("mistakes changed something:\n%s", d)
	}
}

// handsOver: leadership goes where the operator wants it, and nowhere else.
func (o *operator) handsOver() {
	defer o.writing(4)()
	leader, follower, third := o.roles()
	leads := func(s *hosts.Storehouse) {
		o.t.Helper()
		for _, asked := range o.servers {
			o.eventually(s.Host.Name+" leads", func() bool { return asks[houseTold](o, asked, "storehouse", "status").Leader == s.Host.Name })
		}
	}
	o.flows(time.Now())
	o.audited(func() {
		o.ctl(follower, "storehouse", "drain", strings.ToUpper(leader.Host.Name)).want(o.t, 0, leader.Host.Name+" does not lead until")
	}, by(follower, "server.drain "+leader.Host.Name))
	o.flows(time.Now())
	house := asks[houseTold](o, leader, "storehouse", "status")
	i := slices.IndexFunc(house.Servers, func(s serverTold) bool { return s.Name == leader.Host.Name })
	if !house.Servers[i].Drained || house.Servers[i].Leader || !house.Servers[i].Voter || house.Leader == "" {
		o.t.Errorf("the drained leader is %+v, and %q leads", house.Servers[i], house.Leader)
	}
	before := o.standing(leader)
	o.ctl(follower, "storehouse", "transfer", leader.Host.Name).want(o.t, 8, leader.Host.Name, "is drained", "floxctl storehouse drain "+leader.Host.Name+" --undo")
	next, other := follower, third
	if house.Leader == third.Host.Name {
		next, other = third, follower
	}
	if d := cmp.Diff(before, o.standing(leader)); d != "" {
		o.t.Errorf("a refused hand-over changed something:\n%s", d)
	}
	o.ctl(leader, "storehouse", "drain", other.Host.Name).want(o.t, 0)
	before = o.standing(leader)
	o.ctl(other, "storehouse", "drain", next.Host.Name).want(o.t, 8, next.Host.Name, "no other server could lead", "--undo")
	o.ctl(other, "storehouse", "transfer").want(o.t, 8, "no other server could lead", "--undo")
	if d := cmp.Diff(before, o.standing(leader)); d != "" {
		o.t.Errorf("refused drains changed something:\n%s", d)
	}
	o.flows(time.Now())
	o.audited(func() {
		o.ctl(other, "storehouse", "drain", other.Host.Name, "--undo").want(o.t, 0, "may lead again")
		if d := asks[serverTold](o, other, "storehouse", "drain", leader.Host.Name, "--undo"); d.Drained {
			o.t.Errorf("it is told to be %+v", d)
		}
		o.ctl(other, "storehouse", "transfer", strings.ToUpper(leader.Host.Name)).want(o.t, 0, leader.Host.Name+" leads")
		leads(leader)
		o.ctl(other, "storehouse", "transfer", leader.Host.Name).want(o.t, 0, leader.Host.Name+" leads") // it does
	},
		by(other, "server.undrain "+other.Host.Name),
		by(other, "server.undrain "+leader.Host.Name),
		by(other, "server.transfer "+leader.Host.Name))
	if now := asks[serverTold](o, other, "storehouse", "transfer").Name; now == leader.Host.Name {
		o.t.Errorf("%s led, and leads after a transfer to anybody else", now)
	}
	o.flows(time.Now())
}
