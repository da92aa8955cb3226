package storehouse

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

// pathsKind is the kind of PathsCommand in the log. Kinds are never reused.
const pathsKind = 1

// maxChanges is how many changes a watcher may have slept through. It is part
// of the state machine.
const maxChanges = 1 << 16

// maxDifferences bounds the list of second NARs offered for valid paths.
const maxDifferences = 1 << 12

// Keys of the facts:
//
//	'p' hash part            PathInfo
//	'r' hash part referrer   a valid path that refers to the first one
//	'c' log index            WatchEvent: what the entry changed
//	'd' log index, position  Difference
//	't' version              trust list (JSON)
//	'f' NAR file name        hash part of the path uploaded under that name
//	'u' hash part file name  the same, to find the names of a path
//	'n'                      factCounts
const (
	infoKey     = 'p'
	referrerKey = 'r'
	changeKey   = 'c'
	differKey   = 'd'
	trustKey    = 't'
	fileKey     = 'f'
	uploadKey   = 'u'
	countsKey   = 'n'
)

func hashKey(kind byte, hashPart string) []byte { return append([]byte{kind}, hashPart...) }

func indexKey(kind byte, index uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{kind}, index)
}

func referrer(of, by flox.StorePath) []byte {
	return append(hashKey(referrerKey, of.HashPart()), by.HashPart()...)
}

// stable writes messages of the state: equal on every server.
var stable = proto.MarshalOptions{Deterministic: true}

// paths is the processor of PathsCommand. All state is in the transaction.
type paths struct {
	// changes overrides maxChanges, and touchEvery its constant, in tests; they must
	// be equal on every server.
	changes    uint64
	touchEvery time.Duration
}

var _ cluster.Processor = paths{}

// Apply is raft.Processor.
func (p paths) Apply(tx *cluster.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	c := &floxv1.PathsCommand{}
	if err := cluster.DecodeCommand("paths", command, c); err != nil {
		return nil, err
	}
	most := p.changes
	if most == 0 {
		most = maxChanges
	}
	a := &applying{tx: tx, at: at, most: most, index: index, reply: &floxv1.PathsReply{Index: index}, event: &floxv1.WatchEvent{Index: index}}
	a.touchEvery = cmp.Or(p.touchEvery, touchEvery)
	if err := a.load(); err != nil {
		return nil, err
	}
	err := a.command(c)
	if err == nil {
		err = a.finish()
	}
	if err != nil {
		return nil, err
	}
	return stable.Marshal(a.reply)
}

// command carries out what is inside.
func (a *applying) command(c *floxv1.PathsCommand) error {
	switch c := c.GetCommand().(type) {
	case *floxv1.PathsCommand_Add:
		return a.add(c.Add)
	case *floxv1.PathsCommand_Remove:
		if c.Remove.GetCondemned() != nil {
			return a.removeCondemned(c.Remove.GetPaths(), c.Remove.GetCondemned())
		}
		return a.remove(c.Remove)
	case *floxv1.PathsCommand_Trust:
		return a.trust(c.Trust.GetList())
	case *floxv1.PathsCommand_Condemn:
		return a.condemn(c.Condemn)
	case *floxv1.PathsCommand_Keep:
		return a.keep(c.Keep)
	case *floxv1.PathsCommand_Roots:
		return a.setRoots(c.Roots)
	case *floxv1.PathsCommand_Sign:
		return a.sign(c.Sign)
	case *floxv1.PathsCommand_Build:
		return a.noteBuild(c.Build)
	default:
		return fmt.Errorf("paths: no command inside: %w", cluster.ErrUnknownCommand)
	}
}

// factCounts are kept so that nobody has to count a million paths.
type factCounts struct {
	paths, narBytes, changes, differences uint64
	// dropped is the log index of the newest change that was forgotten.
	dropped uint64
}

func (c *factCounts) fields() []*uint64 {
	return []*uint64{&c.paths, &c.narBytes, &c.changes, &c.differences, &c.dropped}
}

// getter is a transaction or a reader.
type getter = cluster.Getter

// readCounts reads the counters.
func readCounts(g getter) (c factCounts, err error) {
	err = cluster.LoadCounts(g, "facts", []byte{countsKey}, c.fields())
	return c, err
}

