package agent

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/p2p"
)

const testStore = flox.StoreDir("/nix/store")

var testSecret = []byte("a secret of the tests, 32 bytes.")

// house is a storehouse of the tests: real p2p, real content, and as much of the
// calls as an agent uses.
type house struct {
	floxv1connect.UnimplementedStorehouseHandler
	host   *p2p.Host
	stop   func() // ends the host
	book   rootBook
	key    nix.SecretKey
	invite *api.Invite
	admin  *houseAdmin
	builds builder
	ups    upstreamer
	lists  [][]byte

	mu       sync.Mutex
	blocks   map[flox.CID][]byte
	infos    map[string]*floxv1.PathInfo
	index    uint64
	events   []*floxv1.WatchEvent
	changed  chan struct{}                                                                                        // closed and replaced with every change
	hold     bool                                                                                                 // a stream's first message is sent, what follows is not
	hangUp   chan struct{}                                                                                        // closed and replaced to end all streams
	told     [][]byte                                                                                             // keys of the last Announce
	added    []string                                                                                             // names of AddPath
	asked    int                                                                                                  // calls of Paths
	maxAge   time.Duration                                                                                        // that the last of them allowed
	broken   error                                                                                                // what Paths answers
	asks     int                                                                                                  // calls of ListPaths
	list     func(context.Context, *floxv1.ListValidRequest) (*connect.Response[floxv1.ListValidResponse], error) // nil = as it is
	served   func(flox.CID)                                                                                       // told of every block that is served; nil = nobody
	traces   map[string]*floxv1.StartTrace
	wanted   int  // calls of Paths that asked for traces
	rootless bool // an older one, that sends no root blocks
	// differences are those that were reported.
	differences []*floxv1.ReportDifferenceRequest
	lie         [][]byte // blocks that are sent instead of the right ones, nil = the right one
	given       int      // blocks given
	takes       takeBook
}

// Put implements flox.BlockSink.
func (h *house) Put(_ context.Context, id flox.CID, data []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.blocks[id] = slices.Clone(data)
	return nil
}

// Sync implements flox.BlockSink.
func (h *house) Sync(context.Context) error { return nil }

// Get implements p2p.Holder.
func (h *house) Get(_ context.Context, id flox.CID) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if b, ok := h.blocks[id]; ok {
		if h.served != nil {
			h.served(id)
		}
		h.given++
		return b, nil
	}
	return nil, fmt.Errorf("block %s: %w", id, flox.ErrNotFound)
}

// Has implements p2p.Holder.
func (h *house) Has(ids []flox.CID) []bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]bool, len(ids))
	for i, id := range ids {
		_, out[i] = h.blocks[id]
	}
	return out
}

// Each implements p2p.Holder.
func (h *house) Each(yield func(flox.CID) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id := range h.blocks {
		if !yield(id) {
			return
		}
	}
}

func testKey(t *testing.T, name string) nix.SecretKey {
	t.Helper()
	key, err := nix.GenerateKey(name)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func machineKey(t *testing.T) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// trustList makes a signed list of keys that follows prev; nil = the first.
func trustList(t *testing.T, prev *content.TrustList, by nix.SecretKey, keys ...nix.SecretKey) (*content.TrustList, []byte) {
	t.Helper()
	epoch := uint64(1)
	if prev != nil {
		epoch = prev.Epoch
	}
	return laterTrustList(t, prev, epoch, by, keys...)
}

// laterTrustList is trustList in an epoch.
func laterTrustList(t *testing.T, prev *content.TrustList, epoch uint64, by nix.SecretKey, keys ...nix.SecretKey) (*content.TrustList, []byte) {
	t.Helper()
	l := &content.TrustList{Version: 1, Epoch: epoch}
	if prev != nil {
		l.Version = prev.Version + 1
		var err error
		if l.Prev, err = prev.Fingerprint(); err != nil {
			t.Fatal(err)
		}
	}
	for _, k := range keys {
		l.ManifestKeys = append(l.ManifestKeys, k.Public().String())
	}
	slices.Sort(l.ManifestKeys)
	l.NixKeys = l.ManifestKeys
	if err := l.Sign(by); err != nil {
		t.Fatal(err)
	}
	b, err := l.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return l, b
}

func newHouse(t *testing.T) *house {
	t.Helper()
	h := &house{
		key: testKey(t, "house-1"), blocks: make(map[flox.CID][]byte), infos: make(map[string]*floxv1.PathInfo),
		index: 10, changed: make(chan struct{}), hangUp: make(chan struct{}),
		admin: &houseAdmin{ended: make(chan struct{})},
	}
	first, b := trustList(t, nil, h.key, h.key)
	h.lists = [][]byte{b}
	anchor, err := first.Fingerprint()
	if err != nil {
		t.Fatal(err)
	}
	h.host, err = p2p.New(p2p.Config{
		Key: machineKey(t), Listen: []string{"127.0.0.1:0"}, Secret: testSecret, Role: p2p.Storehouse,
		NoMDNS: true, Blocks: h, Limits: p2p.Limits{DialTimeout: 10 * time.Second},
	})
	if err != nil {
		t.Fatal(err)
	}
	h.invite = &api.Invite{
		Version: api.InviteVersion, Name: "test", Secret: testSecret, TrustList: anchor, StoreDir: testStore,
		Storehouse: []api.InvitePeer{{ID: string(h.host.ID()), Addrs: h.host.Addrs()}},
	}
	h.stop = h.serve(t, h.host)
	return h
}

// serve answers at a host until the test ends or the function returned is called.
func (h *house) serve(t *testing.T, host *p2p.Host) (stop func()) {
	t.Helper()
	listener, err := host.Listen(rpcProtocol)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(floxv1connect.NewFactsHandler(h))
	mux.Handle(floxv1connect.NewStorehouseHandler(h))
	mux.Handle(floxv1connect.NewAdminHandler(h.admin))
	mux.Handle(floxv1connect.NewMembershipHandler(&h.book))
	mux.Handle(floxv1connect.NewBuildsHandler(&h.builds))
	mux.Handle(floxv1connect.NewUpstreamsHandler(&h.ups))
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	group.Go(func() { _ = host.Run(ctx) })
	group.Go(func() { _ = serveHTTP(ctx, listener, &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}) })
	stop = func() { cancel(); group.Wait() }
	t.Cleanup(stop)
	return stop
}

