package storehouse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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
	// From is a binary cache: http://…, https://…, s3://…, or a directory on the server
	// with narinfos and NARs; or ssh-ng://HOST, the store of Nix there.
	From string
	// Paths are imported with their closures; empty = everything a directory lists.
	Paths []flox.StorePath
	// Jobs is how many paths are fetched at once; 0 = 8, at most 64.
	Jobs int
	// Keys are the public keys to accept, "name:base64"; empty = those of the trust list.
	Keys []string
	// begun, if set, is called once the cache can be read, before anything is imported.
	begun func() error
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
	source, err := openSource(opts.From, sourceOptions{jobs: opts.Jobs, stall: importStall, dir: s.cfg.StoreDir})
	if err != nil {
		return fmt.Errorf("import from %w", err)
	}
	from := &importedCache{Server: s, source: source}
	if from.keys, err = s.acceptedKeys(ctx, opts.Keys); err == nil {
		err = from.checkCache(ctx)
	}
	if err == nil && opts.begun != nil {
		err = opts.begun()
	}
	if err == nil {
		im := newImporting(s, from, opts.Jobs)
		im.failed = func(n *importNode, err error) {
			if len(im.now.GetFailed()) < maxFailedListed {
				im.now.Failed = append(im.now.Failed, fmt.Sprintf("%s: %v", n, err))
			}
		}
		if progress != nil {
			im.tell = func() {
				progress(proto.Clone(&im.now).(*floxv1.ImportProgress)) //nolint:forcetypeassert // a clone
				im.now.Failed = nil
			}
		}
		err = im.run(ctx, func() error { return im.wanted(ctx, opts.Paths, source) })
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

// wanted begins with what is to be imported.
func (im *importing) wanted(ctx context.Context, paths []flox.StorePath, source cacheSource) error {
	for _, p := range paths {
		im.node(p.HashPart(), p)
	}
	if len(paths) > 0 {
		return nil
	}
	return source.list(ctx, func(hashPart string) error { im.node(hashPart, ""); return nil })
}

// importFrom is where paths are imported from.
type importFrom interface {
	// find reads and checks what is said of a path: it may enter. ErrNotFound,
	// ErrUntrusted.
	find(ctx context.Context, hashPart string) (*offer, error)
	// bring makes a path valid whose references are.
	bring(ctx context.Context, o *offer) error
}

// offer is a path that a cache has, or what it says an output became.
type offer struct {
	*nix.NarInfo        // nil if realised is set
	from         string // the cache's URL
	realised     *nix.Realisation
}

// downloadSize is how much is fetched for a path; 0 = its cache does not say.
func (o *offer) downloadSize() uint64 {
	if o.FileSize == 0 && o.Compression == "none" {
		return o.Info.NarSize
	}
	return o.FileSize
}

// importNode is one path of an import.
type importNode struct {
	hashPart string
	path     flox.StorePath // "" until its name is known
	offer    *offer         // nil = not read, or to be read again
	size     uint64         // of its NAR
	waits    int            // references that are not here yet
	needed   []*importNode  // what waits for it
	state    importState
}

func (n *importNode) String() string {
	if n.path == "" {
		return n.hashPart
	}
	return string(n.path)
}

type importState uint8

const (
	importNew importState = iota
	importDescribed
	importDone
	importFailed
)

// importing is one import. One goroutine decides, and calls found, failed and
// tell; the others read and publish.
type importing struct {
	*Server
	jobs int
	from importFrom
	// What is described is not fetched; if alone, what it refers to is not looked for.
	dry, alone bool

	found  func(*offer)
	failed func(*importNode, error)
	tell   func()

	nodes    map[string]*importNode // by hash part
	describe []*importNode          // narinfo to be read
	fetch    []*importNode          // NAR to be fetched: all references are here
	offers   int                    // kept
	now      floxv1.ImportProgress
	told     time.Time
}

func newImporting(s *Server, from importFrom, jobs int) *importing {
	return &importing{
		Server: s, from: from, jobs: jobs, nodes: map[string]*importNode{},
		found: func(*offer) {}, failed: func(*importNode, error) {}, tell: func() {},
	}
}

// importTask is something for a worker, and then what came of it.
type importTask struct {
	node  *importNode
	fetch bool // else describe
	offer *offer
	valid flox.StorePath // it was valid before
	err   error
}

// run imports what begin says.
func (im *importing) run(ctx context.Context, begin func() error) error {
	if err := begin(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	tasks, results := make(chan *importTask), make(chan *importTask)
	var workers sync.WaitGroup
	for range im.jobs {
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
		im.endCircles()
		im.now.Finished = true
		im.report(true)
	}
	return err
}

// endCircles gives up what waits for itself. No store path does; a cache can say so.
func (im *importing) endCircles() {
	for _, n := range im.nodes {
		if n.state == importDescribed {
			im.fail(n, fmt.Errorf("its references lead back to it: %w", flox.ErrBadInput))
		}
	}
}

// schedule hands out what can be done until nothing is left, or all is lost; then
// no worker has a task.
func (im *importing) schedule(ctx context.Context, tasks chan<- *importTask, results <-chan *importTask) (fatal error) {
	tick := time.NewTicker(importProgress)
	defer tick.Stop()
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
			next.offer = next.node.offer
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
		case <-tick.C:
			im.report(false)
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

// node gives the node of a path, a new one if need be. path is "" if only its hash
// part is known.
func (im *importing) node(hashPart string, path flox.StorePath) *importNode {
	n := im.nodes[hashPart]
	if n == nil {
		n = &importNode{hashPart: hashPart, path: path}
		im.nodes[hashPart] = n
		im.describe = append(im.describe, n)
		im.now.TotalPaths++
	}
	return n
}

// take draws the consequences of a task.
func (im *importing) take(t *importTask) {
	n := t.node
	is := t.valid
	if t.offer != nil {
		is = t.offer.Info.Path
	}
	switch {
	case n.state == importFailed: // for a reference of it that failed meanwhile
	case is != "" && n.path != "" && is != n.path:
		im.fail(n, fmt.Errorf("the hash part belongs to %s: %w", is, flox.ErrNotFound))
	case t.err != nil:
		n.path = cmp.Or(is, n.path)
		im.fail(n, t.err)
	case t.valid != "" || t.fetch:
		n.path = is
		im.done(n)
	default:
		im.described(n, t.offer)
	}
}

// described finds out what a path has to wait for.
func (im *importing) described(n *importNode, o *offer) {
	n.state, n.path, n.size = importDescribed, o.Info.Path, o.Info.NarSize
	im.now.TotalBytes += n.size
	im.found(o)
	if im.dry && im.alone {
		im.done(n)
		return
	}
	for _, ref := range o.Info.References {
		if ref == n.path {
			continue
		}
		on := im.node(ref.HashPart(), ref)
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
	if im.offers < maxNarInfos && !im.dry {
		im.offers++
		n.offer = o
	}
	if n.waits == 0 {
		im.next(n)
	}
}

// next has a path fetched whose references are here.
func (im *importing) next(n *importNode) {
	if im.dry {
		im.done(n)
		return
	}
	im.fetch = append(im.fetch, n)
}

func (im *importing) forget(n *importNode) {
	if n.offer != nil {
		im.offers--
		n.offer = nil
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
			im.next(by)
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
		im.now.FailedPaths++
		im.failed(n, err)
		for _, by := range n.needed {
			lost = append(lost, loss{by, fmt.Errorf("%s, which it refers to, is not here: %w", n, flox.ErrNotFound)})
		}
		n.needed = nil
	}
}

func (im *importing) report(always bool) {
	if !always && time.Since(im.told) < importProgress {
		return
	}
	im.told = time.Now()
	im.tell()
}
