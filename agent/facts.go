package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"google.golang.org/protobuf/proto"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/indexdb"
)

// Key prefixes of the facts database.
const (
	prefixInfo     = 'p' // p<hash part> -> floxv1.PathInfo
	prefixManifest = 'm' // m<CID> -> hash part, or floxv1.PathInfo of a path no longer valid
	prefixReferrer = 'r' // r<hash part of the reference><hash part of the referrer> -> ""
)

// factsBallast is how many bytes are set aside for the facts on a large disk.
const factsBallast = 4 << 20

// trustFile holds the newest trust list accepted, beside the database.
const trustFile = "trust.json"

// facts is what this machine knows of store paths: verified path infos on disk,
// and the trust list they are verified with, which only moves forward. Infos are
// kept when their content is evicted: they are small, and they make a path
// readable from any peer while the storehouse is away.
type facts struct {
	dir    flox.StoreDir
	state  string
	anchor flox.CID // fingerprint of the first trust list, from the invite
	db     *indexdb.DB

	closed    sync.Once
	writing   sync.Mutex // held by put and remove
	accepting sync.Mutex // held by accept
	// failed has the hash parts of a write that broke db: they may be read there, and
	// are not known to be on the disk.
	failed atomic.Pointer[map[string]bool]

	mu    sync.RWMutex       // of the fields below, never held over I/O
	trust *content.TrustList // nil until the first list was accepted
	count uint64
	// coming has by hash part what was answered and is not written yet: maxComing.
	coming map[string]*comingFact
}

// openFacts opens the database in dir. A damaged one is an error that says to
// delete it: everything in it can be fetched again. On a disk without any room what is there is
// read only. ErrFull: there is no room to make it.
func openFacts(dir string, store flox.StoreDir, anchor flox.CID, log *slog.Logger) (*facts, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("facts: %w", indexdb.Full(err))
	}
	db, err := indexdb.Open(indexdb.Config{Name: "facts of store paths", Dir: filepath.Join(dir, "db"), Ballast: filepath.Join(dir, "ballast"), Most: factsBallast, Log: log})
	if errors.Is(err, flox.ErrFull) {
		return nil, fmt.Errorf("facts: %w; free some space on the disk of %s", err, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("facts in %s: %w; if the disk is sound, delete the directory: it is fetched again", dir, err)
	}
	f := &facts{dir: store, state: dir, anchor: anchor, db: db, coming: make(map[string]*comingFact)}
	if err := f.loadTrust(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	if err := f.recount(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return f, nil
}

// run watches the room of the disk until ctx ends. ErrFull: facts could not be written, and
// there is room again now; the process has to start anew.
func (f *facts) run(ctx context.Context) error {
	look := time.NewTicker(time.Second)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
		}
		if err := f.db.Tend(); err != nil {
			return err
		}
	}
}

// full says what to do while facts cannot be written, with ErrFull; nil: they can.
func (f *facts) full() error {
	if err := f.db.Room(); err != nil {
		return f.unkept(err)
	}
	return nil
}

func (f *facts) unkept(err error) error {
	return &unkept{fmt.Errorf("what is not known here of store paths yet cannot be written down, and is not served; free some space on the disk of %s: %w", f.state, err)}
}

// unkept is the error of facts that are here and cannot be kept. To ask again is no use.
type unkept struct{ error }

// Unwrap is for errors.Is.
func (u *unkept) Unwrap() error { return u.error }

// close may be called twice.
func (f *facts) close() (err error) {
	f.closed.Do(func() { err = f.db.Close() })
	return err
}

func (f *facts) loadTrust() error {
	file := filepath.Join(f.state, trustFile)
	list, err := content.LoadTrustList(file)
	if errors.Is(err, flox.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("trust list %s: %w; delete it to fetch it again: the invite's fingerprint is checked anew", file, err)
	}
	f.trust = list
	return nil
}

func (f *facts) recount() error {
	it, err := f.db.NewIter(context.Background(), &pebble.IterOptions{LowerBound: []byte{prefixInfo}, UpperBound: []byte{prefixInfo + 1}})
	if err != nil {
		return fmt.Errorf("facts: %w", err)
	}
	for it.First(); it.Valid(); it.Next() {
		f.count++
	}
	return it.Close()
}

// get returns the verified info for a hash part. What comes is waited for until it
// is written, which ends with the agent at the latest.
func (f *facts) get(hashPart string) (*flox.PathInfo, bool) {
	if one := f.comes(hashPart); one != nil {
		<-one.of.written
	}
	return f.read(hashPart)
}

// read is get of what is on the disk.
func (f *facts) read(hashPart string) (*flox.PathInfo, bool) {
	b, closer, err := f.stored(hashPart)
	if err != nil {
		return nil, false
	}
	defer func() { _ = closer.Close() }()
	return decodeInfo(b)
}

