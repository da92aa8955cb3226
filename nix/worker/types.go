package worker

import (
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Info is what is known of a valid path. Of PathInfo the fields Manifest and
// ManifestSignatures never come from or go to a peer.
type Info struct {
	flox.PathInfo
	Ultimate bool // built by the store that says so, not copied to it
}

// DerivedPath is what a client wants built or fetched: the path itself, or
// outputs of the derivation it is.
type DerivedPath struct {
	Path    flox.StorePath
	Outputs []string // sorted names; none and not All: the path itself
	All     bool     // every output
}

// IsOpaque reports whether the path itself is wanted.
func (d DerivedPath) IsOpaque() bool { return !d.All && len(d.Outputs) == 0 }

func (d DerivedPath) text(dir flox.StoreDir) string {
	switch {
	case d.All:
		return dir.Join(d.Path) + "!*"
	case len(d.Outputs) > 0:
		return dir.Join(d.Path) + "!" + strings.Join(d.Outputs, ",")
	}
	return dir.Join(d.Path)
}

// Substitutable is a path that can be fetched from somewhere.
type Substitutable struct {
	Path         flox.StorePath
	Deriver      flox.StorePath
	References   []flox.StorePath
	DownloadSize uint64 // bytes, 0 = unknown
	NarSize      uint64 // bytes, 0 = unknown
}

// Missing is what stands between a client and the paths it wants.
type Missing struct {
	Build        []flox.StorePath // derivations
	Substitute   []flox.StorePath
	Unknown      []flox.StorePath // nobody can make or fetch them
	DownloadSize uint64           // bytes
	NarSize      uint64           // bytes
}

// BuildMode says what a build is for.
type BuildMode uint64

// The modes of Nix 2.8 src/libstore/store-api.hh.
const (
	BuildNormal BuildMode = 0
	BuildRepair BuildMode = 1
	BuildCheck  BuildMode = 2 // build again and compare
)

// BuildStatus is how a build ended.
type BuildStatus uint64

// The states of Nix 2.8 src/libstore/build-result.hh.
const (
	Built                  BuildStatus = 0
	Substituted            BuildStatus = 1
	AlreadyValid           BuildStatus = 2
	PermanentFailure       BuildStatus = 3
	InputRejected          BuildStatus = 4
	OutputRejected         BuildStatus = 5
	TransientFailure       BuildStatus = 6
	CachedFailure          BuildStatus = 7
	TimedOut               BuildStatus = 8
	MiscFailure            BuildStatus = 9
	DependencyFailed       BuildStatus = 10
	LogLimitExceeded       BuildStatus = 11
	NotDeterministic       BuildStatus = 12
	ResolvesToAlreadyValid BuildStatus = 13
	NoSubstituters         BuildStatus = 14
)

// Succeeded reports whether the outputs are valid.
func (s BuildStatus) Succeeded() bool {
	return s == Built || s == Substituted || s == AlreadyValid || s == ResolvesToAlreadyValid
}

// BuildResult is how one derivation fared.
type BuildResult struct {
	Status           BuildStatus
	Error            string // "" if it succeeded
	TimesBuilt       uint64
	NonDeterministic bool
	Start, Stop      time.Time      // zero if nothing was built
	CPUUser          *time.Duration // nil = unknown
	CPUSystem        *time.Duration // nil = unknown
	// Outputs are needed for every kind of derivation: nix build takes the
	// output paths from here.
	Outputs []nix.Realisation
}

// TargetResult is how one of the things a client wanted fared.
type TargetResult struct {
	Target DerivedPath
	BuildResult
}

// Root is a garbage collector root.
type Root struct {
	Link   string // the symlink, "/proc/…" or "{temp:PID}"
	Target flox.StorePath
}

// GCAction says what a collection does.
type GCAction uint64

// The actions of Nix 2.8 src/libstore/gc-store.hh.
const (
	GCReturnLive     GCAction = 0
	GCReturnDead     GCAction = 1
	GCDeleteDead     GCAction = 2
	GCDeleteSpecific GCAction = 3
)

// GCOptions is a client's request to collect garbage.
type GCOptions struct {
	Action   GCAction
	Paths    []flox.StorePath // of GCDeleteSpecific
	MaxFreed uint64           // bytes to free at most, 2^64-1 = all
}

// GCResult is what a collection did.
type GCResult struct {
	Paths []string // absolute, that are live, dead or deleted
	Freed uint64   // bytes
}
