package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

const (
	// validPage is how many names the storehouse is asked for at once: a listing
	// of a million is 250 round trips.
	validPage = 4096
	// maxValidPages bounds the pages kept, so that a reader of the directory, who
	// takes some hundred names at a time, does not ask for each page again and again.
	maxValidPages = 8
	// validFresh is how long a page is good although something changed meanwhile;
	// validAge, if nothing did as far as the watch stream tells.
	validFresh = time.Second
	validAge   = time.Minute
	// listPatience is how long a listing waits for a page. When none came, the
	// storehouse is left alone for listPause: a reader takes many pages, and must
	// not wait for each.
	listPatience = 2 * time.Second
	listPause    = 10 * time.Second
)

// validNames lists what is valid in the storehouse.
type validNames struct {
	calls    *calls
	houses   *houses
	state    func() link
	patience time.Duration
	log      *slog.Logger
	asking   chan struct{} // one page at a time

	mu    sync.Mutex
	pages []namesPage // newest last
	pause time.Time   // until when the storehouse is not asked
}

// namesPage are the valid names between two: all that sort behind after and not
// behind the last, or all behind after if it is the end.
type namesPage struct {
	after string
	names []string
	end   bool
	index uint64
	life  uint64 // link.resets when it was asked for
	at    time.Time
}

func (p *namesPage) covers(after string) bool {
	return p.after <= after && (p.end || after < p.names[len(p.names)-1])
}

// merge adds valid names to known ones, which are the first limit behind after;
// it gives the first limit of both. What the storehouse does not tell in time is
// left out.
func (v *validNames) merge(ctx context.Context, known []flox.Named, after string, limit int) []flox.Named {
	out := make([]flox.Named, 0, limit)
	for len(out) < limit {
		page, ok := v.page(ctx, after)
		if !ok {
			break
		}
		for _, name := range page.names {
			if name <= after {
				continue
			}
			for len(known) > 0 && known[0].Name < name && len(out) < limit {
				out, known = append(out, known[0]), known[1:]
			}
			if len(out) == limit {
				return out
			}
			one := flox.Named{Name: name}
			if len(known) > 0 && known[0].Name == name {
				one, known = known[0], known[1:]
			}
			out = append(out, one)
		}
		if page.end {
			break
		}
		after = page.names[len(page.names)-1]
	}
	return append(out, known[:min(len(known), limit-len(out))]...)
}

// page gives a page that covers what comes behind after; false if the storehouse
// does not answer now.
func (v *validNames) page(ctx context.Context, after string) (namesPage, bool) {
	link := v.state()
	if page, ok, asks := v.kept(link, after); ok || !asks {
		return page, ok
	}
	ctx, cancel := context.WithTimeout(ctx, v.patience)
	defer cancel()
	select {
	case v.asking <- struct{}{}:
		defer func() { <-v.asking }()
	case <-ctx.Done():
		return namesPage{}, false
	}
	if page, ok, asks := v.kept(v.state(), after); ok || !asks { // somebody else asked meanwhile
		return page, ok
	}
	page, err := v.ask(ctx, after)
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil {
		v.log.Warn("the storehouse does not list what is valid; what is known here is shown", "error", err)
		v.pause = time.Now().Add(listPause)
		return namesPage{}, false
	}
	if len(v.pages) == maxValidPages {
		v.pages = append(v.pages[:0], v.pages[1:]...)
	}
	v.pages = append(v.pages, page)
	return page, true
}

// kept finds a page that is good still, and says whether the storehouse may be asked.
func (v *validNames) kept(l link, after string) (page namesPage, ok, asks bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	if !l.connected || now.Before(v.pause) {
		return page, false, false
	}
	for i := len(v.pages) - 1; i >= 0; i-- {
		p := &v.pages[i]
		age := now.Sub(p.at)
		if p.covers(after) && p.life == l.resets && (age < validFresh || age < validAge && l.changed <= p.index) {
			return *p, true, true
		}
	}
	return page, false, true
}

// ask gets a page from the storehouse.
func (v *validNames) ask(ctx context.Context, after string) (namesPage, error) {
	at, life := time.Now(), v.state().resets
	names, more, index, err := v.calls.listValid(ctx, v.houses, after)
	return namesPage{after: after, names: names, end: !more, index: index, life: life, at: at}, err
}

