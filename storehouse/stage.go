package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/pack"
)

// maxStageKey bounds a key in bytes.
const maxStageKey = 1024

// staging keeps the NARs that wait for their path info: one small file each,
// and in memory a session that keeps a sweep away from their blocks.
type staging struct {
	dir string
	ttl time.Duration
	max int
	log *slog.Logger

	mu      sync.Mutex
	records map[string]*pending // by file name
}

// pending is one staged NAR.
type pending struct {
	Staged
	// Used says that a path was made of it. It stays for a while, since the same
	// NAR may belong to another path whose uploader asks first, but gives way to others.
	Used bool `json:"-"`

	session *pack.Session // nil when used, or not yet pinned after a start
}

// fileName is the name of a record's file.
func fileName(publisher, key string) string {
	id := content.Hash([]byte(publisher + "\x00" + key))
	return id.String() + ".json"
}

// openStaging reads the records in dir. What is damaged is dropped: its uploader
// uploads again.
func openStaging(dir string, cfg Config) (*staging, error) {
	s := &staging{dir: dir, ttl: cfg.StageTTL, max: cfg.MaxStaged, log: cfg.Log.With("part", "staging"), records: map[string]*pending{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make staging directory: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read staging directory: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		p := &pending{}
		err := readNote(path, p)
		if err == nil && fileName(p.Publisher, p.Key) != e.Name() {
			err = flox.ErrCorrupt
		}
		if err != nil {
			if !strings.HasPrefix(e.Name(), ".tmp-") {
				s.log.Warn("staged record dropped", "file", path, "error", err)
			}
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("drop staged record: %w", err)
			}
			continue
		}
		s.records[e.Name()] = p
	}
	return s, nil
}

// run pins what was staged before this start, then forgets what waited too long.
func (s *staging) run(ctx context.Context, packs *pack.Store) error {
	s.pinAll(ctx, packs)
	tick := time.NewTicker(min(s.ttl/4+time.Second, 10*time.Minute))
	defer tick.Stop()
	for {
		if err := s.expire(time.Now()); err != nil {
			s.log.Warn("staged records not removed", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// pinAll opens sessions for the records of an earlier run.
func (s *staging) pinAll(ctx context.Context, packs *pack.Store) {
	s.mu.Lock()
	var todo []*pending
	for _, p := range s.records {
		if !p.Used && p.session == nil {
			todo = append(todo, p)
		}
	}
	s.mu.Unlock()
	for _, p := range todo {
		session, err := pin(ctx, packs, p.Manifest)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			s.log.Warn("staged NAR is incomplete, dropped", "key", p.Key, "error", err)
			if err := s.remove(p); err != nil {
				s.log.Warn("staged record not removed", "key", p.Key, "error", err)
			}
			continue
		}
		s.mu.Lock()
		if s.records[fileName(p.Publisher, p.Key)] == p && p.session == nil {
			p.session, session = session, nil
		}
		s.mu.Unlock()
		if session != nil {
			session.Close()
		}
	}
}

// pinBatch is how many blocks are pinned at once.
const pinBatch = 1024

// pin opens a session that holds every block of a manifest; ErrNotFound if one
// is gone.
func pin(ctx context.Context, packs *pack.Store, manifest flox.CID) (*pack.Session, error) {
	session := packs.Session()
	ids := []flox.CID{manifest}
	flush := func() error {
		has, err := session.Pin(ctx, ids)
		for i, ok := range has {
			if !ok && err == nil {
				err = fmt.Errorf("block %s: %w", ids[i], flox.ErrNotFound)
			}
		}
		ids = ids[:0]
		return err
	}
	err := flush()
	var m *content.Manifest
	if err == nil {
		m, err = content.OpenManifest(ctx, manifest, packs)
	}
	if err == nil {
		var failed error
		err = m.Blocks(ctx, func(id flox.CID, _ uint32) bool {
			if ids = append(ids, id); len(ids) == pinBatch {
				failed = flush()
			}
			return failed == nil
		})
		err = errors.Join(err, failed)
	}
	if err == nil {
		err = flush()
	}
	if err != nil {
		session.Close()
		return nil, err
	}
	return session, nil
}

// put keeps a record, making room among the used ones. It takes over session
// unless it fails.
func (s *staging) put(st Staged, session *pack.Session) error {
	p := &pending{Staged: st, session: session}
	name := fileName(st.Publisher, st.Key)
	s.mu.Lock()
	before := s.records[name]
	if before == nil && len(s.records) >= s.max {
		if !s.makeRoom() {
			s.mu.Unlock()
			return s.full()
		}
	}
	s.records[name] = p
	s.mu.Unlock()
	if err := writeNote(filepath.Join(s.dir, name), p, 0o600); err != nil {
		s.mu.Lock()
		delete(s.records, name)
		s.mu.Unlock()
		return err
	}
	if before != nil {
		before.release()
	}
	return nil
}

func (s *staging) full() error {
	return fmt.Errorf("%d uploaded NARs wait for their path info already, for %v at most: %w", s.max, s.ttl, flox.ErrFull)
}

// room says before an upload whether there would be room for it.
func (s *staging) room(publisher, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.records) < s.max || s.records[fileName(publisher, key)] != nil {
		return nil
	}
	for _, p := range s.records {
		if p.Used {
			return nil
		}
	}
	return s.full()
}

// makeRoom drops the oldest used record; it reports false when there is none.
func (s *staging) makeRoom() bool {
	oldest := ""
	for name, p := range s.records {
		if p.Used && (oldest == "" || p.At.Before(s.records[oldest].At)) {
			oldest = name
		}
	}
	if oldest == "" {
		return false
	}
	delete(s.records, oldest)
	if err := os.Remove(filepath.Join(s.dir, oldest)); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Warn("staged record not removed", "file", oldest, "error", err)
	}
	return true
}

// get finds a record; ErrNotFound.
func (s *staging) get(publisher, key string) (*pending, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.records[fileName(publisher, key)]
	if p == nil || time.Since(p.At) > s.ttl {
		return nil, fmt.Errorf("nothing is staged under %q: %w", key, flox.ErrNotFound)
	}
	return p, nil
}

// manifests gives what waits for its path info, or may be asked for again.
func (s *staging) manifests() []flox.CID {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids := make([]flox.CID, 0, len(s.records))
	for _, p := range s.records {
		ids = append(ids, p.Manifest)
	}
	return ids
}

// used notes that a path was made of a record and lets go of its blocks.
func (s *staging) used(p *pending) {
	s.mu.Lock()
	name := fileName(p.Publisher, p.Key)
	if s.records[name] != p {
		s.mu.Unlock()
		return
	}
	p.Used = true
	session := p.session
	p.session = nil
	s.mu.Unlock()
	if session != nil {
		session.Close()
	}
	// A used record need not survive a restart.
	if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Warn("staged record not removed", "file", name, "error", err)
	}
}

