package cache

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// Every write carries a generation. A sync mark begins a new generation, waits
// for the writes of the old ones, makes the file system write everything out and
// then notes durably that all generations up to the old one are safe. When the
// system session ends otherwise, the generations behind the last mark
// are lost: their bytes may or may not have reached the disk.

// span is a run of lost generations, both ends included.
type span struct{ From, To uint64 }

// marks is what is known of generations; it lies in the index as JSON.
type marks struct {
	Session string // system session of the generations behind Durable
	Durable uint64 // generations up to here are on disk, but for Lost
	Next    uint64 // no generation from here on was ever used
	Lost    []span
}

// maxSpans bounds Lost, one per session that did not end with close; more are joined, which only makes
// more of the cache unverified.
const maxSpans = 64

// reserve is how many generations are set aside at a time.
const reserve = 1 << 16

type session struct {
	index *index
	dir   *os.File

	marking sync.Mutex   // one mark at a time
	gate    sync.RWMutex // writers of a generation hold it shared
	gen     uint64       // current generation; guarded by gate
	dirty   atomic.Bool  // something was written since the last mark
	marks   atomic.Pointer[marks]
	begun   chan struct{} // closed once the generation is noted: none may be used twice
}

// openSession begins a new generation in the system session id. That is noted while
// what is here is read already.
func openSession(ix *index, dir *os.File, id string, log *slog.Logger) (*session, error) {
	var m marks
	raw, err := ix.get(keyMarks)
	switch {
	case errors.Is(err, flox.ErrNotFound):
		m.Next = 1
	case err != nil:
		return nil, err
	default:
		if err := json.Unmarshal(raw, &m); err != nil {
			return nil, fmt.Errorf("sync marks in the cache's index: %w: %w", flox.ErrCorrupt, err)
		}
	}
	if m.Session != id {
		m.lose(m.Durable+1, m.Next-1)
		m.Durable = m.Next - 1
		m.Session = id
	}
	s := &session{index: ix, dir: dir, gen: m.Next, begun: make(chan struct{})}
	m.Next = s.gen + reserve
	s.marks.Store(&m)
	go func() {
		defer close(s.begun)
		if err := s.save(m); err != nil && !errors.Is(err, flox.ErrClosed) {
			ix.Break(fmt.Errorf("%w: %w", flox.ErrFull, err)) // nothing may be written in it
			log.Warn("begin a generation of the cache", "err", err)
		}
	}()
	return s, nil
}

// lose adds a span of lost generations.
func (m *marks) lose(from, to uint64) {
	if from > to {
		return
	}
	lost := append([]span(nil), m.Lost...) // readers hold the old one
	lost = append(lost, span{from, to})
	for len(lost) > maxSpans {
		best := 0
		for i := range lost[:len(lost)-1] {
			if lost[i+1].From-lost[i].To < lost[best+1].From-lost[best].To {
				best = i
			}
		}
		lost[best].To = lost[best+1].To
		lost = append(lost[:best+1], lost[best+2:]...)
	}
	m.Lost = lost
}

func (s *session) save(m marks) error {
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	b := s.index.batch()
	b.set(keyMarks, raw)
	if err := b.commit(durable); err != nil {
		return err
	}
	s.marks.Store(&m)
	return nil
}

// lost says that bytes of gen must be hashed before they are read. Generation 0
// is for what was made durable by itself.
func (s *session) lost(gen uint64) bool {
	for _, l := range s.marks.Load().Lost {
		if l.From <= gen && gen <= l.To {
			return true
		}
	}
	return false
}

// alike says that neighbouring bytes of two generations may be one extent
// of the newer one: what is safe must not become as doubtful as what is new.
func (s *session) alike(a, b uint64) bool {
	d := s.marks.Load().Durable
	return !s.lost(a) && !s.lost(b) && (a > d) == (b > d)
}

// enter gives the generation to write in; leave ends the write. A mark waits for both.
func (s *session) enter() (gen uint64) {
	<-s.begun
	s.gate.RLock()
	if !s.dirty.Load() {
		s.dirty.Store(true)
	}
	return s.gen
}

func (s *session) leave() { s.gate.RUnlock() }

// mark makes everything written before it safe.
func (s *session) mark() error {
	<-s.begun
	s.marking.Lock()
	defer s.marking.Unlock()
	if !s.dirty.Load() {
		return nil
	}
	m := *s.marks.Load()
	if s.gen+2 >= m.Next { // only mark changes gen
		m.Next += reserve
		if err := s.save(m); err != nil {
			return err
		}
	}
	s.gate.Lock()
	old := s.gen
	s.gen++
	s.dirty.Store(false)
	s.gate.Unlock()

	syncErr := unix.Syncfs(int(s.dir.Fd()))
	if syncErr != nil {
		// Some page did not reach the disk, and the kernel may forget it now: nobody knows which.
		m.lose(m.Durable+1, old)
		syncErr = fmt.Errorf("write the cache out: %w; what is not yet safe will be checked before use", syncErr)
	}
	m.Durable = old
	return errors.Join(syncErr, s.save(m))
}

// close makes the mark that lets a next session trust everything. Nothing is
// written after it, so no generation is in doubt then.
func (s *session) close() error {
	s.dirty.Store(true)
	if err := s.mark(); err != nil {
		return err
	}
	m := *s.marks.Load()
	m.Next = m.Durable + 1
	return s.save(m)
}

// systemSession names the time during which the file system of dir keeps what
// was written to it and not yet synced: the kernel's boot and the mount.
// The boot id alone is not enough, since a disk can be pulled or a loop device shut
// down without a reboot. The unique mount id (Linux 6.8) is never used
// twice in a boot. It also differs between mount namespaces, and is missing on older
// kernels: then trust is lost without need, and only of what no mark covers.
func systemSession(dir *os.File) (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot id: %w", err)
	}
	var st unix.Statx_t
	err = unix.Statx(int(dir.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID_UNIQUE, &st)
	if err != nil || st.Mask&unix.STATX_MNT_ID_UNIQUE == 0 {
		return fmt.Sprintf("%s/once/%016x", strings.TrimSpace(string(boot)), rand.Uint64()), nil
	}
	return fmt.Sprintf("%s/%d:%d/%d", strings.TrimSpace(string(boot)), st.Dev_major, st.Dev_minor, st.Mnt_id), nil
}
