package storehouse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/ballast"
	"github.com/floxctl/flox/members"
	cluster "github.com/floxctl/flox/raft"
	"github.com/floxctl/flox/storehouse/backup"
)

// Phases of a backup.
const (
	phaseIndex   = "index"   // what the place has already
	phaseContent = "content" // what it lacks
	phaseFacts   = "facts"
	phasePrune   = "prune"
)

const (
	// backupBatch is how many blocks are read at once, backupBytes how many bytes of them.
	backupBatch   = 256
	backupBytes   = 8 << 20
	backupReaders = 4
	// backupIndexBytes is what the index of a block takes on this server's disk meanwhile.
	backupIndexBytes = 128
	backupProgress   = 200 * time.Millisecond
)

// backupDir is a directory in the state directory for the time of a backup.
const backupDir = "backup"

// BackupOptions say what a backup does.
type BackupOptions struct {
	// To is an absolute directory on the server, or a bucket: s3://NAME?…, file:///DIR.
	To string
	// Passphrase encrypts the keys; at least backup.MinPassphrase bytes.
	Passphrase []byte
	// Keep is how many backups stay, this one included; 0 = all.
	Keep int
}

// Backup writes a backup to a place that holds any number of them: the facts as of
// now, all content of valid paths that the place does not have yet, and the keys,
// encrypted. Whatever ends it, the place stays valid, and the next backup goes on
// with the content that was written. Content that is damaged here and that no other
// server has is left out and named: then the backup is finished, and the error is
// ErrCorrupt. Other errors: ErrBusy while another backup runs or somebody else
// writes there, ErrBadInput, ErrFull, ErrDenied, ErrUnreachable. progress is called
// by one goroutine at a time.
func (s *Server) Backup(ctx context.Context, opts BackupOptions, progress func(*floxv1.BackupProgress)) error {
	if err := backup.CheckPassphrase(opts.Passphrase); err != nil {
		return err
	}
	if opts.Keep < 0 {
		return fmt.Errorf("keep %d backups, want at least 1, or 0 for all: %w", opts.Keep, flox.ErrBadInput)
	}
	if !s.backingUp.TryLock() {
		return fmt.Errorf("a backup is being written already: wait for it: %w", flox.ErrBusy)
	}
	defer s.backingUp.Unlock()
	place, closePlace, err := s.backupPlace(ctx, opts.To)
	if err != nil {
		return fmt.Errorf("backup to %s: %w", opts.To, err)
	}
	b := &backingUp{Server: s, opts: opts, place: place, tell: progress}
	if err = errors.Join(b.locked(ctx), closePlace()); err != nil {
		return fmt.Errorf("backup to %s: %w", place, err)
	}
	return nil
}

// backingUp is one backup.
type backingUp struct {
	*Server
	opts     BackupOptions
	place    *backup.Place
	tell     func(*floxv1.BackupProgress)
	state    *cluster.State
	contents *backup.Contents
	writer   *backup.Writer
	m        *backup.Manifest
	now      floxv1.BackupProgress
	told     time.Time

	// of the path under way
	lacks error // why it is not whole
	ids   []flox.CID
	sizes []uint32
	bytes uint64
}

// locked runs the backup while nobody else writes to the place.
func (b *backingUp) locked(ctx context.Context) error {
	lock, err := b.place.Lock(ctx, backup.Owner{ID: string(b.id.peer), Name: b.machineName()})
	if err != nil {
		return err
	}
	group, running := errgroup.WithContext(ctx)
	keeping, stop := context.WithCancel(running)
	group.Go(func() error { return lock.Keep(keeping) })
	group.Go(func() error {
		defer stop()
		return b.run(running)
	})
	return errors.Join(group.Wait(), lock.Unlock(ctx))
}

