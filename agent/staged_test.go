package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/staging"
	"github.com/floxctl/flox/nix"
)

// takeBook is what machines uploaded to a house of the tests.
type takeBook struct {
	offers int // calls of OfferPaths
	takes  int // calls of TakePaths
	blocks int // that came
	lose   int // say so often that a block of an upload is lacking
	parts  int
}

// OfferPaths implements floxv1connect.StorehouseHandler.
func (h *house) OfferPaths(_ context.Context, req *connect.Request[floxv1.OfferPathsRequest]) (*connect.Response[floxv1.OfferPathsResponse], error) {
	out := &floxv1.OfferPathsResponse{}
	h.set(func() {
		h.takes.offers++
		for i, p := range req.Msg.GetPaths() {
			if h.infos[nix.EncodeBase32(p)] == nil {
				out.LackingPaths = append(out.LackingPaths, uint32(i))
			}
		}
		for i, b := range req.Msg.GetBlocks() {
			if _, ok := h.blocks[flox.CID(b)]; !ok {
				out.LackingBlocks = append(out.LackingBlocks, uint32(i))
			}
		}
	})
	return connect.NewResponse(out), nil
}

// TakePaths implements floxv1connect.StorehouseHandler. What it checks, the tests of
// the storehouse look after; here a path must have its blocks, and its references.
func (h *house) TakePaths(ctx context.Context, stream *connect.ClientStream[floxv1.TakePathsRequest]) (*connect.Response[floxv1.TakePathsResponse], error) {
	dec, err := zstd.NewReader(nil)
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	out := &floxv1.TakePathsResponse{}
	h.set(func() { h.takes.takes++ })
	for stream.Receive() {
		b, err := dec.DecodeAll(stream.Msg().GetPart(), nil)
		part := &floxv1.TakePart{}
		if err = errors.Join(err, proto.Unmarshal(b, part)); err != nil {
			return nil, err
		}
		for _, b := range part.GetBlocks() {
			if err := h.Put(ctx, content.Hash(b), b); err != nil {
				return nil, err
			}
		}
		lost := false
		h.set(func() {
			h.takes.blocks += len(part.GetBlocks())
			h.takes.parts++
			if lost = h.takes.lose > 0; lost {
				h.takes.lose--
			}
		})
		for _, m := range part.GetPaths() {
			info, err := api.ToPathInfo(m)
			if err == nil {
				err = h.takeOne(ctx, info, lost)
			}
			if err != nil {
				return nil, api.ToConnect(err)
			}
			out.Paths++
		}
	}
	return connect.NewResponse(out), stream.Err()
}

func (h *house) takeOne(ctx context.Context, info *flox.PathInfo, lost bool) error {
	m, err := content.NewPageCache(0).Open(ctx, info.Manifest, h)
	if err != nil {
		return err
	}
	var nar bytes.Buffer
	if err := m.WriteNar(ctx, &nar, h, 0, -1); err != nil || lost {
		return errors.Join(err, flox.ErrNotFound)
	}
	for _, ref := range info.References {
		ok := false
		h.set(func() { ok = h.infos[ref.HashPart()] != nil })
		if !ok {
			return fmt.Errorf("%s refers to %s: %w", info.Path, ref, flox.ErrBadInput)
		}
	}
	sign(info, h.key)
	h.publish(info)
	return nil
}

// readWhole reads a file of the mount's store through ReadAt.
func readWhole(t *testing.T, a *Agent, path flox.StorePath, index uint32) []byte {
	t.Helper()
	id, _, err := a.store.Lookup(within(t, 5*time.Second), string(path), flox.Reader{})
	if err != nil {
		t.Fatal(err)
	}
	tree, err := a.store.Tree(within(t, 5*time.Second), id, flox.Reader{})
	if err != nil {
		t.Fatal(err)
	}
	e, err := tree.Entry(t.Context(), index)
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, e.Size)
	for off := 0; off < len(out); {
		n, err := tree.ReadAt(within(t, 5*time.Second), index, out[off:min(len(out), off+50_000)], int64(off), flox.Reader{})
		if err != nil || n == 0 {
			t.Fatal(n, err)
		}
		off += n
	}
	return out
}

