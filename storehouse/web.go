package storehouse

import (
	"context"
	"net"
	"net/http"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/metrics"
)

// openWeb listens for those who read over HTTP.
func (s *Server) openWeb() error {
	for _, door := range []struct {
		key, at string
		to      *net.Listener
	}{{"http_listen", s.cfg.HTTPListen, &s.web}, {"metrics", s.cfg.Metrics, &s.metrics}} {
		if door.at == noHTTP || door.at == "" {
			continue
		}
		l, err := net.Listen("tcp", door.at) //nolint:noctx // binds and returns
		if err != nil {
			return listenError(door.key, door.at, err)
		}
		*door.to = l
		s.closers = append(s.closers, func() error { return ignoreClosed(l.Close()) })
	}
	return nil
}

// serveWeb serves the binary cache until ctx ends.
func (s *Server) serveWeb(ctx context.Context) error {
	if s.web == nil {
		return nil
	}
	handler := newHTTP(s, s.cfg, s.readable(s.packs.Checksummed()), s.stored)
	return serve(ctx, s.web, &http.Server{
		Handler: handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: maxWebHeader, ConnState: atMost(maxWebClients, maxWebClients/2),
	})
}

// serveMetrics tells Prometheus of this server until ctx ends.
func (s *Server) serveMetrics(ctx context.Context) error {
	if s.metrics == nil {
		return nil
	}
	state := func(ctx context.Context) (*floxv1.StateResponse, error) {
		st, err := s.ownState(ctx)
		if err == nil {
			st.State.Leader = s.node.Status().State == "leader"
		}
		return st, err
	}
	return serve(ctx, s.metrics, &http.Server{
		Handler: metrics.Server(state), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: maxWebHeader, ConnState: atMost(maxMetricsClients, maxMetricsClients),
	})
}

// maxMetricsClients bounds the connections of those who get metrics.
const maxMetricsClients = 16

// What strangers at the binary cache may take: connections, each a descriptor
// and a goroutine, of which one address has half at most, and bytes of a request's header.
const (
	maxWebClients = 4096
	maxWebHeader  = 32 << 10
)
