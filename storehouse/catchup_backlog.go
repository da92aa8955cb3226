package storehouse

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// meanBlock is about how many bytes a block holds: what is not here cannot be counted.
	meanBlock = 32 << 10
	// rateSpan is over which time the rate of catching up is taken.
	rateSpan = 5 * time.Second
)

// lack is what of some content is not here.
type lack struct{ blocks, bytes uint64 }

func (l lack) plus(o lack) lack { return lack{l.blocks + o.blocks, l.bytes + o.bytes} }

func (l lack) minus(o lack) lack {
	return lack{l.blocks - min(l.blocks, o.blocks), l.bytes - min(l.bytes, o.bytes)}
}

// lackOf is about what a NAR is of which nothing is here, not even which blocks it has.
func lackOf(narBytes uint64) lack { return lack{1 + narBytes/meanBlock, narBytes} }

// backlog says how much of the content of valid paths is not here, and how fast it
// comes. What nobody gave is counted by the block. What was not looked at yet is
// reckoned from the size of the NARs whose manifest is not here, so it is rather
// too much: blocks are shared and compressed. Before everything was looked at once
// nothing counts as here.
type backlog struct {
	mu     sync.Mutex
	looked bool   // what is here was looked at
	failed lack   // asked for in vain
	before lack   // the same before the pass under way
	ahead  uint64 // bytes of NARs still to be looked at
	// bytes that came, since when, and the rate before that
	came  uint64
	since time.Time
	rate  uint64
}

// change says what of a path was asked for in vain, and what was before.
func (b *backlog) change(was, is lack) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failed = b.failed.minus(was).plus(is)
}

// begin says that everything is gone through anew.
func (b *backlog) begin() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.before, b.failed = b.failed, lack{}
}

// end says that everything was looked at.
func (b *backlog) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.before, b.ahead, b.looked = lack{}, 0, true
}

// expect adds bytes of NARs that are still to be looked at.
func (b *backlog) expect(narBytes uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ahead += narBytes
}

// reckoned says how many bytes of NARs a pass still has to look at.
func (b *backlog) reckoned(narBytes uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ahead, b.looked = narBytes, true
}

// pass takes away what was looked at.
func (b *backlog) pass(narBytes uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ahead -= min(b.ahead, narBytes)
}

// brought counts bytes that came.
func (b *backlog) brought(n uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn()
	b.came += n
}

// turn begins a new span when the one before is over.
func (b *backlog) turn() {
	spent := time.Since(b.since)
	if spent < rateSpan {
		return
	}
	if b.rate = uint64(float64(b.came) / spent.Seconds()); spent > 2*rateSpan {
		b.rate = 0 // nothing happened for a while
	}
	b.came, b.since = 0, time.Now()
}

// get gives what is not here, false if nobody has looked yet, and bytes per second.
func (b *backlog) get() (l lack, looked bool, rate uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn()
	l = lack{max(b.failed.blocks, b.before.blocks), max(b.failed.bytes, b.before.bytes)}
	if b.ahead > 0 {
		l = l.plus(lackOf(b.ahead))
	}
	rate = b.rate
	if spent := time.Since(b.since); rate == 0 && spent > time.Second {
		rate = uint64(float64(b.came) / spent.Seconds())
	}
	return l, b.looked, rate
}

// lacks is what is not here of all content, and how fast it comes in bytes per second.
func (s *Server) lacks(ctx context.Context) (lack, uint64, error) {
	if !s.catchUp.needed() {
		return lack{}, 0, nil
	}
	l, looked, rate := s.catchUp.backlog.get()
	if looked {
		return l, rate, nil
	}
	counts, _, err := s.counts(ctx)
	if err != nil || counts.paths == 0 {
		return lack{}, rate, err
	}
	return lackOf(counts.narBytes), rate, nil
}

// lookAhead reckons what a pass over everything will have to bring.
func (c *catchUp) lookAhead(ctx context.Context) error {
	ahead := uint64(0)
	info := &floxv1.PathInfo{}
	err := c.pages(ctx, infoKey, func(page [][2][]byte) error {
		var manifests []flox.CID
		var sizes []uint64
		for _, kv := range page {
			if err := proto.Unmarshal(kv[1], info); err != nil || len(info.GetManifest()) != flox.CIDSize {
				return fmt.Errorf("facts of %q cannot be read: %w", kv[0], flox.ErrCorrupt)
			}
			manifests, sizes = append(manifests, flox.CID(info.GetManifest())), append(sizes, info.GetNarSize())
		}
		missing, err := c.notHere(ctx, manifests, sizes)
		ahead += missing
		return err
	})
	if err == nil {
		c.backlog.reckoned(ahead)
	}
	return err
}

// expect reckons what paths that became valid will have to bring.
func (c *catchUp) expect(ctx context.Context, names []string) error {
	var manifests []flox.CID
	var sizes []uint64
	err := c.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		for _, name := range names {
			if m, err := readInfo(r, name[:min(len(name), flox.HashPartLen)]); err == nil { // else it was removed meanwhile
				manifests, sizes = append(manifests, flox.CID(m.GetManifest())), append(sizes, m.GetNarSize())
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	missing, err := c.notHere(ctx, manifests, sizes)
	c.backlog.expect(missing)
	return err
}

// notHere adds up the sizes of the NARs whose manifest is not here.
func (c *catchUp) notHere(ctx context.Context, manifests []flox.CID, sizes []uint64) (sum uint64, err error) {
	here, err := c.packs.Has(ctx, manifests)
	for i, ok := range here {
		if !ok {
			sum += sizes[i]
		}
	}
	return sum, err
}
