package agent

import (
	"context"
	"errors"
	"path"
	"strings"
	"sync"
	"time"

	flox "github.com/floxctl/flox"
)

// A program that is linked to libraries starts in a dynamic loader, and what that
// reads follows from the files: see elf.go. It is found out for two ends: ahead of
// a start, so that the loader does not wait for one page after the other, and
// behind one, to complete what is told of it.

const (
	// maxObjects bounds the programs and libraries one start is followed through.
	maxObjects = 256
	// maxLoaderBytes is up to which size a program's dynamic loader itself is needed
	// whole: it is small, and a start uses most of it.
	maxLoaderBytes = 256 << 10
	// maxLoads bounds the starts that are followed at once, maxLoaded those that are
	// remembered, and loadAgain is for how long.
	maxLoads, maxLoaded = 16, 512
	loadAgain           = 30 * time.Second
	// firstLook is when it is first looked whether who reads a program runs it, each
	// look comes twice as late as the one before, and lastLook bounds them. The kernel
	// has the thread run it once it has read the loader's head, too.
	firstLook, lastLook = time.Millisecond, 32 * time.Millisecond
)

// loading follows what one start loads.
type loading struct {
	a       *Agent
	root    flox.StorePath
	closure map[flox.StorePath]*flox.PathInfo
	ahead   bool // what is not here is fetched; false: it is left out
	// saw is told of what the loader uses, no parts: it is looked up only. nil = nobody is.
	saw func(t *tree, entry uint32, parts []part)

	trees map[flox.StorePath]*tree // nil = not here
	seen  map[fileKey]struct{}
	later []used // to be fetched with what is needed next
}

// object is a program or library.
type object struct {
	t     *tree
	i     uint32
	e     flox.Entry
	dir   string // where it lies
	parts []part // needed next
	ends  bool   // also what the program's end needs
	head  *elfHead
	dyn   *elfDynamic
}

// used are parts of an object.
type used struct {
	o     *object
	parts []part
}

func (a *Agent) newLoading(root flox.StorePath, ahead bool, saw func(*tree, uint32, []part)) *loading {
	return &loading{
		a: a, root: root, closure: a.localClosure(root), ahead: ahead, saw: saw,
		trees: make(map[flox.StorePath]*tree), seen: make(map[fileKey]struct{}),
	}
}

// follow loads an entry of a store path and all it is linked to, level by level as
// the loader does; what a level needs is fetched at once.
func (l *loading) follow(ctx context.Context, p flox.StorePath, entry uint32) {
	var level []*object
	if t := l.tree(ctx, p); t != nil {
		level = l.object(ctx, nil, t, entry)
	}
	for len(level) > 0 && ctx.Err() == nil {
		level = l.level(ctx, level)
	}
	l.bring(ctx, nil)
}

// object adds an entry to a level, once.
func (l *loading) object(ctx context.Context, level []*object, t *tree, i uint32) []*object {
	key := fileKey{t.ID(), i}
	if _, ok := l.seen[key]; ok || len(l.seen) >= maxObjects {
		return level
	}
	l.seen[key] = struct{}{}
	e, err := t.Entry(ctx, i)
	if err != nil || e.Kind != flox.Regular || e.Size <= uint64(t.Params().InlineLimit) {
		return level
	}
	at, err := t.Path(ctx, i)
	if err != nil {
		return level
	}
	return append(level, &object{
		t: t, i: i, e: e, dir: path.Join(l.a.cfg.StoreDir.Join(t.path), path.Dir(at)), parts: []part{{0, elfHeadBytes}},
		ends: !l.ahead, // ahead of a start nobody waits for that yet
	})
}

// level reads what the loader reads of objects, and gives what they are linked to.
func (l *loading) level(ctx context.Context, objects []*object) (next []*object) {
	objects = l.step(ctx, objects, (*object).heads)
	objects = l.step(ctx, objects, (*object).dynamics)
	objects = l.step(ctx, objects, (*object).relocations)
	type wish struct {
		dirs []string
		name string
	}
	var wishes []wish
	for _, o := range objects {
		if interp := o.text(ctx, o.head.interp); interp != "" {
			wishes = append(wishes, wish{[]string{"/"}, interp})
		}
		table, ok := o.read(ctx, o.dyn.strings)
		if !ok {
			continue
		}
		needed, dirs := o.dyn.names(table)
		for i := range dirs {
			dirs[i] = strings.NewReplacer("$ORIGIN", o.dir, "${ORIGIN}", o.dir).Replace(dirs[i])
		}
		l.open(ctx, dirs)
		for _, name := range needed {
			wishes = append(wishes, wish{dirs, name})
		}
	}
	for _, w := range wishes {
		for _, dir := range w.dirs {
			t, i, ok := l.find(ctx, dir, w.name)
			if !ok {
				continue
			}
			had := len(next)
			if next = l.object(ctx, next, t, i); len(next) > had && dir == "/" {
				if o := next[had]; o.e.Size <= maxLoaderBytes {
					l.later = append(l.later, used{o, []part{{0, int64(o.e.Size)}}})
				}
			}
			break
		}
	}
	return next
}

