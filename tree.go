package flox

import "context"

// Blocks gives blocks (chunks of files, blocks of manifests) by name, as plain
// bytes already checked against id.
type Blocks interface {
	// Get returns the block's bytes; the caller must not change them. Errors:
	// ErrNotFound, ErrCorrupt, ErrUnreachable.
	Get(ctx context.Context, id CID) ([]byte, error)
}

// BlockSink takes blocks in. Put may be called for a block that is there
// already; data must hash to id and may be kept only until Put returns. What was
// put is durable only after Sync returns.
type BlockSink interface {
	Put(ctx context.Context, id CID, data []byte) error
	Sync(ctx context.Context) error
}

// LogsName is a directory of every mount that no listing shows. Who looks up the
// name of a derivation there finds the log of its last build: stock Nix looks for
// logs in such a directory, and asks no daemon.
const LogsName = ".build-logs"

// Store is a read-only store directory as the mount sees it.
type Store interface {
	// Lookup finds a direct child of the store directory. ErrNotFound says that
	// the name is not valid now. Forever says that the answer may be cached without
	// limit: a name that is missing can never become valid (it is no store path
	// name), one that is there is not deleted on this machine. Who is the caller.
	Lookup(ctx context.Context, name string, who Reader) (manifest CID, forever bool, err error)
	// Log finds the log of a derivation's last build, a store path that is a file.
	// Name is the derivation's, or anything else. Errors are as Lookup's.
	Log(ctx context.Context, name string) (manifest CID, err error)
	// Names lists what a reader of the directory is shown, sorted, beginning
	// behind after, at most limit names.
	Names(ctx context.Context, after string, limit int) ([]Named, error)
	// Tree opens the file tree of a manifest that Lookup or Names returned, in
	// this process or in one before it. Who is the caller, whose next calls on
	// the tree these are.
	Tree(ctx context.Context, manifest CID, who Reader) (Tree, error)
	// Usage is what statfs reports; it never waits for the network.
	Usage() Usage
}

// Named is one name of the store directory.
type Named struct {
	Name     string
	Manifest CID
	Kind     Kind // of the store path's own entry
}

// Usage is the size of the store as statfs shows it.
type Usage struct {
	TotalBytes, FreeBytes uint64
	Files                 uint64
}

// Tree is the file tree of one store path. Indices are entry numbers; an
// index out of range is ErrNotFound.
type Tree interface {
	Entry(ctx context.Context, index uint32) (Entry, error)
	// Child finds a direct child of a directory by name; ErrNotFound is final.
	Child(ctx context.Context, dir uint32, name string) (uint32, Entry, error)
	// Children calls yield with each direct child in order, from the first whose
	// index is >= from, until yield returns false.
	Children(ctx context.Context, dir, from uint32, yield func(uint32, Entry) bool) error
	// ReadAt fills p from a regular file's content at off; fewer bytes than len(p)
	// only at the end of the file. Caller describes who waits.
	ReadAt(ctx context.Context, index uint32, p []byte, off int64, who Reader) (int, error)
}

// Reader says who waits for a read or look-up, so that it can be shown, that
// nobody takes the places of others, and that mapped files of running processes
// can wait without a deadline.
type Reader struct {
	PID  uint32 // thread id of the caller as the kernel gave it; 0 = the kernel itself
	UID  uint32 // whose it is, as the kernel gave it
	Node uint64 // inode number the kernel asked for
}
