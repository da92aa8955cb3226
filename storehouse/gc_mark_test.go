package storehouse

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// madeUp is the i-th of many paths of which only facts exist.
func madeUp(i int) flox.StorePath {
	sum := sha256.Sum256(fmt.Appendf(nil, "made up %d", i))
	return flox.StorePath(nix.EncodeBase32(sum[:20]) + "-made-up")
}

// fillFacts makes n paths valid, each with up to refs references to earlier ones.
func fillFacts(t testing.TB, s *Server, n, refs int) (references [][]int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	session := s.node.NewSession()
	ctx := context.Background()
	c := &floxv1.AddPaths{}
	for i := range n {
		var to []int
		for range min(rng.IntN(refs+1), i) {
			to = append(to, rng.IntN(i))
		}
		slices.Sort(to)
		to = slices.Compact(to)
		references = append(references, to)
		info := &floxv1.PathInfo{Path: string(madeUp(i)), NarHash: make([]byte, 32), NarSize: 1, Manifest: make([]byte, flox.CIDSize)}
		for _, k := range to {
			info.References = append(info.References, string(madeUp(k)))
		}
		slices.Sort(info.References)
		if c.Paths = append(c.Paths, info); len(c.Paths) == 2000 || i == n-1 {
			if _, err := propose(ctx, session, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Add{Add: c}}); err != nil {
				t.Fatal(err)
			}
			c = &floxv1.AddPaths{}
		}
	}
	return references
}

// bareServer is as much of a server as marking needs.
func bareServer(t testing.TB) *Server {
	t.Helper()
	n, err := cluster.Open(cluster.Config{Dir: t.TempDir(), ID: "a", Bootstrap: true, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	n.Register(pathsKind, paths{})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	if err := n.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	return &Server{cfg: Config{Log: slog.New(slog.DiscardHandler)}, node: n, marker: n.NewSession(), holds: &holds{count: map[string]int{}}}
}

// Marking reaches what the references from the roots lead to, and nothing else.
func TestMarkReachesTheClosuresOfTheRoots(t *testing.T) {
	t.Parallel()
	s := bareServer(t)
	const n = 3000
	references := fillFacts(t, s, n, 2)
	want := map[int]bool{}
	var reach func(i int)
	reach = func(i int) {
		if !want[i] {
			want[i] = true
			for _, k := range references[i] {
				reach(k)
			}
		}
	}
	for i := 17; i < n; i += 211 {
		release, err := s.Hold(within(t), madeUp(i))
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		reach(i)
	}
	m, err := s.mark(within(t), time.Now().Add(time.Hour).UnixMilli(), nil, func(_, _ uint64) {})
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if p := madeUp(i); m.dead(p.HashPart()) == want[i] {
			t.Errorf("%s (%d) is dead: %v", p, i, want[i])
		}
	}
	if int(m.count) != len(want) || int(m.deadCount()) != n-len(want) || len(want) == n {
		t.Errorf("%d live and %d dead, want %d of %d live", m.count, m.deadCount(), len(want), n)
	}
	if m.dead(madeUp(n + 1).HashPart()) {
		t.Error("a path that was not valid is dead")
	}
	// All of it was registered lately.
	if m, err = s.mark(within(t), time.Now().Add(-time.Hour).UnixMilli(), nil, func(_, _ uint64) {}); err != nil || m.deadCount() != 0 {
		t.Errorf("%v: recent paths are dead", err)
	}
}

// Keys sort as names, and every one is found where it is.
func TestMarkKeys(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 2, 2000} {
		var hashParts []string
		m := &marking{}
		for i := range n {
			hashParts = append(hashParts, madeUp(i).HashPart())
		}
		slices.Sort(hashParts)
		for _, h := range hashParts {
			m.keys = append(m.keys, markKey(h))
		}
		if !slices.IsSorted(m.keys) {
			t.Error("keys do not sort as names")
		}
		for i, h := range hashParts {
			if at, ok := m.find(h); !ok || at != i {
				t.Errorf("%s found at %d %v, is at %d", h, at, ok, i)
			}
		}
		for i := range 100 {
			if at, ok := m.find(madeUp(n + i).HashPart()); ok {
				t.Errorf("what is not there is found at %d", at)
			}
		}
	}
}

// lateRoots is a source as a profile is one.
type lateRoots struct{ list []string }

func (l *lateRoots) roots(_ context.Context, _ *cluster.Reader, yield func(root) bool) error {
	for _, h := range l.list {
		yield(root{kind: "profile", name: "p", hashPart: h})
	}
	return nil
}

