package storehouse

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// rootsTTL is how long a machine's set holds after the machine was last seen.
	rootsTTL = 90 * 24 * time.Hour
	// rootsRenewal is how often the log hears that a machine still has its set.
	rootsRenewal = 7 * 24 * time.Hour
	// guardEvery is how often paths in use are looked at, at least.
	guardEvery = time.Minute
)

// Kinds of roots.
const (
	rootKeep    = "keep"
	rootRecent  = "recent"
	rootMachine = "machine"
	rootUpload  = "upload"
	rootLog     = "build log"
)

// root is a path that stays, with its closure.
type root struct {
	kind, name, hashPart string
	until                time.Time // zero = for ever
}

// rootSource knows some of the roots. Whoever makes a path a root calls
// Server.Revive before it says that it is one: a collection may have condemned the
// path meanwhile, and after Revive nobody removes it by that mark.
type rootSource interface {
	// roots calls yield with every root as of r or later, until it returns false.
	roots(ctx context.Context, r *cluster.Reader, yield func(root) bool) error
}

// sources are all but the recently registered paths, which are found by their facts.
func (s *Server) sources() []rootSource {
	return append([]rootSource{keptRoots{}, machineRoots{}, s.holds}, s.moreRoots...)
}

// eachRoot calls f with the roots of all sources, until it fails.
func (s *Server) eachRoot(ctx context.Context, r *cluster.Reader, f func(root) error) error {
	return eachRoot(ctx, r, s.sources(), f)
}

func eachRoot(ctx context.Context, r *cluster.Reader, sources []rootSource, f func(root) error) error {
	for _, source := range sources {
		var failed error
		err := source.roots(ctx, r, func(at root) bool {
			if failed = ctx.Err(); failed == nil {
				failed = f(at)
			}
			return failed == nil
		})
		if err := errors.Join(err, failed); err != nil {
			return err
		}
	}
	return nil
}

// keptRoots are the paths that operators keep.
type keptRoots struct{}

func (keptRoots) roots(_ context.Context, r *cluster.Reader, yield func(root) bool) error {
	return r.Iterate([]byte{keptKey}, nil, func(key, _ []byte) bool {
		return yield(root{kind: rootKeep, hashPart: string(key[1:])})
	})
}

// machineRoots are the sets of machines, but for one of them.
type machineRoots struct{ without string }

func (s machineRoots) roots(_ context.Context, r *cluster.Reader, yield func(root) bool) error {
	var failed error
	more := true
	err := eachMachine(r, func(m *floxv1.MachineRoots) bool {
		if m.GetPeer() == s.without {
			return true
		}
		var set content.RootSet
		if set, failed = readRootSet(r, m.GetSet()); failed != nil {
			failed = fmt.Errorf("facts: root set of %s: %w", m.GetPeer(), failed)
			return false
		}
		until := time.UnixMilli(m.GetSeenUnixMs()).Add(rootsTTL)
		set.Each(func(hashPart string) bool {
			more = yield(root{rootMachine, m.GetPeer(), hashPart, until})
			return more
		})
		return more
	})
	return errors.Join(err, failed)
}

// holds are the paths that something under way here counts on: an upload on its
// references, an import on what it has brought.
type holds struct {
	mu    sync.Mutex
	count map[string]int // by hash part
}

func (h *holds) add(paths []flox.StorePath, n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range paths {
		if h.count[p.HashPart()] += n; h.count[p.HashPart()] == 0 {
			delete(h.count, p.HashPart())
		}
	}
}

// list gives what is held now.
func (h *holds) list() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	list := make([]string, 0, len(h.count))
	for hashPart := range h.count {
		list = append(list, hashPart)
	}
	return list
}

func (h *holds) roots(_ context.Context, _ *cluster.Reader, yield func(root) bool) error {
	for _, hashPart := range h.list() {
		if !yield(root{kind: rootUpload, hashPart: hashPart}) {
			return nil
		}
	}
	return nil
}

// Hold makes paths roots until release is called: of those that are valid none is
// removed. Whether they are valid is to be asked after Hold.
func (s *Server) Hold(ctx context.Context, paths ...flox.StorePath) (release func(), err error) {
	s.holds.add(paths, 1)
	release = sync.OnceFunc(func() { s.holds.add(paths, -1) })
	hashParts := make([]string, len(paths))
	for i, p := range paths {
		hashParts[i] = p.HashPart()
	}
	// A mark that this server does not know of yet is younger than the grace, and
	// found by guard.
	if err := s.reviveUsed(ctx, hashParts); err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// guard takes the marks off what is held, until ctx ends: one that came after Hold
// looked for it must be gone before the grace is over.
func (s *Server) guard(ctx context.Context) error {
	tick := time.NewTicker(max(min(guardEvery, s.cfg.CollectGrace/4), time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if err := s.reviveUsed(ctx, s.holds.list()); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("condemned paths in use not revived yet", "error", err)
		}
	}
}

// reviveUsed takes the marks off paths that are used, if they have any as far as
// this server knows.
func (s *Server) reviveUsed(ctx context.Context, hashParts []string) error {
	var found []flox.StorePath
	err := s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		marks, err := readMarks(r)
		if err != nil || marks.condemned == 0 {
			return err
		}
		for _, h := range hashParts {
			p, err := condemnedPath(r, h)
			if err != nil {
				return err
			}
			if p != "" {
				found = append(found, p)
			}
		}
		return nil
	})
	if err != nil || len(found) == 0 {
		return err
	}
	return s.Revive(ctx, found...)
}

