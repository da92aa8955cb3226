// Package channel has the rules of channels: named catalogues of what can be installed by
// name, each version made by evaluating a Nix expression. Processor applies what changes
// them; Catalogue is what a version has, and finds packages in it.
package channel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// Kind is the kind of ChannelsCommand in the log. Kinds are never reused.
const Kind = 7

// Level is the level of a ChannelsCommand; see the storehouse.
func Level(c *floxv1.ChannelsCommand) uint32 {
	switch c.GetCommand().(type) {
	case *floxv1.ChannelsCommand_Track, *floxv1.ChannelsCommand_Fetched, *floxv1.ChannelsCommand_Keep:
		return 7
	case *floxv1.ChannelsCommand_Expire:
		return 8
	}
	return 5
}

// Bounds of what is kept. They are part of the state machine.
const (
	maxChannels   = 256
	maxVersions   = 100 // of one channel; then the oldest goes
	maxSystems    = 16
	maxPublishers = 64
	maxTracked    = 64
	maxKept       = 2000 // derivations of one channel; then the oldest goes
	maxText       = 512  // bytes of a file name, a reason, a user
	// maxAge is how long a version of a channel is kept; the newest one always is.
	maxAge = 365 * 24 * time.Hour
)

// The keys of the state. NAME is folded, numbers are big-endian.
//
//	'c' NAME            Channel
//	'v' NAME 0 NUMBER   ChannelVersion
//	't' NAME            ChannelTracking; the channel may have no version yet
//	'd' NAME 0 INDEX    KeptDerivation
const (
	channelKey  = 'c'
	versionKey  = 'v'
	trackingKey = 't'
	keptKey     = 'd'
)

const processorName = "channels"

var (
	nameWords   = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]{0,62}$`)
	systemWords = regexp.MustCompile(`^[a-z0-9_]{1,32}-[a-z0-9]{1,32}$`)
)

func folded(name string) string { return strings.ToLower(name) }

func keyOf(name string) []byte { return append([]byte{channelKey}, folded(name)...) }

func versionsOf(name string) []byte { return append(append([]byte{versionKey}, folded(name)...), 0) }

func versionKeyOf(name string, number uint64) []byte {
	return binary.BigEndian.AppendUint64(versionsOf(name), number)
}

// Check refuses what cannot be a channel's name. ErrBadInput.
func Check(name string) error {
	if !nameWords.MatchString(name) {
		return fmt.Errorf("channel %.80q: want a name of at most 63 letters, digits, - and _, beginning with a letter: %w", name, flox.ErrBadInput)
	}
	return nil
}

// Find gives a channel by its name, in any case. ErrNotFound.
func Find(g raft.Getter, name string) (*floxv1.Channel, error) {
	if err := Check(name); err != nil {
		return nil, err
	}
	c, err := raft.LoadRecord(g, processorName, keyOf(name), &floxv1.Channel{})
	if errors.Is(err, flox.ErrNotFound) {
		err = fmt.Errorf("there is no channel %s; see: floxctl channel list: %w", name, flox.ErrNotFound)
	}
	return c, err
}

// Version gives a version of a channel. ErrNotFound.
func Version(g raft.Getter, name string, number uint64) (*floxv1.ChannelVersion, error) {
	v, err := raft.LoadRecord(g, processorName, versionKeyOf(name, number), &floxv1.ChannelVersion{})
	if errors.Is(err, flox.ErrNotFound) {
		err = fmt.Errorf("channel %s has no version %d (any more); see: floxctl channel show %s: %w", name, number, name, flox.ErrNotFound)
	}
	return v, err
}

// List gives all channels, in the order of their names.
func List(g raft.Getter) (all []*floxv1.Channel, err error) {
	var bad error
	err = g.Iterate([]byte{channelKey}, nil, func(key, value []byte) bool {
		c := &floxv1.Channel{}
		bad = raft.DecodeRecord(processorName, key, value, c)
		all = append(all, c)
		return bad == nil
	})
	return all, errors.Join(bad, err)
}

// Versions gives the versions of a channel, the newest first; of all channels if name is "".
func Versions(g raft.Getter, name string) (all []*floxv1.ChannelVersion, err error) {
	prefix := []byte{versionKey}
	if name != "" {
		prefix = versionsOf(name)
	}
	var bad error
	err = g.Iterate(prefix, nil, func(key, value []byte) bool {
		v := &floxv1.ChannelVersion{}
		bad = raft.DecodeRecord(processorName, key, value, v)
		all = append(all, v)
		return bad == nil
	})
	slices.Reverse(all)
	return all, errors.Join(bad, err)
}

// FirstYoung gives the number of the oldest version of a channel that is kept at a time:
// neither more than a year old, nor the newest one. What is before it may go.
func FirstYoung(g raft.Getter, c *floxv1.Channel, now time.Time) (uint64, error) {
	young := now.Add(-maxAge).UnixMilli()
	for n := c.GetFirst(); n < c.GetLast(); n++ {
		v, err := Version(g, c.GetName(), n)
		if err != nil || v.GetTimeUnixMs() >= young {
			return n, err
		}
	}
	return c.GetLast(), nil
}

// stable writes messages of the state: equal on every server.
var stable = proto.MarshalOptions{Deterministic: true}

func put(tx *raft.Tx, key []byte, m proto.Message) error {
	b, err := stable.Marshal(m)
	if err != nil {
		return err
	}
	return tx.Set(key, b)
}