func (b *backingUp) run(ctx context.Context) (err error) {
	if err := b.roomForIndex(); err != nil {
		return err
	}
	b.begin(phaseIndex, 0)
	dir := filepath.Join(b.cfg.StateDir, backupDir)
	b.contents, err = b.place.OpenContents(ctx, dir, nil, func(o backup.Object, err error) error {
		b.cfg.Log.Warn("an object of the backup is damaged; what it held is written again", "object", o.Digest, "error", err)
		return nil
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.contents.Close()) }()
	if err := b.freeze(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.thaw()) }()
	if err := b.describe(ctx); err != nil {
		return err
	}
	if err := b.allContent(ctx); err != nil {
		return err
	}
	if err := b.finish(ctx); err != nil {
		return err
	}
	if b.m.LackPaths > 0 {
		return fmt.Errorf("backup %s was written without the content of %d paths, which is damaged here and which no other server has (%s): upload them again from where they came: %w",
			b.m.Name, b.m.LackPaths, strings.Join(b.m.Lacking[:min(len(b.m.Lacking), 10)], ", "), flox.ErrCorrupt)
	}
	return nil
}

// roomForIndex refuses to fill this server's own disk.
func (b *backingUp) roomForIndex() error {
	_, free, err := ballast.Disk(b.cfg.StateDir)
	if err != nil {
		return err
	}
	if need := b.packs.Stat().Blocks*backupIndexBytes + b.cfg.ReserveBytes; uint64(free) < need { //nolint:gosec // not negative
		return fmt.Errorf("%s has %d bytes free, and the list of what the backup has takes up to %d: free some space: %w", b.cfg.StateDir, free, need, flox.ErrFull)
	}
	return nil
}

// begin says that a phase begins.
func (b *backingUp) begin(phase string, total uint64) {
	b.now.Phase, b.now.DoneBytes, b.now.TotalBytes = phase, 0, total
	b.report(true)
}

func (b *backingUp) report(always bool) {
	if b.tell == nil || !always && time.Since(b.told) < backupProgress {
		return
	}
	b.told = time.Now()
	if b.writer != nil {
		b.now.NewBytes = b.writer.Written()
	}
	b.tell(proto.Clone(&b.now).(*floxv1.BackupProgress))
}

// frozen are the facts that a backup is of. A sweep leaves their content alone.
type frozen struct {
	sync.RWMutex
	state *cluster.State // nil = no backup is being written
}

// freeze takes the facts as of now. A sweep that runs may have decided already that
// what was valid a moment ago goes: it is waited for.
func (b *backingUp) freeze(ctx context.Context) (err error) {
	if err := b.lockSweep(ctx, time.Hour); err != nil {
		return err
	}
	defer b.sweeping.Unlock()
	if b.state, err = b.node.Freeze(ctx); err != nil {
		return err
	}
	b.frozen.Lock()
	defer b.frozen.Unlock()
	b.frozen.state = b.state
	return nil
}

// thaw lets go of the facts.
func (b *backingUp) thaw() error {
	b.frozen.Lock()
	defer b.frozen.Unlock()
	b.frozen.state = nil
	return b.state.Close()
}

