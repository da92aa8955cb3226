package agent

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

func TestPathsComeIntoBeingAndGoAsTheStorehouseSays(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	data := randomBytes(1, 300_000)
	info := h.make(t, "late", nil, testFile{name: "f", data: data})
	a, _ := runAgent(t, h, nil, nil)
	ctx := within(t, 40*time.Second)
	following(t, a)
	missing := func() error { _, _, err := a.store.Lookup(ctx, string(info.Path), flox.Reader{}); return err }
	if err := missing(); !errors.Is(err, flox.ErrNotFound) {
		t.Fatalf("before it is valid: %v", err)
	}
	h.set(func() { h.asked = 0 })
	if err := missing(); !errors.Is(err, flox.ErrNotFound) || h.asked != 0 {
		t.Errorf("asked again: %v, %d calls", err, h.asked)
	}
	h.publish(info)
	until(t, "the path is valid", func() bool { return missing() == nil })

	tr := treeOf(ctx, t, a, info.Path)
	f := entryOf(ctx, t, tr, "f")
	h.remove(info.Path)
	until(t, "the path is gone", func() bool { return errors.Is(missing(), flox.ErrNotFound) })
	// Who has it open reads on, also from a process started anew.
	a.store.mu.Lock()
	clear(a.store.trees)
	a.store.mu.Unlock()
	again, err := a.store.Tree(ctx, info.Manifest, flox.Reader{})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, len(data))
	if n, err := again.ReadAt(ctx, f, p, 0, flox.Reader{}); err != nil || string(p[:n]) != string(data) {
		t.Errorf("a removed path read on: %d bytes, %v", n, err)
	}
}

// What became valid while the stream was down is told some time after it is up
// again; until then nothing may be answered from memory.
func TestAfterAReconnectionOldAnswersAreNotUsed(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	info := h.make(t, "meanwhile", nil, testFile{name: "f", data: []byte("x")})
	a, _ := runAgent(t, h, nil, nil)
	ctx := within(t, 40*time.Second)
	following(t, a)
	if _, _, err := a.store.Lookup(ctx, string(info.Path), flox.Reader{}); !errors.Is(err, flox.ErrNotFound) {
		t.Fatal(err)
	}
	h.set(func() { h.hold = true })
	h.publish(info)
	h.endStreams()
	until(t, "the stream ended", func() bool { return !a.follower.state().connected })
	following(t, a)
	if _, _, err := a.store.Lookup(ctx, string(info.Path), flox.Reader{}); err != nil {
		t.Errorf("valid since before the stream came back: %v", err)
	}
	index := a.follower.state().index
	h.set(func() { h.hold = false })
	until(t, "the stream goes on where it ended", func() bool { return a.follower.state().index > index })
}

func TestAStorehousesLogGoesBackOnlyInANewEpoch(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	info := h.make(t, "new", nil, testFile{name: "f", data: []byte("x")})
	h.set(func() { h.index = 1000 })
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	a.facts.mu.RLock()
	first := a.facts.trust
	a.facts.mu.RUnlock()
	second, b2 := trustList(t, first, h.key, h.key)
	_, b3 := trustList(t, second, h.key, h.key)
	h.set(func() { h.lists = append(h.lists, b2, b3) })
	h.endStreams()
	until(t, "the newest list is accepted", func() bool { return a.facts.trustVersion() == 3 })
	listed := func() (names []string) {
		for _, n := range a.valid.merge(within(t, time.Minute), nil, "", 10) {
			names = append(names, n.Name)
		}
		return names
	}
	gone := h.make(t, "gone", nil, testFile{name: "f", data: []byte("y")})
	h.publish(gone)
	until(t, "the path is heard of", func() bool { return a.follower.state().index == 1001 })
	if got := listed(); !slices.Equal(got, []string{string(gone.Path)}) {
		t.Fatalf("listed %v", got)
	}
	h.set(func() { h.index, h.events, h.infos = 20, nil, map[string]*floxv1.PathInfo{} })
	h.endStreams()
	until(t, "a log that went back is refused", func() bool {
		l := a.follower.state()
		return !l.connected && errors.Is(l.err, flox.ErrUntrusted) && strings.Contains(l.err.Error(), "new epoch")
	})
	_, b := laterTrustList(t, first, 2, h.key, h.key) // the backup is from before the others
	h.set(func() { h.lists = [][]byte{h.lists[0], b} })
	until(t, "the lower index is taken", func() bool { return a.follower.state().index == 20 })
	if got := listed(); len(got) != 0 {
		t.Errorf("listed %v of the epoch before", got)
	}
	if _, _, err := a.store.Lookup(within(t, time.Minute), string(info.Path), flox.Reader{}); !errors.Is(err, flox.ErrNotFound) {
		t.Fatal(err)
	}
	h.publish(info)
	until(t, "an addition is heard of", func() bool { return a.follower.state().index == 21 })
	if _, _, err := a.store.Lookup(within(t, time.Minute), string(info.Path), flox.Reader{}); err != nil {
		t.Error(err)
	}
}

func TestNewTrustListsAreHeardOf(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, stop := runAgent(t, h, nil, nil)
	following(t, a)
	next := testKey(t, "next-1")
	a.facts.mu.RLock()
	first := a.facts.trust
	a.facts.mu.RUnlock()
	_, b := trustList(t, first, h.key, h.key, next)
	h.set(func() { h.lists = append(h.lists, b) })
	h.endStreams()
	until(t, "the list is accepted", func() bool { return a.facts.trustVersion() == 2 })
	h.key = next
	info := h.make(t, "rotated", nil, testFile{name: "f", data: []byte("x")})
	h.publish(info)
	if _, _, err := a.store.Lookup(within(t, time.Minute), string(info.Path), flox.Reader{}); err != nil {
		t.Errorf("signed with the new key: %v", err)
	}
	stop()
}

// The tracker forgets, restarts, and is away when the agent starts: it is told
// all the same, and of kept paths too.
func TestTheTrackerIsToldOfWhatIsUsedAndKept(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	used := h.make(t, "used", nil, testFile{name: "bin/x", data: randomBytes(1, 5000), exec: true})
	kept := h.make(t, "kept", nil, testFile{name: "f", data: randomBytes(2, 5000)})
	h.publish(used, kept)
	a, _ := runAgent(t, h, nil, nil)
	ctx := within(t, 40*time.Second)
	tr := treeOf(ctx, t, a, used.Path)
	if _, err := tr.ReadAt(ctx, entryOf(ctx, t, tr, "bin/x"), make([]byte, 10), 0, flox.Reader{}); err != nil {
		t.Fatal(err)
	}
	if err := a.keep(ctx, kept); err != nil {
		t.Fatal(err)
	}
	a.executed.again()
	until(t, "the tracker knows both", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		found := 0
		for _, k := range h.told {
			for _, p := range []flox.StorePath{used.Path, kept.Path} {
				if flox.CID(k) == p2p.PathKey(p) {
					found++
				}
			}
		}
		return found == 2
	})
}
