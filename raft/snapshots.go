package raft

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/hashicorp/raft"
	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
)

// keptSnapshots is how many snapshots stay: the newest may be found damaged.
const keptSnapshots = 2

// tmpPrefix marks what a crash may leave; it is removed on the next start.
const tmpPrefix = ".tmp-"

// snapshots keeps each snapshot as a directory: the files of a Pebble
// checkpoint under data/, and meta.json. A directory with its final name is whole.
type snapshots struct {
	dir string
	log *slog.Logger
	seq atomic.Uint64

	newest atomic.Pointer[raft.SnapshotMeta] // nil = there is none
}

var _ raft.SnapshotStore = (*snapshots)(nil)

// snapshotMeta is meta.json. Its first line is the BLAKE3-256 of the rest.
type snapshotMeta struct {
	Raft    raft.SnapshotMeta `json:"raft"`
	Applied uint64            `json:"applied"` // the state holds this entry and maybe later ones; the snapshot's index may lie behind it
	Files   []archiveFile     `json:"files"`
}

// openSnapshots opens the snapshots in dir and removes unfinished ones.
func openSnapshots(dir string, log *slog.Logger) (*snapshots, error) {
	if err := makeDir(dir); err != nil {
		return nil, err
	}
	left, err := filepath.Glob(filepath.Join(dir, tmpPrefix+"*"))
	for _, l := range left {
		err = errors.Join(err, os.RemoveAll(l))
	}
	if err != nil {
		return nil, fmt.Errorf("remove unfinished snapshots: %w", err)
	}
	s := &snapshots{dir: dir, log: log}
	return s, s.findNewest()
}

// findNewest remembers which snapshot is the newest.
func (s *snapshots) findNewest() error {
	found, err := s.all()
	if err == nil && len(found) > 0 {
		s.newest.Store(&found[0].Raft)
	}
	return err
}

func (s *snapshots) tmp() string {
	return filepath.Join(s.dir, fmt.Sprintf("%s%d", tmpPrefix, s.seq.Add(1)))
}

// checkpoint lets make fill a directory beside the snapshots, where its files
// can later be moved into one without a copy.
func (s *snapshots) checkpoint(make func(dir string) error) (string, error) {
	dir := s.tmp()
	if err := make(dir); err != nil {
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	return dir, nil
}

// checkpoint is a state that raft may ask to be kept.
type checkpoint struct {
	db      *database // released at the end
	applied uint64    // the state holds this entry, and maybe more
}

// Persist is raft.FSMSnapshot: it makes a Pebble checkpoint, which links tables and
// copies next to nothing.
func (c *checkpoint) Persist(to raft.SnapshotSink) error {
	s, ok := to.(*sink)
	if !ok {
		return fmt.Errorf("snapshot sink of type %T: %w", to, flox.ErrBadInput)
	}
	dir, err := s.store.checkpoint(func(dir string) error { return c.db.Checkpoint(dir, pebble.WithFlushedWAL()) })
	if err != nil {
		return fmt.Errorf("checkpoint of the state: %w", err)
	}
	defer os.RemoveAll(dir) //nolint:errcheck // moved already when all went well; else it goes on the next start
	return s.adopt(dir, c.applied)
}

// Release is raft.FSMSnapshot.
func (c *checkpoint) Release() { c.db.release() } //nolint:errcheck // of a state that was replaced: the next start removes it

// Create is raft.SnapshotStore.
func (s *snapshots) Create(version raft.SnapshotVersion, index, term uint64, members raft.Configuration, membersIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	if version != raft.SnapshotVersionMax {
		return nil, fmt.Errorf("snapshot version %d: %w", version, flox.ErrBadInput)
	}
	dir := s.tmp()
	if err := makeDir(dir); err != nil {
		return nil, fmt.Errorf("make snapshot: %w", err)
	}
	return &sink{
		store: s,
		dir:   dir,
		meta: snapshotMeta{Raft: raft.SnapshotMeta{
			Version: version, Index: index, Term: term, Configuration: members, ConfigurationIndex: membersIndex,
			ID: fmt.Sprintf("%016x-%016x-%d", term, index, time.Now().UnixMilli()),
		}},
	}, nil
}

// sink takes one snapshot in: a checkpoint of this server, or the stream of another's.
type sink struct {
	store *snapshots
	dir   string
	meta  snapshotMeta
	done  bool

	// of a stream
	pipe     *io.PipeWriter
	unpacked chan struct{} // closed when all of it was, or err says why not
	err      error
}

var _ raft.SnapshotSink = (*sink)(nil)

func (k *sink) data() string { return filepath.Join(k.dir, "data") }

// ID is raft.SnapshotSink.
func (k *sink) ID() string { return k.meta.Raft.ID }

// Write takes more of a stream.
func (k *sink) Write(b []byte) (int, error) {
	if k.pipe == nil {
		r, w := io.Pipe()
		k.pipe, k.unpacked = w, make(chan struct{})
		go func() {
			defer close(k.unpacked)
			c, err := unpack(r, k.data())
			k.meta.Applied, k.meta.Files = c.applied, c.files
			_ = r.CloseWithError(err) // never fails
			k.err = err
		}()
	}
	return k.pipe.Write(b)
}

// adopt takes the files of a checkpoint over.
func (k *sink) adopt(dir string, appliedIndex uint64) error {
	if err := os.Rename(dir, k.data()); err != nil {
		return fmt.Errorf("keep checkpoint: %w", err)
	}
	k.meta.Applied = appliedIndex
	entries, err := os.ReadDir(k.data())
	if err != nil {
		return fmt.Errorf("keep checkpoint: %w", err)
	}
	known := k.store.lastFiles()
	for _, e := range entries {
		f, err := known.reuse(k.data(), e.Name())
		if err == nil {
			err = syncFile(filepath.Join(k.data(), e.Name()))
		}
		if err != nil {
			return fmt.Errorf("keep checkpoint: %w", err)
		}
		k.meta.Files = append(k.meta.Files, f)
	}
	return syncDir(k.data())
}

// Close makes the snapshot durable and gives it its name.
func (k *sink) Close() error {
	if k.done {
		return nil
	}
	var err error
	if k.pipe != nil {
		err = k.pipe.Close()
		<-k.unpacked
		err = errors.Join(err, k.err)
	} else if len(k.meta.Files) == 0 {
		err = fmt.Errorf("snapshot without files: %w", flox.ErrCorrupt)
	}
	k.done = true
	if err == nil {
		k.meta.Raft.Size = archiveSize(k.meta.Files)
		err = k.finish()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("close snapshot %s: %w", k.ID(), err), os.RemoveAll(k.dir))
	}
	return errors.Join(k.store.findNewest(), k.store.reap())
}

