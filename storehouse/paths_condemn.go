package storehouse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Keys of what collection needs to know, beside those of the facts:
//
//	'x' hash part            condemnation
//	'w' hash part            when it was last used by somebody who added it (Unix milliseconds)
//	'y'                      markCounts
//	'k' hash part            KeptPath
//	'm' peer                 MachineRoots
//	's' CID                  a set of roots (content.RootSet)
//	'o' CID peer             a machine whose set that is
const (
	condemnedKey  = 'x'
	touchedKey    = 'w'
	markCountsKey = 'y'
	keptKey       = 'k'
	machineKey    = 'm'
	setKey        = 's'
	ownerKey      = 'o'
)

// touchEvery is how old the last known use of a path is before a further one is
// noted. It is part of the state machine.
const touchEvery = time.Hour

// maxMarked bounds the paths of one CondemnPaths, KeepPaths or RemovePaths of a
// collection. It is part of the state machine.
const maxMarked = 4096

// condemnation is the mark on a path that a collection will remove.
type condemnation struct {
	index   uint64 // of the entry
	at      int64  // its time, Unix milliseconds
	narSize uint64
}

func (c condemnation) marshal() []byte {
	b := binary.BigEndian.AppendUint64(nil, c.index)
	b = binary.BigEndian.AppendUint64(b, uint64(c.at))
	return binary.BigEndian.AppendUint64(b, c.narSize)
}

func parseCondemnation(b []byte) (c condemnation, err error) {
	if len(b) != 24 {
		return c, fmt.Errorf("facts: mark of %d bytes: %w", len(b), flox.ErrCorrupt)
	}
	c.index = binary.BigEndian.Uint64(b)
	c.at = int64(binary.BigEndian.Uint64(b[8:]))
	c.narSize = binary.BigEndian.Uint64(b[16:])
	return c, nil
}

// readCondemned reads the mark on a path; ErrNotFound when it has none.
func readCondemned(g getter, hashPart string) (condemnation, error) {
	b, err := g.Get(hashKey(condemnedKey, hashPart))
	if err != nil {
		return condemnation{}, err
	}
	return parseCondemnation(b)
}

// markCounts say whether there is anything to look for.
type markCounts struct {
	condemned, bytes uint64 // paths with a mark and their NARs
}

// readMarks reads the counters of marks.
func readMarks(g getter) (c markCounts, err error) {
	b, err := g.Get([]byte{markCountsKey})
	if errors.Is(err, flox.ErrNotFound) {
		return c, nil
	}
	if err == nil && len(b) != 16 {
		err = fmt.Errorf("facts: counters of marks of %d bytes: %w", len(b), flox.ErrCorrupt)
	}
	if err != nil {
		return c, err
	}
	return markCounts{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}, nil
}

// countMark adds to or takes from the counters.
func (a *applying) countMark(paths int, narSize uint64) error {
	if paths > 0 {
		a.marks.condemned++
		a.marks.bytes += narSize
	} else {
		a.marks.condemned--
		a.marks.bytes -= narSize
	}
	b := binary.BigEndian.AppendUint64(nil, a.marks.condemned)
	return a.tx.Set([]byte{markCountsKey}, binary.BigEndian.AppendUint64(b, a.marks.bytes))
}

// revive takes the mark off a path, and says whether there was one.
func (a *applying) revive(hashPart string) (bool, error) {
	if a.marks.condemned == 0 {
		return false, nil
	}
	c, err := readCondemned(a.tx, hashPart)
	if errors.Is(err, flox.ErrNotFound) {
		return false, nil
	}
	if err == nil {
		err = a.countMark(-1, c.narSize)
	}
	if err == nil {
		err = a.tx.Delete(hashKey(condemnedKey, hashPart))
	}
	return err == nil, err
}

// lastUse is when a valid path was registered or last used, in Unix milliseconds.
func lastUse(g getter, info *floxv1.PathInfo) (int64, error) {
	// Registration is kept in whole seconds, rounded down.
	use := (info.GetRegisteredUnix()+1)*1000 - 1
	b, err := g.Get(hashKey(touchedKey, flox.StorePath(info.GetPath()).HashPart()))
	if errors.Is(err, flox.ErrNotFound) {
		return use, nil
	}
	if err == nil && len(b) != 8 {
		err = fmt.Errorf("facts: last use of %d bytes: %w", len(b), flox.ErrCorrupt)
	}
	if err != nil {
		return 0, err
	}
	return max(use, int64(binary.BigEndian.Uint64(b))), nil
}

