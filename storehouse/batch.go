package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/queue"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of one entry of the log made of many publishes.
const (
	batchPaths = 512
	batchBytes = 2 << 20
	batchQueue = 1024
)

// errStopping answers what cannot be put into the log any more.
var errStopping = fmt.Errorf("the storehouse is stopping: %w", flox.ErrClosed)

// batcher makes one log entry of the publishes that arrive while the entry
// before is on its way: one fsync for all of them.
type batcher struct {
	session *cluster.Session
	queue   chan *addition
	stopped chan struct{} // closed when run ends
}

// addition is one path on its way into the log, or some that go together.
type addition struct {
	infos     []*floxv1.PathInfo
	file      *floxv1.NarFile // nil = none
	publisher string
	placed    []string // servers that hold its blocks
	lease     *floxv1.UnderLease
	done      chan added
}

// added is what became of an addition.
type added struct {
	reply *floxv1.PathsReply
	err   error
}

func newBatcher(node *cluster.Node) *batcher {
	return &batcher{session: node.NewSession(), queue: make(chan *addition, batchQueue), stopped: make(chan struct{})}
}

// add makes a path valid and gives the reply of the entry it was in. narFile is
// the name its NAR was uploaded under, or ""; placed are the servers that hold it.
func (b *batcher) add(ctx context.Context, info *flox.PathInfo, narFile, publisher string, placed []string) (*floxv1.PathsReply, error) {
	return b.addAll(ctx, []*flox.PathInfo{info}, narFile, publisher, placed)
}

// size is how much of an entry an addition takes.
func (a *addition) size() (n int) {
	for _, info := range a.infos {
		n += proto.Size(info)
	}
	return n
}

// addAll is add of paths that become valid in this order, all or none. There is
// at least one; narFile is the first one's.
func (b *batcher) addAll(ctx context.Context, infos []*flox.PathInfo, narFile, publisher string, placed []string) (*floxv1.PathsReply, error) {
	info := infos[0]
	a := &addition{publisher: publisher, placed: placed, lease: leaseOf(ctx), done: make(chan added, 1)}
	for _, info := range infos {
		a.infos = append(a.infos, api.FromPathInfo(info))
	}
	if narFile != "" {
		a.file = &floxv1.NarFile{Name: narFile, Path: string(info.Path), NarHash: info.NarHash[:]}
	}
	select {
	case b.queue <- a:
	case <-b.stopped:
		return nil, errStopping
	case <-ctx.Done():
		return nil, fmt.Errorf("publish %s: %w", info.Path, ctx.Err())
	}
	select {
	case got := <-a.done:
		return got.reply, got.err
	case <-b.stopped:
		return nil, errStopping
	case <-ctx.Done():
		// It may still become valid; publishing it again is harmless.
		return nil, fmt.Errorf("publish %s: %w", info.Path, ctx.Err())
	}
}

// run makes entries until ctx ends.
func (b *batcher) run(ctx context.Context) error {
	defer close(b.stopped)
	var next *addition // of another publisher than the batch before
	for {
		if next == nil {
			select {
			case next = <-b.queue:
			case <-ctx.Done():
				return nil
			}
		}
		batch := []*addition{next}
		batch, next = b.collect(batch)
		b.propose(ctx, batch)
	}
}

// collect takes what waits and fits. An entry names one publisher, one set of servers,
// and one lease.
func (b *batcher) collect(batch []*addition) (_ []*addition, next *addition) {
	size, paths := batch[0].size(), len(batch[0].infos)
	for paths < batchPaths && size < batchBytes {
		select {
		case a := <-b.queue:
			if a.publisher != batch[0].publisher || !proto.Equal(a.lease, batch[0].lease) || !slices.Equal(a.placed, batch[0].placed) || len(a.infos) > 1 && paths+len(a.infos) > batchPaths {
				return batch, a
			}
			batch = append(batch, a)
			size, paths = size+a.size(), paths+len(a.infos)
		default:
			return batch, nil
		}
	}
	return batch, nil
}

// propose puts a batch into the log. If the batch is refused, its paths go one
// by one, so that each is answered for itself.
func (b *batcher) propose(ctx context.Context, batch []*addition) {
	c := &floxv1.AddPaths{Publisher: batch[0].publisher, Touch: true, Lease: batch[0].lease}
	if len(batch[0].placed) > 1 {
		c.PlacedOn = batch[0].placed
	}
	for _, a := range batch {
		c.Paths = append(c.Paths, a.infos...)
		if a.file != nil {
			c.NarFiles = append(c.NarFiles, a.file)
		}
	}
	reply, err := proposeAt(ctx, b.session, levelOf(c.GetLease()), &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Add{Add: c}})
	if errors.Is(err, cluster.ErrRefused) && len(batch) > 1 {
		for i := range batch {
			b.propose(ctx, batch[i:i+1])
		}
		return
	}
	for _, a := range batch {
		a.done <- added{reply, err}
	}
}

type leaseKey struct{}

// underLease has what is published count only as long as a lease of a build does.
func underLease(ctx context.Context, l *floxv1.UnderLease) context.Context {
	return context.WithValue(ctx, leaseKey{}, l)
}

// leaseOf is what underLease has set; nil = nothing.
func leaseOf(ctx context.Context) *floxv1.UnderLease {
	l, _ := ctx.Value(leaseKey{}).(*floxv1.UnderLease)
	return l
}

// levelOf is the level of commands that name a lease.
func levelOf(l *floxv1.UnderLease) uint32 {
	if l == nil {
		return 0
	}
	return queue.Level
}