// finish writes meta.json and renames the directory.
func (k *sink) finish() error {
	body, err := json.MarshalIndent(k.meta, "", " ")
	if err != nil {
		return err
	}
	digest, err := sum(blake3.Sum256(body)).MarshalText()
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(k.dir, "meta.json"), slices.Concat(digest, []byte("\n"), body)); err != nil {
		return err
	}
	if err := os.Rename(k.dir, filepath.Join(k.store.dir, k.ID())); err != nil {
		return err
	}
	return syncDir(k.store.dir)
}

// Cancel is raft.SnapshotSink.
func (k *sink) Cancel() error {
	if k.done {
		return nil
	}
	k.done = true
	if k.pipe != nil {
		_ = k.pipe.CloseWithError(flox.ErrClosed) // never fails
		<-k.unpacked
	}
	return os.RemoveAll(k.dir)
}

// readMeta reads and checks one snapshot's meta.json.
func (s *snapshots) readMeta(id string) (*snapshotMeta, error) {
	path := filepath.Join(s.dir, id, "meta.json")
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", id, err)
	}
	line, body, _ := bytes.Cut(b, []byte("\n"))
	var want sum
	if err := want.UnmarshalText(line); err != nil || want != sum(blake3.Sum256(body)) {
		return nil, fmt.Errorf("%s does not match its sum: %w", path, flox.ErrCorrupt)
	}
	m := &snapshotMeta{}
	if err := json.Unmarshal(body, m); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, err, flox.ErrCorrupt)
	}
	return m, nil
}

// all reads the snapshots, newest first. A damaged one is named in the log and left out.
func (s *snapshots) all() ([]*snapshotMeta, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var found []*snapshotMeta
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tmpPrefix) {
			continue
		}
		m, err := s.readMeta(e.Name())
		if err != nil {
			s.log.Error("snapshot left out", "snapshot", e.Name(), "error", err)
			continue
		}
		found = append(found, m)
	}
	slices.SortFunc(found, func(a, b *snapshotMeta) int {
		// Names begin with term and index in fixed width.
		return strings.Compare(b.Raft.ID, a.Raft.ID)
	})
	return found, nil
}

// List is raft.SnapshotStore.
func (s *snapshots) List() ([]*raft.SnapshotMeta, error) {
	found, err := s.all()
	metas := make([]*raft.SnapshotMeta, len(found))
	for i, m := range found {
		metas[i] = &m.Raft
	}
	return metas, err
}

// Open is raft.SnapshotStore: the snapshot as a stream, checked while it is read.
func (s *snapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	m, err := s.readMeta(id)
	if err != nil {
		return nil, nil, err
	}
	return &m.Raft, newArchive(filepath.Join(s.dir, id, "data"), m.Applied, m.Files), nil
}

// reap removes all but the newest snapshots.
func (s *snapshots) reap() error {
	found, err := s.all()
	if err != nil {
		return err
	}
	for i, m := range found {
		if i < keptSnapshots {
			continue
		}
		// Renamed first: a directory with its final name must be whole.
		gone := s.tmp()
		if err := os.Rename(filepath.Join(s.dir, m.Raft.ID), gone); err != nil {
			return fmt.Errorf("remove old snapshot: %w", err)
		}
		if err := os.RemoveAll(gone); err != nil {
			return fmt.Errorf("remove old snapshot: %w", err)
		}
	}
	return nil
}

// sums are the files of the newest snapshot, by name.
type sums struct {
	dir   string
	files map[string]archiveFile
}

// lastFiles gives what is known of the newest snapshot's files.
func (s *snapshots) lastFiles() sums {
	found, err := s.all()
	if err != nil || len(found) == 0 {
		return sums{}
	}
	k := sums{dir: filepath.Join(s.dir, found[0].Raft.ID, "data"), files: make(map[string]archiveFile, len(found[0].Files))}
	for _, f := range found[0].Files {
		k.files[f.Name] = f
	}
	return k
}

// reuse gives the entry of a file. Tables never change and are the same inode
// in every checkpoint, so only new ones are read.
func (k sums) reuse(dir, name string) (archiveFile, error) {
	if f, ok := k.files[name]; ok && strings.HasSuffix(name, ".sst") {
		before, err1 := os.Stat(filepath.Join(k.dir, name))
		now, err2 := os.Stat(filepath.Join(dir, name))
		if err1 == nil && err2 == nil && os.SameFile(before, now) && now.Size() == f.Size {
			return f, nil
		}
	}
	return sumFile(dir, name)
}