// lockSweep makes sure that nobody else sweeps, waiting for up to patience.
func (s *Server) lockSweep(ctx context.Context, patience time.Duration) error {
	for begun := time.Now(); !s.sweeping.TryLock(); {
		if time.Since(begun) > patience {
			return fmt.Errorf("the packs are being swept already: %w", flox.ErrBusy)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// addFrozen calls add with the manifests that a backup is of and that are not valid
// any more. Called behind a look at everything that is valid: what became valid
// since came in with a session.
func (s *Server) addFrozen(ctx context.Context, add func(name string, manifest flox.CID) error) error {
	s.frozen.RLock()
	defer s.frozen.RUnlock()
	if s.frozen.state == nil {
		return nil
	}
	return eachInfo(ctx, s.frozen.state.View(pathsKind), func(name string, manifest flox.CID, _ []byte) error {
		valid := false
		err := s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
			m, err := validAs(r, name)
			valid = m != nil && string(m.GetManifest()) == string(manifest[:])
			return err
		})
		if err != nil || valid {
			return err
		}
		return add(name, manifest)
	})
}

// eachInfo calls f with the name, the manifest and the facts of every valid path.
func eachInfo(ctx context.Context, r *cluster.Reader, f func(name string, manifest flox.CID, info []byte) error) error {
	var failed error
	err := r.Iterate([]byte{infoKey}, nil, func(key, value []byte) bool {
		name, manifest, ok := api.PeekPathInfo(value)
		if !ok || !strings.HasPrefix(name, string(key[1:])) {
			failed = fmt.Errorf("facts of %q: %w", key[1:], flox.ErrCorrupt)
			return false
		}
		failed = errors.Join(f(name, manifest, value), ctx.Err())
		return failed == nil
	})
	return errors.Join(failed, err)
}

// describe begins the manifest.
func (b *backingUp) describe(ctx context.Context) error {
	counts, err := readCounts(b.state.View(pathsKind))
	if err != nil {
		return err
	}
	lists, err := readTrust(b.state.View(pathsKind), 0)
	if err != nil || len(lists) == 0 {
		return fmt.Errorf("the storehouse has no trust list yet: %w", orUnreachable(err))
	}
	trust, err := content.ParseTrustList(lists[len(lists)-1])
	if err != nil {
		return err
	}
	taken := time.Now()
	name, err := b.place.NewName(ctx, taken, b.state.Index())
	b.m = &backup.Manifest{
		Format: 1, Name: name, Taken: taken.UTC().Truncate(time.Second), Index: b.state.Index(), Storehouse: b.cfg.Name, StoreDir: b.cfg.StoreDir,
		Server: string(b.id.peer), Version: b.cfg.Version, Trust: trust.Version, Epoch: trust.Epoch, Paths: counts.paths, NarBytes: counts.narBytes,
		Lacking: []string{},
	}
	b.now.Index, b.now.Name, b.now.Paths = b.m.Index, name, counts.paths
	return err
}

// finish writes the facts, the keys, and the manifest, and removes old backups.
func (b *backingUp) finish(ctx context.Context) error {
	b.begin(phaseFacts, 0)
	sealed, err := b.sealedKeys()
	if err == nil {
		err = b.place.PutKeys(ctx, b.m, sealed)
	}
	if err == nil {
		err = b.facts(ctx)
	}
	if err == nil {
		err = b.place.Finish(ctx, b.m)
	}
	if err != nil {
		return err
	}
	if b.opts.Keep > 0 && b.m.LackPaths == 0 { // one that is not whole replaces none
		b.begin(phasePrune, 0)
		done, err := b.place.Prune(ctx, b.opts.Keep)
		if err != nil {
			return fmt.Errorf("backup %s is written; old ones could not be removed: %w", b.m.Name, err)
		}
		b.now.Removed = done.Backups
	}
	b.now.Finished = true
	b.report(true)
	return nil
}

// facts writes the facts. What a stranger could use is left out of them.
func (b *backingUp) facts(ctx context.Context) error {
	w, err := b.place.Facts(ctx, b.m)
	if err != nil {
		return err
	}
	err = b.state.Each(ctx, func(key, value []byte) error {
		if kind, own, ok := cluster.RecordKind(key); ok && kind == members.Kind {
			var err error
			if value, err = members.Redacted(own, value); err != nil {
				return err
			}
		}
		b.now.DoneBytes += uint64(len(key) + len(value))
		b.report(false)
		return w.Add(key, value)
	})
	if err != nil {
		return err
	}
	return w.Close()
}

// backupPlace opens the place a backup is written to.
func (s *Server) backupPlace(ctx context.Context, to string) (*backup.Place, func() error, error) {
	b, err := openBackup(ctx, to, true, s.outside)
	if err != nil {
		return nil, nil, err
	}
	place, err := backup.Make(ctx, b, s.cfg.Log.With("part", "backup"))
	if err != nil {
		return nil, nil, errors.Join(err, b.Close())
	}
	return place, b.Close, nil
}

// outside refuses a directory that is lost together with the state directory, or
// that lies in the store. It need not exist.
func (s *Server) outside(dir string) error {
	at := resolved(dir)
	for _, no := range []string{s.cfg.StateDir, string(s.cfg.StoreDir)} {
		if real := resolved(no); at == real || strings.HasPrefix(at, real+string(os.PathSeparator)) {
			return fmt.Errorf("%s lies in %s, and is lost with it or no place for files: name a directory elsewhere, best on another disk: %w", dir, no, flox.ErrBadInput)
		}
	}
	return nil
}

// resolved is a path without symbolic links, as far as it exists.
func resolved(path string) string {
	path, err := filepath.Abs(path)
	if err != nil {
		return path
	}
	for at, rest := path, ""; ; at, rest = filepath.Dir(at), filepath.Join(filepath.Base(at), rest) {
		if real, err := filepath.EvalSymlinks(at); err == nil {
			return filepath.Join(real, rest)
		}
		if at == filepath.Dir(at) {
			return path
		}
	}
}
