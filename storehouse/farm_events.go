package storehouse

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

// maxJournal bounds what is kept of what happened in a build, in bytes of the file: a
// log of 64 MiB of lines that are not very short.
const maxJournal = 256 << 20

// journal keeps what happens in a build under way, in a file without a name, for any
// number of readers, each at its own pace.
type journal struct {
	mu    sync.Mutex
	file  *os.File // nil = it could not be made, or is closed
	out   *bufio.Writer
	size  int64 // written, with what out holds
	most  int64 // that size may be
	full  bool  // what comes is not kept
	ended bool
	more  bell
	users int // that read, and the build
}

// newJournal makes one in a directory. Without a file it has nothing to say.
func newJournal(dir string) *journal {
	j := &journal{users: 1, most: maxJournal}
	file, err := os.CreateTemp(dir, "build-events-")
	if err == nil {
		err = os.Remove(file.Name())
		j.file, j.out = file, bufio.NewWriterSize(file, 32<<10)
	}
	j.ended = err != nil
	return j
}

// put is listener. That the build waits or has ended is the queue's to say.
func (j *journal) put(e *floxv1.BuildEvent) {
	if e.GetWait() != nil || e.GetStop() != nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.ended || j.full {
		return
	}
	b, err := proto.Marshal(e)
	if err == nil {
		var n [binary.MaxVarintLen64]byte
		head := n[:binary.PutUvarint(n[:], uint64(len(b)))]
		if size := j.size + int64(len(head)+len(b)); size <= j.most {
			_, failed := j.out.Write(head)
			_, err = j.out.Write(b)
			j.size = size
			err = errors.Join(failed, err)
		} else {
			j.full = true
		}
	}
	j.full = j.full || err != nil // what comes is in the log
	j.more.ring()
}

// end says that nothing more comes.
func (j *journal) end() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ended = true
	j.more.ring()
}

// use takes part in the journal; false if it is closed.
func (j *journal) use() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.users == 0 {
		return false
	}
	j.users++
	return true
}

// close ends a use, and with the last one the file.
func (j *journal) close() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.users--; j.users == 0 && j.file != nil {
		_ = j.file.Close()
		j.file = nil
	}
}

// ReadAt is io.ReaderAt of what is written so far.
func (j *journal) ReadAt(p []byte, at int64) (int, error) { return j.file.ReadAt(p, at) }

// errJournalFull ends what is read while a build goes on.
var errJournalFull = fmt.Errorf("it has said more than is kept while it is under way; all of it is in its log once it is over: floxctl queue log: %w", flox.ErrNotFound)

// upTo waits until more than at bytes can be read, and gives how many; as many as at =
// that is all, or soFar and there is no more yet. errJournalFull if more is not kept.
func (j *journal) upTo(ctx context.Context, at int64, soFar bool) (int64, error) {
	for {
		rung := j.more.wait()
		j.mu.Lock()
		size, ended := j.size, j.ended
		var err error
		if size == at && j.full && !soFar {
			err = errJournalFull
		}
		if size > at && j.out != nil {
			err = j.out.Flush()
		}
		j.mu.Unlock()
		if err != nil || size > at || ended || soFar {
			return size, err
		}
		select {
		case <-rung:
		case <-ctx.Done():
			return at, ctx.Err()
		}
	}
}

// read calls yield with all that happens, from the beginning, until the build has ended,
// or soFar, with what has happened. Who reads has used it. ErrNotFound, behind all that
// is kept, if there was more.
func (j *journal) read(ctx context.Context, soFar bool, yield func(*floxv1.BuildEvent) error) error {
	for at := int64(0); ; {
		size, err := j.upTo(ctx, at, soFar)
		if err != nil || size == at {
			return err
		}
		in := bufio.NewReader(io.NewSectionReader(j, at, size-at))
		for {
			n, err := binary.ReadUvarint(in)
			if errors.Is(err, io.EOF) {
				break
			}
			if err == nil && n > maxMessage {
				err = flox.ErrCorrupt
			}
			e := &floxv1.BuildEvent{}
			if err == nil {
				b := make([]byte, n)
				if _, err = io.ReadFull(in, b); err == nil {
					err = proto.Unmarshal(b, e)
				}
			}
			if err == nil {
				err = yield(e)
			}
			if err != nil {
				return err
			}
		}
		at = size
	}
}

// events calls yield with what happens in a build that this server has a lease of, from
// its beginning. ErrNotFound if it has ended, or there is none.
func (f *farming) events(ctx context.Context, q *floxv1.BuildEventsRequest, yield func(*floxv1.BuildEvent) error) error {
	l := q.GetLease()
	if err := f.looked(ctx, l.GetToken()); err != nil {
		return err
	}
	f.mu.Lock()
	run := f.runs[l.GetToken()]
	f.mu.Unlock()
	if run == nil || run.lease.GetKey() != l.GetBuild() || !run.events.use() {
		return fmt.Errorf("build %.300s does not run here under lease %d: %w", l.GetBuild(), l.GetToken(), flox.ErrNotFound)
	}
	defer run.events.close()
	err := run.events.read(ctx, q.GetSoFar(), yield)
	if errors.Is(err, errJournalFull) {
		err = fmt.Errorf("build %.300s: %w", l.GetBuild(), err)
	}
	return err
}

// eventsOf is events of the server that has a lease.
func (f *farming) eventsOf(ctx context.Context, l *floxv1.BuildLease, soFar bool, yield func(*floxv1.BuildEvent) error) error {
	q := &floxv1.BuildEventsRequest{Lease: &floxv1.UnderLease{Build: l.GetKey(), Token: l.GetToken()}, SoFar: soFar}
	if l.GetWorker() == f.id() {
		return f.events(ctx, q, yield)
	}
	stream, err := f.s.servers.client(p2p.PeerID(l.GetWorker())).BuildEvents(ctx, connect.NewRequest(q))
	if err != nil {
		return api.FromConnect(err)
	}
	for err == nil && stream.Receive() {
		err = yield(stream.Msg())
	}
	return errors.Join(err, api.FromConnect(stream.Err()), stream.Close())
}

// BuildEvents is floxv1connect.ServersHandler.
func (h *houses) BuildEvents(ctx context.Context, req *connect.Request[floxv1.BuildEventsRequest], stream *connect.ServerStream[floxv1.BuildEvent]) error {
	err := h.caller(req.Peer().Addr)
	if err == nil {
		err = h.farm.events(ctx, req.Msg, stream.Send)
	}
	return api.ToConnect(err)
}
