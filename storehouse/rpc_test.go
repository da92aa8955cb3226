package storehouse

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/p2p"
)

// member is another machine that joined by the invite.
type member struct {
	host   *p2p.Host
	house  p2p.PeerID
	facts  floxv1connect.FactsClient
	store  floxv1connect.StorehouseClient
	builds floxv1connect.BuildsClient
	token  string
}

// join starts a machine with an invite of a storehouse.
func join(t *testing.T, inv *api.Invite) *member {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	m := &member{house: p2p.PeerID(inv.Storehouse[0].ID)}
	m.host, err = p2p.New(p2p.Config{
		Key: key, Secret: inv.Secret, Listen: []string{"127.0.0.1:0"}, NoMDNS: true,
		Bootstrap: []p2p.PeerAddr{{ID: m.house, Addrs: inv.Storehouse[0].Addrs}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.host.Run(ctx) }()
	transport := &http.Transport{DisableCompression: true, DialContext: m.dial}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	client := &http.Client{Transport: transport}
	m.facts, m.store = floxv1connect.NewFactsClient(client, "http://house"), floxv1connect.NewStorehouseClient(client, "http://house")
	m.builds = floxv1connect.NewBuildsClient(client, "http://house")
	return m
}

// dial opens a stream to the storehouse, as http.Transport wants it.
func (m *member) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	return m.host.Dial(ctx, m.house, rpcProtocol)
}

// upload publishes a path over the wire.
func (m *member) upload(ctx context.Context, p testPath) (*floxv1.AddPathResponse, error) {
	info := api.FromPathInfo(p.info)
	info.Manifest = nil
	return m.send(ctx, &floxv1.AddPathRequest{Info: info, Token: m.token}, p.nar)
}

func (m *member) send(ctx context.Context, first *floxv1.AddPathRequest, nar []byte) (*floxv1.AddPathResponse, error) {
	stream := m.store.AddPath(ctx)
	err := stream.Send(first)
	for err == nil && len(nar) > 0 {
		n := min(len(nar), 64<<10)
		err = stream.Send(&floxv1.AddPathRequest{Nar: nar[:n]})
		nar = nar[n:]
	}
	out, err := stream.CloseAndReceive() // also says why a send failed
	if err != nil {
		return nil, api.FromConnect(err)
	}
	return out.Msg, nil
}

func tokenOf(t *testing.T, s *Server) string {
	t.Helper()
	b, err := os.ReadFile(s.cfg.UploadTokenFile)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// A machine that joined by the invite publishes, looks up, fetches blocks,
// finds holders and follows changes, all over peer streams.
func TestCalls(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	m := join(t, s.Invite())
	m.token = tokenOf(t, s)
	ctx := within(t)

	lists, err := m.facts.TrustList(ctx, connect.NewRequest(&floxv1.TrustListRequest{}))
	if err != nil || len(lists.Msg.GetLists()) != 1 {
		t.Fatalf("trust lists: %v %v", lists, err)
	}
	trust, err := content.ParseTrustList(lists.Msg.GetLists()[0])
	if err == nil {
		err = trust.CheckFirst(s.Invite().TrustList)
	}
	if err != nil {
		t.Fatal(err)
	}

	watch, err := m.store.Watch(ctx, connect.NewRequest(&floxv1.WatchRequest{}))
	if err != nil || !watch.Receive() || !watch.Msg().GetReset_() {
		t.Fatalf("watch: %v %v", err, watch.Err())
	}
	begin := watch.Msg().GetIndex()

	lib := makePath(t, "lib", 150_000)
	app := makePath(t, "app", 1000, lib.info.Path)
	if _, err := m.upload(ctx, app); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("reference missing: %v", err)
	}
	for _, p := range []testPath{lib, app} {
		out, err := m.upload(ctx, p)
		if err != nil || out.GetWasValid() {
			t.Fatalf("upload %s: %v %v", p.info.Path, out, err)
		}
		checkWhole(t, s, p)
	}
	if out, err := m.upload(ctx, app); err != nil || !out.GetWasValid() {
		t.Errorf("upload again: %v %v", out, err)
	}
	// Answers that come long before the end of the upload arrive all the same.
	big := makePath(t, "big", 20<<20)
	if out, err := m.upload(ctx, big); err != nil || out.GetWasValid() {
		t.Errorf("big upload: %v", err)
	}
	if out, err := m.upload(ctx, big); err != nil || !out.GetWasValid() {
		t.Errorf("big upload again: %v", err)
	}
	bad := makePath(t, "bad", 20<<20)
	bad.nar[90] ^= 1
	if _, err := m.upload(ctx, bad); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("damaged upload: %v", err)
	}
	src, err := m.send(ctx, &floxv1.AddPathRequest{Name: "tree", Token: m.token}, lib.nar)
	if err != nil || src.GetInfo().GetNarSize() != lib.info.NarSize || !strings.HasSuffix(src.GetInfo().GetPath(), "-tree") {
		t.Errorf("add by name: %v %v", src, err)
	}
	m.token = "wrong"
	if _, err := m.upload(ctx, makePath(t, "x", 20<<20)); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("wrong token: %v", err)
	}

	var added []string
	for len(added) < 4 && watch.Receive() {
		added = append(added, watch.Msg().GetAdded()...)
	}
	if len(added) != 4 || added[0] != string(lib.info.Path) || added[1] != string(app.info.Path) {
		t.Errorf("watched %v, %v", added, watch.Err())
	}
	for !watch.Msg().GetHeartbeat() && watch.Receive() { // one comes without anything happening
	}
	watch.Close()
	resumed, err := m.store.Watch(ctx, connect.NewRequest(&floxv1.WatchRequest{AfterIndex: begin}))
	if err != nil || !resumed.Receive() || resumed.Msg().GetReset_() || !resumed.Receive() || resumed.Msg().GetAdded()[0] != added[0] {
		t.Errorf("resumed watch: %v %v %v", err, resumed.Msg(), resumed.Err())
	}
	resumed.Close()

	checkLookups(t, m, lib, app, trust)
	checkTracker(t, m, join(t, s.Invite()))
}

