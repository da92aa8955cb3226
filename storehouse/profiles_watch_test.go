package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/members"
)

// profileStream is what a machine is told of profiles.
type profileStream struct {
	t      *testing.T
	client floxv1connect.StorehouseClient
	stream *connect.ServerStreamForClient[floxv1.ProfilesEvent]
	end    context.CancelFunc
	told   map[string]uint64 // by folded name: the generation that lives
	before map[string]uint64
	users  []string
	labels []string
	asked  []string
	at     uint64
	resets int
}

// begin opens a stream that goes on where the last one ended.
func (p *profileStream) begin(asked ...string) {
	p.t.Helper()
	if p.end != nil {
		p.end()
	}
	var ctx context.Context
	ctx, p.end = context.WithCancel(within(p.t))
	p.asked = asked
	q := &floxv1.WatchProfilesRequest{AfterIndex: p.at, Asked: asked, Users: p.users, Labels: p.labels}
	for name := range p.told {
		q.Names = append(q.Names, name)
	}
	stream, err := p.client.WatchProfiles(ctx, connect.NewRequest(q))
	if err != nil {
		p.t.Fatal(err)
	}
	p.stream = stream
}

// until takes messages until what was told is so.
func (p *profileStream) until(want map[string]uint64) {
	p.t.Helper()
	for first := true; first || fmt.Sprint(p.told) != fmt.Sprint(want); first = false {
		if !p.stream.Receive() {
			p.t.Fatalf("told %v, want %v; the stream ended: %v", p.told, want, p.stream.Err())
		}
		e := p.stream.Msg()
		if e.GetReset_() {
			p.resets++
			clear(p.told)
		}
		for _, n := range e.GetPut() {
			p.told[strings.ToLower(n.GetName())] = n.GetLive().GetNumber()
			p.before[strings.ToLower(n.GetName())] = n.GetBefore().GetNumber()
			if n.GetLive() != nil && (len(n.GetLive().GetEnvironments()) != 1 || n.GetLive().GetEnvironments()[0].GetSystem() != linux) {
				p.t.Errorf("environments of %v", n)
			}
		}
		for _, name := range e.GetGone() {
			if _, had := p.told[name]; !had && !slices.Contains(p.asked, name) {
				p.t.Errorf("told that %s is gone, which it never was told of", name)
			}
			delete(p.told, name)
		}
		if len(e.GetUsers()) > 0 {
			p.users, p.labels = e.GetUsers(), e.GetLabels()
		}
		p.at = max(p.at, e.GetIndex())
	}
}

