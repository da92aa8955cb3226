package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/cache"
)

const (
	// downloadWindow is how many bytes of chunks a download asks for at once.
	downloadWindow = 8 << 20
	// downloadStall is how long a download goes on without a single block.
	downloadStall = time.Minute
)

// Download implements floxv1connect.AgentHandler. What is here already is not
// fetched again, so a download that was cut off is resumed by asking again.
func (c *control) Download(ctx context.Context, req *connect.Request[floxv1.DownloadRequest], stream *connect.ServerStream[floxv1.DownloadProgress]) error {
	d := &download{a: c.a, began: time.Now(), stream: stream}
	return api.ToConnect(d.run(ctx, req.Msg))
}

// download brings paths here whole, with progress.
type download struct {
	a        *Agent
	began    time.Time
	said     time.Time
	fetched  uint64 // bytes that came from elsewhere
	progress floxv1.DownloadProgress
	stream   *connect.ServerStream[floxv1.DownloadProgress]
}

func (d *download) run(ctx context.Context, req *floxv1.DownloadRequest) error {
	if err := d.substitute(ctx, req.GetPaths()); err != nil {
		return err
	}
	infos, err := d.a.wanted(ctx, req.GetPaths(), req.GetClosure())
	if err != nil {
		return err
	}
	d.progress.TotalPaths = uint32(len(infos)) //nolint:gosec // a closure
	trees, err := d.a.openAll(ctx, infos)
	if err != nil {
		return err
	}
	for i, info := range infos {
		err = trees[i].files(ctx, func(_ uint32, _ string, e flox.Entry) error {
			d.progress.TotalBytes += e.Size
			return nil
		})
		if err != nil {
			return err
		}
		if req.GetKeep() { // first, so that eviction does not take what was just fetched
			if err := d.a.keep(ctx, info); err != nil {
				return err
			}
		}
	}
	for _, t := range trees {
		d.progress.Path = d.a.cfg.StoreDir.Join(t.path)
		if err := d.tree(ctx, t); err != nil {
			return err
		}
		d.progress.DonePaths++
	}
	if err := d.check(ctx, trees); err != nil {
		return err
	}
	d.progress.Finished = true
	return d.say(true)
}

// substitute has the storehouse fetch what is not valid from its upstreams.
func (d *download) substitute(ctx context.Context, given []string) error {
	var missing []flox.StorePath
	for _, g := range given {
		p, _, err := d.a.parse(g)
		if err != nil {
			return err
		}
		if _, err := d.a.lookup(ctx, p); errors.Is(err, flox.ErrNotFound) {
			missing = append(missing, p)
		} else if err != nil {
			return err
		}
	}
	if len(missing) == 0 {
		return nil
	}
	failed, err := d.a.substituted(ctx, missing, func(p *floxv1.SubstituteProgress) error {
		if now := p.GetNow(); now != "" {
			d.progress.Path = d.a.cfg.StoreDir.Join(flox.StorePath(now))
		}
		return d.say(false)
	})
	if err != nil {
		return err
	}
	for _, p := range missing {
		if why := failed[p]; why != "" {
			return fmt.Errorf("%s is not valid in the storehouse, and cannot be substituted: %s: %w", p, why, flox.ErrNotFound)
		}
	}
	return nil
}

// check makes sure that what arrived is still here: a cache without room lets
// bytes pass, which is right for a reader and not for a download.
func (d *download) check(ctx context.Context, trees []*tree) error {
	missing := uint64(0)
	for _, t := range trees {
		err := t.files(ctx, func(_ uint32, _ string, e flox.Entry) error {
			missing += e.Size - d.a.localBytes(t, e)
			return nil
		})
		if err != nil {
			return err
		}
	}
	if missing > 0 {
		return fmt.Errorf("%d of %d bytes arrived and could not be kept; free some space on the disk of %s or allow a larger cache, `floxctl cache usage` says what it may hold: %w",
			missing, d.progress.TotalBytes, d.a.cfg.StateDir, flox.ErrFull)
	}
	return nil
}

