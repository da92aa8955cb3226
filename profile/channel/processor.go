package channel

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// Processor applies ChannelsCommands. All state is in the transaction.
type Processor struct {
	maxKept int // 0 = the constant; another in tests
}

var _ raft.Processor = Processor{}

// Apply is raft.Processor.
func (p Processor) Apply(tx *raft.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	c := &floxv1.ChannelsCommand{}
	if err := raft.DecodeCommand(processorName, command, c); err != nil {
		return nil, err
	}
	if p.maxKept == 0 {
		p.maxKept = maxKept
	}
	a := &applying{Processor: p, tx: tx, at: at, index: index, actor: c.GetActor(), admin: c.GetAdmin(), reply: &floxv1.ChannelsReply{}}
	var err error
	switch c := c.GetCommand().(type) {
	case *floxv1.ChannelsCommand_Publish:
		err = a.publish(c.Publish)
	case *floxv1.ChannelsCommand_Delete:
		err = a.remove(c.Delete)
	case *floxv1.ChannelsCommand_Publishers:
		err = a.publishers(c.Publishers)
	case *floxv1.ChannelsCommand_Track:
		err = a.track(c.Track)
	case *floxv1.ChannelsCommand_Fetched:
		err = a.fetched(c.Fetched)
	case *floxv1.ChannelsCommand_Keep:
		err = a.keep(c.Keep)
	case *floxv1.ChannelsCommand_Expire:
		err = a.expire(c.Expire)
	default:
		err = fmt.Errorf("%s: no command inside: %w", processorName, raft.ErrUnknownCommand)
	}
	if err != nil {
		return nil, err
	}
	return stable.Marshal(a.reply)
}

// applying is one command under way.
type applying struct {
	Processor
	tx    *raft.Tx
	at    time.Time
	index uint64
	actor *floxv1.Actor
	admin bool
	reply *floxv1.ChannelsReply
}

// MayPublish refuses who may not publish into a channel; nil = a new one. ErrDenied.
func MayPublish(c *floxv1.Channel, name, user string, admin bool) error {
	if admin || slices.ContainsFunc(c.GetPublishers(), func(p string) bool { return user != "" && folded(p) == folded(user) }) {
		return nil
	}
	if c == nil {
		return fmt.Errorf("channel %s is not there yet, and only an admin of the storehouse makes channels: have one publish its first version, then floxctl channel publishers %s --add %s: %w", name, name, user, flox.ErrDenied)
	}
	return fmt.Errorf("channel %s: %q is none of its publishers: an admin of the storehouse can change that with floxctl channel publishers %s --add %s: %w", c.GetName(), user, c.GetName(), user, flox.ErrDenied)
}

func (a *applying) publish(n *floxv1.NewChannelVersion) error {
	c, err := Find(a.tx, n.GetChannel())
	if errors.Is(err, flox.ErrNotFound) {
		c, err = nil, nil
	}
	if err == nil {
		err = MayPublish(c, n.GetChannel(), a.actor.GetUser(), a.admin)
	}
	if err != nil {
		return err
	}
	v := n.GetVersion()
	if err := checkVersion(n.GetChannel(), v); err != nil {
		return err
	}
	if c == nil {
		all, err := List(a.tx)
		if err != nil {
			return err
		}
		if len(all) >= maxChannels {
			return fmt.Errorf("there are %d channels already: delete some: %w", len(all), flox.ErrFull)
		}
		c = &floxv1.Channel{Name: n.GetChannel(), First: 1, CreatedUnixMs: a.at.UnixMilli(), CreatedBy: a.actor.GetUser()}
	}
	c.Last++
	c.ChangedUnixMs = a.at.UnixMilli()
	v.Number, v.Index, v.TimeUnixMs, v.Actor = c.GetLast(), a.index, a.at.UnixMilli(), a.actor
	a.reply.Channel, a.reply.Version = c, v
	err = put(a.tx, versionKeyOf(c.GetName(), v.GetNumber()), v)
	if err == nil && c.GetLast()-c.GetFirst() >= maxVersions {
		err = a.dropBefore(c, c.GetLast()-maxVersions+1)
	}
	if err != nil {
		return err
	}
	return put(a.tx, keyOf(c.GetName()), c)
}

