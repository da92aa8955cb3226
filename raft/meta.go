package raft

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"

	"github.com/floxctl/flox"
)

// checkMeta walks through the WAL's bbolt file, if there is one. Bbolt maps the
// file and believes it: damage would end the process much later.
func checkMeta(path string) (err error) {
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return guarded(func() error {
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, PreLoadFreelist: true, Timeout: time.Second})
		if err != nil {
			return err
		}
		defer db.Close()
		return db.View(func(tx *bbolt.Tx) error {
			if err := checkPages(tx); err != nil {
				return err
			}
			return walk(tx, tx.Cursor().Bucket())
		})
	})
}

// checkPages compares what each page says of its length with that of the file: bbolt
// would count to it, through up to 4,294,967,295 pages, when it frees the page. And
// the list of free pages must be on a page that is not free.
func checkPages(tx *bbolt.Tx) error {
	pages, lists := int(tx.Size())/tx.DB().Info().PageSize, 0
	for id := 0; id < pages; id++ {
		p, err := tx.Page(id)
		if err != nil {
			return err
		}
		if p.Type == "freelist" {
			lists++
		}
		if p.Type == "free" {
			continue // nobody looks into it
		}
		if p.OverflowCount >= pages-id {
			return fmt.Errorf("page %d of %d says that %d follow: %w", id, pages, p.OverflowCount, flox.ErrCorrupt)
		}
		id += p.OverflowCount
	}
	if lists == 0 {
		return fmt.Errorf("every page is free: %w", flox.ErrCorrupt)
	}
	return nil
}

// walk touches everything in a bucket, which is not on a page that may be written over.
// Tx.Check of bbolt does more, in a goroutine of its own, where a fault of the mapped
// file ends the process.
func walk(tx *bbolt.Tx, b *bbolt.Bucket) error {
	if root := int(b.Root()); root > 0 { // else it is inside its parent's page
		p, err := tx.Page(root)
		if err != nil {
			return err
		}
		if p == nil || p.Type == "free" {
			return fmt.Errorf("page %d is in use and free: %w", root, flox.ErrCorrupt)
		}
	}
	return b.ForEach(func(k, v []byte) error {
		if v == nil {
			if inner := b.Bucket(k); inner != nil {
				return walk(tx, inner)
			}
			return fmt.Errorf("key %x without a value: %w", k, flox.ErrCorrupt)
		}
		return nil
	})
}

// guarded runs f, where a panic and a fault of a mapped file are errors.
func guarded(f func() error) (err error) {
	done := make(chan struct{})
	go func() { // faults are made panics for one goroutine
		defer close(done)
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("%v: %w", r, flox.ErrCorrupt)
			}
		}()
		debug.SetPanicOnFault(true)
		err = errors.New("it gave up") // if it ends its goroutine
		err = f()
	}()
	<-done
	return err
}
