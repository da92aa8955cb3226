package storehouse

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

// othersNames are the files in the state directory that name the other servers: a
// server whose facts are damaged has to find them without these. There are two, which say
// the same, since nothing else does where the server is the first one.
var othersNames = []string{"servers.json", "servers-again.json"}

// loadOthers reads which other servers there were last, and before there were any
// noted, which ones this server was told of when it joined.
func loadOthers(dir string, joined *api.Invite) ([]api.InvitePeer, error) {
	var told []api.InvitePeer
	if joined != nil {
		told = joined.Storehouse
	}
	for _, name := range othersNames {
		var noted []api.InvitePeer
		err := readNote(filepath.Join(dir, name), &noted)
		if err == nil {
			return noted, nil
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, flox.ErrCorrupt) { // such are written anew later
			return nil, err
		}
	}
	return told, nil
}

// noteOthers writes the other servers down when they changed.
func (s *Server) noteOthers() {
	var others []api.InvitePeer
	for _, m := range s.roster.servers() {
		if m.GetPeer() != string(s.id.peer) && len(m.GetAddrs()) > 0 {
			others = append(others, api.InvitePeer{ID: m.GetPeer(), Addrs: m.GetAddrs()})
		}
	}
	b, err := sealNote(others)
	for _, name := range othersNames {
		if err != nil {
			break
		}
		file := filepath.Join(s.cfg.StateDir, name)
		have, _ := os.ReadFile(file)
		if !bytes.Equal(have, b) && (len(have) > 0 || len(others) > 0) {
			err = writeFile(file, b, 0o600)
		}
	}
	if err != nil {
		s.cfg.Log.Warn("the other servers are not noted", "error", err)
	}
}

// openNode opens the log and the facts. Damaged ones are given up for those of the
// other servers, if there are any.
func (s *Server) openNode(cfg cluster.Config) (*cluster.Node, error) {
	node, err := cluster.Open(cfg)
	switch {
	case err == nil:
		return node, nil
	case s.giveUpFacts(err):
		return cluster.Open(cfg)
	case errors.Is(err, flox.ErrCorrupt):
		return nil, fmt.Errorf("%w; this server knows no other that has the facts. Where there are others, put one's %s into %s, or let this server join anew; "+
			"where there are none, restore a backup (floxctl storehouse restore)", err, othersNames[0], s.cfg.StateDir)
	}
	return nil, err
}

// giveUpFacts gives the facts of this server, which does not use them, up if they
// are damaged and other servers have them, and says whether it did. Then this
// server gets them from the others and does not vote before it has them.
func (s *Server) giveUpFacts(damage error) bool {
	if !errors.Is(damage, flox.ErrCorrupt) || s.line == nil {
		return false
	}
	if others, err := loadOthers(s.cfg.StateDir, s.id.joined); err != nil || len(others) == 0 {
		return false
	}
	dir := filepath.Join(s.cfg.StateDir, "raft")
	if err := cluster.Discard(dir); err != nil {
		s.cfg.Log.Error("damaged facts cannot be given up", "damage", damage, "error", err)
		return false
	}
	s.cfg.Log.Error("the facts here are damaged: they come again from the other servers, and until then what there was is kept",
		"damage", damage, "kept", filepath.Join(dir, "damaged"))
	return true
}

// meetOthers tells the swarm where the servers are that are known without the log.
func (s *Server) meetOthers() error {
	for _, p := range s.id.others {
		if err := s.swarm.AddPeer(p2p.PeerAddr{ID: p2p.PeerID(p.ID), Addrs: p.Addrs}); err != nil {
			return fmt.Errorf("address of a server in %s or %s: %w", joinedName, othersNames[0], err)
		}
	}
	return nil
}
