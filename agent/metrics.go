package agent

import (
	"context"
	"net"
	"net/http"
	"time"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/metrics"
)

// metricsAgain is how long after it could not be listened for Prometheus it is tried again.
const metricsAgain = time.Second

// serveMetrics tells Prometheus of this agent until ctx ends. That its address is taken
// ends nothing else: one that was just replaced may still have it.
func (a *Agent) serveMetrics(ctx context.Context) error {
	if a.cfg.Metrics == "" {
		return nil
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", a.cfg.Metrics)
	if err != nil {
		a.log.Warn("nobody gets metrics yet", "at", a.cfg.Metrics, "error", err)
	}
	for err != nil {
		select {
		case <-time.After(metricsAgain):
		case <-ctx.Done():
			return nil
		}
		listener, err = (&net.ListenConfig{}).Listen(ctx, "tcp", a.cfg.Metrics)
	}
	status := func(ctx context.Context) (*floxv1.StatusResponse, error) { return a.status(ctx), nil }
	all := newClients(func(net.Conn) int { return -1 })
	return serveHTTP(ctx, listener, &http.Server{
		Handler: metrics.Agent(status, a.peerMessages, a.waits.spent), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 32 << 10, ConnState: all.changed,
	})
}
