package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/storehouse/backup"
)

// allContent writes what the place lacks of the content of valid paths.
func (b *backingUp) allContent(ctx context.Context) (err error) {
	b.writer = b.contents.Writer(ctx, b.cfg.backupObject)
	b.begin(phaseContent, b.m.NarBytes)
	info := &floxv1.PathInfo{}
	err = eachInfo(ctx, b.state.View(pathsKind), func(name string, manifest flox.CID, value []byte) error {
		if err := proto.Unmarshal(value, info); err != nil {
			return fmt.Errorf("facts of %q: %w: %w", name, err, flox.ErrCorrupt)
		}
		b.lacks = nil
		if err := b.path(ctx, manifest); err != nil {
			return fmt.Errorf("content of %s: %w", name, err)
		}
		if b.lacks != nil {
			b.cfg.Log.Error("the backup lacks content", "path", name, "error", b.lacks)
			b.m.Lack(name)
		}
		b.now.DoneBytes += info.GetNarSize()
		b.report(false)
		return nil
	})
	if failed := b.writer.Close(); failed != nil {
		err = failed // the reason; what else failed, failed because of it
	}
	b.m.Blocks, b.m.NewBytes = b.writer.Blocks(), b.writer.Written()
	b.m.Content = slices.DeleteFunc(b.contents.Used(), func(o backup.Object) bool { return o.Digest == "" }) // of a writer that failed
	b.report(true)
	return err
}

// path writes what the place lacks of one path.
func (b *backingUp) path(ctx context.Context, manifest flox.CID) error {
	m, err := content.OpenManifest(ctx, manifest, anyServers{b.Server})
	if err == nil {
		var failed error
		err = m.Blocks(ctx, func(id flox.CID, size uint32) bool {
			failed = b.block(ctx, id, size)
			return failed == nil
		})
		if failed == nil {
			failed = b.flush(ctx)
		}
		if failed != nil {
			return failed
		}
	}
	if errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrCorrupt) {
		b.lacks, err = errors.Join(b.lacks, err), nil
	}
	return err
}

// block has a block written unless the place has it.
func (b *backingUp) block(ctx context.Context, id flox.CID, size uint32) error {
	there, err := b.contents.Use(id)
	if err != nil || there || slices.Contains(b.ids, id) {
		return err
	}
	b.ids, b.sizes, b.bytes = append(b.ids, id), append(b.sizes, size), b.bytes+uint64(size)
	if len(b.ids) < backupBatch && b.bytes < backupBytes {
		return nil
	}
	return b.flush(ctx)
}

// flush reads the blocks that wait, some at once, and writes them in order.
func (b *backingUp) flush(ctx context.Context) error {
	type read struct {
		stored []byte
		zstd   bool
		err    error
	}
	got := make([]read, len(b.ids))
	var group errgroup.Group
	group.SetLimit(backupReaders)
	for i, id := range b.ids {
		group.Go(func() error {
			got[i].stored, got[i].zstd, got[i].err = anyServers{b.Server}.stored(ctx, id)
			return nil
		})
	}
	_ = group.Wait() // what failed is in got
	defer func() { b.ids, b.sizes, b.bytes = b.ids[:0], b.sizes[:0], 0 }()
	for i, g := range got {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(g.err, flox.ErrNotFound) || errors.Is(g.err, flox.ErrCorrupt):
			b.lacks = errors.Join(b.lacks, g.err)
			continue
		case g.err != nil:
			return g.err
		}
		if err := b.writer.Add(b.ids[i], g.stored, b.sizes[i], g.zstd); err != nil {
			return err
		}
	}
	return nil
}

// anyServers are the blocks here, and of those that are damaged or missing here
// the other servers'.
type anyServers struct{ s *Server }

// Get is flox.Blocks.
func (a anyServers) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	b, err := a.s.packs.Get(ctx, id)
	if errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrCorrupt) {
		return a.others(ctx, id, err)
	}
	return b, err
}

// stored gives a block as pack.Store.Stored does.
func (a anyServers) stored(ctx context.Context, id flox.CID) (b []byte, zstd bool, err error) {
	b, zstd, err = a.s.packs.Stored(ctx, id)
	if errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrCorrupt) {
		b, err = a.others(ctx, id, err)
		return b, false, err
	}
	return b, zstd, err
}

func (a anyServers) others(ctx context.Context, id flox.CID, why error) ([]byte, error) {
	b, err := a.s.fromOthers(ctx, id)
	if err != nil {
		return nil, errors.Join(why, err)
	}
	return b, nil
}
