package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/staging"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/p2p"
)

// Bounds of an upload of staged paths; the storehouse's are the same or wider.
const (
	uploadOffer = 8192    // paths of one offer
	uploadIDs   = 32768   // blocks of one offer
	uploadPart  = 2 << 20 // bytes of blocks in a part, and one block more
	uploadPaths = 512     // paths of a part, which become valid together
	uploadTries = 3       // an upload whose blocks were collected meanwhile begins again
)

// Uploaded says what PublishStaged did.
type Uploaded struct {
	Paths  int    // staged paths the storehouse lacked
	Blocks int    // blocks sent
	Bytes  uint64 // of the messages that carried them
}

// PublishStaged makes staged paths and all staged paths they need valid in the
// storehouse, which checks each content address itself. What it has is not sent:
// a first round trip asks for that, a second one brings the rest. Paths that are
// not staged are skipped. Errors: ErrUntrusted (a path without a content address:
// only this machine believes it), ErrUnreachable, ErrFull, ErrBadInput.
func (a *Agent) PublishStaged(ctx context.Context, paths ...flox.StorePath) (done Uploaded, err error) {
	closure, err := a.stagedClosure(ctx, paths)
	if err != nil {
		return done, err
	}
	for len(closure) > 0 {
		n := min(len(closure), uploadOffer)
		if err := a.publishBatch(ctx, closure[:n], &done); err != nil {
			return done, err
		}
		closure = closure[n:]
	}
	return done, nil
}

// believed reports whether others have reason to believe what a staged path is: its
// address, or the signature of a key that the storehouse goes by.
func (a *Agent) believed(ctx context.Context, p *staging.Path) bool {
	return p.Addressed() || a.facts.signed(p.Info) || a.vouchedUpstream(ctx, p.Info)
}

// shareStaged makes those of staged paths, with all they need, valid in the storehouse
// that others have reason to believe. The rest stays here, with what refers to it.
// Errors: as PublishStaged.
func (a *Agent) shareStaged(ctx context.Context, paths ...flox.StorePath) error {
	closure, err := a.stagedClosure(ctx, paths)
	if err != nil {
		return err
	}
	going := believable(closure, func(p *staging.Path) bool { return a.believed(ctx, p) })
	if len(going) == 0 {
		return nil
	}
	if l := a.follower.state(); !l.connected {
		return fmt.Errorf("the storehouse is not connected: %w", flox.ErrUnreachable)
	}
	_, err = a.PublishStaged(ctx, going...)
	if errors.Is(err, flox.ErrUntrusted) { // a key that was taken away, or a storehouse that takes nothing signed yet
		a.log.Debug("the storehouse does not believe what is signed", "error", err)
		_, err = a.PublishStaged(ctx, believable(closure, (*staging.Path).Addressed)...)
	}
	return err
}

// believable gives what the storehouse does not have of a closure, references first,
// without what is not believed and what refers to that.
func believable(closure []*staging.Path, believed func(*staging.Path) bool) (going []flox.StorePath) {
	stays := make(map[flox.StorePath]bool)
	for _, p := range closure {
		switch {
		case p.Uploaded:
		case !believed(p), slices.ContainsFunc(p.Info.References, func(ref flox.StorePath) bool { return stays[ref] }):
			stays[p.Info.Path] = true
		default:
			going = append(going, p.Info.Path)
		}
	}
	return going
}

// shareLeft shares what was to be and is not yet, because the storehouse was away or
// who added it left too early.
func (a *Agent) shareLeft(ctx context.Context) error {
	var left []flox.StorePath
	err := a.staged.List(ctx, "", func(p *staging.Path) bool {
		if p.Shared && !p.Uploaded {
			left = append(left, p.Info.Path)
		}
		return true
	})
	if err != nil || len(left) == 0 {
		return err
	}
	return a.shareStaged(ctx, left...)
}

// stagedClosure lists staged paths and the staged paths they refer to, references
// first.
func (a *Agent) stagedClosure(ctx context.Context, paths []flox.StorePath) (order []*staging.Path, err error) {
	type visit struct {
		p    *staging.Path
		next int // reference to look at
	}
	seen := make(map[flox.StorePath]bool)
	var stack []*visit
	enter := func(path flox.StorePath) error {
		if seen[path] {
			return nil
		}
		seen[path] = true
		p, err := a.staged.Path(path)
		if errors.Is(err, flox.ErrNotFound) {
			return nil // valid elsewhere, or it could not have been added
		}
		if err == nil {
			stack = append(stack, &visit{p: p})
		}
		return err
	}
	for _, path := range paths {
		if err := enter(path); err != nil {
			return nil, err
		}
		for len(stack) > 0 {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			top := stack[len(stack)-1]
			if top.next < len(top.p.Info.References) {
				top.next++
				if err := enter(top.p.Info.References[top.next-1]); err != nil {
					return nil, err
				}
				continue
			}
			stack = stack[:len(stack)-1]
			order = append(order, top.p)
		}
	}
	return order, nil
}