func addText(t *testing.T, a *Agent, name string, text []byte, refs ...flox.StorePath) *staging.Path {
	t.Helper()
	p, err := a.Staged().AddText(within(t, time.Minute), name, text, refs)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// What is added is in the mount at once, also for the next process, with the
// storehouse away; and nobody else gets to know it.
func TestStagedPathsAreInTheMountAndNowhereElse(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	state := t.TempDir()
	same := func(c *Config) { c.StateDir, c.Socket = filepath.Join(state, "state"), filepath.Join(state, "a.sock") }
	a, stop := runAgent(t, h, same, nil)
	following(t, a)
	small, large := []byte("small"), randomBytes(3, 900_000)
	paths := map[flox.StorePath][]byte{}
	for name, text := range map[string][]byte{"small": small, "large": large, "middle": large[:5000]} {
		paths[addText(t, a, name, text).Info.Path] = text
	}
	addText(t, a, "twin", small)
	check := func(a *Agent) {
		t.Helper()
		var blocks []flox.CID
		for p, text := range paths {
			if got := readWhole(t, a, p, 0); !bytes.Equal(got, text) {
				t.Errorf("%s: %d bytes, want %d", p, len(got), len(text))
			}
			info, err := a.lookup(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			m, err := a.pages.Open(t.Context(), info.Manifest, a.staged)
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Blocks(t.Context(), func(id flox.CID, _ uint32) bool { blocks = append(blocks, id); return true }); err != nil {
				t.Fatal(err)
			}
			// Peers ask for facts by hash part.
			answer, err := (&factsServer{facts: a.facts}).Paths(t.Context(), connect.NewRequest(&floxv1.PathsRequest{HashParts: []string{p.HashPart()}}))
			if err != nil || len(answer.Msg.GetFound()) > 0 {
				t.Errorf("a peer hears of %s: %v, %v", p, answer, err)
			}
		}
		if slices.Contains(holder{a.cache}.Has(blocks), true) {
			t.Error("peers are served staged blocks")
		}
		names, err := a.store.Names(t.Context(), "", 100)
		var got []flox.StorePath
		for _, n := range names {
			if n.Manifest.IsZero() {
				t.Errorf("%s has no manifest", n.Name)
			}
			if p := flox.StorePath(n.Name); p.Name() != "twin" {
				got = append(got, p)
			}
		}
		if want := slices.Sorted(maps.Keys(paths)); !slices.Equal(got, want) || err != nil {
			t.Errorf("the directory has %v, want %v, %v", got, want, err)
		}
		if m := a.stagedMessage(); m.GetPaths() != 4 || m.GetUploaded() != 0 || m.GetBytes() < 900_000 || a.stagedBytes.Load() < 900_000 {
			t.Errorf("%v, %d of the budget", m, a.stagedBytes.Load())
		}
	}
	check(a)
	if asked := h.takes.offers; asked != 0 {
		t.Errorf("the storehouse was asked %d times", asked)
	}
	if _, _, err := a.store.Lookup(within(t, time.Second), string(addText(t, a, "x", small).Info.Path)+"y", flox.Reader{}); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("another name with the hash part of a staged one: %v", err)
	}
	if n, err := a.CollectStaged(t.Context(), func(p *staging.Path) bool { return p.Info.Path.Name() != "x" }); n != 1 || err != nil {
		t.Errorf("%d collected, %v", n, err)
	}
	stop()
	h.stop()
	a, _ = runAgent(t, h, same, nil)
	check(a)
}

// What the storehouse lacks of a closure is there after one question and one
// upload; what it has is not sent.
func TestPublishStagedSendsWhatIsLacking(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	large := randomBytes(4, 5<<20)
	base := addText(t, a, "base", large[:3000])
	tree := addText(t, a, "large", large, base.Info.Path)
	var last *staging.Path
	for i := range 1200 {
		refs := []flox.StorePath{base.Info.Path, tree.Info.Path}
		if last != nil {
			refs = append(refs, last.Info.Path)
		}
		last = addText(t, a, fmt.Sprint("t", i), fmt.Append(nil, "text ", i, string(large[:400])), refs...)
	}
	other := addText(t, a, "other", []byte("nobody needs it"))
	done, err := a.PublishStaged(within(t, time.Minute), last.Info.Path)
	if err != nil || done.Paths != 1202 || h.takes.offers != 1 || h.takes.takes != 1 || h.takes.blocks != done.Blocks {
		t.Fatalf("%+v, %v; %+v", done, err, h.takes)
	}
	if h.infos[other.Info.Path.HashPart()] != nil {
		t.Error("a path that nobody needs was uploaded")
	}
	if m := a.stagedMessage(); m.GetUploaded() != 1202 {
		t.Errorf("%v", m)
	}
	again, err := a.PublishStaged(within(t, time.Minute), last.Info.Path)
	if err != nil || again != (Uploaded{}) || h.takes.offers != 2 || h.takes.takes != 1 {
		t.Errorf("again: %+v, %v; %+v", again, err, h.takes)
	}
	// Most of it is there already.
	near := addText(t, a, "near", slices.Concat(large, []byte("more")))
	done, err = a.PublishStaged(within(t, time.Minute), near.Info.Path)
	if err != nil || done.Paths != 1 || done.Bytes > 1<<20 || done.Blocks == 0 {
		t.Errorf("a path like another: %+v, %v", done, err)
	}
	// It was collected there meanwhile.
	h.set(func() { delete(h.infos, base.Info.Path.HashPart()); h.takes.lose = 1; clear(h.blocks) })
	done, err = a.PublishStaged(within(t, time.Minute), base.Info.Path)
	if err != nil || done.Paths != 1 || h.infos[base.Info.Path.HashPart()] == nil {
		t.Errorf("what was collected: %+v, %v", done, err)
	}
}

// A server that only follows may answer with what it knew some time ago, but not from
// before the storehouse last did something for this machine.
func TestAnswersAreNoOlderThanWhatThisMachineHadDone(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	allowed := func(name string) (age time.Duration) {
		t.Helper()
		info := h.make(t, name, nil, testFile{name: "f", data: []byte(name)})
		if _, _, err := a.store.Lookup(within(t, 40*time.Second), string(info.Path), flox.Reader{}); !errors.Is(err, flox.ErrNotFound) {
			t.Fatal(err)
		}
		h.set(func() { age = h.maxAge })
		return age
	}
	a.houses.mu.Lock()
	a.houses.wroteAt = time.Now().Add(-time.Hour)
	a.houses.mu.Unlock()
	if got := allowed("one"); got != oldAnswer {
		t.Errorf("an answer may be %v old, want %v", got, oldAnswer)
	}
	if _, err := a.PublishStaged(within(t, time.Minute), addText(t, a, "up", []byte("text")).Info.Path); err != nil {
		t.Fatal(err)
	}
	if got := allowed("two"); got >= oldAnswer {
		t.Errorf("right after an upload an answer may be %v old", got)
	}
}

// Once the storehouse has signed it, a path is no longer staged, and reads on.
func TestUploadedPathsLeaveTheStagingStore(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	text := randomBytes(5, 700_000)
	up, stays := addText(t, a, "up", text), addText(t, a, "stays", text[:1000])
	if _, err := a.PublishStaged(within(t, time.Minute), up.Info.Path); err != nil {
		t.Fatal(err)
	}
	id, forever, err := a.store.Lookup(within(t, 5*time.Second), string(up.Info.Path), flox.Reader{})
	if err != nil {
		t.Fatal(err)
	}
	if forever { // by the kernel, though it may be deleted
		t.Error("a staged name is cached for ever")
	}
	open, err := a.store.Tree(t.Context(), id, flox.Reader{})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.tidyStaged(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.staged.Path(up.Info.Path); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("it is staged still: %v", err)
	}
	if _, err := a.staged.Path(stays.Info.Path); err != nil {
		t.Error(err)
	}
	if err := a.staged.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := readWhole(t, a, up.Info.Path, 0); !bytes.Equal(got, text) {
		t.Error("it reads otherwise")
	}
	if _, forever, err := a.store.Lookup(within(t, 5*time.Second), string(up.Info.Path), flox.Reader{}); !forever || err != nil {
		t.Errorf("a signed name is asked for each time: %v", err)
	}
	p := make([]byte, 1000) // by who had it open
	if n, err := open.ReadAt(within(t, 5*time.Second), 0, p, 1000, flox.Reader{}); err != nil || !bytes.Equal(p[:n], text[1000:2000]) {
		t.Errorf("who has it open reads %d, %v", n, err)
	}
}

// A path without a content address is this machine's own business.
func TestPublishStagedRefusesWhatNobodyCanCheck(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	r, err := nix.FileNar(1, bytes.NewReader([]byte("x")))
	if err != nil {
		t.Fatal(err)
	}
	p, err := a.Staged().Add(t.Context(), &flox.PathInfo{Path: "11111111111111111111111111111111-glibc"}, r, staging.AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.PublishStaged(within(t, time.Minute), p.Info.Path); !errors.Is(err, flox.ErrUntrusted) || h.takes.takes != 0 {
		t.Errorf("it was published: %v", err)
	}
}
