package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
)

// rpcProtocol carries Connect calls between machines.
const rpcProtocol = "/flox/rpc/1"

// maxMessage bounds one message of a call in bytes.
const maxMessage = 4 << 20

const (
	// maxUploads is how many uploads are taken in at once; the others wait. One that
	// waits for its client is in nobody's way.
	maxUploads = 16
	// maxAdding is how many AddPath calls are under way, an eighth of them of one peer.
	maxAdding = 256
)

// serveRPC answers the calls of members until ctx ends.
func (s *Server) serveRPC(ctx context.Context, operators *admin) error {
	l, err := s.swarm.Listen(rpcProtocol)
	if err != nil {
		return err
	}
	calls := newRPC(s, ctx)
	mux := http.NewServeMux()
	// What is asked for most, path infos and traces, is hashes and signatures: packing
	// them took a quarter of the time of an answer and saved little.
	limit := connect.WithHandlerOptions(connect.WithReadMaxBytes(maxMessage), connect.WithCompression("gzip", nil, nil))
	mux.Handle(floxv1connect.NewFactsHandler(calls, limit))
	mux.Handle(floxv1connect.NewStorehouseHandler(calls, limit))
	mux.Handle(floxv1connect.NewMembershipHandler(calls, limit))
	mux.Handle(floxv1connect.NewBuildsHandler(newBuildsRPC(s.builds, ctx), limit))
	mux.Handle(floxv1connect.NewAdminHandler(operators, limit))
	mux.Handle(floxv1connect.NewUpstreamsHandler(calls, limit))
	mux.Handle(floxv1connect.NewServersHandler(&houses{Server: s, slots: make(chan struct{}, maxPlacing)}, limit))
	return serve(ctx, l, &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute})
}

// rpc answers calls. The connections it gets are of proven members.
type rpc struct {
	floxv1connect.UnimplementedStorehouseHandler
	floxv1connect.UnimplementedMembershipHandler
	*Server
	uploads         *shares
	adding          *shares
	takes           *shares
	watchers        chan struct{}
	memberWatchers  chan struct{}
	profileWatchers chan struct{}
	substitutions   *shares
	stop            context.Context //nolint:containedctx // ends streams that would not end by themselves
}

func newRPC(s *Server, stop context.Context) *rpc { //nolint:revive // stop is kept, not used
	return &rpc{
		Server: s, uploads: newShares(maxUploads, maxUploads/2), adding: newShares(maxAdding, maxAdding/8),
		takes: newShares(maxTakes, maxTakes/2), substitutions: newShares(maxSubstitutions, maxSubstitutions/2),
		watchers: make(chan struct{}, maxWatchers), memberWatchers: make(chan struct{}, maxWatchers),
		profileWatchers: make(chan struct{}, maxWatchers), stop: stop,
	}
}

// ready refuses calls before the server knows what it would answer.
func (s *rpc) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return s.Ready(ctx)
}

// Paths is floxv1connect.FactsHandler.
func (s *rpc) Paths(ctx context.Context, req *connect.Request[floxv1.PathsRequest]) (*connect.Response[floxv1.PathsResponse], error) {
	if err := s.ready(ctx); err != nil {
		return nil, api.ToConnect(err)
	}
	out, err := s.answerPaths(ctx, req.Msg)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(out), nil
}

// TrustList is floxv1connect.FactsHandler.
func (s *rpc) TrustList(ctx context.Context, req *connect.Request[floxv1.TrustListRequest]) (*connect.Response[floxv1.TrustListResponse], error) {
	if err := s.ready(ctx); err != nil {
		return nil, api.ToConnect(err)
	}
	lists, err := s.trustLists(ctx, req.Msg.GetHaveVersion())
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(&floxv1.TrustListResponse{Lists: lists}), nil
}

// keysOf reads the keys of a message.
func keysOf(raw [][]byte, most int) ([]flox.CID, error) {
	if len(raw) > most {
		return nil, fmt.Errorf("%d keys, want at most %d: %w", len(raw), most, flox.ErrBadInput)
	}
	keys := make([]flox.CID, len(raw))
	for i, k := range raw {
		if len(k) != flox.CIDSize {
			return nil, fmt.Errorf("key of %d bytes, want %d: %w", len(k), flox.CIDSize, flox.ErrBadInput)
		}
		keys[i] = flox.CID(k)
	}
	return keys, nil
}

// WhoHas is floxv1connect.StorehouseHandler.
func (s *rpc) WhoHas(_ context.Context, req *connect.Request[floxv1.WhoHasRequest]) (*connect.Response[floxv1.WhoHasResponse], error) {
	keys, err := keysOf(req.Msg.GetKeys(), maxWhoHasKeys)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	most := int(min(req.Msg.GetMax(), maxProviders))
	if most == 0 {
		most = defaultProvider
	}
	out := &floxv1.WhoHasResponse{}
	for i, k := range keys {
		for _, p := range s.tracker.find(k, req.Peer().Addr, most-len(out.Providers)) {
			out.Providers = append(out.Providers, &floxv1.Provider{Peer: p.peer, Addrs: p.addrs, Key: uint32(i)})
		}
	}
	return connect.NewResponse(out), nil
}

