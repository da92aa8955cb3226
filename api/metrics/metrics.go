// Package metrics shows what agents and servers tell of themselves to Prometheus,
// in its text format: what floxctl status and floxctl storehouse status say, as
// numbers with base units (seconds, bytes; names end in _total where they only grow).
package metrics

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	// Path is what is asked for.
	Path = "/metrics"
	// patience bounds one answer, maxAnswers how many are made at once.
	patience   = 10 * time.Second
	maxAnswers = 4
)

// metric is one number of a message, or some of them told apart by a label.
type metric[M any] struct {
	name, help string
	grows      bool // only ever, until the process ends
	label      string
	one        func(M) float64
	many       func(M, func(label string, v float64)) // in place of one, if there is a label
}

// source collects the metrics of a message that is asked for each time.
type source[M any] struct {
	prefix string
	ask    func(context.Context) (M, error)
	all    []metric[M]
}

// Describe implements prometheus.Collector: which labels there are is not known before.
func (s *source[M]) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (s *source[M]) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	m, err := s.ask(ctx)
	if err != nil {
		out <- prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(err), err)
		return
	}
	for _, one := range s.all {
		kind := prometheus.GaugeValue
		if one.grows {
			kind = prometheus.CounterValue
		}
		name := prometheus.BuildFQName("flox", s.prefix, one.name)
		if one.label == "" {
			out <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, one.help, nil, nil), kind, one.one(m))
			continue
		}
		desc := prometheus.NewDesc(name, one.help, []string{one.label}, nil)
		one.many(m, func(label string, v float64) { out <- prometheus.MustNewConstMetric(desc, kind, v, label) })
	}
}

// handler serves collectors, and what Go and the kernel tell of the process. An
// answer that cannot be made whole is an error.
func handler(all ...prometheus.Collector) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	registry.MustRegister(all...)
	mux := http.NewServeMux()
	mux.Handle("GET "+Path, promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorHandling: promhttp.HTTPErrorOnError, MaxRequestsInFlight: maxAnswers, Timeout: patience,
	}))
	return mux
}

// Waits counts how long something was waited for, by what it was.
type Waits struct{ spent *prometheus.HistogramVec }

// NewWaits gives one without any waits.
func NewWaits() *Waits {
	return &Waits{prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: "flox", Subsystem: "agent", Name: "wait_seconds",
		Help:    "How long requests waited that could not be answered from this machine, by what they waited for.",
		Buckets: []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60},
	}, []string{"for"})}
}

// Waited counts one wait. A nil one counts nothing.
func (w *Waits) Waited(what string, took time.Duration) {
	if w != nil {
		w.spent.WithLabelValues(what).Observe(took.Seconds())
	}
}

// truth is 1 or 0.
func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
