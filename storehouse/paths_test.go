package storehouse

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// factLog is the processor in a log of its own, without a server around it.
type factLog struct {
	*Server
	t *testing.T
}

func newFactLog(t *testing.T, p paths) *factLog {
	t.Helper()
	return &factLog{&Server{node: newLog(t, pathsKind, p)}, t}
}

// newLog runs a log of one server with one processor.
func newLog(t *testing.T, kind uint32, p cluster.Processor) *cluster.Node {
	t.Helper()
	n, err := cluster.Open(cluster.Config{Dir: t.TempDir(), ID: "a", Bootstrap: true, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	n.Register(kind, p)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	if err := n.Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	return n
}

func (f *factLog) do(c *floxv1.PathsCommand) (*floxv1.PathsReply, error) {
	return propose(within(f.t), f.node.NewSession(), c)
}

// add proposes paths whose manifest is made up.
func (f *factLog) add(paths ...testPath) (*floxv1.PathsReply, error) {
	c := &floxv1.AddPaths{Publisher: "tester"}
	for _, p := range paths {
		p.info.Manifest = flox.CID{1}
		c.Paths = append(c.Paths, api.FromPathInfo(p.info))
	}
	return f.do(&floxv1.PathsCommand{Command: &floxv1.PathsCommand_Add{Add: c}})
}

func (f *factLog) remove(paths ...testPath) error {
	c := &floxv1.RemovePaths{}
	for _, p := range paths {
		c.Paths = append(c.Paths, string(p.info.Path))
	}
	_, err := f.do(&floxv1.PathsCommand{Command: &floxv1.PathsCommand_Remove{Remove: c}})
	return err
}

func (f *factLog) valid(p testPath) bool {
	_, err := f.Info(within(f.t), p.info.Path.HashPart())
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		f.t.Fatal(err)
	}
	return err == nil
}

// Paths become valid all or none, in order; a reference must be there before.
func TestAddAllOrNone(t *testing.T) {
	t.Parallel()
	f := newFactLog(t, paths{})
	a := makePath(t, "a", 1)
	b := makePath(t, "b", 1, a.info.Path)
	c := makePath(t, "c", 1, makePath(t, "none", 1).info.Path)
	for name, list := range map[string][]testPath{"reference later": {b, a}, "reference nowhere": {a, c}, "none": {}} {
		if _, err := f.add(list...); !errors.Is(err, cluster.ErrRefused) || !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v, want refused", name, err)
		}
	}
	if f.valid(a) || f.valid(b) || f.valid(c) {
		t.Fatal("part of a refused list is valid")
	}
	reply, err := f.add(a, b, a)
	if err != nil || len(reply.GetAdded()) != 2 {
		t.Fatalf("%v %v", reply, err)
	}
	if !f.valid(a) || !f.valid(b) {
		t.Error("not valid after it was answered")
	}
	counts, index, err := f.counts(within(t))
	if err != nil || counts.paths != 2 || counts.narBytes != a.info.NarSize+b.info.NarSize || index != reply.GetIndex() {
		t.Errorf("counts %+v at %d, %v", counts, index, err)
	}
}

// A path goes only when nothing else refers to it, and can come back.
func TestRemove(t *testing.T) {
	t.Parallel()
	f := newFactLog(t, paths{})
	a := makePath(t, "a", 1)
	b := makePath(t, "b", 1, a.info.Path)
	b.info.References = append(b.info.References, b.info.Path)
	if b.info.References[0] > b.info.References[1] {
		b.info.References[0], b.info.References[1] = b.info.References[1], b.info.References[0]
	}
	if _, err := f.add(a, b); err != nil {
		t.Fatal(err)
	}
	if err := f.remove(a); !errors.Is(err, flox.ErrBusy) || !f.valid(a) {
		t.Errorf("referred to: %v", err)
	}
	if err := f.remove(a, b, makePath(t, "none", 1)); err != nil || f.valid(a) || f.valid(b) {
		t.Errorf("both: %v", err)
	}
	if counts, _, err := f.counts(within(t)); err != nil || counts.paths != 0 || counts.narBytes != 0 {
		t.Errorf("counts %+v %v", counts, err)
	}
	if _, err := f.add(a); err != nil {
		t.Error(err)
	}
	if err := f.remove(a); err != nil {
		t.Errorf("b is gone, but: %v", err)
	}
}

// Trust lists follow each other by signature; the chain is kept.
func TestTrustChain(t *testing.T) {
	t.Parallel()
	f := newFactLog(t, paths{})
	key, err := nix.GenerateKey("k-1")
	if err != nil {
		t.Fatal(err)
	}
	make1 := func(version uint64, prev flox.CID) ([]byte, flox.CID) {
		l := &content.TrustList{Version: version, Epoch: 1, NixKeys: []string{key.Public().String()}, ManifestKeys: []string{key.Public().String()}, Prev: prev}
		if err := l.Sign(key); err != nil {
			t.Fatal(err)
		}
		b, err1 := l.Marshal()
		id, err2 := l.Fingerprint()
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		return b, id
	}
	set := func(list []byte) error {
		_, err := f.do(&floxv1.PathsCommand{Command: &floxv1.PathsCommand_Trust{Trust: &floxv1.SetTrustList{List: list}}})
		return err
	}
	v1, id1 := make1(1, flox.CID{})
	v2, _ := make1(2, id1)
	forged, _ := make1(2, flox.CID{9})
	if err := set(v2); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("second before first: %v", err)
	}
	if err := errors.Join(set(v1), set(v1)); err != nil {
		t.Fatal(err)
	}
	if err := set(forged); !errors.Is(err, flox.ErrUntrusted) {
		t.Errorf("list of another chain: %v", err)
	}
	if err := set([]byte("{}")); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("garbage: %v", err)
	}
	if err := set(v2); err != nil {
		t.Fatal(err)
	}
	if err := set(v1); err == nil {
		t.Error("went back")
	}
	for have, want := range map[uint64][][]byte{0: {v1, v2}, 1: {v2}, 2: nil} {
		got, err := f.trustLists(within(t), have)
		if err != nil || cmp.Diff(want, got) != "" {
			t.Errorf("above %d: %d lists, %v", have, len(got), err)
		}
	}
}

