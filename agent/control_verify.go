package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/cache"
)

// Verify implements floxv1connect.AgentHandler.
func (c *control) Verify(ctx context.Context, req *connect.Request[floxv1.VerifyRequest], stream *connect.ServerStream[floxv1.VerifyProgress]) error {
	infos, err := c.verified(ctx, req.Msg.GetPaths())
	if err != nil {
		return api.ToConnect(err)
	}
	progress := &verification{stream: stream}
	for _, info := range infos {
		t, err := c.a.open(ctx, info)
		if err != nil {
			if len(req.Msg.GetPaths()) == 0 && errors.Is(err, flox.ErrUnreachable) {
				continue // of a path only its facts are here: nothing to verify
			}
			return api.ToConnect(err)
		}
		err = t.files(ctx, func(i uint32, name string, e flox.Entry) error {
			return c.verifyFile(ctx, t, i, name, e, progress)
		})
		if err != nil {
			return api.ToConnect(err)
		}
	}
	progress.said.Finished = true
	return progress.say(true)
}

// maxBad bounds the places named by one check; more are counted with the last.
const maxBad = 1000

// verification is the progress of one Verify.
type verification struct {
	said   floxv1.VerifyProgress
	at     time.Time
	stream *connect.ServerStream[floxv1.VerifyProgress] // nil = nobody listens
}

func (v *verification) bad(what string) {
	if len(v.said.Bad) == maxBad {
		what = "more than that; check again when these are fetched"
	}
	if len(v.said.Bad) <= maxBad {
		v.said.Bad = append(v.said.Bad, what)
	}
}

// say sends the progress, at most ten times a second.
func (v *verification) say(now bool) error {
	if v.stream == nil || !now && time.Since(v.at) < 100*time.Millisecond {
		return nil
	}
	v.at = time.Now()
	return v.stream.Send(&v.said)
}

// verified gives the infos of the paths asked for, or of all that are known.
func (c *control) verified(ctx context.Context, given []string) ([]*flox.PathInfo, error) {
	var infos []*flox.PathInfo
	for _, g := range given {
		info, _, err := c.a.info(ctx, g)
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	if len(given) > 0 {
		return infos, nil
	}
	err := c.a.facts.each("", func(info *flox.PathInfo) bool {
		if c.a.cache.Has([]flox.CID{info.Manifest})[0] {
			infos = append(infos, info)
		}
		return true
	})
	return infos, err
}

// verifyFile hashes what is here of one file; what is wrong is dropped and said.
func (c *control) verifyFile(ctx context.Context, t *tree, i uint32, name string, e flox.Entry, progress *verification) error {
	if e.Size <= uint64(t.Params().InlineLimit) || c.a.localBytes(t, e) == 0 {
		return nil // in the manifest, which is checked whenever it is read; or not here
	}
	file := cache.File{ID: e.File, Size: int64(e.Size)} //nolint:gosec // sizes fit
	var failed error
	err := t.Chunks(ctx, i, 0, file.Size, func(off int64, chunk flox.Chunk) bool {
		if c.a.cache.State(file, off, int64(chunk.Size)) == cache.Miss {
			return true
		}
		ok, err := c.a.cache.Verify(ctx, file, off, chunk)
		if err != nil {
			failed = err
			return false
		}
		progress.said.DoneBytes += uint64(chunk.Size)
		if !ok {
			progress.bad(fmt.Sprintf("%s/%s: bytes %d to %d were wrong and are dropped; they are fetched again when read",
				c.a.cfg.StoreDir.Join(t.path), name, off, off+int64(chunk.Size)))
		}
		failed = progress.say(false)
		return failed == nil && ctx.Err() == nil
	})
	return errors.Join(failed, err, ctx.Err())
}