// stored is the message on the disk.
func (f *facts) stored(hashPart string) ([]byte, io.Closer, error) {
	if f.lost(hashPart) {
		return nil, nil, flox.ErrNotFound
	}
	return f.db.Get(append([]byte{prefixInfo}, hashPart...))
}

func (f *facts) lost(hashPart string) bool {
	p := f.failed.Load()
	return p != nil && (*p)[hashPart]
}

func decodeInfo(b []byte) (*flox.PathInfo, bool) {
	var m floxv1.PathInfo
	if proto.Unmarshal(b, &m) != nil {
		return nil, false
	}
	info, err := api.ToPathInfo(&m)
	return info, err == nil
}

// byManifest finds the info a manifest belongs to, also that of a path that is
// valid no longer: who has its files open goes on reading them. It never gives
// an info with another manifest: inode numbers stand for the one asked for.
func (f *facts) byManifest(id flox.CID) (*flox.PathInfo, bool) {
	b, closer, err := f.db.Get(append([]byte{prefixManifest}, id[:]...))
	if err != nil {
		return nil, false
	}
	var info *flox.PathInfo
	var ok bool
	if len(b) == flox.HashPartLen {
		info, ok = f.read(string(b))
	} else {
		info, ok = decodeInfo(b)
	}
	_ = closer.Close()
	if !ok || info.Manifest != id {
		return nil, false
	}
	return info, true
}

// put stores infos that verify has passed; see write.
func (f *facts) put(infos ...*flox.PathInfo) error { return f.write(infos, nil) }

// write stores infos that verify has passed, except those that were dropped of the
// coming ones, of which they are if that is not nil. They are synced before anybody hears of
// them: the kernel goes on with what it was told after this process was killed,
// and the next one must know the paths behind it. (Unsynced, Pebble keeps the
// newest writes in memory of the process.)
//
// What is known stays until it is removed: a second info with other content
// for the same path is left out, as the storehouse does with it.
func (f *facts) write(infos []*flox.PathInfo, c *coming) error {
	f.writing.Lock()
	defer f.writing.Unlock()
	batch := new(pebble.Batch)
	fresh := make(map[string]bool)
	added := uint64(0)
	seen := make(map[string]bool, len(infos))
	if c != nil {
		f.mu.RLock()
		maps.Copy(seen, c.dropped)
		f.mu.RUnlock()
	}
	for _, info := range infos {
		hash := info.Path.HashPart()
		known, ok := f.read(hash)
		if seen[hash] || ok && (!sameContent(known, info) || len(info.Signatures) <= len(known.Signatures) && f.holds(known)) {
			continue
		}
		seen[hash] = true
		if !ok {
			fresh[hash] = true
			added++
		}
		b, err := proto.Marshal(api.FromPathInfo(info))
		if err != nil {
			return fmt.Errorf("facts of %s: %w", info.Path, err)
		}
		_ = batch.Set(append([]byte{prefixInfo}, hash...), b, nil)
		_ = batch.Set(append([]byte{prefixManifest}, info.Manifest[:]...), []byte(hash), nil)
		for _, ref := range info.References {
			if ref != info.Path {
				_ = batch.Set(referrerKey(ref, hash), nil, nil)
			}
		}
	}
	if batch.Empty() {
		return nil
	}
	if err := f.full(); err != nil {
		return err
	}
	if err := f.db.Apply(batch, true); err != nil {
		f.failed.Store(&fresh) // nothing is written any more
		return f.unkept(err)
	}
	f.mu.Lock()
	f.count += added
	f.mu.Unlock()
	return nil
}

// sameContent reports whether two infos say the same of the same path: all that
// a manifest key signs.
func sameContent(a, b *flox.PathInfo) bool {
	return a.Path == b.Path && a.NarHash == b.NarHash && a.NarSize == b.NarSize && a.Manifest == b.Manifest &&
		slices.Equal(a.References, b.References)
}

func referrerKey(ref flox.StorePath, by string) []byte {
	return append(append([]byte{prefixReferrer}, ref.HashPart()...), by...)
}

// remove forgets a path that is valid no longer. Its manifest stays known.
func (f *facts) remove(hashPart string) error {
	f.writing.Lock()
	defer f.writing.Unlock()
	f.dropComing(hashPart)
	info, ok := f.read(hashPart)
	if !ok {
		return nil
	}
	batch := new(pebble.Batch)
	b, err := proto.Marshal(api.FromPathInfo(info))
	if err != nil {
		return fmt.Errorf("facts of %s: %w", info.Path, err)
	}
	_ = batch.Set(append([]byte{prefixManifest}, info.Manifest[:]...), b, nil)
	_ = batch.Delete(append([]byte{prefixInfo}, hashPart...), nil)
	for _, ref := range info.References {
		_ = batch.Delete(referrerKey(ref, hashPart), nil)
	}
	if err := f.db.Apply(batch, true); err != nil {
		return fmt.Errorf("facts of %s: %w", info.Path, err)
	}
	f.mu.Lock()
	f.count--
	f.mu.Unlock()
	return nil
}