// remove forgets a record.
func (s *staging) remove(p *pending) error {
	s.mu.Lock()
	name := fileName(p.Publisher, p.Key)
	if s.records[name] != p {
		s.mu.Unlock()
		return nil
	}
	delete(s.records, name)
	s.mu.Unlock()
	p.release()
	err := os.Remove(filepath.Join(s.dir, name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// expire forgets what waited longer than the TTL.
func (s *staging) expire(now time.Time) (err error) {
	s.mu.Lock()
	var old []*pending
	for _, p := range s.records {
		if now.Sub(p.At) > s.ttl {
			old = append(old, p)
		}
	}
	s.mu.Unlock()
	for _, p := range old {
		err = errors.Join(err, s.remove(p))
	}
	return err
}

func (p *pending) release() {
	if p.session != nil {
		p.session.Close()
	}
}

// close lets go of all blocks; the records stay for the next start.
func (s *staging) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.records {
		p.release()
	}
	return nil
}

// Stage takes in a NAR whose path info comes later. key is the caller's name
// for it (for HTTP the URL it was put to), unique per publisher; the same key
// again replaces what was staged. The record survives a restart and is
// forgotten after StageTTL. ErrFull when too much is staged.
func (s *Server) Stage(ctx context.Context, publisher, key string, nar io.Reader) (*Staged, error) {
	if key == "" || len(key) > maxStageKey {
		return nil, fmt.Errorf("stage: key of %d bytes, want 1 to %d: %w", len(key), maxStageKey, flox.ErrBadInput)
	}
	if err := s.staging.room(publisher, key); err != nil {
		return nil, fmt.Errorf("stage %s: %w", key, err)
	}
	nar, err := s.disk.upload(ctx, nar)
	if err != nil {
		return nil, fmt.Errorf("stage %s: %w", key, err)
	}
	session := s.packs.Session()
	got, err := content.Ingest(ctx, nar, session, content.IngestOptions{})
	st := Staged{Key: key, Publisher: publisher, At: time.Now()}
	if err == nil {
		st.NarHash, st.NarSize, st.Manifest = got.NarHash, got.NarSize, got.Manifest
		err = s.staging.put(st, session)
	}
	if err != nil {
		session.Close()
		return nil, fmt.Errorf("stage %s: %w", key, err)
	}
	return &st, nil
}

// Staged gives what a publisher staged under key; ErrNotFound when nothing is.
func (s *Server) Staged(publisher, key string) (*Staged, error) {
	p, err := s.staging.get(publisher, key)
	if err != nil {
		return nil, err
	}
	st := p.Staged
	return &st, nil
}

// Commit makes a path valid whose NAR was staged under key, or is that of a path
// uploaded under that key before; as Publish, and ErrNotFound when there is none.
func (s *Server) Commit(ctx context.Context, key string, info *flox.PathInfo, publisher string) (valid *flox.PathInfo, wasValid bool, err error) {
	release, err := s.Hold(ctx, append(slices.Clone(info.References), info.Path)...)
	if err != nil {
		return nil, false, err
	}
	defer release()
	p, missing := s.staging.get(publisher, key)
	if errors.Is(missing, flox.ErrNotFound) {
		p, missing = s.uploaded(ctx, key, missing)
	}
	if errors.Is(missing, flox.ErrNotFound) {
		p, missing = s.stagedElsewhere(ctx, publisher, key, missing)
	}
	if valid, err = s.known(ctx, info); err != nil {
		return nil, false, err
	}
	if valid != nil {
		if missing == nil {
			err = s.addName(ctx, valid, p, publisher)
			s.staging.used(p)
		}
		return valid, true, err
	}
	if missing != nil {
		return nil, false, missing
	}
	if err := s.checkInfo(ctx, info); err != nil {
		return nil, false, err
	}
	// A session of our own: the record may expire, or give way, meanwhile.
	session, err := pin(ctx, s.packs, p.Manifest)
	if err != nil {
		return nil, false, fmt.Errorf("commit %s: the staged NAR is no longer whole, upload it again: %w", info.Path, err)
	}
	defer session.Close()
	valid, wasValid, err = s.validate(ctx, info, &content.Ingested{Manifest: p.Manifest, NarHash: p.NarHash, NarSize: p.NarSize}, narFile(key), publisher)
	if err == nil {
		s.staging.used(p)
	}
	return valid, wasValid, err
}