// The list of changes is bounded; who slept through more is told to forget.
func TestChangesBounded(t *testing.T) {
	t.Parallel()
	f := newFactLog(t, paths{changes: 3})
	var index []uint64
	for i := range 6 {
		reply, err := f.add(makePath(t, fmt.Sprint("p", i), 1))
		if err != nil {
			t.Fatal(err)
		}
		index = append(index, reply.GetIndex())
	}
	for _, c := range []struct {
		after uint64
		reset bool
		names string
	}{
		{index[5], false, ""}, {index[3], false, "p4 p5"}, {index[2], false, "p3 p4 p5"}, {index[1], true, ""},
	} {
		events, upTo, reset, err := f.changes(within(t), c.after)
		var names []string
		for _, e := range events {
			for _, p := range e.GetAdded() {
				names = append(names, flox.StorePath(p).Name())
			}
		}
		if err != nil || reset != c.reset || upTo != index[5] || strings.Join(names, " ") != c.names {
			t.Errorf("after %d: %v, up to %d, reset %v, %v; want %q, reset %v", c.after, names, upTo, reset, err, c.names, c.reset)
		}
	}
	for _, c := range []struct {
		after uint64
		want  *floxv1.WatchEvent
	}{
		{0, &floxv1.WatchEvent{Index: index[5], Reset_: true}},
		{1, &floxv1.WatchEvent{Index: index[5], Reset_: true}},
		{index[5] + 100, &floxv1.WatchEvent{Index: index[5], Reset_: true}},
		{index[3], &floxv1.WatchEvent{Index: index[3], Heartbeat: true}},
	} {
		var got *floxv1.WatchEvent
		at, err := f.watchStart(within(t), c.after, func(e *floxv1.WatchEvent) error { got = e; return nil })
		if diff := cmp.Diff(c.want, got, protocmp.Transform()); err != nil || diff != "" || at != c.want.GetIndex() {
			t.Errorf("start after %d: at %d, %v, %s", c.after, at, err, diff)
		}
	}
}

// What this program does not know must stop the node, at any depth.
func TestUnknownFields(t *testing.T) {
	t.Parallel()
	p := makePath(t, "p", 1)
	p.info.Manifest = flox.CID{1}
	unknown := []byte{0xf8, 0x07, 1}
	deep := api.FromPathInfo(p.info)
	deep.ProtoReflect().SetUnknown(unknown)
	top := &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Remove{Remove: &floxv1.RemovePaths{}}}
	top.ProtoReflect().SetUnknown(unknown)
	for name, c := range map[string]*floxv1.PathsCommand{
		"path info": {Command: &floxv1.PathsCommand_Add{Add: &floxv1.AddPaths{Paths: []*floxv1.PathInfo{deep}}}},
		"command":   top,
		"nothing":   {},
	} {
		b, err := proto.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		f := newFactLog(t, paths{})
		if _, _, err := f.node.NewSession().Propose(within(t), pathsKind, b); !errors.Is(err, cluster.ErrUnknownCommand) {
			t.Errorf("%s: %v, want ErrUnknownCommand", name, err)
		}
	}
}

// BenchmarkPaths is how fast one server answers batches of 64 look-ups.
func BenchmarkPaths(b *testing.B) {
	n, err := cluster.Open(cluster.Config{Dir: b.TempDir(), ID: "a", Bootstrap: true})
	if err != nil {
		b.Fatal(err)
	}
	n.Register(pathsKind, paths{})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	defer func() { cancel(); <-done }()
	if err := n.Ready(ctx); err != nil {
		b.Fatal(err)
	}
	s := &Server{node: n}
	session := n.NewSession()
	var hashes []string
	for i := 0; i < 20_000; i += 500 {
		c := &floxv1.AddPaths{}
		for j := range 500 {
			p := makePath(b, fmt.Sprint("p", i+j), 1)
			p.info.Manifest = flox.CID{1}
			c.Paths = append(c.Paths, api.FromPathInfo(p.info))
			hashes = append(hashes, p.info.Path.HashPart())
		}
		if _, err := propose(ctx, session, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Add{Add: c}}); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	for i := range b.N {
		at := i * 64 % (len(hashes) - 64)
		out, err := s.answerPaths(ctx, &floxv1.PathsRequest{HashParts: hashes[at : at+64]})
		if err != nil || len(out.Found) != 64 {
			b.Fatal(len(out.GetFound()), err)
		}
	}
	b.ReportMetric(float64(b.N*64)/b.Elapsed().Seconds(), "infos/s")
}
