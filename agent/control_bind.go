package agent

import (
	"context"
	"maps"
	"slices"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// messages tells of one that is bound, "" = of all, by directory.
func (s *binder) messages(dir string) (out []*floxv1.Binding) {
	list, states := s.all()
	for _, d := range slices.Sorted(maps.Keys(list)) {
		if dir != "" && d != dir {
			continue
		}
		b, st := list[d], states[d]
		_, configured := s.configured[d]
		m := &floxv1.Binding{Dir: d, Profile: b.Profile, Generation: b.Generation, Number: st.is.Number, Problem: st.problem, Configured: configured}
		if st.is.Path != "" {
			m.User, m.Path = nameOf(int(st.is.User)), s.storeDir.Join(flox.StorePath(st.is.Path))
		}
		out = append(out, m)
	}
	return out
}

// Bind implements floxv1connect.AgentHandler.
func (c *control) Bind(ctx context.Context, req *connect.Request[floxv1.BindRequest]) (*connect.Response[floxv1.BindResponse], error) {
	dir := req.Msg.GetDir()
	if dir != "" {
		if err := c.a.binder.bind(ctx, dir, req.Msg.GetProfile(), caller(ctx)); err != nil {
			return nil, api.ToConnect(err)
		}
	}
	return connect.NewResponse(&floxv1.BindResponse{Bindings: c.a.binder.messages(dir)}), nil
}

// Unbind implements floxv1connect.AgentHandler.
func (c *control) Unbind(ctx context.Context, req *connect.Request[floxv1.UnbindRequest]) (*connect.Response[floxv1.UnbindResponse], error) {
	b, err := c.a.binder.unbind(ctx, req.Msg.GetDir(), caller(ctx))
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(&floxv1.UnbindResponse{Profile: b.Profile}), nil
}
