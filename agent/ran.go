package agent

import (
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	flox "github.com/floxctl/flox"
)

const (
	// maxRan is how many store paths are remembered of which a program ran.
	maxRan = 256
	// maxRanOthers is how many of which only libraries or data files were used. They
	// are many more, and programs never make room for them.
	maxRanOthers = 4096
	// maxRanFiles is how many files of one of them.
	maxRanFiles = 1024
	// mappedStay is how long what was seen does not make room for what is mapped:
	// what is mapped is seen again and again, and would push out what is as well.
	mappedStay = 10 * time.Minute
	// saveOrderEvery is how often the list is written when only its order changed.
	saveOrderEvery = 10 * time.Minute
)

// ran remembers what ran here last: programs, and what else was mapped. It is
// what is completed in the background, and survives a restart.
type ran struct {
	file string
	news chan struct{} // holds a token when there is something new

	mu       sync.Mutex
	programs ranList // paths of which a program ran
	others   ranList
	changes  uint64 // grows with every file that is new
	unsaved  bool
	moved    bool      // the order is not what was saved
	saved    time.Time // the last time, or loaded
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
	r := &ran{
		file: file, news: make(chan struct{}, 1), saved: time.Now(),
		programs: newRanList(maxRan), others: newRanList(maxRanOthers),
	}
	var list []ranPath
	b, err := os.ReadFile(file)
	if err != nil || json.Unmarshal(b, &list) != nil {
		return r
	}
	for _, p := range slices.Backward(list) { // the newest is first, and comes last
		if _, err := flox.ParseStorePath(string(p.Path)); err != nil || r.programs.by[p.Path] != nil || r.others.by[p.Path] != nil {
			continue
		}
		slices.Sort(p.Files)
		p.Files = slices.Compact(p.Files)
		p.Files = p.Files[:min(len(p.Files), maxRanFiles)]
		l := r.listOf(p.Program)
		l.makeRoom(time.Time{}, 0)
		l.add(&ranEntry{ranPath: p})
	}
	return r
}

func (r *ran) listOf(program bool) *ranList {
	if program {
		return &r.programs
	}
	return &r.others
}

// saw notes that an entry of a path runs or is used as a library. It is called for
// reads, so what is known already costs a look only.
func (r *ran) saw(p flox.StorePath, index uint32, program bool) { r.note(p, index, program, 0) }

// mapped notes that an entry of a path was found mapped. Where there is no room
// left by what was seen lately, it is left out.
func (r *ran) mapped(p flox.StorePath, index uint32, program bool) {
	r.note(p, index, program, mappedStay)
}

func (r *ran) note(p flox.StorePath, index uint32, program bool, stay time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	one, came := r.entry(p, program, stay)
	if one == nil {
		return
	}
	k, known := slices.BinarySearch(one.Files, index)
	switch {
	case !known && len(one.Files) < maxRanFiles:
		one.Files = slices.Insert(slices.Clone(one.Files), k, index) // readers hold the old one
	case !came:
		return
	}
	r.changes++
	r.unsaved = true
	select {
	case r.news <- struct{}{}:
	default:
	}
}

// entry gives the entry of a path, nil if there is no room for it, and whether it
// is new in its list. r.mu is held.
func (r *ran) entry(p flox.StorePath, program bool, stay time.Duration) (one *ranEntry, came bool) {
	now := time.Now()
	for _, l := range []*ranList{&r.programs, &r.others} {
		e, moved := l.find(p, now)
		r.moved = r.moved || moved
		if e != nil {
			one = e
			break
		}
	}
	if one != nil && (one.Program || !program) {
		return one, false
	}
	l := r.listOf(program)
	if !l.makeRoom(now, stay) {
		return one, false // a library it stays for now, or it is left out
	}
	if one == nil {
		one = &ranEntry{ranPath: ranPath{Path: p}}
	} else {
		r.others.remove(p)
	}
	one.Program, one.seen = program, now
	l.add(one)
	return one, true
}

// list gives what ran, programs first and each newest first, and the number of
// changes so far.
func (r *ran) list() ([]ranPath, uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.both(), r.changes
}

// both gives the two lists as one, r.mu being held.
func (r *ran) both() []ranPath {
	out := make([]ranPath, 0, len(r.programs.newest)+len(r.others.newest))
	for _, l := range []*ranList{&r.programs, &r.others} {
		for _, e := range l.newest {
			out = append(out, e.ranPath)
		}
	}
	return out
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
	r.programs.remove(p)
	r.others.remove(p)
	r.unsaved = true
}

// save writes the list if it changed; for its order alone not often.
func (r *ran) save() error {
	r.mu.Lock()
	due := r.unsaved || r.moved && time.Since(r.saved) >= saveOrderEvery
	if !due {
		r.mu.Unlock()
		return nil
	}
	list := r.both()
	r.unsaved, r.moved, r.saved = false, false, time.Now()
	r.mu.Unlock()
	b, err := json.Marshal(list)
	if err == nil {
		err = replaceFile(r.file, b, 0o600, false)
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
func replaceFile(name string, b []byte, mode os.FileMode, durable bool) (err error) {
	tmp := name + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Chmod(mode) // whatever the umask is
	}
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
