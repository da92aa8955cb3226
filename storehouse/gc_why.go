package storehouse

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of what is told about roots.
const (
	maxRootsListed = 20_000  // of one answer
	maxChains      = 1000    // of one answer
	maxAncestors   = 1 << 20 // looked at for one answer, about 100 bytes of memory each
)

// describe gives a root as operators see it; false if its path is not valid.
func (s *Server) describe(r *cluster.Reader, at root) (*floxv1.Root, bool, error) {
	info, err := readInfo(r, at.hashPart)
	if errors.Is(err, flox.ErrNotFound) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	out := &floxv1.Root{Kind: at.kind, Name: at.name, Path: info.GetPath()}
	if !at.until.IsZero() {
		out.UntilUnix = at.until.Unix()
	}
	if at.kind == rootKeep {
		b, err := r.Get(hashKey(keptKey, at.hashPart))
		kept := &floxv1.KeptPath{}
		if err == nil {
			err = proto.Unmarshal(b, kept)
		}
		if err != nil {
			return nil, false, fmt.Errorf("facts: that %s is kept: %w", info.GetPath(), err)
		}
		out.Name = kept.GetReason()
	}
	return out, true, nil
}

// recentUntil is when a path stops being a recent one.
func (s *Server) recentUntil(r *cluster.Reader, info *floxv1.PathInfo) (time.Time, error) {
	last, err := lastUse(r, info)
	return time.UnixMilli(last).Add(DefaultKeepRecent + s.touchEvery()), err
}

// Roots lists the roots: all of them, or those that hold a path, itself or through
// what refers to it. more says that there are others. ErrNotFound if path is not valid.
func (s *Server) Roots(ctx context.Context, path flox.StorePath) (roots []*floxv1.Root, more bool, err error) {
	if path != "" {
		why, err := s.Why(ctx, path, true)
		for _, c := range why.GetChains() {
			roots = append(roots, c.GetRoot())
		}
		return roots, len(roots) == maxChains, err
	}
	err = s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		err := s.eachRoot(ctx, r, func(at root) error {
			out, ok, err := s.describe(r, at)
			if err == nil && ok {
				if len(roots) == maxRootsListed {
					return errMore
				}
				roots = append(roots, out)
			}
			return err
		})
		if err != nil {
			return err
		}
		return s.eachRecent(ctx, r, func(out *floxv1.Root) error {
			if len(roots) == maxRootsListed {
				return errMore
			}
			roots = append(roots, out)
			return nil
		})
	})
	if errors.Is(err, errMore) {
		return roots, true, nil
	}
	return roots, false, err
}

// errMore ends a list that is long enough.
var errMore = errors.New("there is more")

// eachRecent calls f with the paths that were published lately.
func (s *Server) eachRecent(ctx context.Context, r *cluster.Reader, f func(*floxv1.Root) error) error {
	info := &floxv1.PathInfo{}
	var failed error
	err := r.Iterate([]byte{infoKey}, nil, func(key, value []byte) bool {
		var until time.Time
		if failed = errors.Join(ctx.Err(), proto.Unmarshal(value, info)); failed == nil {
			until, failed = s.recentUntil(r, info)
		}
		if failed == nil && time.Now().Before(until) {
			failed = f(&floxv1.Root{Kind: rootRecent, Path: info.GetPath(), UntilUnix: until.Unix()})
		}
		return failed == nil
	})
	return errors.Join(err, failed)
}

// Why says what keeps a valid path: chains of references from a root to it, the
// first that is found, or all, of every root one. No chain means that the next
// collection condemns it. ErrNotFound if it is not valid; ErrFull if more refers to
// it than is looked at and no root was found.
func (s *Server) Why(ctx context.Context, path flox.StorePath, all bool) (*floxv1.WhyResponse, error) {
	if _, err := flox.ParseStorePath(string(path)); err != nil {
		return nil, err
	}
	w := &searchUp{Server: s, all: all, out: &floxv1.WhyResponse{}, next: map[string]string{}}
	err := s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		info, err := validAs(r, string(path))
		if err == nil && info == nil {
			err = fmt.Errorf("%s is not valid here: %w", path, flox.ErrNotFound)
		}
		if err != nil {
			return err
		}
		switch mark, err := readCondemned(r, path.HashPart()); {
		case err == nil:
			w.out.Condemned, w.out.CondemnedUnix = true, mark.at/1000
		case !errors.Is(err, flox.ErrNotFound):
			return err
		}
		err = w.up(ctx, r, path.HashPart())
		if err == nil {
			err = w.held(ctx, r)
		}
		return err
	})
	if errors.Is(err, errMore) {
		err = nil
	}
	if err == nil && w.cut && len(w.out.GetChains()) == 0 {
		err = fmt.Errorf("%s: more than %d paths refer to it, no root was found among those looked at: %w", path, maxAncestors, flox.ErrFull)
	}
	return w.out, err
}

