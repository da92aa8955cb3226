package staging

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/pack"
	"github.com/floxctl/flox/nix"
)

// maxReferences bounds the references of one path.
const maxReferences = 1 << 16

// taken is content that was taken in and belongs to no path yet.
type taken struct {
	*content.Ingested
	blocks  map[flox.CID][]byte // of a small NAR; they go into the index
	session *pack.Session       // of a large one: its blocks are in packs, durable
	used    bool                // a path was made of it
}

// release lets go of what was taken in: a path has it now, or nobody needs it.
func (s *Store) release(t *taken) {
	if t.session == nil {
		return
	}
	t.session.Close()
	if !t.used {
		s.sweepSoon()
	}
}

// sweepSoon says that packs hold what nobody needs.
func (s *Store) sweepSoon() {
	select {
	case s.swept <- struct{}{}:
	default:
	}
}

// size is what goes into the index, in bytes.
func (t *taken) size() (n int64) {
	for _, b := range t.blocks {
		n += int64(len(b))
	}
	return n
}

// small collects the blocks of a small NAR.
type small map[flox.CID][]byte

// Put is flox.BlockSink.
func (m small) Put(_ context.Context, id flox.CID, b []byte) error {
	if _, ok := m[id]; !ok {
		m[id] = bytes.Clone(b)
	}
	return nil
}

// Sync is flox.BlockSink.
func (m small) Sync(context.Context) error { return nil }

// budgeted is a sink that keeps to the budget.
type budgeted struct {
	*pack.Session
	s *Store
}

// Put is flox.BlockSink.
func (b budgeted) Put(ctx context.Context, id flox.CID, data []byte) error {
	if err := b.s.room(int64(len(data))); err != nil {
		return err
	}
	return b.Session.Put(ctx, id, data)
}

// take reads a NAR. With embedded not a byte behind it is read.
func (s *Store) take(ctx context.Context, nar io.Reader, embedded bool) (*taken, error) {
	if err := s.ready(true); err != nil {
		return nil, err
	}
	if !embedded {
		var head bytes.Buffer
		_, err := io.CopyN(&head, nar, content.MaxSmallNar+1)
		switch {
		case errors.Is(err, io.EOF):
			t := &taken{blocks: make(small)}
			t.Ingested, err = content.IngestSmall(ctx, head.Bytes(), small(t.blocks))
			return t, err
		case err != nil:
			return nil, err
		}
		nar = io.MultiReader(&head, nar)
	}
	packs, err := s.blocks()
	if err != nil {
		return nil, err
	}
	t := &taken{session: packs.Session()}
	if t.Ingested, err = content.Ingest(ctx, nar, budgeted{t.session, s}, content.IngestOptions{Embedded: embedded}); err != nil {
		s.release(t)
		return nil, err
	}
	return t, nil
}

// AddOptions say how a path is added. The zero value is the default.
type AddOptions struct {
	// Embedded says that the NAR lies inside a longer stream: not a byte behind it
	// is read.
	Embedded bool
	// Shared says that the path is for other machines, too, which is remembered.
	Shared bool
}

// Add takes in a path. Of info, the NAR hash may be zero: then it is what it turns
// out to be; manifest and time are set here. With a content address, that is
// checked; without one the path is taken as it is claimed, for who may do so is
// the caller's to say. A path that is staged stays as it is: the NAR is read and
// dropped, whatever is in it, as in Nix. It returns when the path is durable; one
// of a text survives the process then, and a power cut SyncAfter later (see write).
//
// Errors: ErrBadInput (also for a reference that is not valid), ErrFull, and
// what nar and Config.Known return.
func (s *Store) Add(ctx context.Context, info *flox.PathInfo, nar io.Reader, opt AddOptions) (*Path, error) {
	if p, err := s.Path(info.Path); err == nil {
		return p, skipNar(nar, opt.Embedded)
	}
	if err := s.checkInfo(info); err != nil {
		return nil, err
	}
	t, err := s.take(ctx, nar, opt.Embedded)
	if err != nil {
		return nil, fmt.Errorf("add %s: %w", info.Path, err)
	}
	defer s.release(t)
	own := *info
	if own.NarHash == ([32]byte{}) {
		own.NarHash, own.NarSize = t.NarHash, t.NarSize
	}
	if err := content.Check(&own, t.Ingested); err != nil {
		return nil, err
	}
	return s.commit(ctx, &own, t, opt.Shared)
}

