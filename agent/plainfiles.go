package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/p2p"
)

// plainEntry is an entry of a tree that was written.
type plainEntry struct {
	name string // below Dir
	kind flox.Kind
	exec bool
}

// plainTree writes one tree below a name in a directory.
type plainTree struct {
	w       *writer
	t       *tree
	draft   string
	begun   bool // there was something: what of it is right is kept
	entries []plainEntry
	window  []plainPiece
	size    int    // of the window
	bytes   uint64 // of content, counted
}

// plainPiece is a chunk to be written to a file.
type plainPiece struct {
	name  string
	off   int64
	chunk flox.Chunk
}

// write writes the tree as draft and seals it. It returns how many bytes of
// content it counted.
func (w *writer) write(ctx context.Context, t *tree, draft string) (uint64, error) {
	p := &plainTree{w: w, t: t, draft: draft}
	if _, err := w.root.Lstat(draft); err == nil {
		p.begun = true
	}
	var failed error
	err := t.Walk(ctx, 0, func(i uint32, inside string, e flox.Entry) bool {
		failed = p.entry(ctx, i, path.Join(draft, inside), e)
		return failed == nil
	})
	if err := errors.Join(failed, err); err != nil {
		return 0, err
	}
	if err := p.flush(ctx); err != nil {
		return 0, err
	}
	return p.bytes, p.seal()
}

// entry makes one entry; the content of a file in chunks comes with a window.
func (p *plainTree) entry(ctx context.Context, i uint32, name string, e flox.Entry) error {
	p.entries = append(p.entries, plainEntry{name, e.Kind, e.Executable})
	if p.begun {
		if err := p.clear(name, e); err != nil {
			return err
		}
	}
	root := p.w.root
	switch e.Kind {
	case flox.Directory:
		if err := root.Mkdir(name, 0o700); err != nil && !errors.Is(err, iofs.ErrExist) {
			return err
		}
		return nil
	case flox.Symlink:
		return root.Symlink(e.Target, name)
	}
	f, err := root.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(p.file(ctx, f, i, name, e), f.Close())
}