// publishBatch uploads what the storehouse lacks of some paths.
func (a *Agent) publishBatch(ctx context.Context, batch []*staging.Path, done *Uploaded) error {
	for try := 1; ; try++ {
		err := a.publishAnywhere(ctx, batch, done)
		// A block it had may have been collected before the path needed it.
		if !errors.Is(err, flox.ErrNotFound) || try == uploadTries {
			return err
		}
	}
}

// publishAnywhere uploads to the first server that can take it. Nobody knows how
// long an upload takes: it goes on as long as ctx does.
func (a *Agent) publishAnywhere(ctx context.Context, batch []*staging.Path, done *Uploaded) error {
	failed := []error{}
	for _, house := range a.houses.order() {
		err := a.publishTo(ctx, house, batch, done)
		if ctx.Err() != nil || !away(err) {
			if err == nil {
				a.houses.answered(house)
			}
			return err
		}
		a.houses.failed(house)
		failed = append(failed, err)
	}
	if len(failed) == 0 {
		return fmt.Errorf("no server of the storehouse is known: %w", flox.ErrUnreachable)
	}
	return because(failed...)
}

func (a *Agent) publishTo(ctx context.Context, house p2p.PeerID, batch []*staging.Path, done *Uploaded) error {
	lacking, blocks, err := a.offer(ctx, house, batch)
	if err != nil {
		return err
	}
	if len(lacking) > 0 {
		if err := a.upload(ctx, house, lacking, blocks, done); err != nil {
			return err
		}
	}
	names := make([]flox.StorePath, len(batch))
	for i, p := range batch {
		names[i] = p.Info.Path
	}
	return a.staged.Uploaded(names...)
}

// offer asks one server which paths and which of their blocks it lacks. The blocks
// of paths that were uploaded before are asked for only if those are lacking.
func (a *Agent) offer(ctx context.Context, house p2p.PeerID, batch []*staging.Path) (lacking []*staging.Path, blocks map[flox.StorePath][]flox.CID, err error) {
	request := &floxv1.OfferPathsRequest{}
	for _, p := range batch {
		hash, err := nix.DecodeBase32(p.Info.Path.HashPart())
		if err != nil {
			return nil, nil, err
		}
		request.Paths = append(request.Paths, hash)
	}
	blocks = make(map[flox.StorePath][]flox.CID)
	var asked []flox.CID
	for _, p := range batch {
		if p.Uploaded || len(asked) >= uploadIDs {
			continue
		}
		ids, err := a.stagedBlocks(ctx, p)
		if err != nil {
			return nil, nil, err
		}
		if len(asked)+len(ids) <= uploadIDs {
			blocks[p.Info.Path], asked = ids, append(asked, ids...)
		}
	}
	missing, answer, err := a.askLacking(ctx, house, request, asked)
	if err != nil {
		return nil, nil, err
	}
	for _, i := range answer.GetLackingPaths() {
		if int(i) < len(batch) {
			lacking = append(lacking, batch[i])
		}
	}
	for _, p := range lacking {
		ids, ok := blocks[p.Info.Path]
		if !ok { // they did not fit, or it was uploaded once
			if ids, err = a.stagedBlocks(ctx, p); err != nil {
				return nil, nil, err
			}
			for part := range slices.Chunk(ids, uploadIDs) {
				more, _, err := a.askLacking(ctx, house, &floxv1.OfferPathsRequest{}, part)
				if err != nil {
					return nil, nil, err
				}
				for id := range more {
					missing[id] = true
				}
			}
		}
		blocks[p.Info.Path] = slices.DeleteFunc(ids, func(id flox.CID) bool { return !missing[id] })
	}
	return lacking, blocks, nil
}

// askLacking puts one offer to one server and gives the blocks it lacks.
func (a *Agent) askLacking(ctx context.Context, house p2p.PeerID, request *floxv1.OfferPathsRequest, blocks []flox.CID) (map[flox.CID]bool, *floxv1.OfferPathsResponse, error) {
	for _, id := range blocks {
		request.Blocks = append(request.Blocks, id[:])
	}
	trip := a.traffic.trips.next()
	response, err := a.calls.storehouse(house).OfferPaths(ctx, connect.NewRequest(request))
	if err != nil {
		return nil, nil, api.FromConnect(err)
	}
	a.traffic.trips.waited(trip)
	missing := make(map[flox.CID]bool)
	for _, i := range response.Msg.GetLackingBlocks() {
		if int(i) < len(blocks) {
			missing[blocks[i]] = true
		}
	}
	return missing, response.Msg, nil
}

