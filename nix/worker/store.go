package worker

import (
	"context"
	"io"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Store answers the operations of one connection. Every field but Release has
// to be set. A path that a method tells valid must be readable in the store
// directory before it returns: over a unix socket the client opens files
// itself. Errors become what the client reads, see Error; the context ends
// when the client hangs up. Operations of one connection come one by one.
type Store struct {
	Paths        Paths
	Files        Files
	Substitutes  Substitutes
	Derivations  Derivations
	Realisations Realisations
	Adder        Adder
	Builder      Builder
	Roots        Roots
	Collector    Collector
	Release      func() // the connection is over; drops its temporary roots
	_            struct{}
}

// Paths are the facts about valid paths.
type Paths interface {
	// Valid gives those of paths that are valid; with substitute it fetches what
	// can be fetched before.
	Valid(ctx context.Context, paths []flox.StorePath, substitute bool) ([]flox.StorePath, error)
	// Info is what is known of a path; ErrNotFound if it is not valid.
	Info(ctx context.Context, path flox.StorePath) (*Info, error)
	// All are all valid paths.
	All(ctx context.Context) ([]flox.StorePath, error)
	// ByHashPart is the valid path with that hash part; "" if there is none.
	ByHashPart(ctx context.Context, hash string) (flox.StorePath, error)
	// Referrers are the valid paths that refer to path.
	Referrers(ctx context.Context, path flox.StorePath) ([]flox.StorePath, error)
}

// Files are the contents of valid paths.
type Files interface {
	// Nar writes the NAR of a path; ErrNotFound if it is not valid.
	Nar(ctx context.Context, path flox.StorePath, w io.Writer) error
	// AddLog keeps the build log of a derivation.
	AddLog(ctx context.Context, drv flox.StorePath, log io.Reader) error
}

// Substitutes are paths that can be had from elsewhere.
type Substitutes interface {
	// Substitutable gives those of paths that can be fetched, each with its
	// content address if the client knows one, else "".
	Substitutable(ctx context.Context, paths map[flox.StorePath]string) ([]Substitutable, error)
	// Ensure makes a path valid if it can be fetched; else CannotMake.
	Ensure(ctx context.Context, path flox.StorePath) error
}

// Derivations are what the .drv files say.
type Derivations interface {
	// Outputs are the outputs by name, "" where the path is not known yet;
	// ErrNotFound if drv is not valid.
	Outputs(ctx context.Context, drv flox.StorePath) (map[string]flox.StorePath, error)
	// Derivers are the valid derivations that have path as an output.
	Derivers(ctx context.Context, path flox.StorePath) ([]flox.StorePath, error)
}

// Realisations tell which paths content-addressed outputs became.
type Realisations interface {
	// Realisation is ErrNotFound if nobody built id.
	Realisation(ctx context.Context, id nix.RealisationID) (*nix.Realisation, error)
	// AddRealisation keeps what a client says.
	AddRealisation(ctx context.Context, r nix.Realisation) error
}

// AddOptions are what a client asks of an addition. NoCheckSigs is only ever
// set for trusted clients.
type AddOptions struct {
	Repair      bool
	NoCheckSigs bool
}

// Content is a content-addressed object a client adds.
type Content struct {
	Name       string
	Method     nix.CAMethod
	Algo       nix.HashAlgo
	References []flox.StorePath
	Repair     bool
}

// Incoming are paths a client sends, in the order of their references.
type Incoming interface {
	// Next gives the next path and its NAR, which is good until the next call
	// and need not be read to its end. io.EOF comes behind the last.
	Next() (*Info, io.Reader, error)
}

// Adder makes paths valid.
type Adder interface {
	// AddPaths adds paths as they are described; every NAR has to be checked
	// against NarHash, NarSize and CA.
	AddPaths(ctx context.Context, paths Incoming, o AddOptions) error
	// AddContent adds data, a NAR if the method is nix.CANar and else a file's
	// bytes, under the path it leads to.
	AddContent(ctx context.Context, c Content, data io.Reader) (*Info, error)
	// AddSignatures keeps signatures of a valid path.
	AddSignatures(ctx context.Context, path flox.StorePath, sigs []string) error
}

// Builder makes outputs.
type Builder interface {
	// Build makes every target valid. What failed to build is told by results,
	// one for each target in its order; an error is for what could not be tried.
	Build(ctx context.Context, targets []DerivedPath, mode BuildMode) ([]TargetResult, error)
	// BuildDerivation builds drv, which has no Inputs and whose sources are
	// valid, under the name of path.
	BuildDerivation(ctx context.Context, path flox.StorePath, drv *nix.Derivation, mode BuildMode) (*BuildResult, error)
	// Missing tells what Build would have to do.
	Missing(ctx context.Context, targets []DerivedPath) (*Missing, error)
}

// Roots keep paths from the garbage collector.
type Roots interface {
	// AddTemp keeps a path, valid or not, while the connection lasts.
	AddTemp(ctx context.Context, path flox.StorePath) error
	// AddIndirect keeps what the symlink link, on the client's machine, points to.
	AddIndirect(ctx context.Context, link string) error
	// AddPermanent makes the symlink link to path and keeps it.
	AddPermanent(ctx context.Context, path flox.StorePath, link string) error
	// Find gives all roots; censored, those of processes and connections have
	// the link "{censored}".
	Find(ctx context.Context, censored bool) ([]Root, error)
}

// Collector looks after what is there.
type Collector interface {
	// Collect tells or deletes what no root keeps.
	Collect(ctx context.Context, o GCOptions) (*GCResult, error)
	// Verify reports whether something is wrong and was not repaired.
	Verify(ctx context.Context, contents, repair bool) (bool, error)
	// Optimise makes equal files share their space.
	Optimise(ctx context.Context) error
}
