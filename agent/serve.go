package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/p2p"
)

// Bounds of one question from a peer.
const (
	maxAskedPaths   = 1024
	maxClosurePaths = 4096
)

// factsServer tells peers the signed facts known here. They verify them
// themselves; nothing said here can make them believe a path.
type factsServer struct {
	floxv1connect.UnimplementedFactsHandler
	facts *facts
}

// Paths implements floxv1connect.FactsHandler.
func (s *factsServer) Paths(_ context.Context, req *connect.Request[floxv1.PathsRequest]) (*connect.Response[floxv1.PathsResponse], error) {
	asked := req.Msg.GetHashParts()
	if len(asked) > maxAskedPaths {
		return nil, api.ToConnect(fmt.Errorf("%d hash parts asked, at most %d are answered: %w", len(asked), maxAskedPaths, flox.ErrBadInput))
	}
	response := &floxv1.PathsResponse{}
	seen := make(map[string]bool)
	queue := append([]string(nil), asked...)
	for i := 0; i < len(queue); i++ {
		hash := queue[i]
		if seen[hash] || !flox.ValidHashPart(hash) {
			continue
		}
		seen[hash] = true
		if len(response.Found) >= maxClosurePaths {
			response.Truncated = true
			break
		}
		info, ok := s.facts.get(hash)
		if !ok {
			continue
		}
		response.Found = append(response.Found, api.FromPathInfo(info))
		if req.Msg.GetClosure() {
			for _, ref := range info.References {
				queue = append(queue, ref.HashPart())
			}
		}
	}
	return connect.NewResponse(response), nil
}

// serveFacts answers peers until ctx ends.
func (a *Agent) serveFacts(ctx context.Context) error {
	listener, err := a.host.Listen(rpcProtocol)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle(floxv1connect.NewFactsHandler(&factsServer{facts: a.facts}, connect.WithReadMaxBytes(1<<20)))
	return serveHTTP(ctx, listener, &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute})
}

// serveHTTP serves until ctx ends and gives requests under way a moment to end.
func serveHTTP(ctx context.Context, listener net.Listener, server *http.Server) error {
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if server.Shutdown(grace) != nil {
			_ = server.Close()
		}
	})
	defer stop()
	err := server.Serve(listener)
	if errors.Is(err, http.ErrServerClosed) || ctx.Err() != nil {
		return nil
	}
	return err
}

// tellTracker registers keys with the storehouse's tracker, which finds faster
// than the DHT while the storehouse is there.
func (a *Agent) tellTracker(ctx context.Context, keys []flox.CID) error {
	if !a.follower.state().connected {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, factsTimeout)
	defer cancel()
	request := &floxv1.AnnounceRequest{Addrs: a.host.Addrs()}
	for _, k := range append(keys, p2p.SiteKey(a.cfg.Site)) {
		request.Keys = append(request.Keys, k[:])
	}
	_, err := a.calls.storehouse(a.follower.house).Announce(ctx, connect.NewRequest(request))
	return api.FromConnect(err)
}
