package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix/local"
	"github.com/floxctl/flox/nix/worker"
)

const (
	// storehouseWord is how long a path of the local store waits for the storehouse
	// to say whether it has one of that name. When it did not, the next ones do not
	// wait for silenceTime.
	storehouseWord = time.Second
	silenceTime    = 10 * time.Second
	// maxSeeds bounds the files of which it is remembered where they lie in the
	// local store.
	maxSeeds = 16_384
)

// beside is the Nix store of this machine that is shown with ours: of its valid
// paths those that the storehouse has not. What both have is the storehouse's, and
// its chunks are read from the local files as far as these hold them, so that who
// put what there does not matter.
type beside struct {
	*local.Store
	read atomic.Uint64 // bytes, instead of from the network

	mu     sync.Mutex
	silent time.Time         // until when the storehouse is not waited for
	seeds  map[flox.CID]seed // by what names the file's content
}

// seed is where a file may lie in the local store.
type seed struct {
	path   flox.StorePath
	inside string
}

// openLocal opens the store of this machine, if there is one to show.
func (a *Agent) openLocal() error {
	if a.cfg.LocalStore == "" {
		return nil
	}
	s, err := local.Open(local.Config{Dir: a.cfg.StoreDir, Root: a.cfg.LocalStore, Socket: a.cfg.LocalSocket})
	if err != nil {
		return err
	}
	a.local = &beside{Store: s, seeds: make(map[flox.CID]seed)}
	return nil
}

// find finds a path that the local store has and the storehouse has not, as far
// as that says so in time. ErrNotFound: it is none of these.
func (b *beside) find(ctx context.Context, a *Agent, p flox.StorePath, by asker, watch *wait) (*local.Path, error) {
	if b == nil {
		return nil, flox.ErrNotFound
	}
	if valid, ok := a.validHere(p); ok && valid {
		return nil, fmt.Errorf("%s is known here: %w", p, flox.ErrNotFound)
	}
	path, err := b.Find(ctx, p)
	if err != nil {
		return nil, err
	}
	if b.waits() {
		ctx, cancel := context.WithTimeout(ctx, storehouseWord)
		defer cancel()
		switch _, err := a.resolver.lookupFor(ctx, p, by, watch); {
		case err == nil:
			return nil, fmt.Errorf("%s is in the storehouse: %w", p, flox.ErrNotFound)
		case !errors.Is(err, flox.ErrNotFound):
			b.unheard()
		}
	}
	return path, nil
}

// waits reports whether the storehouse is waited for.
func (b *beside) waits() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return time.Now().After(b.silent)
}

func (b *beside) unheard() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.silent = time.Now().Add(silenceTime)
}

// passing says of which manifests the kernel must ask again: who holds them may
// change or remove them.
func passing(manifest flox.CID) bool { return local.IsID(manifest) }

// remember notes where a file of the storehouse's may lie in the local store.
func (t *tree) remember(ctx context.Context, index uint32, e *flox.Entry) {
	b := t.a.local
	if b == nil || !b.Has(t.path) {
		return
	}
	b.mu.Lock()
	_, ok := b.seeds[e.File]
	b.mu.Unlock()
	if ok {
		return
	}
	inside, err := t.Path(ctx, index)
	if err != nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.seeds) >= maxSeeds {
		for id := range b.seeds { // any one: its content comes from elsewhere
			delete(b.seeds, id)
			break
		}
	}
	b.seeds[e.File] = seed{t.path, inside}
}

// chunk reads a chunk from the local store. Whatever lies there, what is returned
// is what the chunk's name says.
func (b *beside) chunk(p piece) ([]byte, error) {
	if b == nil || p.loose != nil || p.manifest() {
		return nil, flox.ErrNotFound
	}
	b.mu.Lock()
	at, ok := b.seeds[p.file.ID]
	b.mu.Unlock()
	if !ok {
		return nil, flox.ErrNotFound
	}
	data := make([]byte, p.chunk.Size)
	err := b.Read(at.path, at.inside, data, p.off)
	if err == nil && content.Hash(data) != p.chunk.ID {
		err = fmt.Errorf("%s/%s of the local store is another file: %w", at.path, at.inside, flox.ErrNotFound)
	}
	if err != nil { // not asked for each of its chunks
		b.mu.Lock()
		delete(b.seeds, p.file.ID)
		b.mu.Unlock()
		return nil, err
	}
	b.read.Add(uint64(len(data)))
	return data, nil
}

// localNames adds the names of the local store to those known, as Names does.
func (a *Agent) localNames(ctx context.Context, known []flox.Named, after string, limit int) []flox.Named {
	if a.local == nil || limit <= 0 {
		return known
	}
	theirs, err := a.local.Names(ctx, after, limit)
	if err != nil {
		a.log.Debug("the local Nix store is not listed", "error", err)
		return known
	}
	out := make([]flox.Named, 0, min(limit, len(known)+len(theirs)))
	for len(out) < limit && (len(known) > 0 || len(theirs) > 0) {
		if len(theirs) == 0 || len(known) > 0 && known[0].Name <= string(theirs[0].Path) {
			if len(theirs) > 0 && known[0].Name == string(theirs[0].Path) {
				theirs = theirs[1:]
			}
			out, known = append(out, known[0]), known[1:]
			continue
		}
		one := flox.Named{Name: string(theirs[0].Path), Manifest: theirs[0].ID, Kind: theirs[0].Kind}
		out, theirs = append(out, one), theirs[1:]
	}
	return out
}

// localMessage says what is shown of the local store.
func (a *Agent) localMessage() *floxv1.LocalStore {
	if a.local == nil {
		return nil
	}
	m := &floxv1.LocalStore{Dir: string(a.local.Dir()), Shown: uint64(a.local.Known()), ReadBytes: a.local.read.Load()} //nolint:gosec // not negative
	if err := a.local.Err(); err != nil {
		m.Error = oneLine(err)
	}
	return m
}

// doctorLocal says how this machine has both stores.
func (a *Agent) doctorLocal() *floxv1.Finding {
	m := a.localMessage()
	if m.GetError() != "" {
		return finding("local Nix", "warning", "start its daemon: systemctl start nix-daemon.socket, or nix-daemon; without it only what the storehouse has is seen in sessions",
			"%s stays as it is, and nothing of it is shown in sessions: %s", m.GetDir(), m.GetError())
	}
	return finding("local Nix", "ok", "", "%s stays as it is; sessions (floxctl nix, floxctl run) show it with the storehouse's", m.GetDir())
}

// localInfo is what the local daemon knows of a path that the mount shows from its store.
func (a *Agent) localInfo(ctx context.Context, p flox.StorePath) (*worker.Info, error) {
	path, err := a.local.find(ctx, a, p, elsewhere, nil)
	if err != nil {
		return nil, err
	}
	return path.Info, nil
}

// sortLocal tells paths that the mount shows from the local store from those that
// are not valid there either. All of them are known not to be in the storehouse.
func (a *Agent) sortLocal(ctx context.Context, paths []flox.StorePath) (valid, missing []flox.StorePath, err error) {
	if a.local == nil {
		return nil, paths, nil
	}
	for _, p := range paths {
		switch _, err := a.local.Find(ctx, p); {
		case err == nil:
			valid = append(valid, p)
		case errors.Is(err, flox.ErrNotFound):
			missing = append(missing, p)
		default:
			return nil, nil, err
		}
	}
	return valid, missing, nil
}
