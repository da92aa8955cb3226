package netns

import (
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox"
)

// rtt is the least of five pings: on a busy machine some take longer.
func rtt(t *testing.T, from, to *Host) time.Duration {
	t.Helper()
	out, err := from.Run(t.Context(), "ping", "-n", "-c", "5", "-i", "0.1", "-W", "2", to.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	// rtt min/avg/max/mdev = 50.1/50.2/50.3/0.1 ms
	_, figures, _ := strings.Cut(out, "mdev = ")
	least, _, _ := strings.Cut(figures, "/")
	ms, err := strconv.ParseFloat(least, 64)
	if err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	return time.Duration(ms * float64(time.Millisecond))
}

func TestDelayIsWhatWasAskedFor(t *testing.T) {
	o := newOffice(t)
	ctx := t.Context()
	if got := rtt(t, o.a, o.b); got > 10*time.Millisecond {
		t.Fatalf("%s without a delay", got)
	}
	for _, want := range []time.Duration{50 * time.Millisecond, 20 * time.Millisecond} {
		if err := o.a.Delay(ctx, want); err != nil {
			t.Fatal(err)
		}
		for name, pair := range map[string][2]*Host{"out": {o.a, o.b}, "in": {o.b, o.a}, "same subnet": {o.a, o.a2}} {
			if got := rtt(t, pair[0], pair[1]); got < want || got > want+10*time.Millisecond {
				t.Errorf("%s: %s, want %s", name, got, want)
			}
		}
	}
	if got := rtt(t, o.a2, o.b); got > 10*time.Millisecond {
		t.Errorf("a neighbour without a delay: %s", got)
	}
	if reaches, err := MulticastReaches(ctx, o.a, o.a2); err != nil || !reaches {
		t.Errorf("multicast through the delay: %v, %v", reaches, err)
	}
	if err := o.a.Mute(ctx); err != nil {
		t.Fatal(err)
	}
	if reaches(t, o.b, o.a) {
		t.Error("muted, and reached")
	}
	if err := o.a.Unmute(ctx); err != nil {
		t.Fatal(err)
	}
	if err := o.a.Delay(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if got := rtt(t, o.b, o.a); got > 10*time.Millisecond {
		t.Errorf("%s after the delay was ended", got)
	}
	if err := o.a.Delay(ctx, -1); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("negative delay: %v", err)
	}
}

// TestDelayLetsBulkThrough: the delay is no bottleneck, and every byte arrives.
func TestDelayLetsBulkThrough(t *testing.T) {
	o := newOffice(t)
	ctx := t.Context()
	if err := o.a.Delay(ctx, 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	const size = 128 << 20
	listener, err := o.a.Listen(ctx, "tcp", net.JoinHostPort(o.a.Addr().String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		_, _ = io.CopyN(conn, zeros{}, size)
		_ = conn.Close()
	}()
	conn, err := o.b.Dial(ctx, "tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	began := time.Now()
	n, err := io.Copy(io.Discard, conn)
	if n != size || err != nil {
		t.Fatalf("received %d bytes: %v", n, err)
	}
	rate := float64(size) * 8 / time.Since(began).Seconds() / 1e6
	t.Logf("%.0f Mb/s", rate)
	if rate < 50 {
		t.Errorf("%.0f Mb/s through a delay of 50 ms, want hundreds", rate)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
