package agent

import (
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"

	flox "github.com/floxctl/flox"
)

const (
	// maxRan is how many store paths are remembered of which something ran.
	maxRan = 256
	// maxRanFiles is how many files of one of them.
	maxRanFiles = 1024
)

// ran remembers what ran here last, newest first: programs, and what was mapped.
// It is what is completed in the background, and survives a restart.
type ran struct {
	file string
	news chan struct{} // holds a token when there is something new

	mu      sync.Mutex
	paths   []ranPath
	changes uint64 // grows with every file that is new
	unsaved bool
}

// ranPath is a store path of which something ran.
type ranPath struct {
	Path    flox.StorePath `json:"path"`
	Program bool           `json:"program"` // a program of it ran, not only a library
	Files   []uint32       `json:"files"`   // entries of its manifest that ran or were mapped, sorted
}

// isCode reports whether an entry is a program, or a library by its name.
func isCode(e flox.Entry) bool { return e.Executable || strings.Contains(e.Name, ".so") }

// isProgram leaves out libraries, which are often executable.
func isProgram(e flox.Entry) bool { return e.Executable && !strings.Contains(e.Name, ".so") }

// loadRan reads the list; a missing or damaged file is an empty list.
func loadRan(file string) *ran {
	r := &ran{file: file, news: make(chan struct{}, 1)}
	var list []ranPath
	b, err := os.ReadFile(file)
	if err != nil || json.Unmarshal(b, &list) != nil {
		return r
	}
	for _, p := range list[:min(len(list), maxRan)] {
		if _, err := flox.ParseStorePath(string(p.Path)); err != nil {
			continue
		}
		slices.Sort(p.Files)
		p.Files = slices.Compact(p.Files)
		p.Files = p.Files[:min(len(p.Files), maxRanFiles)]
		r.paths = append(r.paths, p)
	}
	return r
}

// saw notes that an entry of a path runs or is mapped. It is called for reads, so
// what is known already costs a look only.
func (r *ran) saw(p flox.StorePath, index uint32, program bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := slices.IndexFunc(r.paths, func(have ranPath) bool { return have.Path == p })
	switch {
	case at < 0:
		r.paths = slices.Insert(r.paths[:min(len(r.paths), maxRan-1)], 0, ranPath{Path: p})
		at = 0
	case at >= maxRan/4: // the order among the newest is not kept up
		one := r.paths[at]
		copy(r.paths[1:at+1], r.paths[:at])
		r.paths[0], at = one, 0
		r.unsaved = true
	}
	one := &r.paths[at]
	k, known := slices.BinarySearch(one.Files, index)
	if !known && len(one.Files) < maxRanFiles {
		one.Files = slices.Insert(slices.Clone(one.Files), k, index) // readers hold the old one
	} else if one.Program || !program {
		return
	}
	one.Program = one.Program || program
	r.changes++
	r.unsaved = true
	select {
	case r.news <- struct{}{}:
	default:
	}
}

// list gives what ran, newest first, and the number of changes so far.
func (r *ran) list() ([]ranPath, uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.paths), r.changes
}

// changed is the number of changes so far.
func (r *ran) changed() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changes
}

// forget takes a path off the list: it is valid no longer.
func (r *ran) forget(p flox.StorePath) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.paths = slices.DeleteFunc(r.paths, func(have ranPath) bool { return have.Path == p })
	r.unsaved = true
}

// save writes the list if it changed.
func (r *ran) save() error {
	r.mu.Lock()
	list, unsaved := slices.Clone(r.paths), r.unsaved
	r.unsaved = false
	r.mu.Unlock()
	if !unsaved {
		return nil
	}
	b, err := json.Marshal(list)
	if err == nil {
		err = replaceFile(r.file, b, false)
	}
	if err != nil {
		r.mu.Lock()
		r.unsaved = true
		r.mu.Unlock()
	}
	return err
}

// replaceFile writes a small file of the state: after a crash it is the old one
// or the new one. If durable, it is the new one once replaceFile has returned.
func replaceFile(name string, b []byte, durable bool) (err error) {
	tmp := name + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && durable {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if !durable {
		return nil
	}
	return syncDirOf(name)
}
