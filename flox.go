// Package flox holds the words everybody uses: store paths, path infos,
// manifests, chunks, errors, and the few interfaces two packages share.
//
// It must not know how anything is stored, moved or mounted: standard library
// and go-cid only, no I/O, no goroutine, no logger.
package flox
