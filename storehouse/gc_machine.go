package storehouse

import (
	"context"
	"fmt"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

// MachineCollection is a collection as Nix's own, for the one machine whose storehouse
// this is. Nobody else works on with an old answer, so nothing waits, and the machine
// itself sees to it that nothing becomes a root meanwhile.
type MachineCollection struct {
	peer     string
	given    []string        // hash parts the machine holds on to
	only     map[string]bool // hash parts that may go; nil = all
	maxBytes uint64          // more than that need not go; 0 = no limit
}

// may reports whether a path may go that nothing keeps.
func (m *MachineCollection) may(hashPart string) bool {
	return m == nil || m.only == nil || m.only[hashPart]
}

// enough reports whether as much is gone as was asked for.
func (m *MachineCollection) enough(bytes uint64) bool {
	return m != nil && m.maxBytes != 0 && bytes > m.maxBytes
}

// roots implements rootSource.
func (m *MachineCollection) roots(_ context.Context, _ *cluster.Reader, yield func(root) bool) error {
	for _, hashPart := range m.given {
		if !yield(root{kind: rootMachine, name: m.peer, hashPart: hashPart}) {
			return nil
		}
	}
	return nil
}

// eachRootOf is eachRoot; for one machine, what it gives is in place of its set.
func (s *Server) eachRootOf(ctx context.Context, r *cluster.Reader, m *MachineCollection, f func(root) error) error {
	if m == nil {
		return s.eachRoot(ctx, r, f)
	}
	sources := append([]rootSource{m, keptRoots{}, machineRoots{without: m.peer}, s.holds}, s.moreRoots...)
	return eachRoot(ctx, r, sources, f)
}

// hashParts are those of base names.
func hashParts(what string, names []string) ([]string, error) {
	if len(names) > content.MaxRootSet {
		return nil, fmt.Errorf("collect: %d %s, want at most %d: %w", len(names), what, content.MaxRootSet, flox.ErrBadInput)
	}
	out := make([]string, 0, len(names))
	for _, name := range names {
		p, err := flox.ParseStorePath(name)
		if err != nil {
			return nil, fmt.Errorf("collect: %s: %w", what, err)
		}
		out = append(out, p.HashPart())
	}
	return out, nil
}

// collectMachine collects for the one machine whose storehouse this is.
func (a *admin) collectMachine(ctx context.Context, who *floxv1.Actor, q *floxv1.CollectRequest, send func(*floxv1.CollectProgress)) error {
	if !a.s.cfg.Embedded {
		return fmt.Errorf("collect: this storehouse is no machine's own: an operator collects, with floxctl storehouse gc: %w", flox.ErrDenied)
	}
	if m, ok := a.s.roster.machine(p2p.PeerID(who.GetPeer())); !ok || m.GetRole() != members.Agent {
		return fmt.Errorf("collect: %q is no machine in the member list that collects as Nix does; floxctl storehouse gc collects: %w", nameOr(who.GetMachine(), who.GetPeer()), flox.ErrDenied)
	}
	for peer, m := range a.s.roster.now.Load().machines {
		if m.GetRole() != members.Server && string(peer) != who.GetPeer() {
			return fmt.Errorf("collect: %s uses this storehouse as well: an operator collects, with floxctl storehouse gc: %w", m.GetName(), flox.ErrDenied)
		}
	}
	m := &MachineCollection{peer: who.GetPeer(), maxBytes: q.GetMachine().GetMaxFreedBytes()}
	var err error
	if m.given, err = hashParts("roots", q.GetMachine().GetRoots()); err != nil {
		return err
	}
	if names := q.GetMachine().GetPaths(); len(names) > 0 {
		only, err := hashParts("paths", names)
		if err != nil {
			return err
		}
		m.only = make(map[string]bool, len(only))
		for _, h := range only {
			m.only[h] = true
		}
	}
	opts := CollectOptions{DryRun: q.GetDryRun(), Machine: m}
	if opts.DryRun {
		return a.s.Collect(ctx, opts, send)
	}
	return a.s.collectFor(ctx, who, opts, send)
}