// dropBefore forgets the versions of a channel with lower numbers than first.
func (a *applying) dropBefore(c *floxv1.Channel, first uint64) error {
	for ; c.GetFirst() < first; c.First++ {
		if err := a.tx.Delete(versionKeyOf(c.GetName(), c.GetFirst())); err != nil {
			return err
		}
	}
	return nil
}

// expire forgets the versions of a channel that are too old.
func (a *applying) expire(name string) error {
	c, err := Find(a.tx, name)
	if err == nil && !a.admin {
		err = fmt.Errorf("channel %s: only the storehouse says which of its versions are too old: %w", c.GetName(), flox.ErrDenied)
	}
	if err != nil {
		return err
	}
	first, err := FirstYoung(a.tx, c, a.at)
	if err == nil {
		err = a.dropBefore(c, first)
	}
	if err != nil {
		return err
	}
	a.reply.Channel = c
	return put(a.tx, keyOf(c.GetName()), c)
}

func checkVersion(name string, v *floxv1.ChannelVersion) error {
	for _, path := range []string{v.GetSource(), v.GetCatalogue()} {
		if _, err := flox.ParseStorePath(path); err != nil {
			return fmt.Errorf("channel %s: %w", name, err)
		}
	}
	if err := checkSystems(v.GetSystems()); err != nil {
		return fmt.Errorf("channel %s: %w", name, err)
	}
	if len(v.GetFile()) > maxText || len(v.GetReason()) > maxText {
		return fmt.Errorf("channel %s: a file name or reason of more than %d bytes: %w", name, maxText, flox.ErrBadInput)
	}
	return nil
}

func checkSystems(systems []string) error {
	if n := len(systems); n == 0 || n > maxSystems {
		return fmt.Errorf("%d systems, want 1 to %d, such as x86_64-linux: %w", n, maxSystems, flox.ErrBadInput)
	}
	for _, s := range systems {
		if err := CheckSystem(s); err != nil {
			return err
		}
	}
	return nil
}

// CheckSystem refuses what is no system. ErrBadInput.
func CheckSystem(s string) error {
	if !systemWords.MatchString(s) {
		return fmt.Errorf("system %.80q, want one such as x86_64-linux: %w", s, flox.ErrBadInput)
	}
	return nil
}

// remove forgets a channel with all its versions, and what it tracks. What was installed
// from it stays.
func (a *applying) remove(name string) error {
	c, err := Find(a.tx, name)
	if err == nil && !a.admin {
		err = fmt.Errorf("channel %s: only an admin of the storehouse deletes channels: %w", c.GetName(), flox.ErrDenied)
	}
	if err == nil {
		err = errors.Join(
			a.tx.DeleteRange(versionKeyOf(name, 0), versionKeyOf(name, math.MaxUint64)), a.tx.DeleteRange(keptKeyOf(name, 0), keptKeyOf(name, math.MaxUint64)),
			a.tx.Delete(trackingKeyOf(name)), a.tx.Delete(keyOf(name)),
		)
	}
	if err == nil {
		a.reply.Channel = c
	}
	return err
}

func (a *applying) publishers(s *floxv1.SetPublishers) error {
	c, err := Find(a.tx, s.GetChannel())
	if err == nil && !a.admin {
		err = fmt.Errorf("channel %s: only an admin of the storehouse says who publishes: %w", c.GetName(), flox.ErrDenied)
	}
	if err != nil {
		return err
	}
	for _, user := range s.GetAdd() {
		if user == "" || len(user) > maxText {
			return fmt.Errorf("channel %s: user %.80q: %w", c.GetName(), user, flox.ErrBadInput)
		}
		if !slices.ContainsFunc(c.GetPublishers(), func(p string) bool { return folded(p) == folded(user) }) {
			c.Publishers = append(c.Publishers, user)
		}
	}
	c.Publishers = slices.DeleteFunc(c.GetPublishers(), func(p string) bool {
		return slices.ContainsFunc(s.GetDrop(), func(d string) bool { return folded(d) == folded(p) })
	})
	if len(c.GetPublishers()) > maxPublishers {
		return fmt.Errorf("channel %s: more than %d publishers: %w", c.GetName(), maxPublishers, flox.ErrFull)
	}
	a.reply.Channel = c
	return put(a.tx, keyOf(c.GetName()), c)
}
