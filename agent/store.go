package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/nix/local"
)

// maxTrees bounds the trees kept open; what they hold of manifests is bounded by
// the page cache.
const maxTrees = 4096

// store is the store directory as the mount sees it.
type store struct {
	a *Agent

	mu    sync.Mutex
	trees map[flox.CID]*tree
}

var _ flox.Store = (*store)(nil)

// Lookup implements flox.Store. A name that is no store path name is answered
// here, for ever; any other waits for facts until ctx ends. What is staged, or in a
// storehouse of this machine's own, may be deleted by a command of this machine: for it
// the kernel asks each time.
func (s *store) Lookup(ctx context.Context, name string, who flox.Reader) (flox.CID, bool, error) {
	p, err := flox.ParseStorePath(name)
	if err != nil {
		return flox.CID{}, true, fmt.Errorf("%s: no store path name: %w", name, flox.ErrNotFound)
	}
	if info, ok := s.a.facts.get(p.HashPart()); ok {
		info, err := matchName(info, p)
		if err != nil {
			return flox.CID{}, false, err
		}
		return info.Manifest, !s.a.cfg.Embedded, nil
	}
	if info, ok := s.a.stagedInfo(p); ok {
		info, err := matchName(info, p)
		if err != nil {
			return flox.CID{}, false, err
		}
		return info.Manifest, false, nil
	}
	watch := s.a.waits.begin(who.PID, opLookup, s.a.cfg.StoreDir.Join(p), 0)
	defer watch.end()
	theirs, localErr := s.a.local.find(ctx, s.a, p, askerOf(who), watch)
	if localErr == nil {
		return theirs.ID, false, nil
	}
	info, err := s.a.resolver.lookupFor(ctx, p, askerOf(who), watch)
	if errors.Is(err, flox.ErrNotFound) && !errors.Is(localErr, flox.ErrNotFound) {
		err = localErr // whether it is valid there cannot be told
	}
	if err != nil {
		return flox.CID{}, false, err
	}
	_, staged := s.a.stagedInfo(p) // meanwhile
	return info.Manifest, !staged && !s.a.cfg.Embedded, nil
}

// Names implements flox.Store: what is known here, which is what was added, used or
// downloaded on this machine and the closures of that; with Config.ListValid also
// everything else that is valid in the storehouse, while that answers. The kind
// is given for paths whose manifest was opened; to learn it of the others would
// take a fetch for each.
func (s *store) Names(ctx context.Context, after string, limit int) ([]flox.Named, error) {
	out, err := s.a.facts.names(ctx, after, limit)
	if err != nil {
		return nil, err
	}
	if out, err = s.a.stagedNames(ctx, out, after, limit); err != nil {
		return nil, err
	}
	out = s.a.localNames(ctx, out, after, limit)
	if s.a.cfg.ListValid {
		out = s.a.valid.merge(ctx, out, after, limit)
	}
	for i := range out {
		if out[i].Manifest != (flox.CID{}) && out[i].Kind == 0 {
			out[i].Kind = s.kind(out[i].Manifest)
		}
	}
	return out, ctx.Err()
}

// kind is what entry 0 of an opened manifest is, 0 if it was not opened.
func (s *store) kind(manifest flox.CID) flox.Kind {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t, ok := s.trees[manifest]; ok {
		return t.RootKind()
	}
	return 0
}

// Tree implements flox.Store.
func (s *store) Tree(ctx context.Context, manifest flox.CID, who flox.Reader) (flox.Tree, error) {
	if local.IsID(manifest) {
		if s.a.local == nil {
			return nil, fmt.Errorf("the local Nix store is not shown any more: %w", flox.ErrNotFound)
		}
		return s.a.local.Tree(ctx, manifest)
	}
	t, err := s.tree(ctx, manifest)
	if err != nil {
		return nil, err
	}
	return s.a.starts.heard(t, who), nil
}

func (s *store) tree(ctx context.Context, manifest flox.CID) (*tree, error) {
	s.mu.Lock()
	t, ok := s.trees[manifest]
	s.mu.Unlock()
	if ok {
		return t, nil
	}
	info, ok := s.a.facts.byManifest(manifest)
	if !ok {
		info, ok = s.a.stagedByManifest(manifest)
	}
	if !ok {
		return nil, fmt.Errorf("manifest %s belongs to no path known here: %w", manifest, flox.ErrNotFound)
	}
	t, err := s.a.openTree(ctx, info, 0)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.trees) >= maxTrees {
		for id := range s.trees { // any one: it is opened again from the page cache
			delete(s.trees, id)
			break
		}
	}
	s.trees[manifest] = t
	return t, nil
}

// Usage implements flox.Store: the disk the cache lies on. It asks the local
// disk only.
func (s *store) Usage() flox.Usage {
	var st syscall.Statfs_t
	if err := syscall.Statfs(s.a.cfg.StateDir, &st); err != nil {
		return flox.Usage{}
	}
	size := uint64(st.Bsize) //nolint:gosec // a block size is positive
	return flox.Usage{TotalBytes: st.Blocks * size, FreeBytes: st.Bavail * size, Files: s.a.facts.known()}
}

// info finds the facts of a path given as people give it: absolute or a base name.
func (a *Agent) info(ctx context.Context, given string) (*flox.PathInfo, string, error) {
	p, rest, err := a.parse(given)
	if err != nil {
		return nil, "", err
	}
	info, err := a.lookup(ctx, p)
	if err != nil {
		return nil, "", err
	}
	return info, rest, nil
}

// lookup finds the facts of a path within the time a look-up may take, also for
// those who would wait longer.
func (a *Agent) lookup(ctx context.Context, p flox.StorePath) (*flox.PathInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.LookupTimeout)
	defer cancel()
	return a.resolver.lookup(ctx, p)
}

// parse splits a path as people give it into the store path and what follows.
func (a *Agent) parse(given string) (p flox.StorePath, rest string, err error) {
	if len(given) > 0 && given[0] == '/' {
		return a.cfg.StoreDir.Split(given)
	}
	p, err = flox.ParseStorePath(given)
	return p, "", err
}

// closure gives the infos of everything roots refer to, roots included, each once.
func (a *Agent) closure(ctx context.Context, roots []*flox.PathInfo) ([]*flox.PathInfo, error) {
	seen := make(map[flox.StorePath]bool)
	queue := append([]*flox.PathInfo(nil), roots...)
	for _, r := range roots {
		seen[r.Path] = true
	}
	for i := 0; i < len(queue); i++ {
		for _, ref := range queue[i].References {
			if seen[ref] {
				continue
			}
			seen[ref] = true
			info, err := a.lookup(ctx, ref)
			if err != nil {
				if errors.Is(err, flox.ErrNotFound) {
					err = fmt.Errorf("%s refers to %s, which is not valid: %w", queue[i].Path, ref, flox.ErrCorrupt)
				}
				return nil, err
			}
			queue = append(queue, info)
		}
	}
	return queue, nil
}
