package storehouse

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
)

// Bounds of what is kept about roots. They are part of the state machine.
const (
	maxReason  = 1024
	maxRootKey = 128 // of a machine's name in the state
)

// keep makes paths roots, or takes that back: all or none.
func (a *applying) keep(c *floxv1.KeepPaths) error {
	if err := marked("keep", c.GetPaths()); err != nil {
		return err
	}
	if len(c.GetReason()) > maxReason || len(c.GetBy()) > maxReason {
		return fmt.Errorf("keep: reason of %d and name of %d bytes, want at most %d: %w", len(c.GetReason()), len(c.GetBy()), maxReason, flox.ErrBadInput)
	}
	for i, p := range c.GetPaths() {
		err := a.keepOne(c, flox.StorePath(p))
		if err != nil {
			return err
		}
		a.done(i)
	}
	return nil
}

func (a *applying) keepOne(c *floxv1.KeepPaths, p flox.StorePath) error {
	key := hashKey(keptKey, p.HashPart())
	if c.GetUndo() {
		if _, err := a.tx.Get(key); errors.Is(err, flox.ErrNotFound) {
			return fmt.Errorf("%s is not kept here: %w", p, flox.ErrNotFound)
		} else if err != nil {
			return err
		}
		return a.tx.Delete(key)
	}
	info, err := validAs(a.tx, string(p))
	if err != nil {
		return err
	}
	if info == nil {
		return fmt.Errorf("%s is not valid here, so it cannot be kept: upload it first: %w", p, flox.ErrNotFound)
	}
	if _, err := a.revive(p.HashPart()); err != nil {
		return err
	}
	b, err := stable.Marshal(&floxv1.KeptPath{Path: string(p), Reason: c.GetReason(), By: c.GetBy(), TimeUnixMs: a.at.UnixMilli()})
	if err != nil {
		return err
	}
	return a.tx.Set(key, b)
}

func machineRootsKey(peer string) []byte { return append([]byte{machineKey}, peer...) }

func rootSetKey(set []byte) []byte { return append([]byte{setKey}, set...) }

func ownersKey(set []byte, peer string) []byte {
	return append(append([]byte{ownerKey}, set...), peer...)
}

// readMachineRoots reads what is known of a machine's set; ErrNotFound.
func readMachineRoots(g getter, peer string) (*floxv1.MachineRoots, error) {
	b, err := g.Get(machineRootsKey(peer))
	if err != nil {
		return nil, err
	}
	m := &floxv1.MachineRoots{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("facts: roots of %s: %w: %w", peer, err, flox.ErrCorrupt)
	}
	return m, nil
}

// readRootSet reads a set; ErrNotFound.
func readRootSet(g getter, set []byte) (content.RootSet, error) {
	b, err := g.Get(rootSetKey(set))
	return content.RootSet(b), err
}

// eachMachine calls yield with every machine that has a set, sorted by peer.
func eachMachine(g getter, yield func(*floxv1.MachineRoots) bool) error {
	var bad error
	err := g.Iterate([]byte{machineKey}, nil, func(key, value []byte) bool {
		m := &floxv1.MachineRoots{}
		if bad = proto.Unmarshal(value, m); bad != nil {
			bad = fmt.Errorf("facts: roots of %q: %w: %w", key[1:], bad, flox.ErrCorrupt)
			return false
		}
		return yield(m)
	})
	return errors.Join(err, bad)
}