// referrers lists at most limit paths known to refer to p.
func (f *facts) referrers(p flox.StorePath, limit int) []flox.StorePath {
	lower := referrerKey(p, "")
	upper := append(bytes.Clone(lower[:len(lower)-1]), lower[len(lower)-1]+1)
	it, err := f.db.NewIter(context.Background(), &pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return nil
	}
	defer func() { _ = it.Close() }()
	var out []flox.StorePath
	for it.First(); it.Valid() && len(out) < limit; it.Next() {
		if info, ok := f.get(string(it.Key()[len(lower):])); ok {
			out = append(out, info.Path)
		}
	}
	return out
}

// each calls yield with every known info whose base name sorts behind after.
func (f *facts) each(after string, yield func(*flox.PathInfo) bool) error {
	it, err := f.db.NewIter(context.Background(), &pebble.IterOptions{
		LowerBound: append([]byte{prefixInfo}, after[:min(len(after), flox.HashPartLen)]...),
		UpperBound: []byte{prefixInfo + 1},
	})
	if err != nil {
		return fmt.Errorf("facts: %w", err)
	}
	for it.First(); it.Valid(); it.Next() {
		info, ok := decodeInfo(it.Value())
		if ok && string(info.Path) > after && !yield(info) {
			break
		}
	}
	return it.Close()
}

// names lists at most limit known paths whose base names sort behind after, which
// may be any beginning of one. Their facts are not looked at any closer: a
// listing has a million of them.
func (f *facts) names(ctx context.Context, after string, limit int) ([]flox.Named, error) {
	it, err := f.db.NewIter(ctx, &pebble.IterOptions{
		LowerBound: append([]byte{prefixInfo}, after[:min(len(after), flox.HashPartLen)]...),
		UpperBound: []byte{prefixInfo + 1},
	})
	if err != nil {
		return nil, fmt.Errorf("facts: %w", err)
	}
	out := make([]flox.Named, 0, limit)
	for it.First(); it.Valid() && len(out) < limit && ctx.Err() == nil; it.Next() {
		if name, manifest, ok := api.PeekPathInfo(it.Value()); ok && name > after && !f.lost(string(it.Key()[1:])) {
			out = append(out, flox.Named{Name: name, Manifest: manifest})
		}
	}
	if err := it.Close(); err != nil {
		return nil, fmt.Errorf("facts: %w", err)
	}
	return out, ctx.Err()
}

// has reports whether the facts of a hash part are here.
func (f *facts) has(hashPart string) bool {
	_, closer, err := f.stored(hashPart)
	if err != nil {
		return false
	}
	return closer.Close() == nil
}

func (f *facts) known() uint64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.count
}

// verify checks an info's manifest signature against the trust list.
func (f *facts) verify(info *flox.PathInfo) error {
	f.mu.RLock()
	trust := f.trust
	f.mu.RUnlock()
	if trust == nil {
		return fmt.Errorf("%s: no trust list here yet; it comes with the first contact to the storehouse: %w", info.Path, flox.ErrUnreachable)
	}
	return trust.VerifyInfo(f.dir, info)
}

// accept moves the trust list forward along lists, oldest first. The first one
// ever is checked by the invite's fingerprint, each other by the one before, or,
// once the storehouse was restored from a backup, by its epoch and who signed it.
// Lists that neither lead on nor are the one accepted are of a storehouse that
// went back: ErrUntrusted.
func (f *facts) accept(lists [][]byte) error {
	f.accepting.Lock()
	defer f.accepting.Unlock()
	f.mu.RLock()
	known := f.trust
	f.mu.RUnlock()
	w := trustWalk{anchor: f.anchor, at: known}
	for _, b := range lists {
		next, err := content.ParseTrustList(b)
		if err == nil {
			err = w.step(next)
		}
		if err != nil {
			return fmt.Errorf("trust list from the storehouse: %w", err)
		}
	}
	if w.at == known {
		return w.end()
	}
	if err := w.at.Save(filepath.Join(f.state, trustFile)); err != nil {
		return fmt.Errorf("trust list: %w", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trust = w.at
	return nil
}

func (f *facts) trustVersion() uint64 {
	version, _ := f.trustAt()
	return version
}

// trustAt gives version and epoch of the trust list accepted; 0 before the first.
func (f *facts) trustAt() (version, epoch uint64) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.trust == nil {
		return 0, 0
	}
	return f.trust.Version, f.trust.Epoch
}
