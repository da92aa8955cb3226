package storehouse

import (
	"context"
	"errors"
	"fmt"

	"github.com/floxctl/flox"
)

// maxToMend is how many blocks wait to be put right; a scrub finds what did not fit.
const maxToMend = 1024

// mender puts blocks right that a reader found damaged: from another server.
type mender struct {
	*Server
	queue chan flox.CID
}

func newMender(s *Server) *mender { return &mender{s, make(chan flox.CID, maxToMend)} }

// note has a block put right. It never waits.
func (m *mender) note(id flox.CID) {
	select {
	case m.queue <- id:
	default:
	}
}

// run works until ctx ends.
func (m *mender) run(ctx context.Context) error {
	for {
		select {
		case id := <-m.queue:
			if _, err := m.packs.Get(ctx, id); !errors.Is(err, flox.ErrCorrupt) {
				continue // done already, or it went
			}
			if _, err := m.anew(ctx, id); err != nil && ctx.Err() == nil {
				m.cfg.Log.Error("a block rotted and no other server has it", "block", id.String(), "error", err)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// anew gets a block that is damaged or lacking here from another server and keeps it.
func (s *Server) anew(ctx context.Context, id flox.CID) ([]byte, error) {
	data, err := s.fromOthers(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := s.packs.Replace(ctx, id, data); err != nil {
		s.cfg.Log.Warn("a block of another server is not kept", "block", id.String(), "error", err)
	} else {
		s.cfg.Log.Warn("a block that was damaged or lacking here is had from another server", "block", id.String())
	}
	return data, nil
}

// readable reads blocks for a door of this server: what is damaged or lacking here
// another server gives.
func (s *Server) readable(here flox.Blocks) flox.Blocks { return &readable{s, here} }

type readable struct {
	s    *Server
	here flox.Blocks
}

// Get is flox.Blocks.
func (r *readable) Get(ctx context.Context, id flox.CID) ([]byte, error) {
	b, err := r.here.Get(ctx, id)
	if err == nil {
		return b, nil
	}
	return r.s.instead(ctx, id, err)
}

// Append is Get, appending to dst, so that a caller can use memory again.
func (r *readable) Append(ctx context.Context, dst []byte, id flox.CID) ([]byte, error) {
	a, ok := r.here.(interface {
		Append(ctx context.Context, dst []byte, id flox.CID) ([]byte, error)
	})
	if ok {
		b, err := a.Append(ctx, dst, id)
		if err == nil {
			return b, nil
		}
		b, err = r.s.instead(ctx, id, err)
		return append(dst, b...), err
	}
	b, err := r.Get(ctx, id)
	return append(dst, b...), err
}

// stored is pack.Store.Stored for such a door.
func (s *Server) stored(ctx context.Context, id flox.CID) (data []byte, zstd bool, err error) {
	if data, zstd, err = s.packs.Stored(ctx, id); err == nil {
		return data, zstd, nil
	}
	data, err = s.instead(ctx, id, err)
	return data, false, err
}

// instead gives a block from another server where reading it here failed so.
func (s *Server) instead(ctx context.Context, id flox.CID, failed error) ([]byte, error) {
	if !errors.Is(failed, flox.ErrCorrupt) && !errors.Is(failed, flox.ErrNotFound) {
		return nil, failed
	}
	if others, _, _ := s.servers.others(); len(others) == 0 {
		return nil, failed
	}
	data, err := s.anew(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("%w; and %w", failed, err)
	}
	return data, nil
}
