package storehouse

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/pack"
	cluster "github.com/floxctl/flox/raft"
)

const (
	bringBatch   = 512 // blocks asked for at once: 16 MiB of them on average
	bringTimeout = 5 * time.Minute
	// retryPause is how long a path whose content nobody had waits to be asked for again.
	retryPause = 10 * time.Second
	// maxLacking bounds the list of paths to ask for again; past it everything is
	// gone through anew.
	maxLacking = 1 << 14
	// passEvery is how often everything is gone through even so: what a disk lost
	// is then fetched again.
	passEvery = 24 * time.Hour
	// sideBySide is how many paths are brought at once: while one waits for the other
	// servers, the other waits for the disk. More bring nothing sooner, and make what
	// the servers confirm to each other late.
	sideBySide = 2
	// burst is how much of what the rate did not use may be used later.
	burst = time.Second
)

// catchUp brings the content of valid paths here that other servers have and
// this one lacks: all of it when the server is new, what was published while it
// was away, and what its disk lost.
type catchUp struct {
	*Server
	file string // remembers up to which entry of the log all content is here

	at      uint64          // that entry; 0 = go through everything
	passed  time.Time       // when everything was gone through last
	lacking map[string]lack // by hash part: paths that nobody gave the content of; guarded by mu while paths are brought

	mu   sync.Mutex
	free time.Time // when the rate allows the next fetch

	damaged atomic.Bool // blocks that were here are lost: go through everything
	backlog backlog
}

func newCatchUp(s *Server) *catchUp {
	return &catchUp{Server: s, file: filepath.Join(s.cfg.StateDir, "placed.json"), lacking: map[string]lack{}}
}

// placedMark is placed.json.
type placedMark struct {
	Index uint64 `json:"index"` // of the log
}

// run works until ctx ends.
func (c *catchUp) run(ctx context.Context) error {
	if !c.needed() {
		return nil
	}
	if err := c.load(); err != nil {
		return err
	}
	for ctx.Err() == nil {
		err := c.step(ctx)
		if err == nil || ctx.Err() != nil {
			continue
		}
		if errors.Is(err, flox.ErrCorrupt) {
			return err // the facts
		}
		c.cfg.Log.Warn("content of other servers cannot be brought here now, trying again", "error", err)
		select {
		case <-time.After(retryPause):
		case <-ctx.Done():
		}
	}
	return nil
}

// needed is false where there are no others, or what they have is here.
func (c *catchUp) needed() bool { return c.line != nil && c.cfg.Bucket == "" && !c.cfg.noCatchUp }

func (c *catchUp) load() error {
	var mark placedMark
	err := readNote(c.file, &mark)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case errors.Is(err, flox.ErrCorrupt):
		c.cfg.Log.Warn("going through all content: the mark of what is here is damaged", "file", c.file, "error", err)
		return nil
	case err != nil:
		return fmt.Errorf("catch up: %w", err)
	}
	if c.packs.Stat().Blocks == 0 {
		return nil // whatever was here, it is gone
	}
	c.at, c.passed = mark.Index, time.Now()
	c.backlog.end()
	return nil
}

// lost is told of blocks that are here no more.
func (c *catchUp) lost(flox.CID) { c.damaged.Store(true) }

// reached notes that all content up to an entry is here, or listed as lacking.
func (c *catchUp) reached(index uint64) error {
	if c.at == index {
		return nil
	}
	c.at = index
	if len(c.lacking) > 0 {
		return nil // after a restart the mark before leads to them again
	}
	return writeNote(c.file, placedMark{index}, 0o644)
}

// step goes through everything if need be, else waits for what is new, and asks
// again for what was lacking.
func (c *catchUp) step(ctx context.Context) error {
	if c.at == 0 { // no entry is known here before this server was let in: nothing to go through
		if _, err := c.node.Follow(ctx, 0); err != nil {
			return err
		}
	}
	if c.at == 0 || c.damaged.Load() || time.Since(c.passed) > passEvery || len(c.lacking) >= maxLacking {
		return c.pass(ctx)
	}
	wait, cancel := context.WithTimeout(ctx, retryPause)
	_, err := c.node.Follow(wait, c.at)
	cancel()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		if err := c.follow(ctx); err != nil {
			return err
		}
	} else if wait.Err() == nil {
		return err
	}
	return c.again(ctx)
}

