package buildfarm

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// maxPlaces bounds how many jobs are done at once.
const maxPlaces = 1024

// place is where one job is done and nothing else ever: a store, a state of Nix, a
// temporary directory, and where root builds a user id. What a job does there, to its
// inputs too, nobody else gets to see.
type place struct {
	b      *Builder
	number int
	dir    string
	as     int // who root has Nix run as; 0 = this process's user
	trees  []tree
	inputs []*input
}

// tree is a directory that a room shows read-only.
type tree struct {
	Name string `json:"name"` // among the inputs
	Path string `json:"path"` // in the store
}

// place makes one, which is to be closed.
func (b *Builder) place() (*place, error) {
	p := &place{b: b}
	b.mu.Lock()
	for b.places[p.number] {
		p.number++
	}
	full := p.number >= maxPlaces
	if !full {
		b.places[p.number] = true
	}
	b.mu.Unlock()
	if full {
		return nil, fmt.Errorf("%d builds run at once already: %w", maxPlaces, flox.ErrBusy)
	}
	p.dir = filepath.Join(b.cfg.Dir, "jobs", fmt.Sprint(p.number))
	if b.own {
		p.as = firstID + p.number
	}
	err := remove(p.dir) // it could not be removed last time
	for _, sub := range []string{"store", "var", "home", "tmp"} {
		dir := filepath.Join(p.dir, sub)
		if err == nil {
			err = os.MkdirAll(dir, 0o755)
		}
		if err == nil && p.as != 0 {
			err = os.Chown(dir, p.as, p.as)
		}
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("builder: %w", err)
	}
	return p, nil
}

// close removes it. Nothing may run there any more.
func (p *place) close() {
	for _, in := range p.inputs {
		p.b.inputs.done(in)
	}
	if err := remove(p.dir); err != nil {
		p.b.cfg.Log.Warn("what a build has left stays until the next start", "error", err)
		return // its number is not free
	}
	p.b.mu.Lock()
	defer p.b.mu.Unlock()
	delete(p.b.places, p.number)
}

// lay puts store paths, references before what refers to them, into the store: a
// directory as it is, to be read; of a file, which Nix links to where a build sees it, a
// copy. Nix is told of them when the room is made.
func (p *place) lay(ctx context.Context, infos []*flox.PathInfo, from Source) (err error) {
	var words strings.Builder
	for _, info := range infos {
		in, err := p.b.inputs.hold(ctx, info, func(w io.Writer) error { return from.Nar(ctx, w, info) })
		if err != nil {
			return err
		}
		p.inputs = append(p.inputs, in)
		if err := p.show(in, info.Path); err != nil {
			return fmt.Errorf("show %s to a build: %w", info.Path, err)
		}
		fmt.Fprintf(&words, "%s\n%s\n%d\n\n%d\n", p.b.cfg.StoreDir.Join(info.Path), hex.EncodeToString(info.NarHash[:]), info.NarSize, len(info.References))
		for _, ref := range info.References {
			words.WriteString(p.b.cfg.StoreDir.Join(ref) + "\n")
		}
	}
	if len(infos) == 0 {
		return nil
	}
	return os.WriteFile(p.registration(), []byte(words.String()), 0o600)
}

// registration is the file that has what Nix is told of the inputs.
func (p *place) registration() string { return filepath.Join(p.dir, "registration") }

func (p *place) show(in *input, path flox.StorePath) error {
	st, err := os.Lstat(in.file)
	if err != nil {
		return err
	}
	to := filepath.Join(p.dir, "store", string(path))
	switch st.Mode().Type() {
	case os.ModeDir:
		p.trees = append(p.trees, tree{Name: filepath.Base(in.file), Path: string(path)})
		return os.Mkdir(to, 0o755)
	case os.ModeSymlink:
		target, err := os.Readlink(in.file)
		if err == nil {
			err = os.Symlink(target, to)
		}
		if err == nil && p.as != 0 {
			err = os.Lchown(to, p.as, p.as)
		}
		return err
	}
	return copyFile(in.file, to, st.Mode().Perm(), p.as)
}

// copyFile copies a file as Nix would have it in a store, shared with the original
// where the file system can.
func copyFile(from, to string, mode os.FileMode, as int) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) != nil {
		_, err = io.Copy(dst, src)
	}
	if err == nil && as != 0 {
		err = dst.Chown(as, as)
	}
	if err == nil {
		err = dst.Chmod(mode)
	}
	if err == nil {
		err = unix.Futimes(int(dst.Fd()), []unix.Timeval{{Sec: 1}, {Sec: 1}})
	}
	return errors.Join(err, dst.Close())
}
