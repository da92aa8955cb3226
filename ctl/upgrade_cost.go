package ctl

import (
	"context"
	"slices"
	"time"

	"connectrpc.com/connect"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// costPatience is how long finding out may take what a change costs this machine.
const costPatience = 10 * time.Second

// costFacts is what a change costs this machine, by the manifests of what is new in it,
// with all that needs.
type costFacts struct {
	FetchBytes uint64   `json:"fetchBytes"` // that are not here
	SavedBytes uint64   `json:"savedBytes"` // that are
	Unknown    []string `json:"unknown"`    // store paths of which it is not known, such as those to be built
}

// costOf asks the agent, which has the manifests or fetches them. It gives nil where
// nothing is new for this machine, or there is no agent.
func costOf(ctx context.Context, g *globals, m *floxv1.ChangeProfileResponse) *costFacts {
	ctx, cancel := context.WithTimeout(ctx, costPatience)
	defer cancel()
	cost, counted, asked := &costFacts{Unknown: []string{}}, map[string]bool{}, false
	for _, c := range changesOf(m.GetBefore(), m.GetGeneration()) {
		if c.After == nil {
			continue
		}
		for _, path := range c.After.Paths[thisSystem()] {
			if c.Before != nil && slices.Contains(c.Before.Paths[thisSystem()], path) {
				continue
			}
			asked = true
			if slices.Contains(m.GetMissing(), path) {
				cost.Unknown = append(cost.Unknown, path)
				continue
			}
			resp, err := g.agent().Path(ctx, connect.NewRequest(&floxv1.PathRequest{Path: path, Closure: true}))
			if connect.CodeOf(err) == connect.CodeUnimplemented {
				return nil // a server of the storehouse
			}
			if err != nil {
				cost.Unknown = append(cost.Unknown, path)
				continue
			}
			for _, d := range resp.Msg.GetPaths() {
				if name := d.GetInfo().GetPath(); !counted[name] {
					counted[name] = true
					cost.FetchBytes += d.GetContentBytes() - min(d.GetLocalBytes(), d.GetContentBytes())
					cost.SavedBytes += min(d.GetLocalBytes(), d.GetContentBytes())
				}
			}
		}
	}
	if !asked {
		return nil
	}
	return cost
}

func (c *costFacts) tell(out *output) {
	out.printf("To fetch here: %s; %s are here already.\n", cli.FormatBytes(c.FetchBytes), cli.FormatBytes(c.SavedBytes))
	if n := len(c.Unknown); n > 0 {
		out.printf("Not counted: %s that is to be built first, or that nobody answered for.\n", plural(uint64(n), "store path", "store paths"))
	}
}
