package raft

import (
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// memberKind is the kind of commands about the members themselves. No other
// package may register it.
const memberKind = 0

// Keys of memberKind:
//
//	'm' id   ServerFacts
//	'l'      level of the cluster, 4 bytes
const (
	memberKey = 'm'
	levelKey  = 'l'
)

// firstLevel is the level of a cluster that was never raised.
const firstLevel = 1

// members is the Processor of what the servers decided about each other. Who
// is a member and votes is raft's to know; this is what is wanted of them.
type members struct {
	level uint32 // the newest this program knows
}

var _ Processor = members{}

// Apply is Processor.
func (m members) Apply(tx *Tx, command []byte, at time.Time, _ uint64) ([]byte, error) {
	c := &floxv1.ServersCommand{}
	if err := proto.Unmarshal(command, c); err != nil {
		return nil, fmt.Errorf("members: %w: %w", err, ErrUnknownCommand)
	}
	if len(c.ProtoReflect().GetUnknown()) > 0 {
		return nil, fmt.Errorf("members: a field this program does not know: %w", ErrUnknownCommand)
	}
	switch c := c.Command.(type) {
	case *floxv1.ServersCommand_Level:
		return nil, m.raise(tx, c.Level)
	case *floxv1.ServersCommand_Add:
		return nil, change(tx, c.Add.Id, func(s *floxv1.ServerFacts) {
			if s.AddedMs == 0 {
				s.AddedMs = at.UnixMilli()
			}
			s.WantsVote = c.Add.Voter
		})
	case *floxv1.ServersCommand_Drain:
		return nil, change(tx, c.Drain.Id, func(s *floxv1.ServerFacts) { s.Drained = c.Drain.On })
	case *floxv1.ServersCommand_Down:
		return nil, change(tx, c.Down.Id, func(s *floxv1.ServerFacts) {
			s.DownMs = 0
			if c.Down.Down {
				s.DownMs = at.UnixMilli()
			}
		})
	case *floxv1.ServersCommand_Forget:
		if c.Forget.ReplacedBy != "" {
			err := change(tx, c.Forget.ReplacedBy, func(s *floxv1.ServerFacts) { s.Replaced = c.Forget.Id })
			if err != nil {
				return nil, err
			}
		}
		return nil, tx.Delete(append([]byte{memberKey}, c.Forget.Id...))
	}
	return nil, fmt.Errorf("members: no command inside: %w", ErrUnknownCommand)
}

// raise lifts the level of the cluster. A program that does not know it stops
// here, before the first command of that level.
func (m members) raise(tx *Tx, level uint32) error {
	if level > m.level {
		return fmt.Errorf("the cluster is at level %d, this program knows %d: upgrade it: %w", level, m.level, ErrUnknownCommand)
	}
	have, err := readLevel(tx)
	if err != nil || level <= have {
		return err
	}
	return tx.Set([]byte{levelKey}, []byte{byte(level >> 24), byte(level >> 16), byte(level >> 8), byte(level)})
}

// keyReader is what a Tx and a Reader have in common.
type keyReader interface {
	Get(key []byte) ([]byte, error)
	Iterate(prefix, from []byte, yield func(key, value []byte) bool) error
}

func readLevel(r keyReader) (uint32, error) {
	b, err := r.Get([]byte{levelKey})
	switch {
	case errors.Is(err, flox.ErrNotFound):
		return firstLevel, nil
	case err != nil:
		return 0, err
	case len(b) != 4:
		return 0, fmt.Errorf("state: level of %d bytes: %w", len(b), flox.ErrCorrupt)
	}
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3]), nil
}

// change edits what is kept of a server.
func change(tx *Tx, id string, edit func(*floxv1.ServerFacts)) error {
	if id == "" || len(id) > maxServerID {
		return fmt.Errorf("server ID of %d bytes, want 1 to %d: %w", len(id), maxServerID, flox.ErrBadInput)
	}
	key := append([]byte{memberKey}, id...)
	s := &floxv1.ServerFacts{Id: id}
	b, err := tx.Get(key)
	if err == nil {
		err = proto.Unmarshal(b, s)
	}
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return tx.fail(fmt.Errorf("state: member %s: %w", id, err))
	}
	edit(s)
	if b, err = (proto.MarshalOptions{Deterministic: true}).Marshal(s); err != nil {
		return tx.fail(err)
	}
	return tx.Set(key, b)
}

// maxServerID bounds a server's ID in bytes.
const maxServerID = 256

// readMembers gives what is kept of every server, by ID.
func readMembers(r keyReader) (map[string]*floxv1.ServerFacts, error) {
	all := map[string]*floxv1.ServerFacts{}
	var bad error
	err := r.Iterate([]byte{memberKey}, nil, func(_, value []byte) bool {
		s := &floxv1.ServerFacts{}
		if bad = proto.Unmarshal(value, s); bad != nil {
			return false
		}
		all[s.Id] = s
		return true
	})
	if err = errors.Join(err, bad); err != nil {
		return nil, fmt.Errorf("state: members: %w", err)
	}
	return all, nil
}

// known gives what is kept of a server; one that was there from the first votes.
func known(all map[string]*floxv1.ServerFacts, id string, voter bool) *floxv1.ServerFacts {
	if s := all[id]; s != nil {
		return s
	}
	return &floxv1.ServerFacts{Id: id, WantsVote: voter}
}

// learnMembers takes over what the state says of this server and the level. It
// is called whenever that may have changed.
func (n *Node) learnMembers() error {
	db, err := n.machine.state.acquire()
	if err != nil {
		return err
	}
	r := &Reader{db: db, snap: db.NewSnapshot(), space: kindPrefix(memberKind)}
	defer r.Close()
	level, err := readLevel(r)
	if err != nil {
		return err
	}
	all, err := readMembers(r)
	if err != nil {
		return err
	}
	n.level.Store(level)
	n.drained.Store(known(all, n.cfg.ID, true).Drained)
	if level > n.cfg.Level {
		return fmt.Errorf("%s: the cluster is at level %d, this program knows %d: upgrade it: %w", n.cfg.Dir, level, n.cfg.Level, ErrUnknownCommand)
	}
	return nil
}

// decide puts a command about the members into the log.
func (n *Node) decide(c *floxv1.ServersCommand) *floxv1.ProposeCall {
	b, err := proto.Marshal(c)
	if err != nil {
		b = nil // refused by the Processor; a message of ours always encodes
	}
	return &floxv1.ProposeCall{Kind: memberKind, Command: b}
}
