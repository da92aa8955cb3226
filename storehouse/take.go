package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/pack"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of what machines offer and upload.
const (
	maxOfferPaths  = 1 << 14
	maxOfferBlocks = 1 << 15
	maxTakePart    = 4 << 20 // bytes of a TakePart, plain
	maxTakePaths   = batchPaths
	maxTakes       = 8 // parts of uploads at once, half of them of one machine; the others wait
)

// OfferPaths is floxv1connect.StorehouseHandler. What it says of blocks is a hint:
// one may be collected before the upload ends, which then says so.
func (s *rpc) OfferPaths(ctx context.Context, req *connect.Request[floxv1.OfferPathsRequest]) (*connect.Response[floxv1.OfferPathsResponse], error) {
	out, err := s.offered(ctx, req.Msg)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(out), nil
}

func (s *rpc) offered(ctx context.Context, req *floxv1.OfferPathsRequest) (*floxv1.OfferPathsResponse, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	if n := len(req.GetPaths()); n > maxOfferPaths {
		return nil, fmt.Errorf("%d paths offered, want at most %d: %w", n, maxOfferPaths, flox.ErrBadInput)
	}
	ids, err := keysOf(req.GetBlocks(), maxOfferBlocks)
	if err != nil {
		return nil, err
	}
	out := &floxv1.OfferPathsResponse{}
	err = s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		for i, p := range req.GetPaths() {
			if len(p) != 20 {
				return fmt.Errorf("hash part of %d bytes, want 20: %w", len(p), flox.ErrBadInput)
			}
			_, err := r.Get(hashKey(infoKey, nix.EncodeBase32(p)))
			if errors.Is(err, flox.ErrNotFound) {
				out.LackingPaths = append(out.LackingPaths, uint32(i))
			} else if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	has, err := s.packs.Has(ctx, ids)
	for i, ok := range has {
		if !ok {
			out.LackingBlocks = append(out.LackingBlocks, uint32(i))
		}
	}
	return out, err
}

// TakePaths is floxv1connect.StorehouseHandler.
func (s *rpc) TakePaths(ctx context.Context, stream *connect.ClientStream[floxv1.TakePathsRequest]) (*connect.Response[floxv1.TakePathsResponse], error) {
	out, err := s.takePaths(ctx, stream)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(out), nil
}

func (s *rpc) takePaths(ctx context.Context, stream *connect.ClientStream[floxv1.TakePathsRequest]) (*floxv1.TakePathsResponse, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	plain, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxTakePart))
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	// Who the caller is its connection has proved.
	t := &take{Server: s.Server, by: "machine " + stream.Peer().Addr, session: s.packs.Session(), out: &floxv1.TakePathsResponse{}}
	defer t.session.Close()
	t.hasher = &nix.DrvHasher{Dir: s.cfg.StoreDir, Read: t.derivation}
	for stream.Receive() {
		// While a machine sends nothing it is in nobody's way.
		leave, err := s.takes.take(ctx, stream.Peer().Addr)
		if err != nil {
			return nil, err
		}
		err = t.packed(ctx, plain, stream.Msg().GetPart())
		leave()
		if err != nil {
			return nil, err
		}
	}
	return t.out, stream.Err()
}

// packed takes one part.
func (t *take) packed(ctx context.Context, plain *zstd.Decoder, packed []byte) error {
	b, err := plain.DecodeAll(packed, nil)
	part := &floxv1.TakePart{}
	if err == nil {
		err = proto.Unmarshal(b, part)
	}
	if err != nil {
		return fmt.Errorf("take paths: part of an upload: %w: %w", err, flox.ErrBadInput)
	}
	return t.part(ctx, part)
}

// take is one upload of a machine that nobody needs to trust.
type take struct {
	*Server
	by      string
	session *pack.Session
	hasher  *nix.DrvHasher
	batch   map[flox.StorePath]flox.CID // manifests of the part's paths that were checked
	out     *floxv1.TakePathsResponse
}

