// Package fuse shows a flox.Store to the kernel as a read-only file system.
//
// A mount outlives the process that serves it. Mount (root) opens the device,
// mounts, and answers the kernel's INIT; every Server after that, the first
// included, takes over a running connection: it replays the INIT for itself,
// asks the kernel to send unanswered requests again, and serves. What makes
// that possible is that nothing about an inode or an open file is kept in the
// process: node ids are computed (ServerConfig.NodeTable), opens are never sent.
//
// The package must not know where bytes come from, how a store is cached, who
// is allowed to do what, or how the serving process is supervised.
package fuse
