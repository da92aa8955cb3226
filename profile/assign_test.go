package profile

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

func assign(name string, add, drop []*floxv1.ProfileAssignment) *floxv1.ProfilesCommand {
	return &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Assign{Assign: &floxv1.AssignProfile{Profile: name, Add: add, Drop: drop}}}
}

// Admins assign profiles to machines and to labels, each once.
func TestAssign(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	l.must("alice", create("alice/x"))
	desk, berlin := &floxv1.ProfileAssignment{Peer: "12D3", Machine: "desk"}, &floxv1.ProfileAssignment{Label: "site", Value: "berlin"}
	if _, err := l.apply("alice", assign("alice/x", []*floxv1.ProfileAssignment{berlin}, nil)); !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "only an admin of the storehouse assigns") {
		t.Errorf("who is no admin: %v", err)
	}
	p := l.must("ADMIN", assign("alice/x", []*floxv1.ProfileAssignment{desk, berlin, desk}, nil))
	if len(p.GetAssigned()) != 2 || !Assigned(p, "12D3", nil) || !Assigned(p, "", []string{"a=b", "site=berlin"}) || Assigned(p, "12D4", []string{"site=bonn", "site="}) || Assigned(p, "", nil) {
		t.Errorf("assigned to %v", p.GetAssigned())
	}
	for _, to := range []*floxv1.ProfileAssignment{{}, {Peer: "p", Label: "l"}, {Label: strings.Repeat("l", maxText+1)}} {
		if _, err := l.apply("ADMIN", assign("alice/x", []*floxv1.ProfileAssignment{to}, nil)); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("to %v: %v", to, err)
		}
	}
	p = l.must("ADMIN", assign("alice/x", nil, []*floxv1.ProfileAssignment{desk}))
	if len(p.GetAssigned()) != 1 || DescribeAssignment(p.GetAssigned()[0]) != "site=berlin" {
		t.Errorf("assigned to %v", p.GetAssigned())
	}
	if _, err := l.apply("ADMIN", assign("alice/x", nil, []*floxv1.ProfileAssignment{desk})); !errors.Is(err, flox.ErrNotFound) || !strings.Contains(err.Error(), "not assigned to desk") {
		t.Errorf("taken away twice: %v", err)
	}
	var many []*floxv1.ProfileAssignment
	for i := range maxAssigned {
		many = append(many, &floxv1.ProfileAssignment{Label: "n", Value: fmt.Sprint(i)})
	}
	if _, err := l.apply("ADMIN", assign("alice/x", many, nil)); !errors.Is(err, flox.ErrFull) {
		t.Errorf("one too many: %v", err)
	}
}