// stagedBlocks lists the blocks of a staged path, each once.
func (a *Agent) stagedBlocks(ctx context.Context, p *staging.Path) ([]flox.CID, error) {
	m, err := a.pages.Open(ctx, p.Info.Manifest, a.staged)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Info.Path, err)
	}
	seen := make(map[flox.CID]bool)
	var ids []flox.CID
	err = m.Blocks(ctx, func(id flox.CID, _ uint32) bool {
		if !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
		return true
	})
	return ids, err
}

// uploading is one stream to a server.
type uploading struct {
	a      *Agent
	stream *connect.ClientStreamForClient[floxv1.TakePathsRequest, floxv1.TakePathsResponse]
	enc    *zstd.Encoder
	part   *floxv1.TakePart
	size   int
	done   *Uploaded
}

// upload sends paths and the blocks that are lacking of them.
func (a *Agent) upload(ctx context.Context, house p2p.PeerID, paths []*staging.Path, blocks map[flox.StorePath][]flox.CID, done *Uploaded) error {
	for _, p := range paths {
		if !a.believed(ctx, p) {
			return fmt.Errorf("%s has no content address: it was added on this machine, and nobody else has reason to believe it; build it, or publish it with an upload token: %w", p.Info.Path, flox.ErrUntrusted)
		}
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	defer func() { _ = enc.Close() }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // a stream that is not read to its end
	u := &uploading{a: a, stream: a.calls.storehouse(house).TakePaths(ctx), enc: enc, part: &floxv1.TakePart{}, done: done}
	err = u.send(ctx, paths, blocks)
	if err != nil && !errors.Is(err, errStreamEnded) {
		return err
	}
	response, err := u.stream.CloseAndReceive() // also says why a send failed
	a.houses.wrote()
	if err != nil {
		return api.FromConnect(err)
	}
	if got := int(response.Msg.GetPaths()); got != len(paths) {
		return fmt.Errorf("the storehouse took %d of %d paths: %w", got, len(paths), flox.ErrUnreachable)
	}
	done.Paths += len(paths)
	return nil
}

// errStreamEnded says that the other side does not listen any more.
var errStreamEnded = errors.New("stream ended")

func (u *uploading) send(ctx context.Context, paths []*staging.Path, blocks map[flox.StorePath][]flox.CID) error {
	sent := make(map[flox.CID]bool)
	for i, p := range paths {
		for _, id := range blocks[p.Info.Path] {
			if sent[id] {
				continue
			}
			sent[id] = true
			b, err := u.a.staged.Get(ctx, id)
			if err != nil {
				return fmt.Errorf("%s: %w", p.Info.Path, err)
			}
			u.done.Blocks++
			if err := u.block(b); err != nil {
				return err
			}
		}
		m := api.FromPathInfo(p.Info)
		if p.Addressed() {
			m.Signatures = nil // nobody needs one
		}
		u.part.Paths = append(u.part.Paths, m)
		u.size += proto.Size(m)
		if len(u.part.GetPaths()) == uploadPaths || u.size > uploadPart || i == len(paths)-1 {
			if err := u.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// block adds a block to the part. A part's paths are behind its blocks, so what
// was added of paths goes first with the blocks it needs.
func (u *uploading) block(b []byte) error {
	u.part.Blocks = append(u.part.Blocks, b)
	if u.size += len(b); u.size <= uploadPart {
		return nil
	}
	return u.flush()
}

func (u *uploading) flush() error {
	b, err := proto.Marshal(u.part)
	if err != nil {
		return err
	}
	u.part, u.size = &floxv1.TakePart{}, 0
	part := u.enc.EncodeAll(b, nil)
	u.done.Bytes += uint64(len(part))
	if u.stream.Send(&floxv1.TakePathsRequest{Part: part}) != nil {
		return errStreamEnded
	}
	return nil
}

// Share implements floxv1connect.AgentHandler.
func (c *control) Share(ctx context.Context, req *connect.Request[floxv1.ShareRequest]) (*connect.Response[floxv1.ShareResponse], error) {
	var paths []flox.StorePath
	for _, text := range req.Msg.GetPaths() {
		p, err := flox.ParseStorePath(text)
		if err != nil {
			return nil, api.ToConnect(err)
		}
		paths = append(paths, p)
	}
	done, err := c.a.PublishStaged(ctx, paths...)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(&floxv1.ShareResponse{Paths: uint32(done.Paths), Bytes: done.Bytes}), nil //nolint:gosec // few, not negative
}
