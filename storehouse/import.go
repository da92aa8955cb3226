package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
)

// Bounds of an import.
const (
	defaultJobs = 8
	maxJobs     = 64
	// maxNarInfos is how many path infos are kept until their NARs are fetched; what
	// is beyond is read again.
	maxNarInfos = 1 << 14
	// maxFailedListed bounds the words of one progress message.
	maxFailedListed = 1000
)

// importProgress is how often an import says how far it is.
const importProgress = 200 * time.Millisecond

// ImportOptions say what to import.
type ImportOptions struct {
	// From is a binary cache: http://…, https://…, or a directory on the server with
	// narinfos and NARs.
	From string
	// Paths are imported with their closures; empty = everything a directory lists.
	Paths []flox.StorePath
	// Jobs is how many paths are fetched at once; 0 = 8, at most 64.
	Jobs int
	// Keys are the public keys to accept, "name:base64"; empty = those of the trust list.
	Keys []string
}

// Import copies paths of an existing binary cache here, references first, with
// their signatures. What is valid already is passed over, so an import that was
// stopped goes on where it was. A path that cannot be had, or that no accepted key
// signed, is told of in the progress with what refers to it, and the others go on;
// the error is of the import as a whole: ErrBadInput, ErrNotFound, ErrFull.
// progress is called by one goroutine at a time.
func (s *Server) Import(ctx context.Context, opts ImportOptions, progress func(*floxv1.ImportProgress)) error {
	if opts.Jobs < 0 || opts.Jobs > maxJobs {
		return fmt.Errorf("import with %d jobs, want at most %d: %w", opts.Jobs, maxJobs, flox.ErrBadInput)
	}
	setDefault(&opts.Jobs, defaultJobs)
	for _, p := range opts.Paths {
		if _, err := flox.ParseStorePath(string(p)); err != nil {
			return fmt.Errorf("import: %w", err)
		}
	}
	source, err := openSource(opts.From, opts.Jobs)
	if err != nil {
		return err
	}
	im := &importing{Server: s, opts: opts, source: source, tell: progress, nodes: map[string]*importNode{}}
	if im.keys, err = s.acceptedKeys(ctx, opts.Keys); err == nil {
		err = im.run(ctx)
	}
	if err = errors.Join(err, source.close()); err != nil {
		return fmt.Errorf("import from %s: %w", opts.From, err)
	}
	return nil
}

// acceptedKeys are the keys given, or those of the trust list.
func (s *Server) acceptedKeys(ctx context.Context, keys []string) (nix.KeyRing, error) {
	if len(keys) > 0 {
		return nix.ParseKeyRing(keys)
	}
	lists, err := s.trustLists(ctx, 0)
	if err != nil || len(lists) == 0 {
		return nix.KeyRing{}, err
	}
	list, err := content.ParseTrustList(lists[len(lists)-1])
	if err != nil {
		return nix.KeyRing{}, err
	}
	return nix.ParseKeyRing(list.NixKeys)
}

// importNode is one path of an import.
type importNode struct {
	hashPart string
	path     flox.StorePath // "" until its narinfo was read
	info     *nix.NarInfo   // nil = not read, or to be read again
	size     uint64         // of its NAR
	waits    int            // references that are not here yet
	needed   []*importNode  // what waits for it
	state    importState
}

type importState uint8

const (
	importNew importState = iota
	importDescribed
	importDone
	importFailed
)

// importing is one import. One goroutine decides, the others read and publish.
type importing struct {
	*Server
	opts   ImportOptions
	source cacheSource
	keys   nix.KeyRing
	tell   func(*floxv1.ImportProgress)

	nodes    map[string]*importNode // by hash part
	describe []*importNode          // narinfo to be read
	fetch    []*importNode          // NAR to be fetched: all references are here
	infos    int                    // narinfos kept
	now      floxv1.ImportProgress
	told     time.Time
}

// importTask is something for a worker, and then what came of it.
type importTask struct {
	node  *importNode
	fetch bool // else describe
	info  *nix.NarInfo
	valid bool // it was valid before
	err   error
}