// setRoots replaces a machine's set.
func (a *applying) setRoots(c *floxv1.SetRootSet) error {
	if c.GetPeer() == "" || len(c.GetPeer()) > maxRootKey {
		return fmt.Errorf("root set of a machine whose name has %d bytes, want 1 to %d: %w", len(c.GetPeer()), maxRootKey, flox.ErrBadInput)
	}
	old, err := readMachineRoots(a.tx, c.GetPeer())
	if errors.Is(err, flox.ErrNotFound) {
		old, err = nil, nil
	}
	if err != nil {
		return err
	}
	if len(c.GetSet()) == 0 {
		if old == nil || c.GetSeenUnixMs() != 0 && old.GetSeenUnixMs() > c.GetSeenUnixMs() {
			return nil
		}
		return errors.Join(a.disown(old), a.tx.Delete(machineRootsKey(c.GetPeer())))
	}
	if len(c.GetSet()) != flox.CIDSize {
		return fmt.Errorf("root set of %s: CID of %d bytes, want %d: %w", c.GetPeer(), len(c.GetSet()), flox.CIDSize, flox.ErrBadInput)
	}
	now := &floxv1.MachineRoots{Peer: c.GetPeer(), Set: c.GetSet(), SeenUnixMs: a.at.UnixMilli(), ChangedIndex: a.index}
	if old != nil && string(old.GetSet()) == string(c.GetSet()) {
		now.ChangedIndex = old.GetChangedIndex()
	} else if err := a.own(c, old); err != nil {
		return err
	}
	b, err := stable.Marshal(now)
	if err != nil {
		return err
	}
	return a.tx.Set(machineRootsKey(c.GetPeer()), b)
}

// own makes a machine an owner of its new set, instead of the old one.
func (a *applying) own(c *floxv1.SetRootSet, old *floxv1.MachineRoots) error {
	set, err := readRootSet(a.tx, c.GetSet())
	if errors.Is(err, flox.ErrNotFound) {
		if len(c.GetHashes()) == 0 {
			return fmt.Errorf("root set %x of %s is not known here: send it whole: %w", c.GetSet(), c.GetPeer(), flox.ErrNotFound)
		}
		if set, err = content.ParseRootSet(c.GetHashes()); err != nil {
			return fmt.Errorf("roots of %s: %w", c.GetPeer(), err)
		}
		if set.ID() != flox.CID(c.GetSet()) {
			return fmt.Errorf("root set of %s does not hash to its name %x: %w", c.GetPeer(), c.GetSet(), flox.ErrBadInput)
		}
		err = a.tx.Set(rootSetKey(c.GetSet()), set)
	}
	if err != nil {
		return err
	}
	if a.marks.condemned > 0 {
		set.Each(func(hashPart string) bool {
			_, err = a.revive(hashPart)
			return err == nil
		})
	}
	if err == nil {
		err = a.tx.Set(ownersKey(c.GetSet(), c.GetPeer()), nil)
	}
	if err == nil && old != nil {
		err = a.disown(old)
	}
	return err
}

// disown takes a machine from the owners of its set, which goes with the last one.
func (a *applying) disown(m *floxv1.MachineRoots) error {
	if err := a.tx.Delete(ownersKey(m.GetSet(), m.GetPeer())); err != nil {
		return err
	}
	owned := false
	err := a.tx.Iterate(ownersKey(m.GetSet(), ""), nil, func(_, _ []byte) bool {
		owned = true
		return false
	})
	if err != nil || owned {
		return err
	}
	return a.tx.Delete(rootSetKey(m.GetSet()))
}

// heldSets are sets of machines.
type heldSets struct{ sets []content.RootSet }

func (h *heldSets) has(hashPart string) bool {
	for _, s := range h.sets {
		if s.Has(hashPart) {
			return true
		}
	}
	return false
}

// setsSince gives the sets that changed behind an index: who looked at that state
// has not seen them.
func (a *applying) setsSince(index uint64) (*heldSets, error) {
	h, seen := &heldSets{}, map[string]bool{}
	err := eachMachine(a.tx, func(m *floxv1.MachineRoots) bool {
		if m.GetChangedIndex() > index {
			seen[string(m.GetSet())] = true
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	for id := range seen { // the order does not matter
		s, err := readRootSet(a.tx, []byte(id))
		if err != nil {
			return nil, fmt.Errorf("facts: root set %x: %w", id, err)
		}
		h.sets = append(h.sets, s)
	}
	return h, nil
}
