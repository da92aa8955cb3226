package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

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
				if !seen[ref.HashPart()] {
					queue = append(queue, ref.HashPart())
				}
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

// serveHTTP serves until ctx ends, which also ends the requests under way; it
// returns when their handlers have.
func serveHTTP(ctx context.Context, listener net.Listener, server *http.Server) error {
	under := &handlers{inner: server.Handler}
	server.Handler = under
	server.BaseContext = func(net.Listener) context.Context { return ctx }
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	var err error
	ended := false
	select {
	case err = <-served:
		ended = true
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if server.Shutdown(grace) != nil {
		_ = server.Close()
	}
	if !ended {
		err = <-served
	}
	under.wait()
	if errors.Is(err, http.ErrServerClosed) || ctx.Err() != nil {
		return nil
	}
	return err
}

// handlers counts the requests under way. http.Server's Close does not wait for
// them, and what they use is closed next.
type handlers struct {
	inner http.Handler
	mu    sync.Mutex
	over  bool
	work  sync.WaitGroup
}

// ServeHTTP implements http.Handler.
func (h *handlers) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	if h.over {
		h.mu.Unlock()
		return
	}
	h.work.Add(1)
	h.mu.Unlock()
	defer h.work.Done()
	h.inner.ServeHTTP(w, r)
}

// wait lets no request in any more and waits for the others.
func (h *handlers) wait() {
	h.mu.Lock()
	h.over = true
	h.mu.Unlock()
	h.work.Wait()
}

// tellTracker registers keys with the storehouse's trackers, which find faster
// than the DHT while the storehouse is there. Each server has its own, and is
// asked by some of the machines.
func (a *Agent) tellTracker(ctx context.Context, keys []flox.CID) error {
	ctx, cancel := context.WithTimeout(ctx, factsTimeout)
	defer cancel()
	request := &floxv1.AnnounceRequest{Addrs: a.host.Addrs()}
	for _, k := range append(keys, p2p.SiteKey(a.cfg.Site)) {
		request.Keys = append(request.Keys, k[:])
	}
	var told errgroup.Group
	told.SetLimit(maxTrackers)
	for _, house := range a.houses.order() {
		told.Go(func() error {
			_, err := a.calls.storehouse(house).Announce(ctx, connect.NewRequest(request))
			return api.FromConnect(err)
		})
	}
	return told.Wait()
}

// maxTrackers is how many servers are told at once.
const maxTrackers = 5

// whoHas asks the storehouse's tracker who announced key lately. It is quick or
// nothing: the DHT is asked at the same time.
func (a *Agent) whoHas(ctx context.Context, key flox.CID, most int) ([]p2p.PeerAddr, error) {
	if !a.follower.state().connected {
		return nil, fmt.Errorf("tracker: the storehouse is not connected: %w", flox.ErrUnreachable)
	}
	ctx, cancel := context.WithTimeout(ctx, trackerTimeout)
	defer cancel()
	request := &floxv1.WhoHasRequest{Keys: [][]byte{key[:]}, Max: uint32(most)} //nolint:gosec // a few
	var response *connect.Response[floxv1.WhoHasResponse]
	err := a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) (err error) {
		response, err = a.calls.storehouse(house).WhoHas(ctx, connect.NewRequest(request))
		return err
	})
	if err != nil {
		return nil, err
	}
	var out []p2p.PeerAddr
	for _, p := range response.Msg.GetProviders() {
		out = append(out, p2p.PeerAddr{ID: p2p.PeerID(p.GetPeer()), Addrs: p.GetAddrs()})
	}
	return out, nil
}
