package agent

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

const (
	// renewBatch is how many paths are asked for at once, renewPause what lies between.
	renewBatch = 256
	renewPause = 100 * time.Millisecond
)

// renewer asks the storehouse again for facts whose signatures are by keys that
// were retired. What is known here needs none, but other agents, who are told of
// it while the storehouse is away, believe keys of their trust list only.
type renewer struct {
	facts  *facts
	calls  *calls
	houses *houses
	log    *slog.Logger
	wake   chan struct{} // holds one while there may be something to do
}

func newRenewer(f *facts, c *calls, h *houses, log *slog.Logger) *renewer {
	return &renewer{facts: f, calls: c, houses: h, log: log, wake: make(chan struct{}, 1)}
}

// look has the facts looked through if the trust list is another than the last time.
func (r *renewer) look() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// run renews until ctx ends.
func (r *renewer) run(ctx context.Context) error {
	for done := uint64(0); ; { // trust list version that all facts were looked at with
		select {
		case <-r.wake:
		case <-ctx.Done():
			return nil
		}
		version := r.facts.trustVersion()
		if version == done {
			continue
		}
		n, err := r.all(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil { // the next connection wakes us again
			r.log.Info("facts signed with retired keys are not renewed yet", "error", err)
			continue
		}
		if done = version; n > 0 {
			r.log.Info("facts signed with retired keys are renewed", "paths", n)
		}
	}
}

// all renews what has to be, a batch at a time, and says how many paths it was.
func (r *renewer) all(ctx context.Context) (n int, err error) {
	for after := ""; ; {
		var stale []string
		err := r.facts.each(after, func(info *flox.PathInfo) bool {
			after = string(info.Path)
			if !r.facts.holds(info) {
				stale = append(stale, info.Path.HashPart())
			}
			return len(stale) < renewBatch && ctx.Err() == nil
		})
		if err != nil || len(stale) == 0 {
			return n, err
		}
		renewed, err := r.some(ctx, stale)
		if n += renewed; err != nil {
			return n, err
		}
		select {
		case <-time.After(renewPause):
		case <-ctx.Done():
			return n, ctx.Err()
		}
	}
}

// some renews the facts of some paths.
func (r *renewer) some(ctx context.Context, hashParts []string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, factsTimeout)
	defer cancel()
	var response *connect.Response[floxv1.PathsResponse]
	err := r.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) (err error) {
		response, err = r.calls.facts(house).Paths(ctx, connect.NewRequest(&floxv1.PathsRequest{HashParts: hashParts}))
		return api.FromConnect(err)
	})
	if err != nil {
		return 0, fmt.Errorf("facts: %w", err)
	}
	var infos []*flox.PathInfo
	for _, m := range response.Msg.GetFound() {
		info, err := api.ToPathInfo(m)
		if err == nil {
			err = r.facts.verify(info)
		}
		if err != nil {
			r.log.Warn("path info refused", "path", m.GetPath(), "error", err)
			continue
		}
		infos = append(infos, info)
	}
	return len(infos), r.facts.put(infos...)
}

// holds reports whether a known info carries a signature of a key that is trusted
// still, by its name: the signature was verified when the info came.
func (f *facts) holds(info *flox.PathInfo) bool {
	f.mu.RLock()
	trust := f.trust
	f.mu.RUnlock()
	if trust == nil {
		return true
	}
	for _, sig := range info.ManifestSignatures {
		name, _, _ := strings.Cut(sig, ":")
		for _, key := range trust.ManifestKeys {
			if strings.HasPrefix(key, name+":") {
				return true
			}
		}
	}
	return false
}
