package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/worker"
)

// upstreamer is what a storehouse has of upstreams.
type upstreamer struct {
	floxv1connect.UnimplementedUpstreamsHandler
	h   *house                    // nil = it knows no upstreams
	has map[string]*flox.PathInfo // by base name
	got []string                  // what was substituted
}

// ListUpstreams implements floxv1connect.AdminHandler.
func (h *houseAdmin) ListUpstreams(context.Context, *connect.Request[floxv1.ListUpstreamsRequest]) (*connect.Response[floxv1.ListUpstreamsResponse], error) {
	return connect.NewResponse(&floxv1.ListUpstreamsResponse{Upstreams: []*floxv1.UpstreamState{{Upstream: &floxv1.Upstream{Keys: h.upstreamKeys}}}}), nil
}

// Substitute implements floxv1connect.UpstreamsHandler.
func (u *upstreamer) Substitute(_ context.Context, req *connect.Request[floxv1.SubstituteRequest], stream *connect.ServerStream[floxv1.SubstituteProgress]) error {
	if u.h == nil {
		return connect.NewError(connect.CodeUnimplemented, errors.New("no upstreams"))
	}
	said := &floxv1.SubstituteProgress{Finished: true}
	for _, name := range req.Msg.GetPaths() {
		if info := u.has[name]; info != nil {
			u.h.publish(info)
			u.h.set(func() { u.got = append(u.got, name) })
		} else {
			said.Failed = append(said.Failed, &floxv1.UnsubstitutablePath{Path: name, Unknown: true, Reason: "nobody has it"})
		}
	}
	return stream.Send(said)
}

// ReportDifference implements floxv1connect.StorehouseHandler.
func (h *house) ReportDifference(_ context.Context, req *connect.Request[floxv1.ReportDifferenceRequest]) (*connect.Response[floxv1.ReportDifferenceResponse], error) {
	h.set(func() { h.differences = append(h.differences, req.Msg) })
	return connect.NewResponse(&floxv1.ReportDifferenceResponse{Recorded: true}), nil
}

// has reports whether a path is valid.
func (h *house) has(p flox.StorePath) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.infos[p.HashPart()]
	return ok
}

// sent is a path as a client sends it: a symlink.
type sent struct {
	*worker.Info
	nar []byte
}

