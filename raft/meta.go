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
			return tx.ForEach(func(_ []byte, b *bbolt.Bucket) error { return walk(b) })
		})
	})
}

// walk touches everything in a bucket.
func walk(b *bbolt.Bucket) error {
	return b.ForEach(func(k, v []byte) error {
		if v == nil {
			if inner := b.Bucket(k); inner != nil {
				return walk(inner)
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