// step brings what objects need next and reads it; parse says what is needed
// then. Objects that are not what they should be are left out.
func (l *loading) step(ctx context.Context, objects []*object, parse func(*object, context.Context) error) []*object {
	l.bring(ctx, objects)
	left := objects[:0]
	for _, o := range objects {
		if o.parts = nil; parse(o, ctx) == nil {
			left = append(left, o)
		}
		if len(o.parts) > 0 {
			l.later = append(l.later, used{o, o.parts})
		}
	}
	return left
}

func (o *object) heads(ctx context.Context) (err error) {
	size := int64(o.e.Size) //nolint:gosec // sizes fit
	b, ok := o.read(ctx, part{0, min(elfHeadBytes, size)})
	if !ok {
		return flox.ErrNotFound
	}
	if o.head, err = parseELF(b, size); err == nil {
		o.parts = []part{o.head.dynamic, o.head.interp}
	}
	return err
}

func (o *object) dynamics(ctx context.Context) error {
	b, ok := o.read(ctx, o.head.dynamic)
	if !ok {
		return flox.ErrNotFound
	}
	o.dyn = o.head.parseDynamic(b)
	o.parts = o.dyn.tables()
	return nil
}

func (o *object) relocations(ctx context.Context) error {
	t := o.dyn.touched(o.ends)
	for _, p := range o.dyn.relocations {
		if table, ok := o.read(ctx, p); ok {
			t.relocations(table)
		}
	}
	if table, ok := o.read(ctx, o.dyn.relative); ok {
		t.relative(table)
	}
	o.parts = t.parts()
	return nil
}

// read reads a part as far as it is on this machine's disk.
func (o *object) read(ctx context.Context, p part) ([]byte, bool) {
	b := make([]byte, p.end-p.off)
	n, err := hereReader{ctx, o.t, o.i, o.e}.ReadAt(b, p.off)
	return b, n == len(b) && (err == nil || n > 0)
}

// text reads a part as a string, "" if it is not here.
func (o *object) text(ctx context.Context, p part) string {
	b, _ := o.read(ctx, p)
	return strings.TrimRight(string(b), "\x00")
}

// bring tells of, and fetches if that is wanted, what objects need next and what
// could wait for that.
func (l *loading) bring(ctx context.Context, objects []*object) {
	for _, o := range objects {
		l.later = append(l.later, used{o, o.parts})
	}
	var pieces []piece
	for _, u := range l.later {
		if l.saw != nil {
			l.saw(u.o.t, u.o.i, u.parts)
		}
		for _, p := range u.parts {
			if l.ahead && p.end > p.off {
				pieces, _ = u.o.t.missing(ctx, u.o.i, &u.o.e, p.off, p.end-p.off, pieces)
			}
		}
	}
	l.later = nil
	l.fetch(ctx, pieces)
}

// fetch gets pieces, each block once. What does not come is not here.
func (l *loading) fetch(ctx context.Context, pieces []piece) {
	if len(pieces) == 0 {
		return
	}
	once := make(map[flox.CID]struct{}, len(pieces))
	left := pieces[:0]
	for _, p := range pieces {
		if _, ok := once[p.chunk.ID]; !ok {
			once[p.chunk.ID] = struct{}{}
			left = append(left, p)
		}
	}
	if err := l.a.ahead.fetch(ctx, aheadLink, left, l.a.hints(l.root), nil); err != nil && ctx.Err() == nil {
		l.a.log.Debug("not fetched ahead of a loader", "path", string(l.root), "error", err)
	}
}

// open fetches the manifests of directories' store paths at once.
func (l *loading) open(ctx context.Context, dirs []string) {
	if !l.ahead {
		return
	}
	var pieces []piece
	for _, dir := range dirs {
		sp, _, err := l.a.cfg.StoreDir.Split(path.Clean(dir))
		if info := l.closure[sp]; err == nil && info != nil && l.trees[sp] == nil && !l.a.cache.Has([]flox.CID{info.Manifest})[0] {
			pieces = append(pieces, piece{chunk: flox.Chunk{ID: info.Manifest}})
		}
	}
	l.fetch(ctx, pieces)
}

// tree opens a tree of the closure.
func (l *loading) tree(ctx context.Context, p flox.StorePath) *tree {
	if t, ok := l.trees[p]; ok {
		return t
	}
	var t *tree
	if info := l.closure[p]; info != nil {
		if m, err := l.a.pages.Open(ctx, info.Manifest, l); err == nil {
			t = &tree{Manifest: m, path: p, a: l.a}
		}
	}
	l.trees[p] = t
	return t
}

// Get implements flox.Blocks for manifests.
func (l *loading) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	data, err := l.a.cache.Get(ctx, id)
	if err != nil && l.ahead {
		l.fetch(ctx, []piece{{chunk: flox.Chunk{ID: id}}})
		data, err = l.a.cache.Get(ctx, id)
	}
	return data, err
}

var _ flox.Blocks = (*loading)(nil)

