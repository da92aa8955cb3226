package storehouse

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// ownBlocks are the blocks of a path that a machine has.
type ownBlocks struct{ blocks [][]byte }

// Put is flox.BlockSink.
func (o *ownBlocks) Put(_ context.Context, _ flox.CID, b []byte) error {
	o.blocks = append(o.blocks, bytes.Clone(b))
	return nil
}

// Sync is flox.BlockSink.
func (o *ownBlocks) Sync(context.Context) error { return nil }

// addressed makes a content-addressed path of a NAR, as a machine would upload it.
func addressed(t *testing.T, name string, nar []byte, ca nix.ContentAddress, refs ...flox.StorePath) (*flox.PathInfo, [][]byte) {
	t.Helper()
	own := &ownBlocks{}
	got, err := content.IngestSmall(t.Context(), nar, own)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ca.Path(flox.DefaultStoreDir, name, refs, false)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(refs)
	return &flox.PathInfo{Path: p, NarHash: got.NarHash, NarSize: got.NarSize, CA: ca.String(), References: refs, Manifest: got.Manifest}, own.blocks
}

// textPath is a text file that refers to refs.
func textPath(t *testing.T, name string, text []byte, refs ...flox.StorePath) (*flox.PathInfo, [][]byte) {
	t.Helper()
	r, err := nix.FileNar(uint64(len(text)), bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	var nar bytes.Buffer
	if _, err := nar.ReadFrom(r); err != nil {
		t.Fatal(err)
	}
	return addressed(t, name, nar.Bytes(), nix.ContentAddress{Method: nix.CAText, Hash: nix.SHA256Hash(sha256.Sum256(text))}, refs...)
}

func partOf(blocks [][]byte, infos ...*flox.PathInfo) *floxv1.TakePart {
	part := &floxv1.TakePart{Blocks: blocks}
	for _, info := range infos {
		part.Paths = append(part.Paths, api.FromPathInfo(info))
	}
	return part
}

// take uploads parts.
func (m *member) take(ctx context.Context, parts ...*floxv1.TakePart) (*floxv1.TakePathsResponse, error) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		return nil, err
	}
	defer enc.Close()
	stream := m.store.TakePaths(ctx)
	for _, part := range parts {
		b, err := proto.Marshal(part)
		if err != nil {
			return nil, err
		}
		if stream.Send(&floxv1.TakePathsRequest{Part: enc.EncodeAll(b, nil)}) != nil {
			break // CloseAndReceive says why
		}
	}
	out, err := stream.CloseAndReceive()
	if err != nil {
		return nil, api.FromConnect(err)
	}
	return out.Msg, nil
}

// drvOf is a derivation whose outputs are right.
func drvOf(t *testing.T, name string) *nix.Derivation {
	t.Helper()
	d := &nix.Derivation{
		Name: name, Outputs: map[string]nix.DrvOutput{"out": {Kind: nix.OutputDeferred}}, Platform: "x", Builder: "/b",
		Args: []string{strings.Repeat(name, 100)}, Env: map[string]string{"out": ""},
	}
	if err := d.FillOutputs(flox.DefaultStoreDir, nil); err != nil {
		t.Fatal(err)
	}
	return d
}

