package storehouse

import (
	"context"
	"io"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
)

// Server is one storehouse.
type Server struct{ cfg Config }

// New checks cfg, opens or creates the state under StateDir, and binds the
// listening sockets. A Server that is not run must be closed.
func New(cfg Config) (*Server, error) { return &Server{cfg: cfg}, nil }

// Run serves until ctx ends and then closes the server. It returns nil when
// ctx ended, and an error when the storehouse cannot go on.
func (s *Server) Run(ctx context.Context) error { return nil }

// Close frees everything of a Server that was not run. It may be called twice.
func (s *Server) Close() error { return nil }

// Ready waits until Run has got as far as answering reads and publishes.
func (s *Server) Ready(ctx context.Context) error { return nil }

// Config is the configuration in use, defaults filled in.
func (s *Server) Config() Config { return s.cfg }

// Invite is what machines need to join, as written to invite.json.
func (s *Server) Invite() *api.Invite { return nil }

// PublicKey is the key of our Nix signatures, "name:base64".
func (s *Server) PublicKey() string { return "" }

// CheckToken gives the publisher a token belongs to; ErrDenied for any other.
func (s *Server) CheckToken(token string) (publisher string, err error) { return "", nil }

// Info gives the facts of the valid path with a hash part (32 characters);
// ErrNotFound when there is none.
func (s *Server) Info(ctx context.Context, hashPart string) (*flox.PathInfo, error) {
	return nil, nil
}

// Publish takes in one store path: its NAR is chunked, checked against info,
// signed and made valid, durably, before Publish returns. wasValid says that
// the path was valid before with the same NAR; the info returned is the one
// in force. ErrBadInput when NAR and info differ or a reference is not valid.
func (s *Server) Publish(ctx context.Context, info *flox.PathInfo, nar io.Reader, publisher string) (valid *flox.PathInfo, wasValid bool, err error) {
	return nil, false, nil
}

// Stage takes in a NAR whose path info comes later. key is the caller's name
// for it (for HTTP the URL it was put to), unique per publisher; the same key
// again replaces what was staged. The record survives a restart and is
// forgotten after StageTTL. ErrFull when too much is staged.
func (s *Server) Stage(ctx context.Context, publisher, key string, nar io.Reader) (*Staged, error) {
	return nil, nil
}

// Staged gives what a publisher staged under key; ErrNotFound when nothing is.
func (s *Server) Staged(publisher, key string) (*Staged, error) { return nil, nil }

// Commit makes a path valid whose NAR was staged under key; as Publish.
func (s *Server) Commit(ctx context.Context, key string, info *flox.PathInfo, publisher string) (valid *flox.PathInfo, wasValid bool, err error) {
	return nil, false, nil
}

// Blocks reads the blocks held here.
func (s *Server) Blocks() flox.Blocks { return nil }
