package storehouse

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

// Damage is what Scrub found wrong with one store path.
type Damage struct {
	// Path is the store path hurt; "" for damage that hurts no valid path.
	Path flox.StorePath
	// Blocks are the blocks of it that are damaged or missing.
	Blocks []flox.CID
	// Err says what is wrong with the first of them.
	Err error
}

// Scrubbed counts what Scrub looked at.
type Scrubbed struct {
	Paths, Hurt  uint64
	BadBlocks    int    // damaged, in a path or not
	StoredBlocks uint64 // all that were read
}

// Scrub reads every block back and reports each store path that damaged or
// missing blocks belong to, then what is damaged and belongs to none. It changes
// nothing and may run while the server serves. A Server that is not run can be
// scrubbed too.
func (s *Server) Scrub(ctx context.Context, report func(Damage)) (done Scrubbed, err error) {
	bad := make(map[flox.CID]error)
	if err := s.packs.Scrub(ctx, func(id flox.CID, err error) { bad[id] = err }); err != nil {
		return done, fmt.Errorf("scrub blocks: %w", err)
	}
	done.BadBlocks, done.StoredBlocks = len(bad), s.packs.Stat().Blocks
	unclaimed := make(map[flox.CID]bool, len(bad))
	for id := range bad {
		unclaimed[id] = true
	}
	err = s.eachPath(ctx, func(info *flox.PathInfo) error {
		done.Paths++
		d, err := s.hurt(ctx, info, bad)
		if err != nil || d == nil {
			return err
		}
		done.Hurt++
		for _, id := range d.Blocks {
			delete(unclaimed, id)
		}
		report(*d)
		return nil
	})
	if err != nil {
		return done, err
	}
	for id := range unclaimed {
		report(Damage{Blocks: []flox.CID{id}, Err: bad[id]})
	}
	return done, nil
}

// eachPath calls visit with every valid path, as of one moment.
func (s *Server) eachPath(ctx context.Context, visit func(*flox.PathInfo) error) error {
	return s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		var failed error
		err := r.Iterate([]byte{infoKey}, nil, func(_, value []byte) bool {
			m := &floxv1.PathInfo{}
			if failed = proto.Unmarshal(value, m); failed != nil {
				return false
			}
			info, err := api.ToPathInfo(m)
			if err == nil {
				err = visit(info)
			}
			failed = errors.Join(err, ctx.Err())
			return failed == nil
		})
		return errors.Join(failed, err)
	})
}

// hurt says which blocks of a path are bad or not there; nil when all is well.
func (s *Server) hurt(ctx context.Context, info *flox.PathInfo, bad map[flox.CID]error) (*Damage, error) {
	d := &Damage{Path: info.Path}
	note := func(id flox.CID, err error) {
		d.Blocks = append(d.Blocks, id)
		if d.Err == nil {
			d.Err = err
		}
	}
	m, err := content.OpenManifest(ctx, info.Manifest, s.packs)
	if err == nil {
		err = m.Blocks(ctx, func(id flox.CID, _ uint32) bool {
			if err, ok := bad[id]; ok {
				note(id, err)
			} else if there, err := s.packs.Has(ctx, []flox.CID{id}); err != nil || !there[0] {
				note(id, errors.Join(fmt.Errorf("block %s is not here: %w", id, flox.ErrNotFound), err))
			}
			return ctx.Err() == nil
		})
	}
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case errors.Is(err, flox.ErrCorrupt), errors.Is(err, flox.ErrNotFound):
		// A block of the manifest itself is damaged, and with it the list of the others.
		if len(d.Blocks) == 0 {
			note(info.Manifest, err)
		}
	case err != nil:
		return nil, err
	}
	if len(d.Blocks) == 0 {
		return nil, nil //nolint:nilnil // no damage
	}
	return d, nil
}
