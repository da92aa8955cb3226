package ctl

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// rolledBack is what a rollback came to.
type rolledBack struct {
	Profile    string `json:"profile"`
	Before     uint64 `json:"before"`
	Generation uint64 `json:"generation"`
	Here       bool   `json:"here"` // on this machine alone, until the storehouse hears of it
}

// rollBack has the storehouse let a generation live again, or this machine by itself while
// that cannot be reached.
func (g *globals) rollBack(ctx context.Context, q *floxv1.RollbackProfileRequest) (rolledBack, error) {
	agent := g.agent()
	at, noAgent := agent.ShownProfiles(ctx, connect.NewRequest(&floxv1.ShownProfilesRequest{Name: q.GetName()}))
	cause := error(flox.ErrUnreachable)
	if noAgent != nil || at.Msg.GetConnected() {
		resp, err := g.admin().RollbackProfile(ctx, connect.NewRequest(q))
		if err == nil {
			p := resp.Msg.GetProfile()
			return rolledBack{Profile: p.GetName(), Before: resp.Msg.GetFrom(), Generation: p.GetLive()}, nil
		}
		cause = explainAdmin(err)
		if noAgent != nil || !errors.Is(api.FromConnect(err), flox.ErrUnreachable) || ctx.Err() != nil {
			return rolledBack{}, cause
		}
	}
	here, err := agent.RollbackHere(ctx, connect.NewRequest(&floxv1.RollbackHereRequest{Name: q.GetName(), To: q.GetTo(), Reason: q.GetReason()}))
	if connect.CodeOf(err) == connect.CodeUnimplemented {
		return rolledBack{}, cause // an older agent
	}
	if err != nil {
		return rolledBack{}, explain(err)
	}
	return rolledBack{here.Msg.GetName(), here.Msg.GetFrom(), here.Msg.GetTo(), true}, nil
}

func (r rolledBack) tell(out *output) error {
	if out.json {
		return out.printJSON(r)
	}
	if r.Here {
		out.printf("%s: generation %d lives again on this machine, before it was %d. The storehouse cannot be reached; other machines follow when it is.\n", clean(r.Profile), r.Generation, r.Before)
		return nil
	}
	out.printf("%s: generation %d lives again, before it was %d.\n", clean(r.Profile), r.Generation, r.Before)
	return nil
}

// hereFacts is a rollback on this machine, made while the storehouse could not be reached,
// as JSON.
type hereFacts struct {
	Before     uint64  `json:"before"`
	Generation uint64  `json:"generation"`
	User       string  `json:"user"`
	Time       *string `json:"time"`
	Refused    string  `json:"refused"` // why the storehouse did not do it; "" = it has not heard of it
}

// rollbackHere asks this machine's agent for one of a profile; nil = there is none, or no agent.
func (g *globals) rollbackHere(ctx context.Context, name string) *hereFacts {
	at, err := g.agent().ShownProfiles(ctx, connect.NewRequest(&floxv1.ShownProfilesRequest{Name: name}))
	if err != nil || len(at.Msg.GetProfiles()) == 0 || at.Msg.GetProfiles()[0].GetHere() == nil {
		return nil
	}
	h := at.Msg.GetProfiles()[0].GetHere()
	return &hereFacts{h.GetLive(), h.GetTo(), h.GetUser(), stampMs(h.GetTimeUnixMs()), h.GetRefused()}
}

func (h *hereFacts) tell(out *output) {
	switch {
	case h == nil:
	case h.Refused != "":
		out.printf("%s rolled it back to generation %d on this machine without the storehouse, which refused that: %s\n", clean(h.User), h.Generation, clean(h.Refused))
	default:
		out.printf("%s rolled it back to generation %d on this machine; the storehouse has not heard of that yet.\n", clean(h.User), h.Generation)
	}
}