// touch notes that a valid path is used.
func (a *applying) touch(info *floxv1.PathInfo) error {
	last, err := lastUse(a.tx, info)
	if err != nil || a.at.UnixMilli()-last < a.touchEvery.Milliseconds() {
		return err
	}
	return a.tx.Set(hashKey(touchedKey, flox.StorePath(info.GetPath()).HashPart()),
		binary.BigEndian.AppendUint64(nil, uint64(a.at.UnixMilli())))
}

// marked checks the paths of a command about marks.
func marked(what string, paths []string) error {
	if len(paths) == 0 || len(paths) > maxMarked {
		return fmt.Errorf("%s %d paths, want 1 to %d: %w", what, len(paths), maxMarked, flox.ErrBadInput)
	}
	for _, p := range paths {
		if _, err := flox.ParseStorePath(p); err != nil {
			return err
		}
	}
	return nil
}

// validAs gives the facts of a path if exactly that one is valid; nil if not.
func validAs(g getter, path string) (*floxv1.PathInfo, error) {
	info, err := readInfo(g, flox.StorePath(path).HashPart())
	if errors.Is(err, flox.ErrNotFound) || err == nil && info.GetPath() != path {
		return nil, nil
	}
	return info, err
}

// done answers that something was done to the i-th path of the command.
func (a *applying) done(i int) { a.reply.Done = append(a.reply.Done, uint32(i)) }

// condemn marks paths, or takes their marks off.
func (a *applying) condemn(c *floxv1.CondemnPaths) error {
	if err := marked("condemn", c.GetPaths()); err != nil {
		return err
	}
	if c.GetRevive() {
		for i, p := range c.GetPaths() {
			was, err := a.revive(flox.StorePath(p).HashPart())
			if err != nil {
				return err
			}
			if was {
				a.done(i)
			}
		}
		return nil
	}
	held, err := a.setsSince(c.GetAsOf())
	if err != nil {
		return err
	}
	for i, p := range c.GetPaths() {
		info, err := a.unused(c, held, p)
		if err != nil {
			return err
		}
		if info == nil {
			continue
		}
		mark := condemnation{a.index, a.at.UnixMilli(), info.GetNarSize()}
		if err := errors.Join(a.countMark(1, mark.narSize), a.tx.Set(hashKey(condemnedKey, flox.StorePath(p).HashPart()), mark.marshal())); err != nil {
			return err
		}
		a.done(i)
		a.event.Condemned = true
	}
	return nil
}

// unused gives the facts of a path that may be condemned, nil of another.
func (a *applying) unused(c *floxv1.CondemnPaths, held *heldSets, path string) (*floxv1.PathInfo, error) {
	hashPart := flox.StorePath(path).HashPart()
	info, err := validAs(a.tx, path)
	if err != nil || info == nil {
		return nil, err
	}
	for _, key := range []byte{condemnedKey, keptKey} {
		switch _, err := a.tx.Get(hashKey(key, hashPart)); {
		case err == nil:
			return nil, nil
		case !errors.Is(err, flox.ErrNotFound):
			return nil, err
		}
	}
	if since := c.GetUnusedSinceUnixMs(); since != 0 {
		last, err := lastUse(a.tx, info)
		if err != nil || last > since {
			return nil, err
		}
	}
	if held.has(hashPart) {
		return nil, nil
	}
	return info, nil
}

// removeCondemned removes what a collection condemned for long enough, and leaves
// alone whatever was wanted since or is referred to.
func (a *applying) removeCondemned(paths []string, c *floxv1.RemoveCondemned) error {
	if err := marked("remove", paths); err != nil {
		return err
	}
	for i, p := range paths {
		path := flox.StorePath(p)
		info, err := validAs(a.tx, p)
		if err != nil {
			return err
		}
		if info == nil {
			continue
		}
		mark, err := readCondemned(a.tx, path.HashPart())
		if errors.Is(err, flox.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		age := a.at.UnixMilli() - mark.at
		if mark.index > c.GetIndex() || age < 0 || uint64(age) < c.GetGraceMs() {
			continue
		}
		by, err := firstReferrer(a.tx, path, nil)
		if err != nil {
			return err
		}
		if by != "" {
			continue
		}
		if err := a.removeOne(path, info, nil); err != nil {
			return err
		}
		a.done(i)
	}
	return nil
}

// firstReferrer gives the hash part of a valid path that refers to p, beside
// itself and those going; "" when there is none.
func firstReferrer(g getter, p flox.StorePath, going map[string]bool) (string, error) {
	prefix := hashKey(referrerKey, p.HashPart())
	found := ""
	err := g.Iterate(prefix, nil, func(key, _ []byte) bool {
		if by := string(key[len(prefix):]); !going[by] && by != p.HashPart() {
			found = by
		}
		return found == ""
	})
	return found, err
}