// find follows a name relative to dir, through symlinks, to an entry in the closure.
func (l *loading) find(ctx context.Context, dir, name string) (*tree, uint32, bool) {
	for range maxHops {
		if !path.IsAbs(name) {
			name = path.Join(dir, name)
		}
		sp, rest, err := l.a.cfg.StoreDir.Split(path.Clean(name))
		if err != nil {
			return nil, 0, false
		}
		t := l.tree(ctx, sp)
		if t == nil {
			return nil, 0, false
		}
		s, err := t.descend(ctx, strings.Trim(rest, "/"))
		if l.saw != nil && (err == nil || errors.Is(err, flox.ErrNotFound)) {
			l.saw(t, s.entry, nil) // also where it is not: the loader asks there
		}
		if err != nil {
			return nil, 0, false
		}
		if s.target == "" {
			return t, s.entry, true
		}
		dir, name = s.from, s.target
	}
	return nil, 0, false
}

// loads are the starts that are followed ahead of their loaders.
type loads struct {
	a      *Agent
	places chan struct{}
	work   sync.WaitGroup                                        // Close waits for them
	exe    func(ctx context.Context, tid uint32) (string, error) // what a thread runs; nil = there is nobody to ask

	mu   sync.Mutex
	last map[fileKey]time.Time
}

func newLoads(a *Agent) *loads {
	l := &loads{a: a, places: make(chan struct{}, maxLoads), last: make(map[fileKey]time.Time)}
	if a.cfg.Warden != nil {
		l.exe = a.cfg.Warden.Exe
	}
	return l
}

// starting is called when a program is about to run. It does not wait, and does
// nothing for what was done lately.
func (l *loads) starting(t *tree, entry uint32) {
	l.begin(t, entry, func(context.Context) bool { return true })
}

// running is starting, once the thread that reads the program runs it.
func (l *loads) running(t *tree, entry, tid uint32) {
	if l == nil || l.exe == nil || tid == 0 {
		return
	}
	l.begin(t, entry, func(ctx context.Context) bool {
		for pause := firstLook; pause <= lastLook; pause *= 2 {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return false
			}
			exe, err := l.exe(ctx, tid)
			if err != nil {
				return false
			}
			if p, _, err := l.a.cfg.StoreDir.Split(exe); err == nil && p == t.path {
				return true
			}
		}
		l.forget(fileKey{t.ID(), entry}) // it may be run after it was copied
		return false
	})
}

// begin follows what a program loads if it was not lately, there is a place, and it
// is sure that it runs.
func (l *loads) begin(t *tree, entry uint32, sure func(context.Context) bool) {
	if l == nil || !l.due(fileKey{t.ID(), entry}, time.Now()) {
		return
	}
	select {
	case l.places <- struct{}{}:
	default:
		return
	}
	l.work.Go(func() { // bounded by l.places
		defer func() { <-l.places }()
		ctx, cancel := context.WithTimeout(l.a.fetcher.life, replayLasts)
		defer cancel()
		if sure(ctx) {
			l.a.newLoading(t.path, true, nil).follow(ctx, t.path, entry)
		}
	})
}

func (l *loads) forget(key fileKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.last, key)
}

func (l *loads) due(key fileKey, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if at, ok := l.last[key]; ok && now.Sub(at) < loadAgain {
		return false
	}
	if len(l.last) >= maxLoaded {
		clear(l.last)
	}
	l.last[key] = now
	return true
}

// linked completes a recording with what the loader read of the programs and
// libraries in it: of those that were warm nobody asked us.
func (a *Agent) linked(ctx context.Context, rec *recording) {
	l := a.newLoading(rec.path, false, func(t *tree, entry uint32, parts []part) {
		if len(parts) == 0 {
			rec.add(fileKey{t.ID(), entry}, t.path, 0, 0)
		}
		for _, p := range parts {
			rec.add(fileKey{t.ID(), entry}, t.path, p.off, p.end-p.off)
		}
	})
	var roots []fileKey
	for key, f := range rec.files {
		if len(f.runs) > 0 {
			roots = append(roots, key)
		}
	}
	for _, key := range roots {
		if p := rec.manifests[key.manifest]; p != "" {
			l.follow(ctx, p, key.entry)
		}
	}
}

// descent is how far a path inside a tree leads.
type descent struct {
	entry uint32
	e     flox.Entry
	// target is a symlink's on the way, with the rest of the path; from is the
	// directory it is relative to. "" = the path led to entry.
	target, from string
}

// descend goes down a path inside a tree, up to the first symlink. With an error
// entry is the last one found.
func (t *tree) descend(ctx context.Context, rest string) (d descent, err error) {
	at := ""
	var parts []string
	if rest != "" {
		parts = strings.Split(rest, "/")
	}
	for n := 0; ; n++ {
		i, e, err := t.Find(ctx, at)
		if err != nil {
			return d, err
		}
		d.entry, d.e = i, e
		if e.Kind == flox.Symlink {
			d.from = path.Join(t.a.cfg.StoreDir.Join(t.path), path.Dir(at))
			d.target = path.Join(append([]string{e.Target}, parts[n:]...)...)
			return d, nil
		}
		if n == len(parts) {
			return d, nil
		}
		at = strings.TrimPrefix(at+"/"+parts[n], "/")
	}
}