func (t *take) part(ctx context.Context, part *floxv1.TakePart) error {
	if len(part.GetPaths()) > maxTakePaths {
		return fmt.Errorf("take paths: %d in one part, want at most %d: %w", len(part.GetPaths()), maxTakePaths, flox.ErrBadInput)
	}
	// What a build needs comes before it runs, and from Essential on none begins.
	if err := t.disk.pause(ctx, float64(proto.Size(part))/paceStep); err != nil {
		return fmt.Errorf("take paths: %w", err)
	}
	for _, b := range part.GetBlocks() {
		if len(b) > content.MaxBlock {
			return fmt.Errorf("take paths: a block of %d bytes, want at most %d: %w", len(b), content.MaxBlock, flox.ErrBadInput)
		}
		if err := t.session.Put(ctx, content.Hash(b), b); err != nil {
			return fmt.Errorf("take paths: %w", err)
		}
	}
	if len(part.GetPaths()) == 0 {
		return nil
	}
	return t.paths(ctx, part.GetPaths())
}

// paths checks paths and makes them valid by one entry of the log.
func (t *take) paths(ctx context.Context, messages []*floxv1.PathInfo) error {
	infos := make([]*flox.PathInfo, len(messages))
	var held []flox.StorePath
	for i, m := range messages {
		info, err := api.ToPathInfo(m)
		if err != nil {
			return fmt.Errorf("take paths: %w", err)
		}
		infos[i] = info
		held = append(append(held, info.Path), info.References...)
	}
	release, err := t.Hold(ctx, held...)
	if err != nil {
		return err
	}
	defer release()
	t.batch = make(map[flox.StorePath]flox.CID, len(infos))
	for _, info := range infos {
		if err := t.check(ctx, info); err != nil {
			return fmt.Errorf("take paths: %w", err)
		}
		t.batch[info.Path] = info.Manifest
	}
	if err := t.session.Sync(ctx); err != nil {
		return fmt.Errorf("take paths: %w", err)
	}
	return t.commit(ctx, infos)
}

// check does not believe a word of info. Its own manifest is rebuilt from the NAR:
// another one with the same content would have another CID everywhere.
func (t *take) check(ctx context.Context, info *flox.PathInfo) error {
	info.ManifestSignatures = nil
	if err := t.vouched(ctx, info); err != nil {
		return err
	}
	if err := t.checkInfoBeside(ctx, info, t.batch); err != nil {
		return err
	}
	m, err := content.OpenManifest(ctx, info.Manifest, t.packs)
	if err != nil {
		return lacking(info, err)
	}
	if m.NarSize() != info.NarSize {
		return fmt.Errorf("%s: its manifest is of a NAR of %d bytes, its path info says %d: %w", info.Path, m.NarSize(), info.NarSize, flox.ErrBadInput)
	}
	got, err := t.ingest(ctx, m)
	if err != nil {
		return lacking(info, err)
	}
	if got.Manifest != info.Manifest {
		return fmt.Errorf("%s: its manifest is %s, not %s: %w", info.Path, got.Manifest, info.Manifest, flox.ErrBadInput)
	}
	if err := content.Check(info, got); err != nil {
		return err
	}
	if info.CA != "" {
		if err := content.CheckAddress(ctx, t.cfg.StoreDir, info, m, t.packs); err != nil {
			return err
		}
	}
	if !strings.HasSuffix(string(info.Path), nix.DrvExtension) {
		return nil
	}
	// Else a build of it could put what it likes at the path of another.
	d, err := t.read(ctx, info.Path, info.Manifest)
	if err == nil {
		err = d.CheckOutputs(t.cfg.StoreDir, t.hasher.Resolver(ctx))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", info.Path, err)
	}
	return nil
}

