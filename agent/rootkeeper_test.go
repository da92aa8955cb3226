package agent

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/content"
)

// rootBook is a storehouse's end of what machines hold on to.
type rootBook struct {
	floxv1connect.UnimplementedMembershipHandler
	roll *roll // nil = a storehouse that does not tell its members

	mu      sync.Mutex
	set     content.RootSet
	renewed int
	sent    int
	broken  error
}

// WatchMembers is floxv1connect.MembershipHandler.
func (b *rootBook) WatchMembers(ctx context.Context, req *connect.Request[floxv1.WatchMembersRequest], stream *connect.ServerStream[floxv1.MembersEvent]) error {
	if b.roll == nil {
		return b.UnimplementedMembershipHandler.WatchMembers(ctx, req, stream)
	}
	return b.roll.watch(ctx, req.Msg, stream.Send)
}

// RenewRoots is floxv1connect.MembershipHandler.
func (b *rootBook) RenewRoots(_ context.Context, req *connect.Request[floxv1.RenewRootsRequest]) (*connect.Response[floxv1.RenewRootsResponse], error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.broken != nil {
		return nil, b.broken
	}
	id := b.set.ID()
	known := len(b.set) > 0 && slices.Equal(req.Msg.GetSet(), id[:])
	if known {
		b.renewed++
	}
	return connect.NewResponse(&floxv1.RenewRootsResponse{Unknown: !known}), nil
}

// SetRoots is floxv1connect.MembershipHandler.
func (b *rootBook) SetRoots(_ context.Context, req *connect.Request[floxv1.SetRootsRequest]) (*connect.Response[floxv1.SetRootsResponse], error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	set, err := content.ParseRootSet(req.Msg.GetHashes())
	if err != nil {
		return nil, err
	}
	b.set = slices.Clone(set)
	b.sent++
	return connect.NewResponse(&floxv1.SetRootsResponse{}), nil
}

func (b *rootBook) look(f func() bool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return f()
}

// What is kept and what ran is told to the storehouse soon after it changed, once;
// a set that stays is renewed by its name, and told again if the storehouse lost it
// or a collection begins.
func TestStorehouseIsToldWhatThisMachineHoldsOnTo(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	kept := h.make(t, "kept", nil, testFile{name: "bin/kept", data: randomBytes(1, 1000)})
	program := h.make(t, "program", nil, testFile{name: "bin/program", data: randomBytes(2, 1000)})
	h.publish(kept, program)
	a, _ := runAgent(t, h, nil, func(a *Agent) {
		a.roots.every, a.roots.wait, a.roots.spread = time.Hour, 10*time.Millisecond, 10*time.Millisecond
		a.ran.saw(program.Path, 1, true)
	})
	following(t, a)
	b := &h.book
	until(t, "what ran is a root", func() bool {
		return b.look(func() bool { return b.set.Has(program.Path.HashPart()) && b.set.Len() == 1 })
	})
	c := &control{a: a}
	if _, err := c.keep(within(t, time.Minute), &floxv1.KeepRequest{Paths: []string{testStore.Join(kept.Path)}}); err != nil {
		t.Fatal(err)
	}
	until(t, "what is kept is a root", func() bool {
		return b.look(func() bool { return b.set.Has(kept.Path.HashPart()) && b.set.Len() == 2 })
	})
	a.roots.changed()
	until(t, "the same set is renewed by its name", func() bool { return b.look(func() bool { return b.renewed > 0 && b.sent == 2 }) })
	b.look(func() bool { b.set = nil; return true })
	h.mu.Lock()
	h.index++
	h.events = append(h.events, &floxv1.WatchEvent{Index: h.index, Condemned: true})
	close(h.changed)
	h.changed = make(chan struct{})
	h.mu.Unlock()
	until(t, "it is told again when a collection begins", func() bool { return b.look(func() bool { return b.set.Len() == 2 }) })
}

// A storehouse that cannot be told is told later.
func TestRootsAreToldAgainAfterAFailure(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	p := h.make(t, "p", nil, testFile{name: "bin/p", data: randomBytes(1, 1000)})
	h.publish(p)
	h.book.broken = connect.NewError(connect.CodeUnavailable, errors.New("no leader"))
	a, _ := runAgent(t, h, nil, func(a *Agent) {
		a.roots.every, a.roots.wait = time.Hour, time.Hour
		a.ran.saw(p.Path, 1, true)
	})
	following(t, a)
	if err := a.roots.tell(within(t, time.Minute)); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("%v, want that nobody answered", err)
	}
	h.book.look(func() bool { h.book.broken = nil; return true })
	if err := a.roots.tell(within(t, time.Minute)); err != nil || !h.book.look(func() bool { return h.book.set.Has(p.Path.HashPart()) }) {
		t.Errorf("%v, or not told", err)
	}
}