// readInfo reads the facts of the path with a hash part. ErrNotFound.
func readInfo(g getter, hashPart string) (*floxv1.PathInfo, error) {
	b, err := g.Get(hashKey(infoKey, hashPart))
	if err != nil {
		return nil, err
	}
	m := &floxv1.PathInfo{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("facts of %s: %w: %w", hashPart, err, flox.ErrCorrupt)
	}
	return m, nil
}

// readTrust reads the trust lists of versions above have, oldest first.
func readTrust(g getter, have uint64) (lists [][]byte, err error) {
	err = g.Iterate([]byte{trustKey}, indexKey(trustKey, have+1), func(_, list []byte) bool {
		lists = append(lists, bytes.Clone(list))
		return true
	})
	return lists, err
}

// applying is one command under way.
type applying struct {
	tx     *cluster.Tx
	at     time.Time
	index  uint64
	most   uint64 // changes kept
	counts factCounts
	marks  markCounts
	// touchEvery is the constant of that name, or a test's.
	touchEvery time.Duration
	reply      *floxv1.PathsReply
	event      *floxv1.WatchEvent
}

func (a *applying) load() (err error) {
	if a.counts, err = readCounts(a.tx); err != nil {
		return err
	}
	a.marks, err = readMarks(a.tx)
	return err
}

// finish records the change for watchers and the counters.
func (a *applying) finish() error {
	if e := a.event; len(e.GetAdded())+len(e.GetRemoved())+len(e.GetTrustList()) > 0 || e.GetCondemned() {
		b, err := stable.Marshal(e)
		if err != nil {
			return err
		}
		if err := a.tx.Set(indexKey(changeKey, a.index), b); err != nil {
			return err
		}
		a.counts.changes++
	}
	// Begun behind what was dropped before, not to walk over what Pebble has not
	// yet forgotten of it.
	dropped, err := cluster.DropOldest(a.tx, changeKey, a.counts.dropped, &a.counts.changes, a.most)
	if err != nil {
		return err
	}
	a.counts.dropped = max(a.counts.dropped, dropped)
	if _, err := cluster.DropOldest(a.tx, differKey, 0, &a.counts.differences, maxDifferences); err != nil {
		return err
	}
	return cluster.SetCounts(a.tx, []byte{countsKey}, a.counts.fields())
}

// add makes paths valid, in order, all or none.
func (a *applying) add(c *floxv1.AddPaths) error {
	if len(c.GetPaths()) == 0 {
		return fmt.Errorf("add paths: none given: %w", flox.ErrBadInput)
	}
	if err := a.fenced(c.GetLease()); err != nil {
		return err
	}
	for _, m := range c.GetPaths() {
		info, err := api.ToPathInfo(m)
		if err != nil {
			return err
		}
		if err := a.addOne(info, c); err != nil {
			return err
		}
	}
	for _, f := range c.GetNarFiles() {
		if err := a.addFile(f); err != nil {
			return err
		}
	}
	return nil
}

// addOne makes one path valid unless it is.
func (a *applying) addOne(info *flox.PathInfo, c *floxv1.AddPaths) error {
	valid, err := readInfo(a.tx, info.Path.HashPart())
	switch {
	case err == nil && valid.GetPath() != string(info.Path):
		return fmt.Errorf("%s: the hash part belongs to %s already: %w", info.Path, valid.GetPath(), flox.ErrBadInput)
	case err == nil && !bytes.Equal(valid.GetNarHash(), info.NarHash[:]):
		return a.differ(info, valid, c.GetPublisher())
	case err == nil:
		if c.GetTouch() {
			err = a.touch(valid)
		}
		_, failed := a.revive(info.Path.HashPart())
		return errors.Join(err, failed)
	case !errors.Is(err, flox.ErrNotFound):
		return err
	}
	for _, ref := range info.References {
		if ref == info.Path {
			continue
		}
		m, err := readInfo(a.tx, ref.HashPart())
		if errors.Is(err, flox.ErrNotFound) || (err == nil && m.GetPath() != string(ref)) {
			return missingReference(info.Path, ref)
		}
		if err == nil {
			_, err = a.revive(ref.HashPart())
		}
		if err == nil {
			err = a.tx.Set(referrer(ref, info.Path), nil)
		}
		if err != nil {
			return err
		}
	}
	info.Registered = a.at.Truncate(time.Second)
	b, err := stable.Marshal(api.FromPathInfo(info))
	if err != nil {
		return err
	}
	a.counts.paths++
	a.counts.narBytes += info.NarSize
	a.reply.Added = append(a.reply.Added, string(info.Path))
	a.event.Added = append(a.event.Added, string(info.Path))
	return a.tx.Set(hashKey(infoKey, info.Path.HashPart()), b)
}

