package versionlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/floxctl/flox"
)

// open opens a database as its owners do.
func open(t *testing.T, dir string) *pebble.DB {
	t.Helper()
	if err := Check(vfs.Default, dir); err != nil {
		t.Fatal(err)
	}
	db, err := pebble.Open(dir, &pebble.Options{FS: FS(vfs.Default), Logger: quiet{}})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

type quiet struct{ pebble.Logger }

func (quiet) Infof(string, ...any)  {}
func (quiet) Errorf(string, ...any) {}

// database makes one whose keys were flushed one after another, in so many runs.
func database(t *testing.T, runs int) (dir, manifest string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "db")
	for run := range runs {
		db := open(t, dir)
		for i := range 3 {
			if err := errors.Join(db.Set(fmt.Appendf(nil, "%d.%d", run, i), []byte("value"), pebble.Sync), db.Flush()); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(db.Set([]byte("last"), fmt.Append(nil, run), pebble.Sync), db.Close()); err != nil {
			t.Fatal(err)
		}
	}
	at, err := pebble.Peek(dir, vfs.Default)
	if err != nil {
		t.Fatal(err)
	}
	return dir, at.ManifestFilename
}

func write(t *testing.T, file string, b []byte) {
	t.Helper()
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Wherever a MANIFEST is cut or a bit of it is another one, that is found; Pebble by itself
// opens what is left of it as if it were all.
func TestDamage(t *testing.T) {
	dir, name := database(t, 2)
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for at := range whole {
		write(t, name, whole[:at])
		if err := Check(vfs.Default, dir); !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("cut at %d of %d: %v", at, len(whole), err)
		}
		bad := append([]byte(nil), whole...)
		bad[at] ^= 1 << (at % 8)
		write(t, name, bad)
		if err := Check(vfs.Default, dir); !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("a bit at %d: %v", at, err)
		}
	}
	write(t, name, append(append([]byte(nil), whole...), "what was not synced"...))
	if err := Check(vfs.Default, dir); err != nil {
		t.Errorf("it is longer than what was synced: %v", err)
	}
}

// What was noted is in two places, of which a power cut may take the one that was written.
func TestDamagedNote(t *testing.T) {
	dir, name := database(t, 1)
	whole, err := os.ReadFile(name + suffix)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int{3, slotAt + 3} {
		bad := append([]byte(nil), whole...)
		bad[at] ^= 1
		write(t, name+suffix, bad)
		if err := Check(vfs.Default, dir); err != nil {
			t.Errorf("one is left: %v", err)
		}
	}
	for what, b := range map[string][]byte{"empty": nil, "text": []byte("hello"), "zeros": make([]byte, slotAt+slotSize)} {
		write(t, name+suffix, b)
		if err := Check(vfs.Default, dir); !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A database of a program that noted nothing is taken as it is, and noted from then on.
// What belongs to a MANIFEST that is no more goes with it.
func TestOlderDatabase(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "db")
	if err := Check(vfs.Default, dir); err != nil {
		t.Fatalf("no directory: %v", err)
	}
	db, err := pebble.Open(dir, &pebble.Options{FS: vfs.Default, Logger: quiet{}})
	if err := errors.Join(err, db.Set([]byte("k"), nil, pebble.Sync), db.Close()); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		if err := open(t, dir).Close(); err != nil {
			t.Fatal(err)
		}
	}
	manifests, err := filepath.Glob(filepath.Join(dir, "MANIFEST-*"))
	if err != nil || len(manifests) > 4 {
		t.Errorf("there is %q, %v", manifests, err)
	}
	at, err := pebble.Peek(dir, vfs.Default)
	if err != nil {
		t.Fatal(err)
	}
	write(t, at.ManifestFilename, nil)
	if err := Check(vfs.Default, dir); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("it was not noted: %v", err)
	}
}
