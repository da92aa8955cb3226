package agent

import (
	"slices"
	"time"

	flox "github.com/floxctl/flox"
)

// ranList is a bounded list of store paths, newest first.
type ranList struct {
	most   int
	newest []*ranEntry
	by     map[flox.StorePath]*ranEntry
	moves  uint64 // how often something came to the front
}

// ranEntry is one of them.
type ranEntry struct {
	ranPath
	at   uint64    // the move with which it came to the front
	seen time.Time // last; zero = by a process before this one
}

func newRanList(most int) ranList {
	return ranList{most: most, by: make(map[flox.StorePath]*ranEntry)}
}

// find gives the entry of a path, and notes that it was seen. The order among the
// newest is not kept up: after fewer moves than that it is still one of them.
func (l *ranList) find(p flox.StorePath, now time.Time) (e *ranEntry, moved bool) {
	e = l.by[p]
	if e == nil {
		return nil, false
	}
	e.seen = now
	if l.moves-e.at < uint64(l.most/4) { //nolint:gosec // a positive constant
		return e, false
	}
	at := slices.Index(l.newest, e)
	copy(l.newest[1:at+1], l.newest[:at])
	l.newest[0] = e
	l.moves++
	e.at = l.moves
	return e, true
}

// makeRoom makes room for one more, for which what was seen within stay does not
// go: false, there is none.
func (l *ranList) makeRoom(now time.Time, stay time.Duration) bool {
	if len(l.newest) < l.most {
		return true
	}
	oldest := l.newest[len(l.newest)-1]
	if now.Sub(oldest.seen) < stay {
		return false
	}
	l.remove(oldest.Path)
	return true
}

// add puts a new entry in front; makeRoom has made room for it.
func (l *ranList) add(e *ranEntry) {
	l.newest = slices.Insert(l.newest, 0, e)
	l.by[e.Path] = e
	l.moves++
	e.at = l.moves
}

func (l *ranList) remove(p flox.StorePath) {
	if l.by[p] == nil {
		return
	}
	delete(l.by, p)
	l.newest = slices.DeleteFunc(l.newest, func(e *ranEntry) bool { return e.Path == p })
}
