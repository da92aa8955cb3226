// Package raft is the only door to hashicorp/raft: a generic replicated log
// whose state is a Pebble database. Packages above register a Processor per
// kind of command, propose commands, and read the state they lead to.
//
// It must not know what a command means, nor how machines reach each other:
// connections come from a Layer. No type of hashicorp/raft or Pebble appears in
// its exported API. DESIGN.md beside this file says what is written where.
package raft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/floxctl/flox"
)

// EnvelopeVersion is the format of the entries this program writes, and the
// newest it can apply.
const EnvelopeVersion = 1

// MaxCommand is the largest command in bytes. Content never goes into the log.
const MaxCommand = 8 << 20

// Errors of a Node beside those of the root package.
var (
	// ErrNotLeader: this server does not lead now; nothing was proposed.
	ErrNotLeader = fmt.Errorf("not the leader: %w", flox.ErrUnreachable)
	// ErrUnknownOutcome: the command may or may not have been applied. Propose it
	// again with the same session and sequence to learn which.
	ErrUnknownOutcome = fmt.Errorf("outcome unknown: %w", flox.ErrUnreachable)
	// ErrRefused marks the answer of a Processor that refused a command; every
	// server refused it, and proposing it again does not help.
	ErrRefused = errors.New("refused")
	// ErrUnknownCommand is what a Processor returns for a command it cannot
	// decode or does not know. The node stops before it differs from the others.
	ErrUnknownCommand = errors.New("unknown command")
	// ErrLevel: a server of the cluster runs a program that does not know such
	// commands yet; the message names it.
	ErrLevel = errors.New("a server is too old")
	// ErrSessionExpired: the session was not used for SessionTTL of log time, or
	// never existed; its replies are forgotten.
	ErrSessionExpired = fmt.Errorf("session expired: %w", flox.ErrClosed)
)

// Processor applies one kind of command. It keeps no state of its own: all of
// it is in the Tx. Given the same state, command, time and index it must do the
// same on every server, so it must not look at a clock, a map's order or the
// network.
type Processor interface {
	// Apply carries out command. What it wrote to tx counts only if err is nil. An
	// error is a refusal and part of the replicated answer: it should wrap a
	// sentinel of the root package; only ErrUnknownCommand stops the node. At is
	// the leader's clock when it proposed, never before that of an earlier entry.
	Apply(tx *Tx, command []byte, at time.Time, index uint64) (reply []byte, err error)
}

// Layer connects the servers of a cluster: it accepts their connections and
// dials them by the address they are members under. Whoever it accepts is
// believed to be a server of the cluster: to know them is its part.
type Layer interface {
	net.Listener
	Dial(address string, timeout time.Duration) (net.Conn, error)
}

// Config says how a Node runs. Dir and ID are needed; every other zero value
// is the default.
type Config struct {
	// Dir holds the log, the state and the snapshots. One process at a time.
	Dir string
	// ID names this server among the members, for ever.
	ID string
	// Layer reaches the other servers; nil = a single server without peers. The
	// Node closes it.
	Layer Layer
	// Address is how the others reach this server through their Layer. Default:
	// the address of Layer.
	Address string
	// Bootstrap makes a new cluster of this server alone if Dir is empty.
	// Without it an empty server waits to be added by a leader.
	Bootstrap bool
	// Heartbeat is how long a follower waits for its leader before it stands for
	// election, and a leader for a majority before it steps down. Both wait longer
	// while round trips between the voters are slow (Patience). Default 200 ms, and
	// 50 ms without Layer, where it only delays the start.
	Heartbeat time.Duration
	// SnapshotEvery is how many entries go into the log between snapshots. Default 8192.
	SnapshotEvery uint64
	// SnapshotCheck is how often, about, the need of a snapshot is looked at. Default 30 s.
	SnapshotCheck time.Duration
	// KeepEntries is how many entries stay in the log behind a snapshot, so that
	// a follower that was away shortly needs none. Default 10240.
	KeepEntries uint64
	// ReserveBytes is the free space of Dir's disk below which commands are
	// refused with ErrFull before they reach the log: a log that hits the end of
	// the disk cannot even record a vote. Default 128 MiB.
	ReserveBytes uint64
	// MaxInFlight is how many proposals and reads may wait at once. Default 4096.
	MaxInFlight int
	// CacheBytes is Pebble's block cache, which grows with what is read. Default a
	// sixteenth of the memory there is, at least 64 MiB and at most 2 GiB.
	CacheBytes int64
	// Level is the newest level of commands this program knows; a level is raised
	// when a program can apply commands that former ones cannot. Default 1.
	Level uint32
	// Version names the program, for people.
	Version string
	// PromoteAfter is how long a new server must be healthy before it gets a vote.
	// Default 10 s.
	PromoteAfter time.Duration
	// DeadAfter is how long a server must be away before one that came later
	// replaces it. Default 1 min.
	DeadAfter time.Duration
	// Replacing is called on the leader before a server that is away is removed because
	// by replaces it. Who keeps a list of the servers takes it out there: who is listed
	// would be added again. An error puts the removal off. nil = there is no such list.
	Replacing func(ctx context.Context, id, by string) error
	// Log takes what an operator may need; nil = discard.
	Log *slog.Logger
	// Hooks are for tests only; nil = none.
	Hooks *Hooks

	probeEvery time.Duration // how often the other members are asked how they are
}

// withDefaults checks c and fills in what is zero.
func (c Config) withDefaults() (Config, error) {
	if c.Dir == "" || c.ID == "" {
		return c, fmt.Errorf("raft: Dir and ID must be set: %w", flox.ErrBadInput)
	}
	if c.Heartbeat < 0 || c.SnapshotCheck < 0 || c.PromoteAfter < 0 || c.DeadAfter < 0 || c.MaxInFlight < 0 || c.CacheBytes < 0 {
		return c, fmt.Errorf("raft: a negative duration or number in the configuration: %w", flox.ErrBadInput)
	}
	if c.Heartbeat == 0 {
		c.Heartbeat = 200 * time.Millisecond
		if c.Layer == nil {
			c.Heartbeat = 50 * time.Millisecond
		}
	}
	if c.Heartbeat < 10*time.Millisecond {
		return c, fmt.Errorf("raft: heartbeat %v, want at least 10ms: %w", c.Heartbeat, flox.ErrBadInput)
	}
	if c.Address == "" {
		c.Address = c.ID
		if c.Layer != nil {
			c.Address = c.Layer.Addr().String()
		}
	}
	setDefault(&c.SnapshotEvery, 8192)
	setDefault(&c.SnapshotCheck, 30*time.Second)
	setDefault(&c.KeepEntries, 10240)
	setDefault(&c.ReserveBytes, 128<<20)
	setDefault(&c.MaxInFlight, 4096)
	setDefault(&c.CacheBytes, defaultCache())
	setDefault(&c.Level, firstLevel)
	setDefault(&c.PromoteAfter, 10*time.Second)
	setDefault(&c.DeadAfter, time.Minute)
	if c.Hooks == nil {
		c.Hooks = &Hooks{}
	}
	c.probeEvery = max(20*time.Millisecond, min(c.PromoteAfter/4, time.Second))
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// setDefault gives *v the value d if it has none.
func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}
