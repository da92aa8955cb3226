package indexdb

import (
	"bytes"
	"context"
	"io"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2"
)

// early is the database as it was found, opened for reading. That writes nothing, so
// it does not wait for the disk to write. Nothing is written at all until it
// gave way to the one that can be, so it is never behind.
type early struct {
	db     *pebble.DB
	tables map[string]bool // files it may still open

	mu    sync.Mutex
	users int
	ended bool
	over  chan struct{} // closed once it is closed
	err   error         // of that
}

// enter lets the caller read it until leave; false: it gave way.
func (e *early) enter() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ended {
		return false
	}
	e.users++
	return true
}

func (e *early) leave() {
	e.mu.Lock()
	e.users--
	last := e.ended && e.users == 0
	e.mu.Unlock()
	if last {
		e.close()
	}
}

// end makes it give way. The last who reads it closes it.
func (e *early) end() {
	e.mu.Lock()
	last := !e.ended && e.users == 0
	e.ended = true
	e.mu.Unlock()
	if last {
		e.close()
	}
}

func (e *early) close() {
	e.err = e.db.Close()
	close(e.over)
}

// newEarly opens what is there, nil if that is nothing or cannot be read.
func (d *DB) newEarly() *early {
	db, err := d.open(true)
	if err != nil {
		return nil // it is said of the one that is written
	}
	// Listed with the lock held: nobody else makes tables or removes them any more.
	names, err := d.cfg.FS.List(d.cfg.Dir)
	if err != nil {
		_ = db.Close()
		return nil
	}
	e := &early{db: db, tables: make(map[string]bool), over: make(chan struct{})}
	for _, name := range names {
		e.tables[name] = strings.HasSuffix(name, ".sst") || strings.HasSuffix(name, ".blob")
	}
	return e
}

// writable says that the database is read where it is written.
func (d *DB) writable() bool {
	select {
	case <-d.ready:
		return d.db != nil
	default:
		return false
	}
}

// Get is Pebble's.
func (d *DB) Get(key []byte) ([]byte, io.Closer, error) {
	if !d.writable() && d.early.enter() {
		defer d.early.leave()
		v, done, err := d.early.db.Get(key)
		if err != nil {
			return nil, nil, err
		}
		v = bytes.Clone(v)
		return v, unlocked{}, done.Close()
	}
	return d.db.Get(key)
}

// Iterator is Pebble's.
type Iterator struct {
	*pebble.Iterator
	leave func()
}

// Close is Pebble's.
func (i *Iterator) Close() error {
	err := i.Iterator.Close()
	i.leave()
	return err
}

// NewIter is Pebble's.
func (d *DB) NewIter(ctx context.Context, o *pebble.IterOptions) (*Iterator, error) {
	var db *pebble.DB
	leave := func() {}
	if !d.writable() && d.early.enter() {
		db, leave = d.early.db, d.early.leave
	} else {
		db = d.db
	}
	it, err := db.NewIterWithContext(ctx, o)
	if err != nil {
		leave()
		return nil, err
	}
	return &Iterator{it, leave}, nil
}