// skipNar reads a NAR that is not needed.
func skipNar(nar io.Reader, embedded bool) error {
	if !embedded {
		_, err := io.Copy(io.Discard, nar)
		return err
	}
	for r := nix.NewNarReader(nar); ; {
		if _, err := r.Next(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// checkInfo says what is wrong with info whatever its NAR is.
func (s *Store) checkInfo(info *flox.PathInfo) error {
	if _, err := flox.ParseStorePath(string(info.Path)); err != nil {
		return err
	}
	if len(info.References) > maxReferences {
		return fmt.Errorf("%s has %d references, at most %d are allowed: %w", info.Path, len(info.References), maxReferences, flox.ErrBadInput)
	}
	if !slices.IsSorted(info.References) || len(slices.Compact(slices.Clone(info.References))) != len(info.References) {
		return fmt.Errorf("path info of %s: references are not sorted, or one stands twice: %w", info.Path, flox.ErrBadInput)
	}
	if len(info.Signatures) > nix.MaxSignatures {
		return fmt.Errorf("%s has %d signatures, at most %d are allowed: %w", info.Path, len(info.Signatures), nix.MaxSignatures, flox.ErrBadInput)
	}
	if info.CA == "" {
		return nil
	}
	_, err := content.CheckAddressPath(s.cfg.StoreDir, info)
	return err
}

// commit makes a path of what was taken in. Info is ours to change.
func (s *Store) commit(ctx context.Context, info *flox.PathInfo, t *taken, shared bool) (*Path, error) {
	info.Manifest, info.ManifestSignatures = t.Manifest, nil
	// Nix keeps whole seconds.
	added := time.Now()
	info.Registered = added.Truncate(time.Second).UTC()
	if info.CA != "" {
		blocks := flox.Blocks(s)
		if t.blocks != nil {
			blocks = inMemory(t.blocks)
		}
		// With a page cache of its own: what fails must not be remembered.
		m, err := content.NewPageCache(1).Open(ctx, info.Manifest, blocks)
		if err == nil {
			err = content.CheckAddress(ctx, s.cfg.StoreDir, info, m, blocks)
		}
		if err != nil {
			return nil, err
		}
	}
	done, was, err := s.begin(ctx, info.Path)
	if was != nil || err != nil {
		return was, err
	}
	defer done()
	p := &Path{Info: info, Added: added.Truncate(time.Millisecond).UTC(), Shared: shared, inline: t.size()}
	s.valid.RLock()
	defer s.valid.RUnlock()
	if err := s.checkReferences(ctx, info); err != nil {
		return nil, err
	}
	if strings.HasSuffix(string(info.Path), nix.DrvExtension) && info.CA != "" {
		if err := s.checkDerivation(ctx, info, t); err != nil {
			return nil, err
		}
	}
	if err := s.write(p, t); err != nil {
		return nil, err
	}
	t.used = true
	return p, nil
}

// inMemory are blocks that were not written yet.
type inMemory map[flox.CID][]byte

// Get is flox.Blocks.
func (m inMemory) Get(_ context.Context, id flox.CID) ([]byte, error) {
	if b, ok := m[id]; ok {
		return b, nil
	}
	return nil, fmt.Errorf("block %s: %w", id, flox.ErrNotFound)
}

// begin makes the caller the one who adds a path, until done; or gives the path
// if somebody else has added it meanwhile.
func (s *Store) begin(ctx context.Context, path flox.StorePath) (done func(), was *Path, err error) {
	hash := path.HashPart()
	for {
		s.mu.Lock()
		other, busy := s.adding[hash]
		if !busy {
			mine := make(chan struct{})
			s.adding[hash] = mine
			s.mu.Unlock()
			done = func() {
				s.mu.Lock()
				delete(s.adding, hash)
				s.mu.Unlock()
				close(mine)
			}
			switch p, err := s.get(hash); {
			case err == nil && p.Info.Path != path:
				done()
				return nil, nil, fmt.Errorf("%s: the hash part belongs to %s already: %w", path, p.Info.Path, flox.ErrBadInput)
			case err == nil:
				done()
				return nil, p, nil
			case !errors.Is(err, flox.ErrNotFound):
				done()
				return nil, nil, err
			}
			return done, nil, nil
		}
		s.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("add %s: %w", path, ctx.Err())
		}
	}
}

// checkReferences needs s.valid.
func (s *Store) checkReferences(ctx context.Context, info *flox.PathInfo) error {
	for _, ref := range info.References {
		if ref == info.Path {
			continue
		}
		_, err := s.Path(ref)
		if errors.Is(err, flox.ErrNotFound) {
			var known *flox.PathInfo
			if known, err = s.cfg.Known(ctx, ref); err == nil && known.Path != ref {
				err = flox.ErrNotFound
			}
		}
		if errors.Is(err, flox.ErrNotFound) {
			return fmt.Errorf("cannot add %s because the reference %s is not valid: %w", s.cfg.StoreDir.Join(info.Path), s.cfg.StoreDir.Join(ref), flox.ErrBadInput)
		}
		if err != nil {
			return fmt.Errorf("reference %s of %s: %w", ref, info.Path, err)
		}
	}
	return nil
}

// SyncAfter is how long Run waits with the sync that makes texts durable.
const SyncAfter = 20 * time.Millisecond

// put is how everything but marks that may be lost gets into the index: what is written past it is not
// durable, whatever Pebble is told. Later means that a power cut may take it until Run
// has settled it; otherwise it is durable, and all before it.
func (s *Store) put(batch *pebble.Batch, later bool) error {
	if err := s.db.Apply(batch, true); errors.Is(err, flox.ErrFull) {
		return s.unkept(err)
	} else if err != nil || !later {
		return errors.Join(err, s.settle())
	}
	select {
	case s.loose <- struct{}{}:
	default:
	}
	return nil
}

// settle brings all that was put to the disk. If that fails nobody knows what of it is there, and
// nothing is put any more: ErrFull.
func (s *Store) settle() error {
	err := s.log.settle()
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%w: %w", flox.ErrFull, err)
	s.db.Break(err)
	return s.unkept(err)
}

// write makes a path durable: one write, whose sync it shares with whoever writes
// at the same time. An evaluation adds its texts, derivations above all, by the
// thousand, one after the other, and adds them again if it is asked again: they
// share a sync each SyncAfter. What is written later, such as paths that refer to them, is
// never durable before they are.
func (s *Store) write(p *Path, t *taken) error {
	if err := errors.Join(s.ready(true), s.room(p.inline)); err != nil {
		return fmt.Errorf("add %s: %w", p.Info.Path, err)
	}
	record, err := appendPath(p)
	if err != nil {
		return err
	}
	hash := p.Info.Path.HashPart()
	batch := new(pebble.Batch)
	for id, b := range t.blocks {
		_ = batch.Set(cidKey(blockPrefix, id, hash), b, nil)
	}
	_ = batch.Set(cidKey(manifestPrefix, p.Info.Manifest, hash), nil, nil)
	_ = batch.Set(pathKey(hash), record, nil)
	if err := s.put(batch, strings.HasPrefix(p.Info.CA, string(nix.CAText))); err != nil {
		return fmt.Errorf("add %s: %w", p.Info.Path, err)
	}
	s.mu.Lock()
	s.stats.add(p, 1)
	s.mu.Unlock()
	s.tell()
	return nil
}