// pass goes through every valid path.
func (c *catchUp) pass(ctx context.Context) error {
	clear(c.lacking)
	c.backlog.begin()
	c.damaged.Store(false)
	var upTo uint64
	err := c.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		upTo = r.Index()
		return nil
	})
	if err == nil {
		err = c.lookAhead(ctx)
	}
	if err != nil {
		return err
	}
	after, begun := "", time.Now()
	for more := true; more; {
		page, err := c.listHere(ctx, after)
		if err != nil {
			return err
		}
		if err := c.paths(ctx, page.GetPaths()); err != nil {
			return err
		}
		if more = page.GetMore(); more {
			after = page.GetPaths()[len(page.GetPaths())-1]
		}
	}
	c.passed = begun
	c.backlog.end()
	if len(c.lacking) > 0 {
		c.cfg.Log.Warn("no other server gave the content of some paths; they are asked for again", "paths", len(c.lacking))
	}
	return c.reached(upTo)
}

// follow brings what became valid behind the mark.
func (c *catchUp) follow(ctx context.Context) error {
	for {
		var events []*floxv1.WatchEvent
		upTo, reset := c.at, false
		err := c.read(ctx, cluster.Local, func(r *cluster.Reader) (err error) {
			events, upTo, reset, err = readChanges(r, c.at)
			return err
		})
		if err != nil {
			return err
		}
		if reset {
			return c.pass(ctx)
		}
		var added []string
		for _, e := range events {
			added = append(added, e.GetAdded()...)
		}
		if err := c.expect(ctx, added); err != nil {
			return err
		}
		if err := c.paths(ctx, added); err != nil {
			return err
		}
		if err := c.reached(upTo); err != nil || len(events) < watchBatch {
			return err
		}
	}
}

// paths is path for each, some at a time.
func (c *catchUp) paths(ctx context.Context, names []string) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(sideBySide)
	for _, name := range names {
		group.Go(func() error { return c.path(ctx, name) })
	}
	return group.Wait()
}

// again asks for what nobody gave before.
func (c *catchUp) again(ctx context.Context) error {
	return c.paths(ctx, slices.Collect(maps.Keys(c.lacking)))
}

// path brings the content of one path, named by its base name or hash part. What
// nobody gives is noted; an error is of this server.
func (c *catchUp) path(ctx context.Context, name string) error {
	hashPart := name[:min(len(name), flox.HashPartLen)]
	var info *floxv1.PathInfo
	err := c.read(ctx, cluster.Local, func(r *cluster.Reader) (err error) {
		info, err = readInfo(r, hashPart)
		return err
	})
	var missing lack
	if err == nil {
		missing, err = c.content(ctx, info)
	} else if errors.Is(err, flox.ErrNotFound) { // it was removed meanwhile
		err = nil
	}
	if err != nil {
		return fmt.Errorf("content of %s: %w", name, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.backlog.change(c.lacking[hashPart], missing)
	if delete(c.lacking, hashPart); missing != (lack{}) {
		c.lacking[hashPart] = missing
	}
	return nil
}

// content brings every block of a path and says what nobody gave.
func (c *catchUp) content(ctx context.Context, info *floxv1.PathInfo) (missing lack, err error) {
	root := flox.CID(info.GetManifest())
	began, err := c.packs.Has(ctx, []flox.CID{root})
	if err != nil {
		return lack{}, err
	}
	if _, err := c.disk.admit(Essential(ctx)); err != nil {
		return lack{}, err
	}
	session := c.packs.Session()
	defer session.Close()
	b := &bringing{catchUp: c, session: session}
	err = b.all(ctx, root)
	if errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrUnreachable) {
		b.missing, err = lackOf(info.GetNarSize()), ctx.Err()
	}
	if err == nil && !began[0] {
		c.backlog.pass(info.GetNarSize())
	}
	return b.missing, err
}

// bringing reads a manifest whose pages may have to be fetched, and collects the
// blocks it names.
type bringing struct {
	*catchUp
	session *pack.Session
	ids     []flox.CID
	sizes   []uint32
	size    uint64
	missing lack // had from nobody
}

var _ flox.Blocks = (*bringing)(nil)

// Get is flox.Blocks.
func (b *bringing) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	left, err := b.fetch(ctx, []flox.CID{id})
	if err != nil {
		return nil, err
	}
	if len(left) > 0 {
		return nil, fmt.Errorf("block %s: no other server gave it: %w", id, flox.ErrNotFound)
	}
	data, err := b.packs.Get(ctx, id)
	if errors.Is(err, flox.ErrCorrupt) { // it rotted here
		return b.anew(ctx, id)
	}
	return data, err
}

