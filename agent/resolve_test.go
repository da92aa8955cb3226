package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/p2p"
)

// town is peers of the tests, reached without a network.
type town struct {
	t         *testing.T
	key       nix.SecretKey
	houses    map[p2p.PeerID]floxv1connect.FactsHandler // nil: takes connections and says nothing
	connected []p2p.PeerID
	announced []p2p.PeerID
	ctx       context.Context
	servers   sync.WaitGroup

	mu    sync.Mutex
	lines map[p2p.PeerID]*pipeListener
	asked map[p2p.PeerID]int
}

// pipeListener hands out the other ends of pipes.
type pipeListener struct {
	conns chan net.Conn
	ctx   context.Context
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

func newTown(t *testing.T) *town {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w := &town{
		t: t, key: testKey(t, "k-1"), ctx: ctx, houses: make(map[p2p.PeerID]floxv1connect.FactsHandler),
		lines: make(map[p2p.PeerID]*pipeListener), asked: make(map[p2p.PeerID]int),
	}
	t.Cleanup(func() { cancel(); w.servers.Wait() })
	return w
}

func (w *town) Peers() []p2p.PeerStat {
	var out []p2p.PeerStat
	for _, id := range w.connected {
		out = append(out, p2p.PeerStat{ID: id})
	}
	return out
}

func (w *town) FindProviders(context.Context, flox.CID, int) ([]p2p.PeerAddr, error) {
	var out []p2p.PeerAddr
	for _, id := range w.announced {
		out = append(out, p2p.PeerAddr{ID: id})
	}
	return out, nil
}

func (w *town) AddPeer(p2p.PeerAddr) error { return nil }

func (w *town) dial(ctx context.Context, peer p2p.PeerID, _ string) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked[peer]++
	handler, ok := w.houses[peer]
	if !ok {
		return nil, errors.New("connection refused")
	}
	ours, theirs := net.Pipe()
	if handler == nil {
		context.AfterFunc(w.ctx, func() { _ = theirs.Close() })
		return ours, nil
	}
	line := w.lines[peer]
	if line == nil {
		line = &pipeListener{conns: make(chan net.Conn), ctx: w.ctx}
		w.lines[peer] = line
		mux := http.NewServeMux()
		mux.Handle(floxv1connect.NewFactsHandler(handler))
		w.servers.Go(func() {
			_ = serveHTTP(w.ctx, line, &http.Server{Handler: mux, ReadHeaderTimeout: time.Second})
		})
	}
	select {
	case line.conns <- theirs:
		return ours, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// knowing is a machine that answers with one info.
type knowing struct {
	floxv1connect.UnimplementedFactsHandler
	info    *flox.PathInfo
	invalid bool
	fails   error
}

func (k knowing) Paths(_ context.Context, req *connect.Request[floxv1.PathsRequest]) (*connect.Response[floxv1.PathsResponse], error) {
	if k.fails != nil {
		return nil, k.fails
	}
	out := &floxv1.PathsResponse{Index: 5}
	if k.info != nil {
		out.Found = append(out.Found, api.FromPathInfo(k.info))
	}
	if k.invalid {
		out.Invalid = req.Msg.GetHashParts()
	}
	return connect.NewResponse(out), nil
}

// fact is a signed info of the i-th store path.
func (w *town) fact(i int) *flox.PathInfo {
	info := &flox.PathInfo{
		Path: storePath(w.t, i), NarSize: 100, NarHash: [32]byte{byte(i)}, Manifest: flox.CID{1, byte(i)},
	}
	sign(info, w.key)
	return info
}

// resolver asks this town; the storehouse is "house".
func (w *town) resolver() *resolver {
	w.t.Helper()
	first, b := trustList(w.t, nil, w.key, w.key)
	anchor, err := first.Fingerprint()
	if err != nil {
		w.t.Fatal(err)
	}
	f, err := openFacts(filepath.Join(w.t.TempDir(), "facts"), testStore, anchor, slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	if err := f.accept([][]byte{b}); err != nil {
		w.t.Fatal(err)
	}
	life, cancel := context.WithCancel(context.Background())
	r := &resolver{
		staged: func(flox.StorePath) (*flox.PathInfo, bool) { return nil, false },
		shut:   func() error { return nil },
		facts:  f, negatives: newNegatives(), host: w, houses: newHouses([]p2p.PeerID{"house"}, unreached), traffic: &traffic{}, log: slog.New(slog.DiscardHandler),
		calls: newCalls(w.dial),
		life:  life, places: newPlaces(maxLookups, spareLookups), flights: make(map[string]*lookupFlight),
	}
	r.negatives.setCurrent(true)
	w.t.Cleanup(func() {
		cancel()
		r.work.Wait()
		r.calls.Close()
		if err := f.close(); err != nil {
			w.t.Error(err)
		}
	})
	return r
}

func TestLookupWhenTheStorehouseRefusesAtOnceAsksPeersAtOnce(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	info := w.fact(1)
	w.connected = []p2p.PeerID{"house", "a"}
	w.houses["a"] = knowing{info: info}
	got, err := w.resolver().round(within(t, time.Minute), info.Path, map[p2p.PeerID]bool{})
	if err != nil || got.Manifest != info.Manifest {
		t.Errorf("%v %v, want it in the first round", got, err)
	}
}

// Neither peers that say nothing nor many that know nothing keep a look-up from
// the one that announced the path.
func TestLookupIsNotHeldUpByBadPeers(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	info := w.fact(1)
	for i := range 6 {
		id := p2p.PeerID("silent-" + string(rune('a'+i)))
		w.connected = append(w.connected, id)
		w.houses[id] = nil
	}
	for i := range 6 {
		id := p2p.PeerID("empty-" + string(rune('a'+i)))
		w.connected = append(w.connected, id)
		w.houses[id] = knowing{}
	}
	w.houses["house"] = nil // neither refuses nor answers
	w.announced = []p2p.PeerID{"good"}
	w.houses["good"] = knowing{info: info}
	got, err := w.resolver().round(within(t, time.Minute), info.Path, map[p2p.PeerID]bool{})
	if err != nil || got.Path != info.Path {
		t.Errorf("%v %v, want it in the first round", got, err)
	}
}

func TestLaterRoundsAskOtherPeers(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	info := w.fact(1)
	for i := range 30 {
		id := p2p.PeerID("empty-" + string(rune('a'+i)))
		w.connected = append(w.connected, id)
		w.houses[id] = knowing{}
	}
	w.connected = append(w.connected, "last")
	w.houses["last"] = knowing{info: info}
	got, err := w.resolver().lookup(within(t, time.Minute), info.Path)
	if err != nil || got.Path != info.Path {
		t.Errorf("%v %v", got, err)
	}
}

func TestForgedFactsAreRefused(t *testing.T) {
	t.Parallel()
	key, foreign := testKey(t, "k-1"), testKey(t, "k-1") // of the same name
	liar := func(info *flox.PathInfo) *resolver {
		w := newTown(t)
		w.key = key
		w.connected = []p2p.PeerID{"liar"}
		w.houses["liar"] = knowing{info: info}
		return w.resolver()
	}
	w := &town{t: t, key: key}
	forged, changed, other := w.fact(1), w.fact(2), w.fact(3)
	sign(forged, foreign)
	changed.Manifest = flox.CID{66}
	for _, info := range []*flox.PathInfo{forged, changed} {
		r := liar(info)
		_, err := r.lookup(within(t, 300*time.Millisecond), info.Path)
		if !errors.Is(err, flox.ErrUnreachable) || errors.Is(err, flox.ErrNotFound) {
			t.Errorf("forged facts of %s: %v, want ErrUnreachable", info.Path, err)
		}
		if _, ok := r.facts.get(info.Path.HashPart()); ok {
			t.Errorf("forged facts of %s were kept", info.Path)
		}
	}
	// A peer cannot push facts nobody asked for, signed or not.
	r := liar(other)
	_, _ = r.lookup(within(t, 300*time.Millisecond), forged.Path)
	if _, ok := r.facts.get(other.Path.HashPart()); ok {
		t.Error("facts that were not asked for were kept")
	}
}

// Only the storehouse's list says no: not an error it answers, and no peer.
func TestOnlyTheStorehouseSaysNotValid(t *testing.T) {
	t.Parallel()
	missing := connect.NewError(connect.CodeNotFound, errors.New("no such thing"))
	w := newTown(t)
	p := storePath(t, 1)
	w.connected = []p2p.PeerID{"a"}
	w.houses["a"] = knowing{invalid: true}
	w.houses["house"] = knowing{fails: missing}
	_, err := w.resolver().lookup(within(t, 300*time.Millisecond), p)
	if !errors.Is(err, flox.ErrUnreachable) || errors.Is(err, flox.ErrNotFound) {
		t.Errorf("an error of the storehouse: %v, want ErrUnreachable and not ErrNotFound", err)
	}
	w = newTown(t)
	w.houses["house"] = knowing{invalid: true}
	r := w.resolver()
	if _, err := r.lookup(within(t, time.Minute), p); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("not valid: %v, want ErrNotFound", err)
	}
	w.mu.Lock()
	before := w.asked["house"]
	w.mu.Unlock()
	if _, err := r.lookup(t.Context(), p); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("not valid, again: %v", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.asked["house"] != before {
		t.Error("the second answer did not come from memory")
	}
}

func TestALookupOutlivesItsCallerAndIsShared(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	info := w.fact(1)
	r := w.resolver()
	ctx, giveUp := context.WithCancel(t.Context())
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() {
			if _, err := r.lookup(ctx, info.Path); !errors.Is(err, flox.ErrUnreachable) {
				t.Errorf("gave up and got %v", err)
			}
		})
	}
	until(t, "the look-up is under way", func() bool { return r.underWay() == 1 })
	giveUp()
	group.Wait()
	if n := r.underWay(); n != 1 {
		t.Fatalf("%d look-ups under way, want the one", n)
	}
	w.mu.Lock()
	w.houses["house"] = knowing{info: info} // it is plugged in again
	w.mu.Unlock()
	until(t, "the look-up found it by itself", func() bool { _, ok := r.facts.get(info.Path.HashPart()); return ok })
}

func TestLookupsAreBoundedAndEveryWaitEndsWithItsContext(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	r := w.resolver()
	r.places = newPlaces(8, 0) // of which one user has half
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	for i := range 12 {
		group.Go(func() {
			if _, err := r.lookup(ctx, storePath(t, i)); !errors.Is(err, flox.ErrUnreachable) {
				t.Errorf("look-up %d: %v", i, err)
			}
		})
	}
	until(t, "all places are taken", func() bool { return r.underWay() == 4 })
	cancel()
	group.Wait()
}
