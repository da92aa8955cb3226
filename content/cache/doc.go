// Package cache keeps the plain content an endpoint has fetched on its disk, so
// that a cached read is one pread and peers are served from the same bytes.
//
// Content is named by file id (the CID of a whole file's bytes), never by path:
// equal files lie here once. What is here of a file is a list of byte extents.
// An extent is trusted only if the system session that wrote it still lives (the
// page cache survives kill -9 of the process) or if a sync mark covers it; after
// a power cut it is Unverified and must be hashed once before a reader sees it.
// So neither a lost write nor a hole is ever read as content.
//
// It must not know where content comes from, what a manifest looks like, how it
// is mounted or who the peers are: the agent puts verified bytes in and asks for
// them back. See DESIGN.md beside this file for the layout on disk and the
// order of writes.
package cache