// listValid asks the storehouse for valid names behind after. They are as they
// should be, in order, and more than none if there are more.
func (c *calls) listValid(ctx context.Context, houses *houses, after string) (names []string, more bool, index uint64, err error) {
	err = houses.call(ctx, func(ctx context.Context, house p2p.PeerID) (err error) {
		names, more, index, err = c.listValidOf(ctx, house, after, houses.maxAge())
		return err
	})
	return names, more, index, err
}

func (c *calls) listValidOf(ctx context.Context, house p2p.PeerID, after string, maxAge uint32) (names []string, more bool, index uint64, err error) {
	response, err := c.storehouse(house).ListPaths(ctx, connect.NewRequest(&floxv1.ListValidRequest{After: after, Limit: validPage, MaxAgeMs: maxAge}))
	if err != nil {
		return nil, false, 0, &unreachable{api.FromConnect(err)}
	}
	m := response.Msg
	last := after
	for _, name := range m.GetPaths() {
		if _, err := flox.ParseStorePath(name); err != nil || name <= last {
			return nil, false, 0, fmt.Errorf("list of valid paths: %q behind %q: %w", name, last, flox.ErrCorrupt)
		}
		last = name
	}
	if len(m.GetPaths()) == 0 && m.GetMore() || len(m.GetPaths()) > validPage {
		return nil, false, 0, fmt.Errorf("list of valid paths: a page of %d names: %w", len(m.GetPaths()), flox.ErrCorrupt)
	}
	return m.GetPaths(), m.GetMore(), m.GetIndex(), nil
}

// Paths implements floxv1connect.AgentHandler.
func (c *control) Paths(ctx context.Context, req *connect.Request[floxv1.ListPathsRequest], stream *connect.ServerStream[floxv1.ListPathsResponse]) error {
	if req.Msg.GetValid() {
		return api.ToConnect(c.a.sendValid(ctx, req.Msg.GetAfter(), stream.Send))
	}
	return api.ToConnect(c.a.sendKnown(ctx, req.Msg.GetAfter(), stream.Send))
}

// sendKnown sends what is known here, a page at a time.
func (a *Agent) sendKnown(ctx context.Context, after string, send func(*floxv1.ListPathsResponse) error) error {
	for {
		names, err := a.facts.names(ctx, after, validPage)
		if err != nil || len(names) == 0 {
			return err
		}
		m := &floxv1.ListPathsResponse{}
		for _, n := range names {
			m.Paths = append(m.Paths, &floxv1.ListedPath{Path: n.Name, Known: true})
		}
		if err := send(m); err != nil {
			return err
		}
		after = names[len(names)-1].Name
	}
}

// sendValid sends everything valid in the storehouse, a page at a time.
func (a *Agent) sendValid(ctx context.Context, after string, send func(*floxv1.ListPathsResponse) error) error {
	for more := true; more; {
		if l := a.follower.state(); !l.connected {
			return fmt.Errorf("only the storehouse knows everything that is valid, and it is not connected (%s); without --valid what is known here is listed: %w",
				oneLine(l.err), flox.ErrUnreachable)
		}
		var names []string
		var err error
		if names, more, err = a.listPage(ctx, after); err != nil {
			return err
		}
		m := &floxv1.ListPathsResponse{}
		for _, n := range names {
			m.Paths = append(m.Paths, &floxv1.ListedPath{Path: n, Known: a.facts.has(n[:flox.HashPartLen])})
			after = n
		}
		if err := send(m); err != nil {
			return err
		}
	}
	return nil
}

// listPage gets one page within the time one question may take.
func (a *Agent) listPage(ctx context.Context, after string) (names []string, more bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, factsTimeout)
	defer cancel()
	names, more, _, err = a.calls.listValid(ctx, a.houses, after)
	if err == nil {
		return names, more, nil
	}
	if errors.Is(err, flox.ErrCorrupt) {
		return nil, false, err
	}
	where := "from its beginning"
	if after != "" {
		where = "behind " + after
	}
	return nil, false, fmt.Errorf("the storehouse did not give the list of what is valid %s (%s); without --valid what is known here is listed: %w",
		where, oneLine(err), flox.ErrUnreachable)
}