// twin is another server of the same storehouse.
func (h *house) twin(t *testing.T) (twin *p2p.Host, stop func()) {
	t.Helper()
	twin, err := p2p.New(p2p.Config{
		Key: machineKey(t), Listen: []string{"127.0.0.1:0"}, Secret: testSecret, Role: p2p.Storehouse,
		NoMDNS: true, Blocks: h, Limits: p2p.Limits{DialTimeout: 10 * time.Second},
	})
	if err != nil {
		t.Fatal(err)
	}
	return twin, h.serve(t, twin)
}

// testFile is a file to be put into a store path.
type testFile struct {
	name string
	data []byte
	exec bool
}

// make puts files into a store path and signs its facts, without publishing it.
func (h *house) make(t *testing.T, name string, refs []flox.StorePath, files ...testFile) *flox.PathInfo {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	for _, f := range files {
		file := filepath.Join(dir, f.name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o644)
		if f.exec {
			mode = 0o755
		}
		if err := os.WriteFile(file, f.data, mode); err != nil {
			t.Fatal(err)
		}
	}
	return h.ingest(t, dir, name, refs)
}

// ingest makes a store path of a directory and signs its facts.
func (h *house) ingest(t *testing.T, dir, name string, refs []flox.StorePath) *flox.PathInfo {
	t.Helper()
	got, err := content.IngestPath(t.Context(), dir, h, content.IngestOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return h.info(t, name, refs, got)
}

// info signs the facts of a path whose content was put into h.
func (h *house) info(t *testing.T, name string, refs []flox.StorePath, got *content.Ingested) *flox.PathInfo {
	t.Helper()
	hash := content.Hash([]byte(name))
	const letters = "0123456789abcdfghijklmnpqrsvwxyz"
	text := make([]byte, flox.HashPartLen)
	for i := range text {
		text[i] = letters[hash[i%len(hash)]&31]
	}
	path, err := flox.ParseStorePath(string(text) + "-" + name)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(refs)
	info := &flox.PathInfo{Path: path, NarHash: got.NarHash, NarSize: got.NarSize, References: refs, Manifest: got.Manifest}
	sign(info, h.key)
	return info
}

func sign(info *flox.PathInfo, key nix.SecretKey) {
	info.ManifestSignatures = []string{key.Sign([]byte(content.Statement(testStore, info)))}
}

// publish makes paths valid.
func (h *house) publish(infos ...*flox.PathInfo) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, info := range infos {
		h.index++
		h.infos[info.Path.HashPart()] = api.FromPathInfo(info)
		h.events = append(h.events, &floxv1.WatchEvent{Index: h.index, Added: []string{string(info.Path)}})
	}
	h.tell()
}

// remove makes a path invalid.
func (h *house) remove(p flox.StorePath) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.index++
	delete(h.infos, p.HashPart())
	h.events = append(h.events, &floxv1.WatchEvent{Index: h.index, Removed: []string{string(p)}})
	h.tell()
}

func (h *house) tell() {
	close(h.changed)
	h.changed = make(chan struct{})
}

func (h *house) set(change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change()
	h.tell()
}

// endStreams hangs up on every watcher.
func (h *house) endStreams() {
	h.set(func() { close(h.hangUp); h.hangUp = make(chan struct{}) })
}