// checkLookups asks for facts and fetches a block by them.
func checkLookups(t *testing.T, m *member, lib, app testPath, trust *content.TrustList) {
	t.Helper()
	ctx := within(t)
	none := makePath(t, "none", 1).info.Path.HashPart()
	got, err := m.facts.Paths(ctx, connect.NewRequest(&floxv1.PathsRequest{HashParts: []string{app.info.Path.HashPart(), none}, Closure: true}))
	if err != nil {
		t.Fatal(err)
	}
	r := got.Msg
	if len(r.GetFound()) != 2 || r.GetFound()[1].GetPath() != string(lib.info.Path) || len(r.GetInvalid()) != 1 || r.GetInvalid()[0] != none || r.GetIndex() == 0 {
		t.Errorf("paths: %v", r)
	}
	info, err := api.ToPathInfo(r.GetFound()[0])
	if err == nil {
		err = trust.VerifyInfo(flox.DefaultStoreDir, info)
	}
	if err != nil {
		t.Fatal(err)
	}
	var block []byte
	err = m.host.Fetch(ctx, []p2p.Want{{ID: info.Manifest}}, p2p.Hints{}, func(_ int, b []byte, _ p2p.Source) { block = b })
	if err != nil || content.Hash(block) != info.Manifest {
		t.Errorf("manifest block: %d bytes, %v", len(block), err)
	}
	if err := m.host.Fetch(ctx, []p2p.Want{{ID: flox.CID{7}}}, p2p.Hints{}, func(int, []byte, p2p.Source) {}); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("block that nobody has: %v, want ErrNotFound", err)
	}
	for name, req := range map[string]*floxv1.PathsRequest{
		"not a hash": {HashParts: []string{"../../etc/passwd"}}, "too many": {HashParts: make([]string, maxHashParts+1)},
	} {
		if _, err := m.facts.Paths(ctx, connect.NewRequest(req)); !errors.Is(api.FromConnect(err), flox.ErrBadInput) {
			t.Errorf("%s: %v, want ErrBadInput", name, err)
		}
	}
	house, err := m.store.Info(ctx, connect.NewRequest(&floxv1.InfoRequest{}))
	if err != nil || house.Msg.GetName() != "test" || house.Msg.GetPaths() != 4 || house.Msg.GetBlocks() == 0 || house.Msg.GetStoreDir() != "/nix/store" {
		t.Errorf("info: %v %v", house, err)
	}
}

