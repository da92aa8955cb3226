package agent

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/p2p"
)

// knowingMany is a storehouse that tells of a closure whatever was asked for.
type knowingMany struct {
	floxv1connect.UnimplementedFactsHandler
	infos  []*flox.PathInfo
	sigs   []string
	before func(ctx context.Context)
	asked  *atomic.Int32
}

func (k knowingMany) Paths(ctx context.Context, _ *connect.Request[floxv1.PathsRequest]) (*connect.Response[floxv1.PathsResponse], error) {
	k.asked.Add(1)
	if k.before != nil {
		k.before(ctx)
	}
	out := &floxv1.PathsResponse{Index: 5, FoundSignatures: k.sigs}
	for _, info := range k.infos {
		out.Found = append(out.Found, api.FromPathInfo(info))
	}
	return connect.NewResponse(out), nil
}

// many are signed infos.
func (w *town) many(n int) []*flox.PathInfo {
	infos := make([]*flox.PathInfo, n)
	for i := range infos {
		infos[i] = w.fact(i)
		infos[i].Manifest[2] = byte(i >> 8)
		sign(infos[i], w.key)
	}
	return infos
}

// written waits until the facts of a path are on the disk.
func written(t *testing.T, r *resolver, info *flox.PathInfo) {
	t.Helper()
	until(t, "it is on the disk", func() bool { _, ok := r.facts.read(info.Path.HashPart()); return ok })
}

// TestALargeAnswerIsKnownAtOnce: of a closure each path is looked up without asking
// again, and a forged one among them is refused.
func TestALargeAnswerIsKnownAtOnce(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	infos := w.many(3 * fewFacts)
	forged := infos[7]
	forged.NarSize++
	house := knowingMany{infos: infos, asked: new(atomic.Int32)}
	w.houses["house"] = house
	r := w.resolver()
	for i, info := range infos {
		if info == forged {
			continue
		}
		got, err := r.lookup(within(t, time.Minute), info.Path)
		if err != nil || got.Manifest != info.Manifest {
			t.Fatalf("path %d: %v, %v", i, got, err)
		}
	}
	if n := house.asked.Load(); n != 1 {
		t.Errorf("the storehouse was asked %d times, want once", n)
	}
	for _, info := range infos {
		if info != forged {
			written(t, r, info)
		}
	}
	if _, ok := r.facts.get(forged.Path.HashPart()); ok {
		t.Error("a forged fact was kept")
	}
	until(t, "nothing comes any more", func() bool { r.facts.mu.RLock(); defer r.facts.mu.RUnlock(); return len(r.facts.coming) == 0 })
}

// TestAnAnswerSignedAsOne: one signature stands for those of its facts, as far as these
// name a key that is trusted; another's, or one over something else, does not.
func TestAnAnswerSignedAsOne(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	foreign := testKey(t, "k-1") // of the same name
	infos := w.many(2 * fewFacts)
	unverified := infos[1] // only the answer's signature is good
	sign(unverified, foreign)
	retired := infos[2]
	retired.ManifestSignatures = []string{testKey(t, "k-0").Sign([]byte(content.Statement(testStore, retired)))}
	statement := []byte(content.AnswerStatement(testStore, infos))
	for name, tt := range map[string]struct {
		sigs  []string
		takes bool
	}{
		"good":    {[]string{w.key.Sign(statement)}, true},
		"foreign": {[]string{foreign.Sign(statement)}, false},
		"other":   {[]string{w.key.Sign([]byte(content.AnswerStatement(testStore, infos[1:])))}, false},
		"none":    {nil, false},
	} {
		w := &town{t: t, key: w.key}
		r := w.resolver()
		found := make([]*floxv1.PathInfo, len(infos))
		for i, info := range infos {
			found[i] = api.FromPathInfo(info)
		}
		if err := r.take("house", infos[0].Path, found, tt.sigs); err != nil {
			t.Fatal(err)
		}
		if _, ok := r.facts.early(unverified.Path.HashPart()); ok != tt.takes {
			t.Errorf("%s: a fact that only the answer's signature vouches for: known %v", name, ok)
		}
		if _, ok := r.facts.get(retired.Path.HashPart()); ok {
			t.Errorf("%s: a fact with the signature of a key that is trusted no more was kept", name)
		}
		if _, ok := r.facts.get(infos[3].Path.HashPart()); !ok {
			t.Errorf("%s: a good fact was not kept", name)
		}
	}
}

// TestFactsThatCome: get waits until they are on the disk, and what is removed before
// does not get there.
func TestFactsThatCome(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	r := w.resolver()
	infos := w.many(2)
	c := newComing([]*floxv1.PathInfo{api.FromPathInfo(infos[0]), api.FromPathInfo(infos[1])})
	if !r.facts.announce(c) {
		t.Fatal("no room")
	}
	if got, ok := r.facts.early(infos[0].Path.HashPart()); !ok || got.Path != infos[0].Path {
		t.Errorf("early: %v %v", got, ok)
	}
	var waits sync.WaitGroup
	waits.Go(func() {
		if _, ok := r.facts.get(infos[0].Path.HashPart()); !ok {
			t.Error("get did not wait for what comes")
		}
	})
	if err := r.facts.remove(infos[1].Path.HashPart()); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.facts.early(infos[1].Path.HashPart()); ok {
		t.Error("it is known though it was removed")
	}
	time.Sleep(time.Millisecond) // get has begun, most likely
	if err := r.facts.settle(t.Context(), c, func(m *floxv1.PathInfo, err error) { t.Errorf("%s: %v", m.GetPath(), err) }); err != nil {
		t.Fatal(err)
	}
	waits.Wait()
	if _, ok := r.facts.get(infos[1].Path.HashPart()); ok {
		t.Error("what was removed came back")
	}
	full := newComing(nil)
	for range maxComing + 1 {
		full.all = append(full.all, &comingFact{message: proto.CloneOf(c.all[0].message), hash: hashPart(len(full.all) + 10), of: full})
	}
	if r.facts.announce(full) {
		t.Error("there is no bound")
	}
}

// TestAPeerThatIsFasterDoesNotEndTheQuestion: the storehouse's answer has the closure.
func TestAPeerThatIsFasterDoesNotEndTheQuestion(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	infos := w.many(3)
	told := make(chan struct{})
	w.connected = []p2p.PeerID{"house", "a"}
	w.houses["a"] = knowing{info: infos[0]}
	w.houses["house"] = knowingMany{infos: infos, asked: new(atomic.Int32), before: func(ctx context.Context) {
		select {
		case <-told:
		case <-ctx.Done():
		}
	}}
	r := w.resolver()
	ctx, cancel := context.WithCancel(within(t, time.Minute))
	got, err := r.round(ctx, infos[0].Path, map[p2p.PeerID]bool{})
	cancel()
	if err != nil || got.Path != infos[0].Path {
		t.Fatalf("%v %v, want it of the peer", got, err)
	}
	close(told)
	written(t, r, infos[2])
	until(t, "no question is left", func() bool { return r.overtaken.Load() == 0 })
	for range maxOvertaken {
		r.overtake(t.Context(), func() bool { return true })
	}
	r.overtake(t.Context(), func() bool { t.Error("there is no bound"); return true })
}