// Paths implements floxv1connect.FactsHandler.
func (h *house) Paths(_ context.Context, req *connect.Request[floxv1.PathsRequest]) (*connect.Response[floxv1.PathsResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asked++
	h.maxAge = time.Duration(req.Msg.GetMaxAgeMs()) * time.Millisecond
	if h.broken != nil {
		return nil, h.broken
	}
	out := &floxv1.PathsResponse{Index: h.index}
	queue := slices.Clone(req.Msg.GetHashParts())
	seen := make(map[string]bool)
	for i := 0; i < len(queue); i++ {
		hash := queue[i]
		m, ok := h.infos[hash]
		switch {
		case seen[hash]:
		case !ok:
			out.Invalid = append(out.Invalid, hash)
		default:
			out.Found = append(out.Found, m)
			for _, ref := range m.GetReferences() {
				if req.Msg.GetClosure() {
					queue = append(queue, ref[:flox.HashPartLen])
				}
			}
		}
		seen[hash] = true
	}
	if req.Msg.GetRoots() && !h.rootless {
		for _, hash := range req.Msg.GetHashParts() {
			if m, ok := h.infos[hash]; ok {
				out.Roots = append(out.Roots, h.blocks[flox.CID(m.GetManifest())])
				for i, b := range h.lie {
					if i < len(out.GetRoots()) && b != nil {
						out.Roots[i] = b
					} else if b != nil {
						out.Roots = append(out.Roots, b)
					}
				}
			}
		}
	}
	if req.Msg.GetTraces() {
		h.wanted++
		for _, hash := range req.Msg.GetHashParts() {
			if t, ok := h.traces[hash]; ok {
				out.Traces = append(out.Traces, t)
			}
		}
	}
	return connect.NewResponse(out), nil
}

// TrustList implements floxv1connect.FactsHandler.
func (h *house) TrustList(_ context.Context, req *connect.Request[floxv1.TrustListRequest]) (*connect.Response[floxv1.TrustListResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	have := min(req.Msg.GetHaveVersion(), uint64(len(h.lists)))
	return connect.NewResponse(&floxv1.TrustListResponse{Lists: h.lists[have:]}), nil
}

// Info implements floxv1connect.StorehouseHandler.
func (h *house) Info(context.Context, *connect.Request[floxv1.InfoRequest]) (*connect.Response[floxv1.InfoResponse], error) {
	return connect.NewResponse(&floxv1.InfoResponse{Name: "test", HttpUrl: "http://test"}), nil
}

// Announce implements floxv1connect.StorehouseHandler.
func (h *house) Announce(_ context.Context, req *connect.Request[floxv1.AnnounceRequest]) (*connect.Response[floxv1.AnnounceResponse], error) {
	h.set(func() { h.told = req.Msg.GetKeys() })
	return connect.NewResponse(&floxv1.AnnounceResponse{TtlSeconds: 900}), nil
}

// AddPath implements floxv1connect.StorehouseHandler.
func (h *house) AddPath(_ context.Context, stream *connect.ClientStream[floxv1.AddPathRequest]) (*connect.Response[floxv1.AddPathResponse], error) {
	var name string
	var nar []byte
	for stream.Receive() {
		if name == "" {
			name = stream.Msg().GetName()
		}
		nar = append(nar, stream.Msg().GetNar()...)
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	h.set(func() { h.added = append(h.added, fmt.Sprintf("%s: %d bytes", name, len(nar))) })
	return connect.NewResponse(&floxv1.AddPathResponse{Info: &floxv1.PathInfo{Path: name}}), nil
}

// Watch implements floxv1connect.StorehouseHandler.
func (h *house) Watch(ctx context.Context, req *connect.Request[floxv1.WatchRequest], stream *connect.ServerStream[floxv1.WatchEvent]) error {
	h.mu.Lock()
	at, hangUp := req.Msg.GetAfterIndex(), h.hangUp
	reset := at == 0 || at > h.index
	if reset {
		at = h.index
	}
	h.mu.Unlock()
	send := &floxv1.WatchEvent{Index: at, Reset_: reset, Heartbeat: !reset}
	for {
		if send != nil {
			if err := stream.Send(send); err != nil {
				return err
			}
		}
		h.mu.Lock()
		send = nil
		changed := h.changed
		for _, e := range h.events {
			if !h.hold && e.GetIndex() > at {
				send, at = e, e.GetIndex()
				break
			}
		}
		h.mu.Unlock()
		if send != nil {
			continue
		}
		select {
		case <-changed:
		case <-time.After(time.Second):
			h.mu.Lock()
			if !h.hold {
				send = &floxv1.WatchEvent{Index: at, Heartbeat: true}
			}
			h.mu.Unlock()
		case <-hangUp:
			return connect.NewError(connect.CodeUnavailable, errors.New("hung up"))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
