package storehouse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/pack"
	"github.com/floxctl/flox/p2p"
)

const (
	// scrubEvery is how often all content is read back.
	scrubEvery = 7 * 24 * time.Hour
	// scrubRate is how fast, in bytes per second: a disk that does hundreds of
	// MB/s serves readers beside it.
	scrubRate = 16 << 20
	// scrubNote is how often the place is written down, so that a restart goes on there.
	scrubNote = time.Minute
)

// rescrub is scrub.json.
type rescrub struct {
	At       pack.Cursor `json:"at"`       // the place, of one under way
	Running  bool        `json:"running"`  // whether one is
	Finished time.Time   `json:"finished"` // when the last one was
}

// scrubLoop reads all content back every week, slowly, and replaces what rotted
// by what another server has. What none has is logged, and fetched again as soon
// as one does.
func (s *Server) scrubLoop(ctx context.Context) error {
	file := filepath.Join(s.cfg.StateDir, "scrub.json")
	var mark rescrub
	err := readNote(file, &mark)
	if errors.Is(err, flox.ErrCorrupt) {
		s.cfg.Log.Warn("all content is read back now: the mark of when it was is damaged", "file", file, "error", err)
		mark = rescrub{Running: true}
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("scrub: %w", err)
	}
	if mark.Finished.IsZero() && !mark.Running {
		mark.Finished = time.Now() // there was nothing to rot yet
	}
	for {
		wait := s.cfg.scrubEvery - time.Since(mark.Finished)
		if mark.Running {
			wait = 0
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
		mark.Running = true
		if err := s.scrubOnce(ctx, &mark, file); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			s.cfg.Log.Warn("content could not be read back to its end", "error", err)
		}
		mark = rescrub{Finished: time.Now()}
		if err := mark.save(file); err != nil {
			s.cfg.Log.Warn("when content was read back is not written down", "error", err)
		}
	}
}

func (m *rescrub) save(file string) error {
	return writeNote(file, m, 0o644)
}

// scrubOnce reads everything behind the mark back.
func (s *Server) scrubOnce(ctx context.Context, mark *rescrub, file string) error {
	noted := time.Now()
	done, err := s.packs.ScrubWith(ctx, pack.ScrubOptions{
		Rate: scrubRate, After: mark.At, Repair: s.fromOthers,
		Progress: func(p pack.Scrubbed) {
			if mark.At = p.Cursor; time.Since(noted) < scrubNote {
				return
			}
			noted = time.Now()
			if err := mark.save(file); err != nil {
				s.cfg.Log.Debug("the place of reading content back is not written down", "error", err)
			}
		},
	}, func(bad flox.CID, err error) {
		s.cfg.Log.Error("a block rotted and no other server has it", "block", bad.String(), "error", err)
		s.catchUp.lost(bad)
	})
	if done.Bad+done.Repaired > 0 {
		s.cfg.Log.Warn("content had rotted", "blocks", done.Bad, "repaired", done.Repaired)
	}
	return err
}

// fromOthers gets one block from the other servers. ErrNotFound if none has it.
func (s *Server) fromOthers(ctx context.Context, id flox.CID) (data []byte, err error) {
	others, _, _ := s.servers.others()
	for _, peer := range others {
		limited, cancel := context.WithTimeout(ctx, time.Minute)
		fetchErr := s.swarm.FetchFrom(limited, peer, []p2p.Want{{ID: id}}, func(_ int, b []byte, _ p2p.Source) { data = b })
		cancel()
		if data != nil {
			return data, nil
		}
		err = errors.Join(err, fetchErr)
	}
	return nil, errors.Join(fmt.Errorf("block %s: no other server gave it: %w", id, flox.ErrNotFound), err)
}