func TestMachinesHearOfTheProfilesOfTheirUsers(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, nil)
	laptop := joinedLaptop(t, s, operator)
	tool, other := makeTool(t, "tool"), makeTool(t, "other")
	for _, p := range []testPath{tool, other} {
		publish(t, s, p)
	}
	boss := person{Actor: &floxv1.Actor{User: "boss"}, admin: true}
	propose := func(c *floxv1.ProfilesCommand) {
		t.Helper()
		if _, err := s.profiles.propose(within(t), boss, c); err != nil {
			t.Fatal(err)
		}
	}
	create := func(name string) {
		t.Helper()
		propose(&floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Create{Create: &floxv1.NewProfile{Name: name, Systems: []string{linux}}}})
	}
	grant := func(name, user, role string) {
		t.Helper()
		propose(&floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Grants{Grants: &floxv1.SetGrants{
			Profile: name, Grants: []*floxv1.ProfileGrant{{User: user, Role: role}},
		}}})
	}
	put := func(name string, p *floxv1.Package) {
		t.Helper()
		if _, err := s.profiles.change(within(t), boss, &floxv1.ChangeProfileRequest{Name: name, Set: []*floxv1.Package{p}, Kind: "install"}); err != nil {
			t.Fatal(err)
		}
	}
	newProfile(t, s, "Alice/default")
	for _, name := range []string{"acme/ci", "acme/public", "acme/secret"} {
		create(name)
	}
	grant("acme/ci", "alice", "reader")
	grant("acme/public", "*", "reader")
	put("acme/ci", asPackage("tool", "1", tool))

	w := &profileStream{t: t, client: floxv1connect.NewStorehouseClient(laptop.web(s), "http://storehouse"), told: map[string]uint64{}, before: map[string]uint64{}}
	w.begin()
	w.until(map[string]uint64{"alice/default": 0, "acme/ci": 1})
	if !slices.Equal(w.users, []string{"alice"}) {
		t.Errorf("it speaks for %q", w.users)
	}
	put("acme/public", asPackage("tool", "1", tool)) // of no interest here
	put("acme/ci", asPackage("other", "1", other))
	w.until(map[string]uint64{"alice/default": 0, "acme/ci": 2})
	if w.before["acme/ci"] != 1 {
		t.Errorf("before the second generation it was %d", w.before["acme/ci"])
	}

	// What everybody may read is told to those who ask, and goes on being told.
	w.begin("ACME/public", "acme/secret", "acme/none")
	w.until(map[string]uint64{"alice/default": 0, "acme/ci": 2, "acme/public": 1})
	put("acme/public", asPackage("other", "1", other))
	put("acme/secret", asPackage("other", "1", other))
	w.until(map[string]uint64{"alice/default": 0, "acme/ci": 2, "acme/public": 2})
	if w.resets != 1 {
		t.Errorf("told all anew %d times, want once", w.resets)
	}

	// What happened while nobody listened is told behind the index.
	w.end()
	put("acme/ci", asPackage("other", "2", other))
	grant("acme/public", "*", "")
	put("acme/secret", asPackage("other", "2", other))
	w.begin("acme/public")
	w.until(map[string]uint64{"alice/default": 0, "acme/ci": 3})
	propose(&floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Rename{Rename: &floxv1.RenameProfile{Profile: "acme/ci", To: "acme/build"}}})
	w.until(map[string]uint64{"alice/default": 0, "acme/build": 3})
	propose(&floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Delete{Delete: "acme/build"}})
	w.until(map[string]uint64{"alice/default": 0})
	if w.resets != 1 {
		t.Errorf("told all anew %d times, want once", w.resets)
	}

	// An operator assigns profiles to machines, by name or label.
	assign := func(q *floxv1.AssignProfileRequest) {
		t.Helper()
		if _, err := operator.AssignProfile(within(t), connect.NewRequest(q)); err != nil {
			t.Fatal(err)
		}
	}
	label := func(change *floxv1.ChangeMachine) {
		t.Helper()
		if _, err := operator.ChangeMachine(within(t), connect.NewRequest(&floxv1.ChangeMachineRequest{Machine: "laptop", Change: change})); err != nil {
			t.Fatal(err)
		}
	}
	assign(&floxv1.AssignProfileRequest{Name: "acme/secret", Add: []string{"LAPTOP"}})
	w.until(map[string]uint64{"alice/default": 0, "acme/secret": 2})
	assign(&floxv1.AssignProfileRequest{Name: "acme/secret", Add: []string{"site=berlin", "site=bonn"}, Drop: []string{"laptop"}})
	w.until(map[string]uint64{"alice/default": 0})
	label(&floxv1.ChangeMachine{SetLabels: []*floxv1.Label{{Key: "site", Value: "berlin"}}})
	w.until(map[string]uint64{"alice/default": 0, "acme/secret": 2})
	w.end()
	resets := w.resets
	w.begin("acme/public")
	w.until(map[string]uint64{"alice/default": 0, "acme/secret": 2})
	if w.resets != resets {
		t.Error("told all anew, and its labels are the same")
	}
	w.end()
	// One that had the machine's name before, and is no member any more.
	propose(&floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Assign{Assign: &floxv1.AssignProfile{
		Profile: "acme/secret", Add: []*floxv1.ProfileAssignment{{Peer: "former", Machine: "laptop"}},
	}}})
	assign(&floxv1.AssignProfileRequest{Name: "acme/secret", Add: []string{"laptop"}})
	assign(&floxv1.AssignProfileRequest{Name: "acme/secret", Drop: []string{"laptop"}})
	if now, err := operator.ShowProfile(within(t), connect.NewRequest(&floxv1.ShowProfileRequest{Name: "acme/secret"})); err != nil || len(now.Msg.GetProfile().GetAssigned()) != 2 {
		t.Errorf("assigned to %v, %v; want two labels", now, err)
	}
	label(&floxv1.ChangeMachine{DropLabels: []string{"site"}})
	w.begin("acme/public")
	w.until(map[string]uint64{"alice/default": 0})
	if _, err := operator.AssignProfile(within(t), connect.NewRequest(&floxv1.AssignProfileRequest{Name: "acme/secret", Drop: []string{"nobody"}})); !errors.Is(api.FromConnect(err), flox.ErrNotFound) {
		t.Errorf("taken from a machine that there is not: %v", err)
	}

	// For whom the machine speaks decides what it sees.
	if _, err := operator.ChangeMachine(within(t), connect.NewRequest(&floxv1.ChangeMachineRequest{
		Machine: "laptop", Change: &floxv1.ChangeMachine{SetUsers: []*floxv1.UserGrant{{Name: "Acme", Role: members.Member}}},
	})); err != nil {
		t.Fatal(err)
	}
	w.until(map[string]uint64{"alice/default": 0, "acme/public": 2, "acme/secret": 2})

	find := func(name string, generation uint64) (*floxv1.FindProfileResponse, error) {
		resp, err := w.client.FindProfile(within(t), connect.NewRequest(&floxv1.FindProfileRequest{Name: name, Generation: generation}))
		if err != nil {
			return nil, api.FromConnect(err)
		}
		return resp.Msg, nil
	}
	if got, err := find("ACME/secret", 1); err != nil || got.GetProfile().GetLive().GetNumber() != 2 || got.GetGeneration().GetNumber() != 1 || got.GetOwner() != "acme" {
		t.Errorf("find: %v, %v", got, err)
	}
	create("acme/old")
	propose(&floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Rename{Rename: &floxv1.RenameProfile{Profile: "acme/old", To: "acme/new"}}})
	if _, err := find("acme/old", 0); !errors.Is(err, flox.ErrNotFound) || !strings.Contains(err.Error(), "renamed to acme/new") {
		t.Errorf("find by an old name: %v", err)
	}
	create("bob/was")
	propose(&floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Rename{Rename: &floxv1.RenameProfile{Profile: "bob/was", To: "bob/is"}}})
	if _, err := find("bob/was", 0); !errors.Is(err, flox.ErrNotFound) || strings.Contains(err.Error(), "bob/is") {
		t.Errorf("find by an old name of one that may not be seen: %v", err)
	}
	create("bob/hidden")
	for _, q := range []struct {
		name       string
		generation uint64
	}{{"bob/hidden", 0}, {"bob/none", 0}, {"bob", 0}, {"nobody", 0}, {"acme/secret", 9}} {
		if got, err := find(q.name, q.generation); !errors.Is(err, flox.ErrNotFound) {
			t.Errorf("find %s@%d: %v, %v, want ErrNotFound", q.name, q.generation, got, err)
		}
	}
	w.end()
}
