package storehouse

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

// askStaged is how long another server has to say whether something was put to it.
const askStaged = 5 * time.Second

// stagedElsewhere brings here what a publisher put to another server under key: where
// several servers have one name, and after a fail-over, a NAR and its path info reach
// two of them. missing is what to say when nobody has it.
func (s *Server) stagedElsewhere(ctx context.Context, publisher, key string, missing error) (*pending, error) {
	others, _, _ := s.servers.others()
	type answer struct {
		of p2p.PeerID
		st *Staged
	}
	ask, cancel := context.WithTimeout(ctx, askStaged)
	defer cancel()
	answers := make(chan answer, len(others))
	for _, of := range others {
		go func() {
			st, err := s.askStaged(ask, of, publisher, key)
			if err != nil && !errors.Is(err, flox.ErrNotFound) && ask.Err() == nil {
				s.cfg.Log.Warn("a server does not say what was put to it", "server", string(of), "error", err)
			}
			answers <- answer{of, st}
		}()
	}
	for range others {
		if a := <-answers; a.st != nil {
			return s.bringStaged(ctx, *a.st, a.of)
		}
	}
	return nil, missing
}

func (s *Server) askStaged(ctx context.Context, of p2p.PeerID, publisher, key string) (*Staged, error) {
	resp, err := s.servers.client(of).Staged(ctx, connect.NewRequest(&floxv1.StagedRequest{Publisher: publisher, Key: key}))
	if err != nil {
		return nil, api.FromConnect(err)
	}
	st := &Staged{Key: key, Publisher: publisher, At: time.Now(), NarSize: resp.Msg.GetNarSize()}
	if len(resp.Msg.GetManifest()) != len(st.Manifest) || len(resp.Msg.GetNarHash()) != len(st.NarHash) {
		return nil, fmt.Errorf("what is staged: %d and %d bytes: %w", len(resp.Msg.GetManifest()), len(resp.Msg.GetNarHash()), flox.ErrCorrupt)
	}
	copy(st.Manifest[:], resp.Msg.GetManifest())
	copy(st.NarHash[:], resp.Msg.GetNarHash())
	return st, nil
}

// bringStaged has the blocks of what was put to another server here, and a record of it.
func (s *Server) bringStaged(ctx context.Context, st Staged, of p2p.PeerID) (*pending, error) {
	if err := s.staging.room(st.Publisher, st.Key); err != nil {
		return nil, fmt.Errorf("stage %s: %w", st.Key, err)
	}
	session := s.packs.Session()
	b := &bringing{catchUp: s.catchUp, session: session}
	err := b.all(ctx, st.Manifest)
	if err == nil && b.missing != (lack{}) {
		err = fmt.Errorf("%d blocks were not to be had: %w", b.missing.blocks, flox.ErrUnreachable)
	}
	if err == nil {
		err = s.staging.put(st, session)
	}
	if err != nil {
		session.Close()
		return nil, fmt.Errorf("%s was put to server %s: %w", st.Key, of, err)
	}
	return s.staging.get(st.Publisher, st.Key)
}

// Staged is floxv1connect.ServersHandler.
func (h *houses) Staged(_ context.Context, req *connect.Request[floxv1.StagedRequest]) (*connect.Response[floxv1.StagedResponse], error) {
	err := h.caller(req.Peer().Addr)
	var p *pending
	if err == nil {
		p, err = h.staging.get(req.Msg.GetPublisher(), req.Msg.GetKey())
	}
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(&floxv1.StagedResponse{Manifest: p.Manifest[:], NarHash: p.NarHash[:], NarSize: p.NarSize}), nil
}