// What becomes a root while a collection waits stays, and why it stays can be told.
func TestWhyAndRoots(t *testing.T) {
	t.Parallel()
	cfg := quickGC(t.TempDir())
	cfg.CollectGrace = time.Minute
	late := &lateRoots{}
	s, _ := startChanged(t, cfg, func(s *Server) { s.moreRoots = append(s.moreRoots, late) })
	z := fillZoo(t, s)
	top, bottom := z.dead[4], z.dead[0]
	if why, err := s.Why(within(t), bottom.info.Path, false); err != nil || len(why.GetChains()) != 1 || why.GetChains()[0].GetRoot().GetKind() != rootRecent {
		t.Errorf("%v, %v: want one chain from what is recent", why, err)
	}
	aged()
	ctx, cancel := context.WithCancel(within(t))
	if err := s.Collect(ctx, soon, func(p *floxv1.CollectProgress) {
		if p.GetPhase() == phaseWait {
			cancel()
		}
	}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	late.list = []string{top.info.Path.HashPart()}
	s.cfg.CollectGrace = time.Millisecond
	if got := collect(t, s, CollectOptions{Resume: true}); got.GetDeadPaths() != 1 || stillValid(t, s, z.held) {
		t.Errorf("%v, want only held gone", got)
	}
	for _, d := range z.dead {
		checkWhole(t, s, d)
	}
	why, err := s.Why(within(t), bottom.info.Path, true)
	if err != nil || why.GetCondemned() {
		t.Fatal(why, err)
	}
	found := false
	for _, c := range why.GetChains() {
		if c.GetRoot().GetKind() == "profile" {
			found = c.GetRoot().GetName() == "p" && c.GetPaths()[0] == string(top.info.Path) && c.GetPaths()[len(c.GetPaths())-1] == string(bottom.info.Path)
		}
	}
	if !found {
		t.Errorf("no chain from the profile in %v", why)
	}
	checkRoots(t, s, z)
}

func checkRoots(t *testing.T, s *Server, z zoo) {
	t.Helper()
	kinds := func(path flox.StorePath, without string) map[string]string {
		roots, more, err := s.Roots(within(t), path)
		if err != nil || more {
			t.Fatal(more, err)
		}
		got := map[string]string{}
		for _, r := range roots {
			if r.GetKind() != without {
				got[r.GetKind()+" "+r.GetName()] = r.GetPath()
			}
		}
		return got
	}
	kept, machine := string(z.kept.info.Path), string(z.machine.info.Path)
	if got := kinds("", rootRecent); got["keep for the test"] != kept || got["machine peer"] != machine || len(got) != 3 {
		t.Errorf("roots %v", got)
	}
	if got := kinds(z.base.info.Path, rootRecent); got["keep for the test"] != kept || got["profile p"] == "" || len(got) != 2 {
		t.Errorf("roots of base %v", got)
	}
	for path, want := range map[flox.StorePath]error{makePath(t, "none", 1).info.Path: flox.ErrNotFound, "x": flox.ErrBadInput} {
		if _, err := s.Why(within(t), path, false); !errors.Is(err, want) {
			t.Errorf("why %s: %v", path, err)
		}
		if err := s.KeepPath(within(t), path, false, "", ""); !errors.Is(err, want) {
			t.Errorf("keep %s: %v", path, err)
		}
	}
}

// A machine's set is sent whole once, and again when the storehouse lost it.
func TestRenewRoots(t *testing.T) {
	t.Parallel()
	s := bareServer(t)
	f := &factLog{s, t}
	p := makePath(t, "p", 1)
	if _, err := f.add(p); err != nil {
		t.Fatal(err)
	}
	set, err := s.setRoots(within(t), "b", nil)
	if err != nil {
		t.Fatal(err)
	}
	setRoots(t, s, "a", p)
	err = s.read(within(t), cluster.Local, func(r *cluster.Reader) error {
		m, err := readMachineRoots(r, "a")
		copy(set[:], m.GetSet())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	renew := func(peer string) bool {
		before := s.node.Applied()
		unknown, err := s.renewRoots(within(t), peer, set[:])
		if err != nil {
			t.Fatal(err)
		}
		if unknown && s.node.Applied() != before {
			t.Error("an unknown set is in the log")
		}
		return unknown
	}
	before := s.node.Applied()
	if renew("a") || s.node.Applied() != before {
		t.Error("a renewal that changes nothing: unknown, or in the log")
	}
	if renew("b") { // the same set as a's
		t.Error("b has to send what is known")
	}
	setRoots(t, s, "a")
	if renew("b") {
		t.Error("b's set went with a's")
	}
	if err := s.forgetRoots(within(t), time.Now().Add(rootsTTL-time.Hour)); err != nil || renew("b") {
		t.Errorf("forgotten too soon: %v", err)
	}
	if err := s.forgetRoots(within(t), time.Now().Add(rootsTTL+time.Hour)); err != nil || !renew("b") {
		t.Errorf("not forgotten: %v", err)
	}
	if _, err := s.renewRoots(within(t), "a", []byte{1}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("a short name: %v", err)
	}
}

// BenchmarkMark is how long marking a million paths takes, and what memory.
func BenchmarkMark(b *testing.B) {
	s := bareServer(b)
	const n = 1_000_000
	fillFacts(b, s, n, 10)
	var held []flox.StorePath
	for i := n - 20_000; i < n; i++ { // what reaches nearly everything
		held = append(held, madeUp(i))
	}
	release, err := s.Hold(context.Background(), held...)
	if err != nil {
		b.Fatal(err)
	}
	defer release()
	b.ResetTimer()
	for range b.N {
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		m, err := s.mark(context.Background(), time.Now().Add(time.Hour).UnixMilli(), nil, func(_, _ uint64) {})
		if err != nil {
			b.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/path")
		b.ReportMetric(float64(m.count), "live")
	}
}