// all brings a manifest and every block it names.
func (b *bringing) all(ctx context.Context, root flox.CID) error {
	m, err := content.OpenManifest(ctx, root, b)
	if err != nil {
		return err
	}
	var failed error
	err = m.Blocks(ctx, func(id flox.CID, size uint32) bool {
		failed = b.want(ctx, id, size)
		return failed == nil
	})
	if err = errors.Join(failed, err); err != nil {
		return err
	}
	return b.flush(ctx)
}

// want asks for a block with the next batch.
func (b *bringing) want(ctx context.Context, id flox.CID, size uint32) error {
	b.ids, b.sizes, b.size = append(b.ids, id), append(b.sizes, size), b.size+uint64(size)
	if len(b.ids) < bringBatch && b.size < bringBatch<<15 {
		return nil
	}
	return b.flush(ctx)
}

// flush fetches what of the batch is not here.
func (b *bringing) flush(ctx context.Context) error {
	left, err := b.fetch(ctx, b.ids)
	for _, i := range left {
		b.missing = b.missing.plus(lack{1, uint64(b.sizes[i])})
	}
	b.ids, b.sizes, b.size = b.ids[:0], b.sizes[:0], 0
	return err
}

// fetch brings blocks from the other servers, at the configured rate, and gives the
// indexes of those that none of them gave.
func (b *bringing) fetch(ctx context.Context, ids []flox.CID) (left []uint32, err error) {
	limited, cancel := context.WithTimeout(ctx, bringTimeout)
	defer cancel()
	others, _, _ := b.servers.others()
	left, came, err := b.bring(limited, b.session, ids, others...)
	next := b.brought(came)
	if err != nil {
		if ctx.Err() == nil && limited.Err() != nil { // slow peers, not us
			for i := range ids {
				left = append(left, uint32(i))
			}
			return left, nil
		}
		return nil, err
	}
	select {
	case <-time.After(time.Until(next)):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return left, nil
}

// brought counts bytes that came, and says when the rate allows more.
func (c *catchUp) brought(came uint64) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.backlog.brought(came)
	if rate := c.cfg.CatchUpRate; rate > 0 {
		if unused := time.Now().Add(-burst); c.free.Before(unused) {
			c.free = unused
		}
		c.free = c.free.Add(time.Duration(float64(came) / float64(rate) * float64(time.Second)))
	}
	return c.free
}

// listHere lists valid paths as this server knows them.
func (s *Server) listHere(ctx context.Context, after string) (out *floxv1.ListValidResponse, err error) {
	err = s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		out, err = readNames(ctx, r, after, maxListed)
		return err
	})
	return out, err
}

// readChanges reads the next changes behind at, at most watchBatch, and up to
// which index the caller then knows all of them. reset says that they are no
// longer all there.
func readChanges(r *cluster.Reader, at uint64) (events []*floxv1.WatchEvent, upTo uint64, reset bool, err error) {
	counts, err := readCounts(r)
	if err != nil {
		return nil, 0, false, err
	}
	upTo = r.Index()
	if at < counts.dropped {
		return nil, upTo, true, nil
	}
	var bad error
	err = r.Iterate([]byte{changeKey}, indexKey(changeKey, at+1), func(_, value []byte) bool {
		e := &floxv1.WatchEvent{}
		if bad = proto.Unmarshal(value, e); bad != nil {
			return false
		}
		if events = append(events, e); len(events) == watchBatch {
			upTo = e.GetIndex() // the rest comes with the next call
			return false
		}
		return true
	})
	if bad != nil {
		return nil, 0, false, fmt.Errorf("list of changes: %w: %w", bad, flox.ErrCorrupt)
	}
	return events, upTo, false, err
}
