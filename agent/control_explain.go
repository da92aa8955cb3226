package agent

import (
	"context"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

// Explain implements floxv1connect.AgentHandler.
func (c *control) Explain(ctx context.Context, req *connect.Request[floxv1.ExplainRequest]) (*connect.Response[floxv1.ExplainResponse], error) {
	p, _, err := c.a.parse(req.Msg.GetPath())
	if err != nil {
		return nil, api.ToConnect(err)
	}
	account, _ := c.a.history.Of(p)
	out := &floxv1.ExplainResponse{
		Path: c.a.cfg.StoreDir.Join(p), StartedUnixMs: c.a.started.UnixMilli(),
		LeftOut: uint32(account.LeftOut), LeftOutAfter: uint32(account.First()), //nolint:gosec // counts
		LocalBlocks: uint32(account.Local), Open: uint32(account.Open), Fetches: uint32(account.Fetches), //nolint:gosec // counts
		WaitedMs: millis(account.Waited), SlowestMs: millis(account.Slowest),
	}
	for _, s := range account.Steps {
		step := &floxv1.FetchStep{
			AtUnixUs: s.At.UnixMicro(), Kind: s.Kind, Count: uint32(s.Count), Bytes: s.Bytes, //nolint:gosec // a count
			TookMs: millis(s.Took), Background: s.Background, Why: s.Why, Times: uint32(s.Times), //nolint:gosec // a count
		}
		if s.Peer != "" {
			step.Peer, step.PeerName, step.Tier = string(s.Peer), c.nameOf(s.Peer), s.Tier.String()
		}
		out.Steps = append(out.Steps, step)
	}
	for _, s := range account.Sources {
		out.Sources = append(out.Sources, &floxv1.FetchSource{
			Peer: string(s.Peer), PeerName: c.nameOf(s.Peer), Tier: s.Tier.String(), Blocks: uint32(s.Blocks), Bytes: s.Bytes, //nolint:gosec // a count
			Late: uint32(s.Late), Failed: uint32(s.Failed), MeanMs: millis(s.Mean()), SlowestMs: millis(s.Slowest), //nolint:gosec // counts
		})
	}
	if info, ok := c.a.facts.get(p.HashPart()); ok && info.Path == p {
		out.Known = true
		out.LocalBytes, out.ContentBytes = c.a.hereOf(ctx, info)
	}
	return connect.NewResponse(out), nil
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// nameOf is a machine's name in the member list, "" if it is not in it.
func (c *control) nameOf(id p2p.PeerID) string { return c.a.members.member(id).GetName() }

// hereOf is how much of a path's content is here, of how much; none of none if its
// manifest is not here whole.
func (a *Agent) hereOf(ctx context.Context, info *flox.PathInfo) (here, of uint64) {
	var lists flox.Blocks = hereBlocks{a.cache}
	if a.isStaged(info.Manifest) {
		lists = a.staged
	}
	m, err := a.pages.Open(ctx, info.Manifest, lists)
	if err != nil {
		return 0, 0
	}
	t := &tree{Manifest: m, path: info.Path, a: a}
	t.staged.Store(a.isStaged(info.Manifest))
	err = t.files(ctx, func(_ uint32, _ string, e flox.Entry) error {
		of += e.Size
		here += a.localBytes(t, e)
		return nil
	})
	if err != nil {
		return 0, 0
	}
	return here, of
}
