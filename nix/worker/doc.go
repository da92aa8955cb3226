// Package worker speaks Nix's worker protocol, versions 1.32 to 1.38: the one
// that nix, nix-build, nix-store and Hydra speak to a daemon's unix socket and,
// behind ssh-ng://, to nix-daemon --stdio.
//
// Server decodes requests strictly and within bounds, keeps the log stream in
// its window, applies the rules about trusted clients that are the protocol's
// own, and asks the few interfaces of Store for everything else. Client is the
// other side. The package must not know where paths come from, how they are
// kept or built, or who the people behind a connection are.
//
// The format is described by Nix 2.8 src/libstore/{worker-protocol.hh,
// daemon.cc,remote-store.cc} and Nix 2.35 src/libstore/worker-protocol.cc.
package worker