// tree fetches what is missing of one path, a window of chunks at a time.
func (d *download) tree(ctx context.Context, t *tree) error {
	var window []piece
	size := int64(0)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	hints := d.a.hints(t.path)
	hints.Background, hints.AnyOrder = true, true
	flush := func() error {
		stall := time.AfterFunc(downloadStall, cancel)
		defer stall.Stop()
		err := d.a.fetcher.fetch(ctx, window, hints, nil, func(one piece, _ []byte) error {
			stall.Reset(downloadStall)
			d.progress.DoneBytes += uint64(one.chunk.Size)
			d.fetched += uint64(one.chunk.Size)
			return d.say(false)
		})
		window, size = window[:0], 0
		if err != nil {
			err = fmt.Errorf("download of %s stopped; what is here stays, ask again to go on: %w", t.path, err)
		}
		return err
	}
	err := t.files(ctx, func(i uint32, _ string, e flox.Entry) error {
		file := cache.File{ID: e.File, Size: int64(e.Size)} //nolint:gosec // sizes fit
		if e.Size <= uint64(t.Params().InlineLimit) || len(d.a.cache.Missing(file, 0, file.Size)) == 0 {
			d.progress.DoneBytes += e.Size
			return nil
		}
		t.remember(ctx, i, &e)
		var failed error
		err := t.Chunks(ctx, i, 0, file.Size, func(off int64, c flox.Chunk) bool {
			if len(d.a.cache.Missing(file, off, int64(c.Size))) == 0 {
				d.progress.DoneBytes += uint64(c.Size)
				return true
			}
			window = append(window, piece{file: file, off: off, chunk: c})
			if size += int64(c.Size); size >= downloadWindow {
				failed = flush()
			}
			return failed == nil
		})
		return errors.Join(failed, err)
	})
	if err != nil {
		return err
	}
	return flush()
}

// say sends the progress, at most ten times a second.
func (d *download) say(now bool) error {
	if !now && time.Since(d.said) < 100*time.Millisecond {
		return nil
	}
	d.said = time.Now()
	d.progress.BytesPerSecond = uint64(float64(d.fetched) / max(time.Since(d.began).Seconds(), 0.001))
	return d.stream.Send(&d.progress)
}

// Add implements floxv1connect.AgentHandler: it relays a NAR to the storehouse,
// which names it by its content.
func (c *control) Add(ctx context.Context, stream *connect.ClientStream[floxv1.AddRequest]) (*connect.Response[floxv1.AddResponse], error) {
	response, err := c.add(ctx, stream)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(response), nil
}

func (c *control) add(ctx context.Context, stream *connect.ClientStream[floxv1.AddRequest]) (*floxv1.AddResponse, error) {
	if !c.a.follower.state().connected {
		return nil, fmt.Errorf("the storehouse is not connected, and adding needs it; `floxctl status` says why: %w", flox.ErrUnreachable)
	}
	house := c.a.houses.first()
	defer c.a.houses.wrote()
	up := c.a.calls.storehouse(house).AddPath(ctx)
	for first := true; stream.Receive(); first = false {
		m := stream.Msg()
		out := &floxv1.AddPathRequest{Nar: m.GetNar()}
		if first {
			out.Name, out.Token = m.GetName(), m.GetToken()
		}
		if err := up.Send(out); err != nil {
			if errors.Is(err, io.EOF) {
				break // the server ended early: its answer says why
			}
			return nil, api.FromConnect(err)
		}
	}
	if err := stream.Err(); err != nil {
		_, _ = up.CloseAndReceive()
		return nil, api.FromConnect(err)
	}
	answer, err := up.CloseAndReceive()
	if err != nil {
		if err = api.FromConnect(err); ctx.Err() == nil && errors.Is(err, flox.ErrUnreachable) {
			c.a.houses.failed(house) // who tries again is sent to another
		}
		return nil, err
	}
	// Known at once: the watch stream tells the same a moment later.
	if info, err := api.ToPathInfo(answer.Msg.GetInfo()); err == nil && c.a.facts.verify(info) == nil {
		if err := c.a.facts.put(info); err != nil {
			return nil, err
		}
	}
	return &floxv1.AddResponse{Info: answer.Msg.GetInfo(), WasValid: answer.Msg.GetWasValid()}, nil
}