func (im *importing) run(ctx context.Context) error {
	if err := im.checkCache(ctx); err != nil {
		return err
	}
	for _, p := range im.opts.Paths {
		im.node(p.HashPart())
	}
	if len(im.opts.Paths) == 0 {
		err := im.source.list(ctx, func(hashPart string) error { im.node(hashPart); return nil })
		if err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	tasks, results := make(chan *importTask), make(chan *importTask)
	var workers sync.WaitGroup
	for range im.opts.Jobs {
		workers.Go(func() {
			for task := range tasks {
				im.work(ctx, task)
				results <- task
			}
		})
	}
	err := im.schedule(ctx, tasks, results)
	cancel()
	close(tasks)
	workers.Wait()
	if err == nil {
		im.now.Finished = true
		im.report(true)
	}
	return err
}

// schedule hands out what can be done until nothing is left, or all is lost; then
// no worker has a task.
func (im *importing) schedule(ctx context.Context, tasks chan<- *importTask, results <-chan *importTask) (fatal error) {
	for busy := 0; ; {
		var next *importTask
		var out chan<- *importTask
		if fatal == nil {
			fatal = ctx.Err()
		}
		switch {
		case fatal != nil:
		case len(im.fetch) > 0:
			next, out = &importTask{node: im.fetch[len(im.fetch)-1], fetch: true}, tasks
			next.info = next.node.info
		case len(im.describe) > 0:
			next, out = &importTask{node: im.describe[len(im.describe)-1]}, tasks
		}
		if next == nil && busy == 0 {
			return fatal
		}
		select {
		case out <- next:
			busy++
			if next.fetch {
				im.fetch = im.fetch[:len(im.fetch)-1]
			} else {
				im.describe = im.describe[:len(im.describe)-1]
			}
		case done := <-results:
			busy--
			// Without room or without anybody to answer, the others fail as well.
			if done.err != nil && (errors.Is(done.err, flox.ErrFull) || errors.Is(done.err, flox.ErrClosed) || ctx.Err() != nil) {
				fatal = done.err
				continue
			}
			im.take(done)
			im.report(false)
		}
	}
}

// node gives the node of a path, a new one if need be.
func (im *importing) node(hashPart string) *importNode {
	n := im.nodes[hashPart]
	if n == nil {
		n = &importNode{hashPart: hashPart}
		im.nodes[hashPart] = n
		im.describe = append(im.describe, n)
		im.now.TotalPaths++
	}
	return n
}

// take draws the consequences of a task.
func (im *importing) take(t *importTask) {
	n := t.node
	switch {
	case n.state == importFailed: // for a reference of it that failed meanwhile
	case t.err != nil:
		if t.info != nil {
			n.path = t.info.Info.Path
		}
		im.fail(n, t.err)
	case t.valid || t.fetch:
		im.done(n)
	default:
		im.described(n, t.info)
	}
}

// described finds out what a path has to wait for.
func (im *importing) described(n *importNode, info *nix.NarInfo) {
	n.state, n.path, n.size = importDescribed, info.Info.Path, info.Info.NarSize
	im.now.TotalBytes += n.size
	for _, ref := range info.Info.References {
		if ref == n.path {
			continue
		}
		on := im.node(ref.HashPart())
		switch on.state {
		case importDone:
		case importFailed:
			im.fail(n, fmt.Errorf("%s, which it refers to, is not here: %w", ref, flox.ErrNotFound))
			return
		case importNew, importDescribed:
			n.waits++
			on.needed = append(on.needed, n)
		}
	}
	if im.infos < maxNarInfos {
		im.infos++
		n.info = info
	}
	if n.waits == 0 {
		im.fetch = append(im.fetch, n)
	}
}

func (im *importing) forget(n *importNode) {
	if n.info != nil {
		im.infos--
		n.info = nil
	}
}

// done lets go on what waited for a path.
func (im *importing) done(n *importNode) {
	n.state = importDone
	im.forget(n)
	im.now.DonePaths++
	im.now.DoneBytes += n.size
	im.now.Now = string(n.path)
	for _, by := range n.needed {
		if by.waits--; by.waits == 0 && by.state == importDescribed {
			im.fetch = append(im.fetch, by)
		}
	}
	n.needed = nil
}

// fail gives a path up, and what refers to it.
func (im *importing) fail(n *importNode, err error) {
	type loss struct {
		node *importNode
		err  error
	}
	for lost := []loss{{n, err}}; len(lost) > 0; lost = lost[1:] {
		n, err := lost[0].node, lost[0].err
		if n.state == importFailed {
			continue
		}
		n.state = importFailed
		im.forget(n)
		name := string(n.path)
		if name == "" {
			name = n.hashPart
		}
		im.now.FailedPaths++
		if len(im.now.GetFailed()) < maxFailedListed {
			im.now.Failed = append(im.now.Failed, fmt.Sprintf("%s: %v", name, err))
		}
		for _, by := range n.needed {
			lost = append(lost, loss{by, fmt.Errorf("%s, which it refers to, is not here: %w", name, flox.ErrNotFound)})
		}
		n.needed = nil
	}
}

func (im *importing) report(always bool) {
	if im.tell == nil || !always && time.Since(im.told) < importProgress {
		return
	}
	im.told = time.Now()
	im.tell(proto.Clone(&im.now).(*floxv1.ImportProgress)) //nolint:forcetypeassert // a clone
	im.now.Failed = nil
}

// checkCache refuses a cache of another store directory.
func (im *importing) checkCache(ctx context.Context) error {
	b, err := im.small(ctx, "nix-cache-info")
	if errors.Is(err, flox.ErrNotFound) { // some have none; every narinfo says it as well
		return nil
	}
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		if dir, ok := strings.CutPrefix(line, "StoreDir:"); ok && strings.TrimSpace(dir) != string(im.cfg.StoreDir) {
			return fmt.Errorf("it is a cache of store directory %s, this storehouse has %s, and paths do not go from one to the other: %w",
				strings.TrimSpace(dir), im.cfg.StoreDir, flox.ErrBadInput)
		}
	}
	return nil
}

// small reads a file of no more than a narinfo's size.
func (im *importing) small(ctx context.Context, name string) (b []byte, err error) {
	err = again(ctx, func() error {
		r, err := im.source.open(ctx, name)
		if err != nil {
			return err
		}
		b, err = io.ReadAll(io.LimitReader(r, nix.MaxNarInfo+1))
		return errors.Join(err, r.Close())
	})
	return bytes.Clone(b), err
}