// vouched says whether there is reason to believe a path whose content is what info
// says: its own address, or the signature of a key of ours or of an upstream, whoever
// brings it. Of the signatures those that count stay.
func (t *take) vouched(ctx context.Context, info *flox.PathInfo) error {
	said := info.Signatures
	info.Signatures = nil
	if info.CA != "" {
		return nil // nobody needs one, and they would be kept for good
	}
	have, err := t.id.ring.get()
	if err != nil {
		return err
	}
	ours, err := nix.ParseKeyRing(public(have.nix))
	if err != nil {
		return err
	}
	rings := []nix.KeyRing{ours}
	ups, err := t.upstreams.current(ctx, cluster.Local)
	if err != nil {
		return err
	}
	for _, up := range ups {
		rings = append(rings, up.keys)
	}
	fingerprint := []byte(nix.Fingerprint(t.cfg.StoreDir, info))
	for _, sig := range said[:min(len(said), maxSignatures)] {
		if slices.ContainsFunc(rings, func(r nix.KeyRing) bool { _, ok := r.Verify(fingerprint, []string{sig}); return ok }) {
			info.Signatures = append(info.Signatures, sig)
		}
	}
	if len(info.Signatures) == 0 {
		return fmt.Errorf("%s has neither a content address nor the signature of a key that the storehouse goes by, and machines upload nothing else: %w", info.Path, flox.ErrUntrusted)
	}
	return nil
}

// lacking says that a block of an upload is missing, which its sender can mend.
func lacking(info *flox.PathInfo, err error) error {
	return fmt.Errorf("%s: %w; offer it again, and upload what is lacking then", info.Path, err)
}

// ingest takes in the NAR a manifest describes, as any other upload.
func (t *take) ingest(ctx context.Context, m *content.Manifest) (*content.Ingested, error) {
	if m.NarSize() <= content.MaxSmallNar {
		var nar bytes.Buffer
		if err := m.WriteNar(ctx, &nar, t.packs, 0, -1); err != nil {
			return nil, err
		}
		return content.IngestSmall(ctx, nar.Bytes(), t.session)
	}
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wrote := make(chan error, 1)
	go func() {
		err := m.WriteNar(ctx, w, t.packs, 0, -1)
		w.CloseWithError(err)
		wrote <- err
	}()
	got, err := content.Ingest(ctx, r, t.session, content.IngestOptions{})
	r.CloseWithError(io.ErrClosedPipe)
	if failed := <-wrote; failed != nil && !errors.Is(failed, io.ErrClosedPipe) {
		return nil, failed
	}
	return got, err
}

// derivation reads a derivation that is valid or was checked before.
func (t *take) derivation(ctx context.Context, p flox.StorePath) (*nix.Derivation, error) {
	if manifest, ok := t.batch[p]; ok {
		return t.read(ctx, p, manifest)
	}
	info, err := t.Info(ctx, p.HashPart())
	if err == nil && info.Path != p {
		err = fmt.Errorf("%s: %w", p, flox.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return t.read(ctx, p, info.Manifest)
}

func (t *take) read(ctx context.Context, p flox.StorePath, manifest flox.CID) (*nix.Derivation, error) {
	text, err := content.ReadText(ctx, manifest, t.packs, nix.MaxDerivation)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	return nix.ParseDerivation(t.cfg.StoreDir, strings.TrimSuffix(p.Name(), nix.DrvExtension), text)
}

// commit signs and places paths, and makes them valid.
func (t *take) commit(ctx context.Context, infos []*flox.PathInfo) error {
	have, err := t.id.ring.get()
	if err != nil {
		return fmt.Errorf("take paths: %w", err)
	}
	signed, manifests := make([]*flox.PathInfo, len(infos)), make([]flox.CID, len(infos))
	for i, info := range infos {
		signed[i], manifests[i] = have.sign(t.cfg.StoreDir, info, info.Manifest), info.Manifest
	}
	placed, err := t.place(ctx, manifests...)
	if err != nil {
		return fmt.Errorf("take paths: %w", err)
	}
	reply, err := t.Server.batch.addAll(ctx, signed, "", t.by, placed)
	if err != nil {
		return fmt.Errorf("take paths: %w", err)
	}
	for _, d := range reply.GetDifferences() {
		for _, info := range infos {
			if d.GetPath() == string(info.Path) && [32]byte(d.GetOfferedNarHash()) == info.NarHash {
				return t.differs(info, d, t.by)
			}
		}
	}
	t.out.Paths += uint32(len(infos))
	for _, info := range infos {
		if slices.Contains(reply.GetAdded(), string(info.Path)) {
			t.out.Added++
		}
	}
	t.out.Index = max(t.out.Index, reply.GetIndex())
	return nil
}
