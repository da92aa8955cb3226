package storehouse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

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
)

// catchUp brings the content of valid paths here that other servers have and
// this one lacks: all of it when the server is new, what was published while it
// was away, and what its disk lost.
type catchUp struct {
	*Server
	file string // remembers up to which entry of the log all content is here

	at      uint64              // that entry; 0 = go through everything
	passed  time.Time           // when everything was gone through last
	lacking map[string]struct{} // hash parts of paths that nobody gave the content of

	damaged      atomic.Bool // blocks that were here are lost: go through everything
	lackingPaths atomic.Int64
	bytes        atomic.Uint64 // brought since the start
	goal, done   atomic.Int64  // paths of the pass under way
}

func newCatchUp(s *Server) *catchUp {
	return &catchUp{Server: s, file: filepath.Join(s.cfg.StateDir, "placed.json"), lacking: map[string]struct{}{}}
}

// placedMark is placed.json.
type placedMark struct {
	Index uint64 `json:"index"` // of the log
}

// run works until ctx ends.
func (c *catchUp) run(ctx context.Context) error {
	if c.line == nil || c.cfg.Bucket != "" || c.cfg.noCatchUp {
		return nil // there are no others, or what they have is here
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

func (c *catchUp) load() error {
	b, err := os.ReadFile(c.file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("catch up: %w", err)
	}
	var mark placedMark
	if err := json.Unmarshal(b, &mark); err != nil {
		c.cfg.Log.Warn("going through all content: the mark of what is here cannot be read", "file", c.file, "error", err)
		return nil
	}
	if c.packs.Stat().Blocks == 0 {
		return nil // whatever was here, it is gone
	}
	c.at, c.passed = mark.Index, time.Now()
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
	b, err := json.Marshal(placedMark{index})
	if err != nil {
		return err
	}
	return writeFile(c.file, append(b, '\n'), 0o644)
}

// step goes through everything if need be, else waits for what is new, and asks
// again for what was lacking.
func (c *catchUp) step(ctx context.Context) error {
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
	c.damaged.Store(false)
	var upTo uint64
	err := c.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		counts, err := readCounts(r)
		upTo = r.Index()
		c.goal.Store(int64(counts.paths))
		c.done.Store(0)
		return err
	})
	if err != nil {
		return err
	}
	after, begun := "", time.Now()
	for more := true; more; {
		page, err := c.listHere(ctx, after)
		if err != nil {
			return err
		}
		for _, name := range page.GetPaths() {
			if err := c.path(ctx, name); err != nil {
				return err
			}
			c.done.Add(1)
		}
		if more = page.GetMore(); more {
			after = page.GetPaths()[len(page.GetPaths())-1]
		}
	}
	c.passed = begun
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
		for _, e := range events {
			for _, name := range e.GetAdded() {
				if err := c.path(ctx, name); err != nil {
					return err
				}
			}
		}
		if err := c.reached(upTo); err != nil || len(events) < watchBatch {
			return err
		}
	}
}

// again asks for what nobody gave before.
func (c *catchUp) again(ctx context.Context) error {
	for hashPart := range c.lacking {
		if err := c.path(ctx, hashPart); err != nil {
			return err
		}
	}
	return nil
}

// path brings the content of one path, named by its base name or hash part. What
// nobody gives is noted; an error is of this server.
func (c *catchUp) path(ctx context.Context, name string) error {
	hashPart := name[:min(len(name), flox.HashPartLen)]
	var manifest flox.CID
	err := c.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		m, err := readInfo(r, hashPart)
		if err == nil {
			manifest = flox.CID(m.GetManifest())
		}
		return err
	})
	whole := errors.Is(err, flox.ErrNotFound) // it was removed meanwhile
	if !whole && err != nil {
		return err
	}
	if !whole {
		if whole, err = c.manifest(ctx, manifest); err != nil {
			return fmt.Errorf("content of %s: %w", name, err)
		}
	}
	if delete(c.lacking, hashPart); !whole {
		c.lacking[hashPart] = struct{}{}
	}
	c.lackingPaths.Store(int64(len(c.lacking)))
	return nil
}

// manifest brings every block of one manifest and says whether all are here.
func (c *catchUp) manifest(ctx context.Context, id flox.CID) (whole bool, err error) {
	if _, err := c.disk.admit(Essential(ctx)); err != nil {
		return false, err
	}
	session := c.packs.Session()
	defer session.Close()
	b := &bringing{catchUp: c, session: session}
	m, err := content.OpenManifest(ctx, id, b)
	if err == nil {
		var failed error
		err = m.Blocks(ctx, func(id flox.CID, size uint32) bool {
			failed = b.want(ctx, id, size)
			return failed == nil
		})
		if err = errors.Join(failed, err); err == nil {
			err = b.flush(ctx)
		}
	}
	if errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrUnreachable) {
		return false, ctx.Err()
	}
	return err == nil && !b.short, err
}

// bringing reads a manifest whose pages may have to be fetched, and collects the
// blocks it names.
type bringing struct {
	*catchUp
	session *pack.Session
	ids     []flox.CID
	size    uint64
	short   bool // some block was had from nobody
}

var _ flox.Blocks = (*bringing)(nil)

// Get is flox.Blocks.
func (b *bringing) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	missing, err := b.fetch(ctx, []flox.CID{id})
	if err != nil {
		return nil, err
	}
	if missing > 0 {
		return nil, fmt.Errorf("block %s: no other server gave it: %w", id, flox.ErrNotFound)
	}
	return b.packs.Get(ctx, id)
}

// want asks for a block with the next batch.
func (b *bringing) want(ctx context.Context, id flox.CID, size uint32) error {
	b.ids, b.size = append(b.ids, id), b.size+uint64(size)
	if len(b.ids) < bringBatch && b.size < bringBatch<<15 {
		return nil
	}
	return b.flush(ctx)
}

// flush fetches what of the batch is not here.
func (b *bringing) flush(ctx context.Context) error {
	missing, err := b.fetch(ctx, b.ids)
	b.short = b.short || missing > 0
	b.ids, b.size = b.ids[:0], 0
	return err
}

// fetch brings blocks from the other servers, at the configured rate.
func (b *bringing) fetch(ctx context.Context, ids []flox.CID) (missing int, err error) {
	begun, before := time.Now(), b.packs.Stat().PlainBytes
	limited, cancel := context.WithTimeout(ctx, bringTimeout)
	defer cancel()
	others, _, _ := b.servers.others()
	left, err := b.bring(limited, b.session, ids, others...)
	if err != nil {
		if ctx.Err() == nil && limited.Err() != nil {
			return len(ids), nil // slow peers, not us
		}
		return 0, err
	}
	came := b.packs.Stat().PlainBytes - before
	b.bytes.Add(came)
	if rate := b.cfg.CatchUpRate; rate > 0 {
		pause := time.Duration(float64(came)/float64(rate)*float64(time.Second)) - time.Since(begun)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	return len(left), nil
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