// clear makes way for an entry where an earlier attempt left another, and opens
// what it had sealed.
func (p *plainTree) clear(name string, e flox.Entry) error {
	root := p.w.root
	info, err := root.Lstat(name)
	switch {
	case errors.Is(err, iofs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case e.Kind == flox.Directory && info.IsDir():
		return root.Chmod(name, 0o700)
	case e.Kind == flox.Regular && info.Mode().IsRegular():
		return root.Chmod(name, 0o600)
	}
	return removeSealed(root, name)
}

// file writes what lies in the manifest and lists the rest.
func (p *plainTree) file(ctx context.Context, f *os.File, i uint32, name string, e flox.Entry) error {
	if e.Size <= uint64(p.t.Params().InlineLimit) {
		data, inline, err := p.t.Inline(ctx, i)
		if err != nil {
			return err
		}
		if inline {
			p.wrote(len(data), false)
			return errors.Join(f.Truncate(int64(len(data))), writeAll(f, data, 0))
		}
	}
	if err := f.Truncate(int64(e.Size)); err != nil { //nolint:gosec // sizes fit
		return err
	}
	var failed error
	err := p.t.Chunks(ctx, i, 0, -1, func(off int64, c flox.Chunk) bool {
		failed = p.chunk(ctx, f, plainPiece{name, off, c})
		return failed == nil
	})
	return errors.Join(failed, err)
}

// chunk takes a chunk from the file itself, the cache, or with others from the swarm.
func (p *plainTree) chunk(ctx context.Context, f *os.File, one plainPiece) error {
	if p.begun {
		b := make([]byte, one.chunk.Size)
		if _, err := f.ReadAt(b, one.off); err == nil && content.Hash(b) == one.chunk.ID {
			p.wrote(len(b), false)
			return nil
		}
	}
	data, err := p.w.a.cache.Get(ctx, one.chunk.ID)
	if err == nil && len(data) == int(one.chunk.Size) {
		p.wrote(len(data), false)
		return writeAll(f, data, one.off)
	}
	p.window = append(p.window, one)
	if p.size += int(one.chunk.Size); p.size < writeWindow {
		return nil
	}
	return p.flush(ctx)
}

// flush fetches the chunks of a window and writes them as they come. Nothing of
// them goes through the cache, which would write them a second time.
func (p *plainTree) flush(ctx context.Context) error {
	pieces := p.window
	p.window, p.size = nil, 0
	hints := p.w.a.hints(p.t.path)
	hints.Background, hints.AnyOrder = true, true
	last := time.Now() // of a block
	for pause := retryMin; len(pieces) > 0; pause = min(2*pause, retryMax) {
		left, err := p.fetch(ctx, pieces, hints)
		if len(left) < len(pieces) {
			last, pause = time.Now(), retryMin
		}
		if pieces = left; len(pieces) == 0 {
			break
		}
		if err == nil || !errors.Is(err, flox.ErrUnreachable) && !errors.Is(err, flox.ErrNotFound) {
			return err
		}
		if time.Since(last) > p.w.a.cfg.ReadTimeout {
			return fmt.Errorf("nobody delivered in time: %w", &unreachable{err})
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return ctx.Err()
}

// fetch gets pieces once and returns those that did not come.
func (p *plainTree) fetch(ctx context.Context, pieces []plainPiece, hints p2p.Hints) ([]plainPiece, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchLife)
	defer cancel()
	wants := make([]p2p.Want, len(pieces))
	for i, one := range pieces {
		wants[i] = p2p.Want{ID: one.chunk.ID, Size: one.chunk.Size}
	}
	came := make([]bool, len(pieces))
	var failed error
	err := p.w.a.fetcher.host.Fetch(ctx, wants, hints, func(i int, data []byte, from p2p.Source) {
		if failed != nil {
			return
		}
		if failed = p.put(pieces[i], data); failed != nil {
			cancel()
			return
		}
		came[i] = true
		p.w.a.traffic.block(len(data), from, false)
		p.wrote(len(data), true)
	})
	var left []plainPiece
	for i, one := range pieces {
		if !came[i] {
			left = append(left, one)
		}
	}
	if failed != nil {
		err = failed
	}
	return left, err
}

// wrote counts bytes of content.
func (p *plainTree) wrote(n int, fetched bool) {
	p.bytes += uint64(n) //nolint:gosec // a length
	p.w.wrote(n, fetched)
}

// put writes a verified chunk where it belongs.
func (p *plainTree) put(one plainPiece, data []byte) error {
	if len(data) != int(one.chunk.Size) {
		return fmt.Errorf("chunk %s has %d bytes, its manifest says %d: %w", one.chunk.ID, len(data), one.chunk.Size, flox.ErrCorrupt)
	}
	f, err := p.w.root.OpenFile(one.name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(writeAll(f, data, one.off), f.Close())
}

// seal gives everything its mode and times, directories after what is in them.
func (p *plainTree) seal() error {
	dir, err := p.w.root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	times := []unix.Timespec{{Sec: 1}, {Sec: 1}}
	for i := len(p.entries) - 1; i >= 0; i-- {
		e := p.entries[i]
		mode := iofs.FileMode(0o444)
		if e.exec || e.kind == flox.Directory {
			mode = 0o555
		}
		if e.kind != flox.Symlink {
			if err := p.w.root.Chmod(e.name, mode); err != nil {
				return err
			}
		}
		if err := unix.UtimesNanoAt(int(dir.Fd()), e.name, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "set times", Path: e.name, Err: err}
		}
	}
	return nil
}

// check reads what was written and compares it with the signed hash of its NAR.
func (w *writer) check(ctx context.Context, info *flox.PathInfo, name string) error {
	hash := sha256.New()
	if err := nix.DumpPath(ctx, hash, filepath.Join(w.Dir, name)); err != nil {
		return err
	}
	if !bytes.Equal(hash.Sum(nil), info.NarHash[:]) {
		return fmt.Errorf("the hash of its NAR is not the signed one: %w", flox.ErrCorrupt)
	}
	return nil
}

// writeAll writes data at off.
func writeAll(w io.WriterAt, data []byte, off int64) error {
	_, err := w.WriteAt(data, off)
	return err
}

// removeSealed removes name and all below it, directories that may not be
// written to included.
func removeSealed(root *os.Root, name string) error {
	// Root.FS would refuse names that are not UTF-8.
	err := filepath.WalkDir(filepath.Join(root.Name(), name), func(p string, e iofs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(root.Name(), p)
		if err != nil {
			return err
		}
		return root.Chmod(rel, 0o700)
	})
	return errors.Join(err, root.RemoveAll(name))
}