// searchUp looks for roots among what refers to a path.
type searchUp struct {
	*Server
	all  bool
	cut  bool // not everything was looked at
	out  *floxv1.WhyResponse
	next map[string]string // of every path seen, which it refers to on the way; "" at the end
}

// up walks from a path to all that refers to it, nearest first.
func (w *searchUp) up(ctx context.Context, r *cluster.Reader, from string) error {
	w.next[from] = ""
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		at := queue[0]
		if err := w.recent(ctx, r, at); err != nil {
			return err
		}
		first := hashKey(referrerKey, at)
		err := r.Iterate(first, nil, func(key, _ []byte) bool {
			by := string(key[len(first):])
			if _, seen := w.next[by]; !seen {
				if w.cut = len(w.next) >= maxAncestors; !w.cut {
					w.next[by] = at
					queue = append(queue, by)
				}
			}
			return !w.cut
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// recent adds a chain if a path was published lately.
func (w *searchUp) recent(ctx context.Context, r *cluster.Reader, hashPart string) error {
	info, err := readInfo(r, hashPart)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return err
	}
	until, err := w.recentUntil(r, info)
	if err != nil || time.Now().After(until) {
		return err
	}
	return w.add(r, root{rootRecent, "", hashPart, until})
}

// held adds the chains from all other roots.
func (w *searchUp) held(ctx context.Context, r *cluster.Reader) error {
	return w.eachRoot(ctx, r, func(at root) error {
		if _, seen := w.next[at.hashPart]; !seen {
			return nil
		}
		return w.add(r, at)
	})
}

// add adds the chain from a root; errMore when that is enough.
func (w *searchUp) add(r *cluster.Reader, at root) error {
	described, ok, err := w.describe(r, at)
	if err != nil || !ok {
		return err
	}
	chain := &floxv1.WhyChain{Root: described}
	for h := at.hashPart; h != ""; h = w.next[h] {
		info, err := readInfo(r, h)
		if err != nil {
			return err
		}
		chain.Paths = append(chain.Paths, info.GetPath())
	}
	w.out.Chains = append(w.out.Chains, chain)
	if !w.all || len(w.out.GetChains()) == maxChains {
		return errMore
	}
	return nil
}

// Usage says what is here and how full the disk is.
func (s *Server) Usage(ctx context.Context) (*floxv1.UsageResponse, error) {
	out := &floxv1.UsageResponse{}
	err := s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		counts, err := readCounts(r)
		if err != nil {
			return err
		}
		marks, err := readMarks(r)
		out.Paths, out.NarBytes = counts.paths, counts.narBytes
		out.CondemnedPaths, out.CondemnedBytes = marks.condemned, marks.bytes
		return err
	})
	if err != nil {
		return nil, err
	}
	stat := s.packs.Stat()
	out.Blocks, out.BlockBytes, out.StoredBytes = stat.Blocks, stat.PlainBytes, stat.DiskBytes+stat.BucketBytes
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.StateDir, &st); err != nil {
		return nil, fmt.Errorf("disk of %s: %w", s.cfg.StateDir, err)
	}
	out.DiskTotal, out.DiskFree = st.Blocks*uint64(st.Bsize), st.Bavail*uint64(st.Bsize) //nolint:gosec // not negative
	usage, err := s.disk.usage()
	marks := s.cfg.Watermarks
	// The first that is reached, from the fullest on.
	for i, name := range []string{"full", "high", "slow"} {
		if out.GetWatermark() == "" && usage >= []float64{marks.ReadOnly, marks.Essential, marks.Slow}[i] {
			out.Watermark = name
		}
	}
	return out, err
}