// Announce is floxv1connect.StorehouseHandler. The caller is who its connection
// proved it to be; nobody announces for another.
func (s *rpc) Announce(_ context.Context, req *connect.Request[floxv1.AnnounceRequest]) (*connect.Response[floxv1.AnnounceResponse], error) {
	keys, err := keysOf(req.Msg.GetKeys(), maxPeerKeys)
	if err == nil {
		err = s.tracker.announce(req.Peer().Addr, keys, req.Msg.GetAddrs())
	}
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(&floxv1.AnnounceResponse{TtlSeconds: uint32(trackerTTL / time.Second)}), nil
}

// Info is floxv1connect.StorehouseHandler.
func (s *rpc) Info(ctx context.Context, _ *connect.Request[floxv1.InfoRequest]) (*connect.Response[floxv1.InfoResponse], error) {
	if err := s.ready(ctx); err != nil {
		return nil, api.ToConnect(err)
	}
	counts, index, err := s.counts(ctx)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	stat := s.packs.Stat()
	return connect.NewResponse(&floxv1.InfoResponse{
		Name: s.cfg.Name, Version: s.cfg.Version, StoreDir: string(s.cfg.StoreDir), HttpUrl: s.Invite().HTTPURL,
		Index: index, Paths: counts.paths, Blocks: stat.Blocks, BlockBytes: stat.PlainBytes, StoredBytes: stat.DiskBytes,
	}), nil
}

// AddPath is floxv1connect.StorehouseHandler.
func (s *rpc) AddPath(ctx context.Context, stream *connect.ClientStream[floxv1.AddPathRequest]) (*connect.Response[floxv1.AddPathResponse], error) {
	out, err := s.addPath(ctx, stream)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(out), nil
}

func (s *rpc) addPath(ctx context.Context, stream *connect.ClientStream[floxv1.AddPathRequest]) (*floxv1.AddPathResponse, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	if !stream.Receive() {
		return nil, errors.Join(fmt.Errorf("add path: no first message: %w", flox.ErrBadInput), stream.Err())
	}
	first := stream.Msg()
	nar := &narStream{stream: stream, left: first.GetNar()}
	defer nar.drain()
	publisher, err := s.CheckToken(first.GetToken())
	if err != nil {
		return nil, err
	}
	who := stream.Peer().Addr
	done, err := s.adding.take(ctx, who)
	if err != nil {
		return nil, err
	}
	defer done()
	nar.place = func() (func(), error) { return s.uploads.take(ctx, who) }
	if err := nar.begin(); err != nil {
		return nil, err
	}
	defer nar.end()
	var valid *flox.PathInfo
	var wasValid bool
	if first.GetInfo() == nil {
		valid, wasValid, err = s.PublishSource(ctx, first.GetName(), nar, publisher)
	} else {
		var info *flox.PathInfo
		if info, err = uploadInfo(first.GetInfo()); err == nil {
			valid, wasValid, err = s.Publish(ctx, info, nar, publisher)
		}
	}
	if err != nil {
		return nil, err
	}
	return &floxv1.AddPathResponse{Info: api.FromPathInfo(valid), WasValid: wasValid}, nil
}

// uploadInfo reads the info of an upload, which names no manifest: that is for
// us to make.
func uploadInfo(m *floxv1.PathInfo) (*flox.PathInfo, error) {
	if len(m.GetManifest()) == 0 {
		m.Manifest = make([]byte, flox.CIDSize)
	}
	info, err := api.ToPathInfo(m)
	if err != nil {
		return nil, err
	}
	info.Manifest, info.ManifestSignatures = flox.CID{}, nil
	return info, nil
}

// narStream is the NAR in the messages of an upload.
type narStream struct {
	stream *connect.ClientStream[floxv1.AddPathRequest]
	left   []byte
	place  func() (leave func(), err error) // among those whose bytes are worked on; nil = none is needed
	leave  func()                           // gives the place back; nil = it has none
}

// begin waits for a place.
func (n *narStream) begin() (err error) {
	if n.place != nil {
		n.leave, err = n.place()
	}
	return err
}

// end gives the place back.
func (n *narStream) end() {
	if n.leave != nil {
		n.leave()
		n.leave = nil
	}
}

// Read is io.Reader.
func (n *narStream) Read(p []byte) (int, error) {
	for len(n.left) == 0 {
		n.end() // however long the client is silent, it is in nobody's way
		if !n.stream.Receive() {
			if err := n.stream.Err(); err != nil {
				return 0, err
			}
			return 0, io.EOF
		}
		if err := n.begin(); err != nil {
			return 0, err
		}
		n.left = n.stream.Msg().GetNar()
	}
	k := copy(p, n.left)
	n.left = n.left[k:]
	return k, nil
}

// maxDrained is how much of an upload that is refused or not needed is read
// all the same.
const maxDrained = 4 << 30

// drain reads what is left: over HTTP/1.1 a caller that is still sending when
// the connection closes never sees the answer.
func (n *narStream) drain() {
	n.place = nil
	if n.stream.Err() == nil {
		_, _ = io.CopyN(io.Discard, n, maxDrained)
	}
}