// Any member uploads content-addressed paths: what the storehouse has is not sent
// again, and a batch is one entry of the log.
func TestMachinesUploadContentAddressedPaths(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	m := join(t, s.Invite())
	ctx := within(t)

	var infos []*flox.PathInfo
	var blocks [][]byte
	add := func(info *flox.PathInfo, b [][]byte) {
		infos, blocks = append(infos, info), append(blocks, b...)
	}
	d := drvOf(t, "a")
	text, err := d.Marshal(flox.DefaultStoreDir)
	if err != nil {
		t.Fatal(err)
	}
	add(textPath(t, "a.drv", text))
	user := drvOf(t, "b")
	user.Inputs = map[flox.StorePath][]string{infos[0].Path: {"out"}}
	user.Outputs["out"] = nix.DrvOutput{Kind: nix.OutputDeferred}
	if err := user.FillOutputs(flox.DefaultStoreDir, func(flox.StorePath) (nix.DrvHash, error) {
		return d.HashModulo(flox.DefaultStoreDir, false, nil)
	}); err != nil {
		t.Fatal(err)
	}
	if text, err = user.Marshal(flox.DefaultStoreDir); err != nil {
		t.Fatal(err)
	}
	add(textPath(t, "b.drv", text, infos[0].Path))
	tree := makePath(t, "tree", 200_000)
	add(addressed(t, "tree", tree.nar, nix.ContentAddress{Method: nix.CANar, Hash: nix.SHA256Hash(tree.info.NarHash)}, infos[0].Path))
	large := makePath(t, "large", 3<<20)
	own := &ownBlocks{}
	got, err := content.Ingest(ctx, large.reader(), own, content.IngestOptions{Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	sha1 := nix.SHA1.New()
	sha1.Write(large.nar)
	ca := nix.ContentAddress{Method: nix.CANar, Hash: nix.Hash{Algo: nix.SHA1, Sum: sha1.Sum(nil)}}
	p, err := ca.Path(flox.DefaultStoreDir, "large", nil, false)
	if err != nil {
		t.Fatal(err)
	}
	add(&flox.PathInfo{Path: p, NarHash: got.NarHash, NarSize: got.NarSize, CA: ca.String(), Manifest: got.Manifest}, own.blocks)

	offer := &floxv1.OfferPathsRequest{}
	for _, info := range infos {
		raw, err := nix.DecodeBase32(info.Path.HashPart())
		if err != nil {
			t.Fatal(err)
		}
		offer.Paths = append(offer.Paths, raw)
	}
	for _, b := range blocks {
		id := content.Hash(b)
		offer.Blocks = append(offer.Blocks, id[:])
	}
	lacks := func(paths, blocks int) {
		t.Helper()
		answer, err := m.store.OfferPaths(ctx, connect.NewRequest(offer))
		if err != nil || len(answer.Msg.GetLackingPaths()) != paths || len(answer.Msg.GetLackingBlocks()) != blocks {
			t.Errorf("it lacks %v paths and %v blocks, want %d and %d, %v", answer.Msg.GetLackingPaths(), answer.Msg.GetLackingBlocks(), paths, blocks, err)
		}
	}
	lacks(4, len(blocks))
	// Blocks in one part, paths in another, as a large upload comes.
	half := len(blocks) / 2
	out, err := m.take(ctx, partOf(blocks[:half]), partOf(blocks[half:]), partOf(nil, infos...))
	if err != nil || out.GetPaths() != 4 || out.GetAdded() != 4 || out.GetIndex() == 0 {
		t.Fatalf("%v, %v", out, err)
	}
	lacks(0, 0)
	for i, nar := range [][]byte{nil, nil, tree.nar, large.nar} {
		info, err := s.Info(ctx, infos[i].Path.HashPart())
		if err != nil || info.Manifest != infos[i].Manifest {
			t.Fatalf("%s: %v, %v", infos[i].Path, info, err)
		}
		if nar != nil {
			checkWhole(t, s, testPath{infos[i], nar})
		}
	}
	// One entry made them all valid.
	events, _, _, err := s.changes(ctx, 0)
	added := 0
	for _, e := range events {
		if n := len(e.GetAdded()); n > 0 {
			if added += n; n != 4 {
				t.Errorf("an entry of the log added %d", n)
			}
		}
	}
	if added != 4 || err != nil {
		t.Errorf("%d were added, %v", added, err)
	}
	again, err := m.take(ctx, partOf(nil, infos...))
	if err != nil || again.GetPaths() != 4 || again.GetAdded() != 0 {
		t.Errorf("again: %v, %v", again, err)
	}
}

func TestForgedUploadsAreRefused(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	m := join(t, s.Invite())
	ctx := within(t)
	text := bytes.Repeat([]byte("text "), 500)
	refuse := func(what string, want error, blocks [][]byte, infos ...*flox.PathInfo) {
		t.Helper()
		out, err := m.take(ctx, partOf(blocks, infos...))
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, %v", what, out, err)
		}
		for _, info := range infos {
			if _, err := s.Info(ctx, info.Path.HashPart()); !errors.Is(err, flox.ErrNotFound) {
				t.Errorf("%s: it is valid, %v", what, err)
			}
		}
	}
	changed := func(info *flox.PathInfo, change func(*flox.PathInfo)) *flox.PathInfo {
		own := *info
		change(&own)
		return &own
	}
	bad := flox.ErrBadInput
	good, blocks := textPath(t, "good", text)
	other, otherBlocks := textPath(t, "good", append([]byte("other "), text...))

	refuse("no content address", flox.ErrUntrusted, blocks, changed(good, func(i *flox.PathInfo) { i.CA = "" }))
	// Signatures are over all that is said of a path, and count only if somebody here trusts them.
	have, err := s.id.ring.get()
	if err != nil {
		t.Fatal(err)
	}
	signs := func(info *flox.PathInfo, key nix.SecretKey) *flox.PathInfo {
		return changed(info, func(i *flox.PathInfo) {
			i.CA = ""
			i.Signatures = append(i.Signatures, key.Sign([]byte(nix.Fingerprint(flox.DefaultStoreDir, i))))
		})
	}
	stranger, err := nix.GenerateKey("stranger-1")
	if err != nil {
		t.Fatal(err)
	}
	signed := signs(signs(good, have.nix[0]), stranger)
	refuse("a stranger's signature", flox.ErrUntrusted, blocks, signs(good, stranger))
	refuse("the signature of another path", flox.ErrUntrusted, blocks, changed(signed, func(i *flox.PathInfo) { i.Path = other.Path }))
	refuse("the signature of other content", flox.ErrUntrusted, otherBlocks, changed(signed, func(i *flox.PathInfo) {
		i.Manifest, i.NarHash, i.NarSize = other.Manifest, other.NarHash, other.NarSize
	}))
	refuse("another's content beside a signature", bad, otherBlocks, changed(signed, func(i *flox.PathInfo) { i.Manifest = other.Manifest }))
	refuse("another's content under its path", bad, otherBlocks, changed(good, func(i *flox.PathInfo) {
		i.Manifest, i.NarHash, i.NarSize = other.Manifest, other.NarHash, other.NarSize
	}))
	refuse("another's content that claims its NAR", bad, otherBlocks, changed(good, func(i *flox.PathInfo) { i.Manifest = other.Manifest }))
	refuse("another address", bad, blocks, changed(good, func(i *flox.PathInfo) { i.CA = other.CA }))
	refuse("another path", bad, blocks, changed(good, func(i *flox.PathInfo) { i.Path = other.Path }))
	refuse("another name", bad, blocks, changed(good, func(i *flox.PathInfo) { i.Path += "2" }))
	refuse("another size", bad, blocks, changed(good, func(i *flox.PathInfo) { i.NarSize++ }))
	refuse("no manifest", flox.ErrNotFound, blocks, changed(good, func(i *flox.PathInfo) { i.Manifest[0]++ }))
	absent, absentBlocks := textPath(t, "absent", append([]byte("absent "), text...))
	refuse("half of its blocks", flox.ErrNotFound, absentBlocks[1:], absent)
	loose, looseBlocks := textPath(t, "loose", text, "00000000000000000000000000000000-nobody")
	refuse("a reference nobody has", bad, looseBlocks, loose)
	user, userBlocks := textPath(t, "user", text, good.Path)
	refuse("a reference that comes behind", bad, append(slices.Clone(blocks), userBlocks...), user, good)

	forged := drvOf(t, "forged")
	forged.Args = []string{"something else"}
	drvText, err := forged.Marshal(flox.DefaultStoreDir)
	if err != nil {
		t.Fatal(err)
	}
	drv, drvBlocks := textPath(t, "forged.drv", drvText)
	refuse("a derivation that claims another's output", bad, drvBlocks, drv)
	noDrv, noDrvBlocks := textPath(t, "none.drv", text)
	refuse("a derivation that is none", bad, noDrvBlocks, noDrv)

	// The same content by a manifest of another making.
	odd, oddBlocks := oddManifest(t, text)
	refuse("an odd manifest", bad, oddBlocks, changed(good, func(i *flox.PathInfo) { i.Manifest = odd }))

	stream := m.store.TakePaths(ctx)
	_ = stream.Send(&floxv1.TakePathsRequest{Part: []byte("no frame")})
	if _, err := stream.CloseAndReceive(); !errors.Is(api.FromConnect(err), bad) {
		t.Errorf("no zstd frame: %v", err)
	}
	many := make([]*flox.PathInfo, maxTakePaths+1)
	for i := range many {
		many[i] = good
	}
	if _, err := m.take(ctx, partOf(nil, many...)); !errors.Is(err, bad) {
		t.Errorf("too many paths: %v", err)
	}
	for _, offer := range []*floxv1.OfferPathsRequest{{Paths: [][]byte{{1}}}, {Blocks: [][]byte{{1}}}, {Paths: make([][]byte, maxOfferPaths+1)}, {Blocks: make([][]byte, maxOfferBlocks+1)}} {
		if _, err := m.store.OfferPaths(ctx, connect.NewRequest(offer)); !errors.Is(api.FromConnect(err), bad) {
			t.Errorf("offer of %d paths, %d blocks: %v", len(offer.GetPaths()), len(offer.GetBlocks()), err)
		}
	}
	if out, err := m.take(ctx, partOf(blocks, good)); err != nil || out.GetAdded() != 1 {
		t.Errorf("the good one: %v, %v", out, err)
	}
	// What a key of ours signed enters, whoever brings it, and only that signature is kept.
	brought, broughtBlocks := textPath(t, "brought", text)
	brought = signs(signs(brought, have.nix[0]), stranger)
	if out, err := m.take(ctx, partOf(broughtBlocks, brought)); err != nil || out.GetAdded() != 1 {
		t.Errorf("the signed one: %v, %v", out, err)
	}
	if info, err := s.Info(ctx, brought.Path.HashPart()); err != nil || info.CA != "" || !slices.Equal(info.Signatures, brought.Signatures[:1]) {
		t.Errorf("the signed one is %+v, %v", info, err)
	}
}

// oddManifest is that of a file cut by other parameters than everybody's.
func oddManifest(t *testing.T, text []byte) (flox.CID, [][]byte) {
	t.Helper()
	r, err := nix.FileNar(uint64(len(text)), bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	own := &ownBlocks{}
	got, err := content.Ingest(t.Context(), r, own, content.IngestOptions{Workers: 1, Params: content.Params{MinChunk: 512, AvgChunk: 1024, MaxChunk: 2048, InlineLimit: 16}})
	if err != nil {
		t.Fatal(err)
	}
	return got.Manifest, own.blocks
}

// A machine that began an upload and sends nothing more holds up no other.
func TestIdleUploadsAreInNobodysWay(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	m := join(t, s.Invite())
	ctx := within(t)
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	idle, idleBlocks := textPath(t, "idle", []byte("idle"))
	b, err := proto.Marshal(partOf(idleBlocks, idle))
	if err != nil {
		t.Fatal(err)
	}
	for range maxTakes { // each has sent a part, and sends no more
		stream := m.store.TakePaths(ctx)
		if err := stream.Send(&floxv1.TakePathsRequest{Part: enc.EncodeAll(b, nil)}); err != nil {
			t.Fatal(err)
		}
		defer stream.CloseAndReceive() //nolint:errcheck // only ends it
	}
	eventually(t, "their parts are taken", func() bool { _, err := s.Info(ctx, idle.Path.HashPart()); return err == nil })
	info, blocks := textPath(t, "hurried", []byte("hurried"))
	if out, err := m.take(ctx, partOf(blocks, info)); err != nil || out.GetAdded() != 1 {
		t.Errorf("%v, %v", out, err)
	}
}

// Who is no member uploads nothing.
func TestStrangersUploadNothing(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	inv := *s.Invite()
	inv.Secret = bytes.Repeat([]byte{7}, len(inv.Secret))
	m := join(t, &inv)
	info, blocks := textPath(t, "x", []byte("x"))
	if out, err := m.take(within(t), partOf(blocks, info)); err == nil {
		t.Fatalf("it was taken: %v", out)
	}
	if _, err := s.Info(within(t), info.Path.HashPart()); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("it is valid: %v", err)
	}
}
