// Package pack keeps blocks on a local disk: append-only pack files with
// checksummed frames, and a Pebble index that can be rebuilt from them.
//
// It must not know what a block means (chunk, page, manifest) nor who may have it.
package pack

import (
	"context"
	"log/slog"

	"github.com/floxctl/flox"
)

// Config of a Store. The zero value of every field but Dir means the default.
type Config struct {
	// Dir holds the packs and the index; it is created if missing. One process
	// at a time: a second gets ErrBusy.
	Dir string
	// PackSize is the size in bytes at which a pack file is closed and the next
	// begun; default 256 MiB.
	PackSize int64
	// Reserve is how many bytes of the disk stay free; default 64 MiB. Put
	// returns ErrFull before it would use them.
	Reserve int64
	// Uncompressed keeps every block as it is.
	Uncompressed bool
	// Log defaults to nothing.
	Log *slog.Logger
}

// Store is a directory of blocks. It is safe for concurrent use and is a
// flox.Blocks and a flox.BlockSink.
type Store struct{}

// Open opens or creates the store in cfg.Dir, drops the torn tail of a write
// that never ended, and brings the index up to the packs. Errors: ErrBusy,
// ErrBadInput for a wrong Config.
func Open(cfg Config) (*Store, error) { return nil, flox.ErrClosed }

// Close syncs and releases everything.
func (s *Store) Close() error { return flox.ErrClosed }

// Put appends a block, compressed where that helps, unless it is there already.
// It is durable after Sync. Errors: ErrCorrupt if data does not hash to id,
// ErrFull with nothing changed, ErrClosed.
func (s *Store) Put(ctx context.Context, id flox.CID, data []byte) error { return flox.ErrClosed }

// Sync makes everything durable that was put before the call. Concurrent calls
// share one fsync.
func (s *Store) Sync(ctx context.Context) error { return flox.ErrClosed }

// Get returns a block's plain bytes, checked against id. Errors: ErrNotFound,
// ErrCorrupt.
func (s *Store) Get(ctx context.Context, id flox.CID) ([]byte, error) { return nil, flox.ErrClosed }

// Append is Get, appending to dst, so that a caller can use memory again.
func (s *Store) Append(ctx context.Context, dst []byte, id flox.CID) ([]byte, error) {
	return nil, flox.ErrClosed
}

// Stored returns a block as it is kept, its checksum checked: one zstd frame, or
// the plain bytes if zstd is false.
func (s *Store) Stored(ctx context.Context, id flox.CID) (data []byte, zstd bool, err error) {
	return nil, false, flox.ErrClosed
}

// Has says which blocks are there, synced or not.
func (s *Store) Has(ctx context.Context, ids []flox.CID) ([]bool, error) { return nil, flox.ErrClosed }

// Size gives the plain and the stored size of a block in bytes. ErrNotFound.
func (s *Store) Size(ctx context.Context, id flox.CID) (plain, stored uint32, err error) {
	return 0, 0, flox.ErrClosed
}

// Stats counts what is in a store.
type Stats struct {
	Blocks      uint64 // in the index
	PlainBytes  uint64 // of those blocks
	StoredBytes uint64 // of those blocks, frames included
	Packs       int
	DiskBytes   uint64 // of all packs, deleted blocks included
}

// Stat counts what is in the store.
func (s *Store) Stat() Stats { return Stats{} }

// Scrub reads everything and reports every block that cannot be read back and
// every damage of the index (the zero CID), until ctx ends. It changes nothing.
func (s *Store) Scrub(ctx context.Context, report func(bad flox.CID, err error)) error {
	return flox.ErrClosed
}

// Delete forgets blocks, for example damaged ones, so that Put stores them anew.
func (s *Store) Delete(ctx context.Context, ids ...flox.CID) error { return flox.ErrClosed }

// Swept is what a Sweep did.
type Swept struct {
	Blocks uint64 // forgotten
	Bytes  int64  // given back to the disk
}

// Sweep forgets every block that is not live and that no open Session counts on,
// and rewrites packs that hold mostly such blocks.
func (s *Store) Sweep(ctx context.Context, live func(flox.CID) bool) (Swept, error) {
	return Swept{}, flox.ErrClosed
}

// Session is a flox.BlockSink whose blocks stay while it is open, also those
// that were there before. Close must be called.
type Session struct{}

// Session begins one.
func (s *Store) Session() *Session { return &Session{} }

// Put is Store.Put; a Sweep leaves the block alone until Close.
func (s *Session) Put(ctx context.Context, id flox.CID, data []byte) error { return flox.ErrClosed }

// Pin keeps blocks that are there already, and says which are.
func (s *Session) Pin(ctx context.Context, ids []flox.CID) ([]bool, error) {
	return nil, flox.ErrClosed
}

// Sync is Store.Sync.
func (s *Session) Sync(ctx context.Context) error { return flox.ErrClosed }

// Close ends the session: a Sweep may take its blocks again.
func (s *Session) Close() {}