func symlink(t *testing.T, target string) (nar []byte) {
	t.Helper()
	var b bytes.Buffer
	w := nix.NewNarWriter(&b)
	if err := errors.Join(w.Entry(nix.NarEntry{Kind: flox.Symlink, Target: target}), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// inputAddressed is one whose path says nothing of its content, signed by keys.
func inputAddressed(t *testing.T, hash string, keys ...nix.SecretKey) sent {
	t.Helper()
	nar := symlink(t, hash)
	info := flox.PathInfo{Path: flox.StorePath(strings.Repeat(hash, 32) + "-" + hash), NarHash: sha256.Sum256(nar), NarSize: uint64(len(nar))}
	for _, key := range keys {
		info.Signatures = append(info.Signatures, key.Sign([]byte(nix.Fingerprint(testStore, &info))))
	}
	return sent{&worker.Info{PathInfo: info}, nar}
}

func contentAddressed(t *testing.T, name string, refs ...flox.StorePath) sent {
	t.Helper()
	nar := symlink(t, name)
	info := flox.PathInfo{NarHash: sha256.Sum256(nar), NarSize: uint64(len(nar)), References: refs}
	ca := nix.ContentAddress{Method: nix.CANar, Hash: nix.SHA256Hash(info.NarHash)}
	var err error
	if info.Path, err = ca.Path(testStore, name, refs, false); err != nil {
		t.Fatal(err)
	}
	info.CA = ca.String()
	return sent{&worker.Info{PathInfo: info}, nar}
}

func sendAll(ctx context.Context, c *worker.Client, noCheck bool, paths ...sent) error {
	i := -1
	return c.AddNars(ctx, len(paths), func() (*worker.Info, io.Reader, error) {
		i++
		return paths[i].Info, bytes.NewReader(paths[i].nar), nil
	}, worker.AddOptions{NoCheckSigs: noCheck})
}

// What a client adds with a reason to believe it, other machines have when the client
// hears that it was added; the rest nobody else sees.
func TestCopiedPathsAreForAllMachines(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	upstream, own, stranger := testKey(t, "upstream-1"), testKey(t, "own-1"), testKey(t, "stranger-1")
	h.admin.upstreamKeys = []string{upstream.Public().String()}
	cached, absent := inputAddressed(t, "a", upstream), inputAddressed(t, "b", upstream)
	got, err := content.IngestSmall(t.Context(), cached.nar, h)
	if err != nil {
		t.Fatal(err)
	}
	there := cached.PathInfo
	there.Manifest = got.Manifest
	sign(&there, h.key)
	h.ups.h, h.ups.has = h, map[string]*flox.PathInfo{string(there.Path): &there}

	a, b := runNixAgent(t, h), runNixAgent(t, h)
	ctx := within(t, time.Minute)
	root, user, reader := nixDial(t, a, worker.Trusted), nixDial(t, a, worker.NotTrusted), nixDial(t, b, worker.NotTrusted)
	shared := func(p sent) bool { return h.has(p.Path) }
	ca := contentAddressed(t, "ca")
	if _, err := reader.Info(ctx, ca.Path); !errors.Is(err, flox.ErrNotFound) { // and remembers that
		t.Fatal(err)
	}
	forged := inputAddressed(t, "c")
	onForged, signed := contentAddressed(t, "on-forged", forged.Path), inputAddressed(t, "d", h.key)
	if err := sendAll(ctx, root, true, ca, forged, onForged, signed); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		p    sent
		want bool
	}{"content-addressed": {ca, true}, "unsigned": {forged, false}, "on the unsigned one": {onForged, false}, "signed by the storehouse": {signed, true}} {
		if shared(c.p) != c.want {
			t.Errorf("%s: the storehouse has it: %v", what, !c.want)
		}
		if _, err := root.Info(ctx, c.p.Path); err != nil {
			t.Errorf("%s, on its own machine: %v", what, err)
		}
	}
	until(t, "another machine has it", func() bool { _, err := reader.Info(ctx, ca.Path); return err == nil })
	if _, err := reader.Info(ctx, forged.Path); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("the unsigned one on another machine: %v", err)
	}

	// What an upstream's key signed the storehouse fetches from there, and else from here.
	if err := sendAll(ctx, user, false, cached, absent); err != nil {
		t.Error(err)
	}
	if !slices.Equal(h.ups.got, []string{string(cached.Path)}) || !shared(absent) {
		t.Errorf("substituted %q, the other is there: %v", h.ups.got, shared(absent))
	}
	if _, err := a.staged.Path(cached.Path); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("what was substituted is staged, too: %v", err)
	}

	// A trusted client may name keys of its own, for this machine.
	mine := inputAddressed(t, "f", own)
	keys := worker.Options{UseSubstitutes: true, Settings: map[string]string{"trusted-public-keys": own.Public().String() + " " + h.key.Public().String()}}
	for _, c := range []*worker.Client{root, user} {
		if err := c.SetOptions(ctx, keys); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		client *worker.Client
		p      sent
	}{{user, mine}, {root, inputAddressed(t, "g", stranger)}, {root, inputAddressed(t, "h")}} {
		if err := sendAll(ctx, c.client, false, c.p); err == nil || !strings.Contains(err.Error(), "lacks a valid signature") {
			t.Errorf("%s is added: %v", c.p.Path, err)
		}
	}
	if err := sendAll(ctx, root, false, mine); err != nil || shared(mine) {
		t.Errorf("%v, the storehouse has it: %v", err, shared(mine))
	}
}

// What could not be told the storehouse is as soon as it can.
func TestCopiedPathsAreSharedLater(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a := runNixAgent(t, h)
	ctx := within(t, time.Minute)
	h.set(func() { h.takes.lose = uploadTries })
	ca := contentAddressed(t, "ca")
	var said []string
	c := nixDial(t, a, worker.NotTrusted, func(f worker.LogFrame) { said = append(said, f.Text) })
	if err := sendAll(ctx, c, false, ca); err != nil || !strings.Contains(strings.Join(said, "\n"), "on this machine only") {
		t.Errorf("%v, it said %q", err, said)
	}
	if !a.unshared.Load() || h.has(ca.Path) {
		t.Fatal("it is not to be shared later, or was")
	}
	if err := a.shareLeft(ctx); err != nil || !h.has(ca.Path) {
		t.Errorf("not shared later: %v", err)
	}
}

// Another NAR for a valid path is passed over, as by Nix, and the storehouse hears of
// it; not of the same one again, and not of one that is another than it says.
func TestAnotherNarIsToldOf(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	valid := h.make(t, "valid", nil, testFile{name: "f", data: []byte("1")})
	h.publish(valid)
	a := runNixAgent(t, h)
	c, ctx := nixDial(t, a, worker.Trusted), within(t, time.Minute)
	offer := func(target, says string) {
		t.Helper()
		nar := symlink(t, target)
		info := flox.PathInfo{Path: valid.Path, NarHash: sha256.Sum256(symlink(t, says)), NarSize: uint64(len(nar))}
		if err := sendAll(ctx, c, true, sent{&worker.Info{PathInfo: info}, nar}); err != nil {
			t.Fatal(err)
		}
	}
	told := func() (n int) {
		h.set(func() { n = len(h.differences) })
		return n
	}
	offer("other", "others")
	if told() != 0 {
		t.Errorf("%d reports of what is not what it says", told())
	}
	offer("other", "other")
	if told() != 1 || h.differences[0].GetPath() != string(valid.Path) || [32]byte(h.differences[0].GetNarHash()) != sha256.Sum256(symlink(t, "other")) {
		t.Errorf("told was %v", h.differences)
	}
	readWhole(t, a, valid.Path, 1)
}
