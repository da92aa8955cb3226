package storehouse

import (
	"errors"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/profile"
)

// A machine that joins gets no user by its own word who has something: profiles, a role in
// one, another machine.
func TestMachinesDoNotTakeUsersThatAreThere(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, nil)
	joins := func(name string) *floxv1.JoinResponse {
		t.Helper()
		joined, err := newComputer(t).join(s, makeInvite(t, operator, &floxv1.MakeInviteRequest{Role: members.Agent}), name)
		if err != nil {
			t.Fatal(err)
		}
		return joined
	}
	refused := func(name, why string) {
		t.Helper()
		if got := joins(name); !strings.Contains(got.GetUnclaimed(), why) || len(got.GetMachine().GetUsers()) != 0 {
			t.Errorf("%s speaks for %v, %q, want for nobody: %s", name, got.GetMachine().GetUsers(), got.GetUnclaimed(), why)
		}
	}
	create := func(name string) {
		t.Helper()
		if _, err := operator.CreateProfile(within(t), connect.NewRequest(&floxv1.CreateProfileRequest{Name: name, Systems: []string{linux}})); err != nil {
			t.Fatal(err)
		}
	}
	create("acme/ci")
	grant := func(role string) {
		t.Helper()
		if _, err := operator.GrantProfile(within(t), connect.NewRequest(&floxv1.GrantProfileRequest{Name: "acme/ci", Grants: []*floxv1.ProfileGrant{{User: "alice", Role: role}}})); err != nil {
			t.Fatal(err)
		}
	}
	grant(profile.Writer)
	refused("m1", "alice has a role in a profile already")
	grant("")
	if got := joins("m2"); got.GetUnclaimed() != "" || len(got.GetMachine().GetUsers()) != 1 {
		t.Errorf("a name that nobody has: %v, %q", got.GetMachine(), got.GetUnclaimed())
	}
	refused("m3", "the machine m2 speaks for alice already")
	create("Alice/tools")
	refused("m4", "alice has profiles already")
}

// Who uses a machine reads the profiles that are assigned to it, and changes none; others
// it does not hear of, by an old name neither.
func TestUsersReadWhatIsAssignedToTheirMachine(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, nil)
	laptop := joinedLaptop(t, s, operator)
	a := floxv1connect.NewAdminClient(laptop.web(s), "http://storehouse")
	boss := person{Actor: &floxv1.Actor{User: "boss"}, admin: true}
	for _, name := range []string{"acme/base", "acme/secret", "acme/old"} {
		if _, err := s.profiles.propose(within(t), boss, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Create{Create: &floxv1.NewProfile{Name: name, Systems: []string{linux}}}}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := operator.RenameProfile(within(t), connect.NewRequest(&floxv1.RenameProfileRequest{Name: "acme/old", To: "acme/hidden"})); err != nil {
		t.Fatal(err)
	}
	if _, err := operator.AssignProfile(within(t), connect.NewRequest(&floxv1.AssignProfileRequest{Name: "acme/base", Add: []string{"laptop"}})); err != nil {
		t.Fatal(err)
	}
	for _, user := range []string{"alice", "acme", ""} { // it speaks for alice alone
		show := func(name string) error {
			r := connect.NewRequest(&floxv1.ShowProfileRequest{Name: name})
			r.Header().Set(UserHeader, user)
			_, err := a.ShowProfile(within(t), r)
			return api.FromConnect(err)
		}
		if err := show("acme/base"); err != nil {
			t.Errorf("%q cannot read what is assigned: %v", user, err)
		}
		if err := show("acme/secret"); !errors.Is(err, flox.ErrDenied) {
			t.Errorf("%q reads what is not: %v", user, err)
		}
		if err := show("acme/old"); !errors.Is(err, flox.ErrNotFound) || strings.Contains(err.Error(), "hidden") {
			t.Errorf("%q asks by an old name: %v", user, err)
		}
		list := connect.NewRequest(&floxv1.ListProfilesRequest{})
		list.Header().Set(UserHeader, user)
		if l, err := a.ListProfiles(within(t), list); err != nil || len(l.Msg.GetProfiles()) != 1 || l.Msg.GetProfiles()[0].GetName() != "acme/base" {
			t.Errorf("%q lists %v, %v", user, l, err)
		}
		change := connect.NewRequest(&floxv1.ChangeProfileRequest{Name: "acme/base", Kind: "install"})
		change.Header().Set(UserHeader, user)
		if _, err := a.ChangeProfile(within(t), change); !errors.Is(api.FromConnect(err), flox.ErrDenied) {
			t.Errorf("%q changes what is assigned: %v", user, err)
		}
	}
}