// condemnedPath gives the path with a hash part if it has a mark, else "".
func condemnedPath(g getter, hashPart string) (flox.StorePath, error) {
	_, err := readCondemned(g, hashPart)
	if errors.Is(err, flox.ErrNotFound) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	info, err := readInfo(g, hashPart)
	if err != nil {
		return "", fmt.Errorf("facts: a mark on %s: %w", hashPart, err)
	}
	return flox.StorePath(info.GetPath()), nil
}

// Revive takes back that paths were condemned. Those that are not are left as
// they are, also if they are not valid.
func (s *Server) Revive(ctx context.Context, paths ...flox.StorePath) error {
	for len(paths) > 0 {
		n := min(len(paths), maxMarked)
		c := &floxv1.CondemnPaths{Revive: true}
		for _, p := range paths[:n] {
			c.Paths = append(c.Paths, string(p))
		}
		paths = paths[n:]
		if _, err := propose(freeing(ctx), s.marker, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Condemn{Condemn: c}}); err != nil {
			return fmt.Errorf("revive condemned paths: %w", err)
		}
	}
	return nil
}

// renewRoots notes that a machine still has its set. unknown says that the set
// must be sent whole. The log hears of it when the set became another, or once in
// a while, so that it does not depend on who led meanwhile.
func (s *Server) renewRoots(ctx context.Context, peer string, set []byte) (unknown bool, err error) {
	if len(set) != flox.CIDSize {
		return false, fmt.Errorf("roots of %s: CID of %d bytes, want %d: %w", peer, len(set), flox.CIDSize, flox.ErrBadInput)
	}
	current, known := false, false
	err = s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		m, err := readMachineRoots(r, peer)
		switch {
		case err == nil:
			current = string(m.GetSet()) == string(set) && time.Since(time.UnixMilli(m.GetSeenUnixMs())) < rootsRenewal
		case !errors.Is(err, flox.ErrNotFound):
			return err
		}
		_, err = r.Get(rootSetKey(set))
		if known = err == nil; errors.Is(err, flox.ErrNotFound) {
			return nil
		}
		return err
	})
	if err != nil || current || !known {
		return !current && !known, err
	}
	_, err = s.proposeRoots(ctx, &floxv1.SetRootSet{Peer: peer, Set: set})
	if errors.Is(err, flox.ErrNotFound) { // its last owner let go of it meanwhile
		return true, nil
	}
	return false, err
}

// setRoots replaces a machine's set; an empty one forgets the machine.
func (s *Server) setRoots(ctx context.Context, peer string, hashes []byte) (flox.CID, error) {
	set, err := content.ParseRootSet(hashes)
	if err != nil {
		return flox.CID{}, fmt.Errorf("roots of %s: %w", peer, err)
	}
	id := set.ID()
	c := &floxv1.SetRootSet{Peer: peer, Set: id[:], Hashes: set}
	if set.Len() == 0 {
		c.Set, c.Hashes = nil, nil
	}
	_, err = s.proposeRoots(ctx, c)
	return id, err
}

func (s *Server) proposeRoots(ctx context.Context, c *floxv1.SetRootSet) (*floxv1.PathsReply, error) {
	// Without it a collection that makes room would take what is in use.
	return propose(freeing(ctx), s.marker, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Roots{Roots: c}})
}

// forgetRoots forgets the sets of machines that were not seen for too long.
func (s *Server) forgetRoots(ctx context.Context, now time.Time) error {
	var gone []*floxv1.MachineRoots
	err := s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		return eachMachine(r, func(m *floxv1.MachineRoots) bool {
			if now.Sub(time.UnixMilli(m.GetSeenUnixMs())) > rootsTTL {
				gone = append(gone, m)
			}
			return true
		})
	})
	for _, m := range gone {
		if err == nil {
			s.cfg.Log.Info("the roots of a machine that was not seen for long are forgotten", "peer", m.GetPeer())
			_, err = s.proposeRoots(ctx, &floxv1.SetRootSet{Peer: m.GetPeer(), SeenUnixMs: m.GetSeenUnixMs()})
		}
	}
	return err
}

// KeepPath makes a valid path a root for as long as it takes, or takes that back.
// by is who asked for it. ErrNotFound when it is not valid, or not kept.
func (s *Server) KeepPath(ctx context.Context, path flox.StorePath, undo bool, reason, by string) error {
	if _, err := flox.ParseStorePath(string(path)); err != nil {
		return err
	}
	if undo {
		ctx = freeing(ctx)
	} else if err := s.takesFacts(ctx); err != nil {
		return fmt.Errorf("keep %s: %w", path, err)
	}
	_, err := propose(ctx, s.marker, &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Keep{Keep: &floxv1.KeepPaths{
		Paths: []string{string(path)}, Undo: undo, Reason: reason, By: by,
	}}})
	return err
}
