package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	shared "github.com/floxctl/flox/profile"
)

const (
	// passTimeout is how long the storehouse may take to answer for one rollback.
	passTimeout = 30 * time.Second
	// passPause is before rollbacks are passed on again of which nobody heard.
	passPause = 5 * time.Second
)

// live gives the generation that lives on this machine: what the storehouse told, or what
// was gone back to while it could not be reached. nil = nothing was installed yet.
func (p viewed) live() *floxv1.GenerationNews {
	if h := p.GetHere(); h.GetTo() > 0 && h.GetRefused() == "" {
		for _, g := range append([]*floxv1.GenerationNews{p.GetNews().GetBefore()}, p.GetOlder()...) {
			if g.GetNumber() == h.GetTo() {
				return g
			}
		}
	}
	return p.GetNews().GetLive()
}

// stillHere is what becomes of a rollback on this machine when the storehouse tells of the
// profile: it counts while nobody changed that.
func stillHere(h *floxv1.HereRollback, n *floxv1.ProfileNews) *floxv1.HereRollback {
	live := n.GetLive().GetNumber()
	switch {
	case h == nil || live == h.GetLive():
		return h
	case live == h.GetTo() || h.GetRefused() != "":
		return nil
	}
	return refused(h, fmt.Sprintf("generation %d lives since somebody changed the profile meanwhile", live))
}

// refused is a rollback that does not count, and why.
func refused(h *floxv1.HereRollback, why string) *floxv1.HereRollback {
	return &floxv1.HereRollback{Live: h.GetLive(), To: h.GetTo(), Reason: h.GetReason(), User: h.GetUser(), TimeUnixMs: h.GetTimeUnixMs(), Refused: why}
}

// rollback has an earlier generation live on this machine, for a user of it.
func (v *view) rollback(ctx context.Context, user string, q *floxv1.RollbackHereRequest) (*floxv1.RollbackHereResponse, error) {
	out := &floxv1.RollbackHereResponse{}
	return out, v.change(ctx, func(next *viewState) error {
		key := shared.Folded(q.GetName())
		p, known := next.profiles[key]
		name := p.GetNews().GetName()
		switch {
		case !known:
			return fmt.Errorf("profile %.200q is not known on this machine, and the storehouse cannot be reached: %w", q.GetName(), flox.ErrUnreachable)
		case !slices.Contains(p.GetNews().GetWriters(), shared.Folded(user)):
			return fmt.Errorf("profile %s: %s does not have the role writer, as far as this machine knows; whoever owns it gives it: floxctl profile grant %s %s=writer: %w", name, user, name, user, flox.ErrDenied)
		}
		from := p.live().GetNumber()
		to := q.GetTo()
		if to == 0 && from == p.GetNews().GetLive().GetNumber() {
			to = p.GetNews().GetBefore().GetNumber()
		}
		if to == 0 {
			return fmt.Errorf("profile %s: this machine does not know what lived before generation %d, and the storehouse cannot be reached; say which with --to: %w", name, from, flox.ErrNotFound)
		}
		g := p.generation(to)
		if _, here := environmentFor(g, v.system); !here {
			return fmt.Errorf("profile %s: generation %d is not known on this machine, and the storehouse cannot be reached: %w", name, to, flox.ErrUnreachable)
		}
		h := &floxv1.HereRollback{Live: p.GetNews().GetLive().GetNumber(), To: to, Reason: q.GetReason(), User: user, TimeUnixMs: time.Now().UnixMilli()}
		if h.GetTo() == h.GetLive() {
			h = nil // back to what the storehouse has
		}
		p.ToldProfile = &floxv1.ToldProfile{News: p.GetNews(), Older: p.GetOlder(), Here: h}
		next.profiles[key] = p
		out.Name, out.From, out.To = name, from, to
		return nil
	})
}

// passRollbacks has the storehouse do what was gone back to on this machine, once it can
// be reached.
func (w *viewWatch) passRollbacks(ctx context.Context) error {
	for {
		select {
		case <-w.rolled:
		case <-ctx.Done():
			return nil
		}
		again := false
		for _, p := range w.now.Load().profiles {
			if h := p.GetHere(); h != nil && h.GetRefused() == "" && w.connected.Load() {
				again = w.passRollback(ctx, p.GetNews().GetName(), h) || again
			}
		}
		if !again {
			continue
		}
		select {
		case <-time.After(passPause):
			poke(w.rolled)
		case <-ctx.Done():
			return nil
		}
	}
}

// passRollback passes one on. again says that the storehouse did not answer.
func (w *viewWatch) passRollback(ctx context.Context, name string, h *floxv1.HereRollback) (again bool) {
	call, cancel := context.WithTimeout(ctx, passTimeout)
	defer cancel()
	err := w.roll(call, h.GetUser(), &floxv1.RollbackProfileRequest{Name: name, To: h.GetTo(), Live: h.GetLive(), Reason: h.GetReason()})
	switch {
	case err == nil:
		w.log.Info("a rollback on this machine is in the storehouse", "profile", name, "generation", h.GetTo(), "user", h.GetUser())
		return false // the news of it ends what counts here
	case errors.Is(err, flox.ErrUnreachable), call.Err() != nil:
		return ctx.Err() == nil
	}
	w.log.Warn("the storehouse refused a rollback on this machine", "profile", name, "generation", h.GetTo(), "user", h.GetUser(), "error", err)
	bad := w.change(ctx, func(next *viewState) error {
		p, known := next.profiles[shared.Folded(name)]
		if known && p.GetHere() == h {
			p.ToldProfile = &floxv1.ToldProfile{News: p.GetNews(), Older: p.GetOlder(), Here: refused(h, err.Error())}
			next.profiles[shared.Folded(name)] = p
		}
		return nil
	})
	if bad != nil {
		w.log.Warn("a rollback that was refused", "profile", name, "error", bad)
	}
	return false
}

// rollFor asks the storehouse for a rollback on a user's behalf.
func (a *Agent) rollFor(ctx context.Context, user string, q *floxv1.RollbackProfileRequest) error {
	req := connect.NewRequest(q)
	req.Header().Set(userHeader, user)
	house := a.houses.first()
	_, err := a.calls.admin(house).RollbackProfile(ctx, req)
	if err = api.FromConnect(err); errors.Is(err, flox.ErrUnreachable) {
		a.houses.failed(house)
	}
	return err
}

// RollbackHere implements floxv1connect.AgentHandler.
func (c *control) RollbackHere(ctx context.Context, req *connect.Request[floxv1.RollbackHereRequest]) (*connect.Response[floxv1.RollbackHereResponse], error) {
	user := callerName(ctx)
	if user == "" {
		return nil, api.ToConnect(fmt.Errorf("the system does not say who calls: %w", flox.ErrDenied))
	}
	out, err := c.a.view.rollback(ctx, user, req.Msg)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	poke(c.a.view.rolled)
	return connect.NewResponse(out), nil
}
