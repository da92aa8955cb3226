package backup

import (
	"context"
	"errors"
	"fmt"
)

// Pruned is what Prune did.
type Pruned struct {
	Backups []string // removed
	Objects int      // content objects removed
	Bytes   int64    // of those
}

// Prune removes all but the newest keep backups, what unfinished ones left beside
// them, and the content objects that no backup needs any more. A block stays with
// its object as long as one block of that is needed. The caller holds the lock.
// Nothing is removed when one of the backups that stay cannot be read.
func (p *Place) Prune(ctx context.Context, keep int) (done Pruned, err error) {
	names, leftovers, err := p.names(ctx)
	if err != nil {
		return done, err
	}
	old := names[:max(0, len(names)-keep)]
	needed := map[string]bool{}
	for _, name := range names[len(old):] {
		m, err := p.Manifest(ctx, name)
		if err != nil {
			return done, fmt.Errorf("nothing is removed, since a backup that stays cannot be read: %w", err)
		}
		for _, o := range m.Content {
			needed[o.Digest] = true
		}
	}
	// A backup goes with its manifest: what comes behind is a leftover.
	for _, name := range old {
		if err := p.bucket.Delete(ctx, backupsPrefix+name+"/"+manifestName); err != nil {
			return done, err
		}
		done.Backups = append(done.Backups, name)
		err := p.list(ctx, backupsPrefix+name+"/", func(o object) error {
			leftovers = append(leftovers, o.name)
			return nil
		})
		if err != nil {
			return done, err
		}
	}
	for _, name := range leftovers {
		if err := p.bucket.Delete(ctx, name); err != nil {
			return done, err
		}
	}
	all, err := p.objects(ctx)
	if err != nil {
		return done, err
	}
	for _, o := range all {
		if needed[o.Digest] {
			continue
		}
		if err := errors.Join(ctx.Err(), p.bucket.Delete(ctx, objectName(o.Digest))); err != nil {
			return done, err
		}
		done.Objects++
		done.Bytes += o.Size
	}
	return done, nil
}