// checkTracker lets one machine announce and the other look.
func checkTracker(t *testing.T, a, b *member) {
	t.Helper()
	ctx := within(t)
	key := p2p.PathKey(makePath(t, "lib", 1).info.Path)
	who := func(m *member) []*floxv1.Provider {
		out, err := m.store.WhoHas(ctx, connect.NewRequest(&floxv1.WhoHasRequest{Keys: [][]byte{make([]byte, 32), key[:]}}))
		if err != nil {
			t.Fatal(err)
		}
		return out.Msg.GetProviders()
	}
	if _, err := a.store.Announce(ctx, connect.NewRequest(&floxv1.AnnounceRequest{Keys: [][]byte{key[:]}, Addrs: a.host.Addrs()})); err != nil {
		t.Fatal(err)
	}
	found := who(b)
	if len(found) != 1 || found[0].GetPeer() != string(a.host.ID()) || found[0].GetKey() != 1 || len(found[0].GetAddrs()) == 0 {
		t.Errorf("who has: %v, want %s", found, a.host.ID())
	}
	if found := who(a); len(found) != 0 {
		t.Errorf("told to itself: %v", found)
	}
	if _, err := a.store.Announce(ctx, connect.NewRequest(&floxv1.AnnounceRequest{})); err != nil {
		t.Fatal(err)
	}
	if found := who(b); len(found) != 0 {
		t.Errorf("after it announced nothing: %v", found)
	}
	if _, err := a.store.Announce(ctx, connect.NewRequest(&floxv1.AnnounceRequest{Keys: [][]byte{{1}}})); !errors.Is(api.FromConnect(err), flox.ErrBadInput) {
		t.Errorf("short key: %v", err)
	}
}

// Who has another secret gets no answer.
func TestStrangerRefused(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	inv := *s.Invite()
	inv.Secret = []byte("0123456789abcdef0123456789abcdef")
	m := join(t, &inv)
	if _, err := m.facts.TrustList(within(t), connect.NewRequest(&floxv1.TrustListRequest{})); err == nil {
		t.Error("a stranger was answered")
	}
}

// The tracker forgets after a while, and refuses more than it has room for.
func TestTracker(t *testing.T) {
	t.Parallel()
	tr := newTracker()
	now := tr.now()
	k1, k2 := flox.CID{1}, flox.CID{2}
	if err := errors.Join(tr.announce("a", []flox.CID{k1, k1, k2}, nil), tr.announce("b", []flox.CID{k1}, nil)); err != nil {
		t.Fatal(err)
	}
	if got := tr.find(k1, "a", 10); len(got) != 1 || got[0].peer != "b" {
		t.Errorf("found %v", got)
	}
	if got := tr.find(k1, "c", 1); len(got) != 1 {
		t.Errorf("found %v, want one", got)
	}
	if err := tr.announce("c", make([]flox.CID, maxPeerKeys+1), nil); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("too many keys: %v", err)
	}
	if err := tr.announce("c", nil, []string{strings.Repeat("x", maxAddrBytes+1)}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("long address: %v", err)
	}
	if tr.total != 3 {
		t.Errorf("%d keys, want 3", tr.total)
	}
	tr.now = func() time.Time { return now.Add(trackerTTL + time.Minute) }
	if got := tr.find(k1, "c", 10); len(got) != 0 {
		t.Errorf("found %v after their time", got)
	}
	tr.expire()
	if len(tr.peers)+len(tr.keys)+tr.total != 0 {
		t.Errorf("kept %d peers, %d keys, total %d", len(tr.peers), len(tr.keys), tr.total)
	}
}

// Whoever makes up names for itself does not fill the tracker's memory, even
// with peers that hold nothing; those known stay and may announce again.
func TestTrackerIsBounded(t *testing.T) {
	t.Parallel()
	tr := newTracker()
	for i := range maxTracked {
		if err := tr.announce(fmt.Sprint(i), nil, []string{"/ip4/10.0.0.1/tcp/1"}); err != nil {
			t.Fatalf("peer %d: %v", i, err)
		}
	}
	if err := tr.announce("one more", nil, nil); !errors.Is(err, flox.ErrFull) {
		t.Errorf("one peer too many: %v, want ErrFull", err)
	}
	if err := tr.announce("0", []flox.CID{{1}}, nil); err != nil {
		t.Errorf("one that is known: %v", err)
	}
}
