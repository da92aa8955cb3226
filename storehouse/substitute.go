package storehouse

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of one Substitute.
const (
	maxSubstituted = 1 << 14 // paths named; with what they refer to they may be many more
	substituteJobs = 32
	// maxSubstituteNews bounds in bytes what a progress message gathers.
	maxSubstituteNews = 256 << 10
)

// SubstituteOptions say what is to be fetched from upstreams.
type SubstituteOptions struct {
	Paths []string // base names or hash parts
	Dry   bool     // only say what would be fetched
	Alone bool     // if Dry: not what they refer to
}

// Substitute makes paths valid that upstreams have, with all they refer to,
// references first. What is valid is passed over. A path that cannot be had is told
// of in the progress, with what refers to it, and the others go on; the error is of
// the whole: ErrBadInput, ErrFull, ErrUnreachable. tell is called by one goroutine at
// a time. Whatever calls overlap, a path is fetched once.
func (s *Server) Substitute(ctx context.Context, opts SubstituteOptions, tell func(*floxv1.SubstituteProgress)) error {
	wanted, err := substitutable(opts.Paths)
	if err != nil {
		return err
	}
	// What was set a moment ago, at whichever server, counts.
	if _, err := s.upstreams.current(ctx, cluster.Linearizable); err != nil {
		return err
	}
	sub := &substituting{s: s, under: map[*flight]bool{}, tell: tell, next: &floxv1.SubstituteProgress{}}
	sub.im = newImporting(s, sub, min(substituteJobs, max(len(wanted), 1)*4))
	sub.im.dry, sub.im.alone = opts.Dry, opts.Alone
	sub.im.found, sub.im.failed, sub.im.tell = sub.found, sub.failed, sub.report
	err = sub.im.run(ctx, func() error {
		for _, w := range wanted {
			sub.im.node(w.hashPart, w.path)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("substitute: %w", err)
	}
	return nil
}

// wantedPath is a path that is to be substituted.
type wantedPath struct {
	hashPart string
	path     flox.StorePath // "" if only the hash part is known
}

func substitutable(names []string) ([]wantedPath, error) {
	if len(names) > maxSubstituted {
		return nil, fmt.Errorf("substitute %d paths, want at most %d: %w", len(names), maxSubstituted, flox.ErrBadInput)
	}
	list := make([]wantedPath, 0, len(names))
	for _, name := range names {
		if flox.ValidHashPart(name) {
			list = append(list, wantedPath{hashPart: name})
			continue
		}
		p, err := flox.ParseStorePath(name)
		if err != nil {
			return nil, fmt.Errorf("substitute: %w", err)
		}
		list = append(list, wantedPath{p.HashPart(), p})
	}
	return list, nil
}

// substituting is one Substitute.
type substituting struct {
	s    *Server
	im   *importing
	tell func(*floxv1.SubstituteProgress)

	next *floxv1.SubstituteProgress // what is not told yet
	size int                        // of it, in bytes

	mu    sync.Mutex
	under map[*flight]bool // what is under way
}

var _ importFrom = (*substituting)(nil)

// find is importFrom.
func (b *substituting) find(ctx context.Context, hashPart string) (*offer, error) {
	return b.s.upstreams.find(ctx, hashPart, nil)
}

// bring is importFrom.
func (b *substituting) bring(ctx context.Context, o *offer) error {
	var mine *flight
	defer func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.under, mine)
	}()
	return b.s.upstreams.bring(ctx, o, func(f *flight) {
		b.mu.Lock()
		defer b.mu.Unlock()
		mine = f
		b.under[f] = true
	})
}

// underway is how many bytes came of what is not valid yet.
func (b *substituting) underway() (sum uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for f := range b.under {
		sum += f.read.Load()
	}
	return sum
}

// found tells of a path that an upstream has.
func (b *substituting) found(o *offer) {
	news := substitutableOf(o)
	b.next.Found = append(b.next.Found, news)
	b.grown(news)
}

// substitutableOf is what is told of an offer.
func substitutableOf(o *offer) *floxv1.SubstitutablePath {
	return &floxv1.SubstitutablePath{Info: api.FromPathInfo(&o.Info), DownloadSize: o.downloadSize(), Upstream: o.from}
}

// failed tells of a path that cannot be had.
func (b *substituting) failed(n *importNode, err error) {
	news := &floxv1.UnsubstitutablePath{Path: n.String(), Unknown: errors.Is(err, flox.ErrNotFound), Reason: err.Error()}
	b.next.Failed = append(b.next.Failed, news)
	b.grown(news)
}

func (b *substituting) grown(news proto.Message) {
	if b.size += proto.Size(news); b.size >= maxSubstituteNews {
		b.report()
	}
}

// report tells how far it is.
func (b *substituting) report() {
	now, p := &b.im.now, b.next
	b.next, b.size = &floxv1.SubstituteProgress{}, 0
	if b.tell == nil {
		return
	}
	p.DonePaths, p.TotalPaths, p.TotalBytes = now.GetDonePaths(), now.GetTotalPaths(), now.GetTotalBytes()
	p.DoneBytes, p.Now, p.Finished = now.GetDoneBytes()+b.underway(), now.GetNow(), now.GetFinished()
	b.tell(p)
}