// missingReference is the refusal of a path whose reference is not there.
func missingReference(p, ref flox.StorePath) error {
	return fmt.Errorf("%s refers to %s, which is not valid here: upload that first: %w", p, ref, flox.ErrBadInput)
}

// differ answers and records that another NAR was offered for a valid path.
func (a *applying) differ(offered *flox.PathInfo, valid *floxv1.PathInfo, publisher string) error {
	d := &floxv1.Difference{
		Path: valid.GetPath(), ValidNarHash: valid.GetNarHash(), OfferedNarHash: offered.NarHash[:],
		Publisher: publisher, TimeUnixMs: a.at.UnixMilli(),
	}
	b, err := stable.Marshal(d)
	if err != nil {
		return err
	}
	a.reply.Differences = append(a.reply.Differences, d)
	a.counts.differences++
	key := binary.BigEndian.AppendUint32(indexKey(differKey, a.index), uint32(len(a.reply.Differences)))
	return a.tx.Set(key, b)
}

// remove makes paths invalid unless another one refers to them.
func (a *applying) remove(c *floxv1.RemovePaths) error {
	going := map[string]bool{}
	for _, p := range c.GetPaths() {
		path, err := flox.ParseStorePath(p)
		if err != nil {
			return err
		}
		going[path.HashPart()] = true
	}
	for _, p := range c.GetPaths() {
		info, err := readInfo(a.tx, flox.StorePath(p).HashPart())
		if errors.Is(err, flox.ErrNotFound) || (err == nil && info.GetPath() != p) {
			continue // gone already
		}
		if err != nil {
			return err
		}
		if err := a.removeOne(flox.StorePath(p), info, going); err != nil {
			return err
		}
	}
	return nil
}

func (a *applying) removeOne(p flox.StorePath, info *floxv1.PathInfo, going map[string]bool) error {
	keeps, err := firstReferrer(a.tx, p, going)
	if err != nil {
		return err
	}
	if keeps != "" {
		return fmt.Errorf("%s cannot be removed: %s refers to it: %w", p, keeps, flox.ErrBusy)
	}
	for _, ref := range info.GetReferences() {
		err = errors.Join(err, a.tx.Delete(referrer(flox.StorePath(ref), p)))
	}
	_, failed := a.revive(p.HashPart())
	err = errors.Join(err, failed, a.removeFiles(p), a.removeBuilds(p), a.tx.Delete(hashKey(touchedKey, p.HashPart())))
	a.counts.paths--
	a.counts.narBytes -= info.GetNarSize()
	a.event.Removed = append(a.event.Removed, string(p))
	return errors.Join(err, a.tx.Delete(hashKey(infoKey, p.HashPart())))
}

// trust puts the next trust list in force. The one in force again changes nothing.
func (a *applying) trust(list []byte) error {
	next, err := content.ParseTrustList(list)
	if err != nil {
		return err
	}
	lists, err := readTrust(a.tx, 0)
	if err != nil {
		return err
	}
	if len(lists) > 0 {
		if bytes.Equal(lists[len(lists)-1], list) {
			return nil
		}
		old, err := content.ParseTrustList(lists[len(lists)-1])
		if err != nil {
			return fmt.Errorf("facts: %w: %w", err, flox.ErrCorrupt)
		}
		if err := content.Newer(old, next); err != nil {
			return err
		}
	} else if next.Version != 1 {
		return fmt.Errorf("the first trust list has version %d, want 1: %w", next.Version, flox.ErrBadInput)
	}
	a.event.TrustList = slices.Clone(list)
	return a.tx.Set(indexKey(trustKey, next.Version), list)
}
