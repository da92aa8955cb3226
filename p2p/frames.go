package p2p

import (
	"sync"
	"time"

	"github.com/floxctl/flox"
)

const (
	// framesBytes bounds what is kept of what came, as it came; framesFor is how long.
	framesBytes = 16 << 20
	framesFor   = 15 * time.Second
)

// frames keeps the blocks that came a moment ago as they came over the wire, each
// verified: a crowd wants them from us next, before they are on the disk, and what was
// compressed once is passed on so by all of it.
type frames struct {
	mu    sync.Mutex
	by    map[flox.CID]frame
	order []flox.CID // as they came; a block has one place
	bytes int
	timer *time.Timer // until the oldest goes; nil = there is none
}

// frame is the payload of a reply that carried a whole block.
type frame struct {
	data []byte
	size int // plain
	zstd bool
	at   time.Time
}

func newFrames() *frames { return &frames{by: map[flox.CID]frame{}} }

func (s *frames) put(id flox.CID, f frame) {
	f.at = time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, twice := s.by[id]; twice || len(f.data) > framesBytes/4 {
		return
	}
	s.by[id] = f
	s.order = append(s.order, id)
	s.bytes += len(f.data)
	for s.bytes > framesBytes {
		s.drop()
	}
	if s.timer == nil {
		s.timer = time.AfterFunc(framesFor, s.age)
	}
}

func (s *frames) get(id flox.CID) (frame, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, ok := s.by[id]
	return f, ok
}

// drop forgets the oldest; s.mu is held.
func (s *frames) drop() {
	id := s.order[0]
	s.order = s.order[1:]
	s.bytes -= len(s.by[id].data)
	delete(s.by, id)
}

// age forgets those whose time is over.
func (s *frames) age() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.order) > 0 && time.Since(s.by[s.order[0]].at) >= framesFor {
		s.drop()
	}
	s.timer = nil
	if len(s.order) > 0 {
		s.timer = time.AfterFunc(framesFor-time.Since(s.by[s.order[0]].at), s.age)
	}
}

// close ends the timer.
func (s *frames) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
	}
}
