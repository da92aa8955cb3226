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
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// tracesKind is the kind of TracesCommand in the log. Kinds are never reused.
const tracesKind = 2

// Bounds of what is known of starts. They are part of the state machine, as is
// every number in this file.
const (
	maxStartChunks = 4096     // of one path, pages included
	maxStartBytes  = 64 << 20 // of the files' content, of one path
	maxStartPaths  = 8192
	maxAllChunks   = 1 << 20 // of all paths
	maxStartTrees  = 1024    // of one report
	saltLen        = 32
	tagLen         = 4
)

// How a chunk's weight moves. What every start reads stays at the top; what no
// start read for some sixty reports, or one machine alone for thirty, is gone.
const (
	weightNew   = 64
	weightGain  = 32
	weightMost  = 255
	weightDecay = 16 // this part of it is lost, at least 1, with every report without the chunk
)

// Keys of the state:
//
//	's'                  salt of the tags
//	't' hash part        StartState
//	'o' index hash part  the path that was reported at that log index, to find the oldest
//	'n'                  number of paths and of chunks
const (
	saltKey  = 's'
	startKey = 't'
	orderKey = 'o'
	totalKey = 'n'
)

// traces is the processor of TracesCommand. All state is in the transaction.
type traces struct {
	// paths and chunks override maxStartPaths and maxAllChunks in tests; they must
	// be equal on every server.
	paths, chunks uint64
}

var _ cluster.Processor = traces{}

// Apply is raft.Processor.
func (p traces) Apply(tx *cluster.Tx, command []byte, _ time.Time, index uint64) ([]byte, error) {
	c := &floxv1.TracesCommand{}
	if err := cluster.DecodeCommand("traces", command, c); err != nil {
		return nil, err
	}
	m := &merging{tx: tx, index: index, paths: cmp.Or(p.paths, maxStartPaths), chunks: cmp.Or(p.chunks, maxAllChunks), reply: &floxv1.TracesReply{}}
	var err error
	switch c := c.GetCommand().(type) {
	case *floxv1.TracesCommand_Salt:
		err = m.salt(c.Salt)
	case *floxv1.TracesCommand_Merge:
		err = m.merge(c.Merge)
	default:
		err = fmt.Errorf("traces: no command inside: %w", cluster.ErrUnknownCommand)
	}
	if err != nil {
		return nil, err
	}
	return stable.Marshal(m.reply)
}

// merging is one command under way.
type merging struct {
	tx            *cluster.Tx
	index         uint64
	paths, chunks uint64 // bounds
	havePaths     uint64
	haveChunks    uint64
	reply         *floxv1.TracesReply
}

// salt puts a salt in force unless there is one.
func (m *merging) salt(salt []byte) error {
	if len(salt) != saltLen {
		return fmt.Errorf("traces: salt of %d bytes, want %d: %w", len(salt), saltLen, flox.ErrBadInput)
	}
	have, err := m.tx.Get([]byte{saltKey})
	if errors.Is(err, flox.ErrNotFound) {
		have, err = salt, m.tx.Set([]byte{saltKey}, salt)
	}
	m.reply.Salt = have
	return err
}

func (m *merging) merge(c *floxv1.MergeStarts) error {
	b, err := m.tx.Get([]byte{totalKey})
	switch {
	case errors.Is(err, flox.ErrNotFound):
	case err != nil:
		return err
	case len(b) != 16:
		return fmt.Errorf("traces: counters of %d bytes: %w", len(b), flox.ErrCorrupt)
	default:
		m.havePaths, m.haveChunks = binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])
	}
	for _, r := range c.GetReports() {
		if _, err := flox.ParseStorePath(r.GetPath()); err != nil {
			return err
		}
		if len(r.GetTag()) != tagLen || len(r.GetTrees()) > maxStartTrees {
			return fmt.Errorf("traces: report with a tag of %d bytes and %d trees: %w", len(r.GetTag()), len(r.GetTrees()), flox.ErrBadInput)
		}
		if err := m.report(r); err != nil {
			return err
		}
		m.reply.Merged++
	}
	if err := m.dropOldest(); err != nil {
		return err
	}
	return m.tx.Set([]byte{totalKey}, binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, m.havePaths), m.haveChunks))
}

// report merges one report into what is known of its path.
func (m *merging) report(r *floxv1.StartReport) error {
	hash := flox.StorePath(r.GetPath()).HashPart()
	old, err := readStart(m.tx, hash)
	switch {
	case errors.Is(err, flox.ErrNotFound):
		old = &floxv1.StartState{}
		m.havePaths++
	case err != nil:
		return err
	default:
		m.haveChunks -= countSeen(old)
		if err := m.tx.Delete(append(indexKey(orderKey, old.GetReported()), hash...)); err != nil {
			return err
		}
		if old.GetPath() != r.GetPath() { // another path with that hash part was valid once
			old = &floxv1.StartState{}
		}
	}
	next := mergeStart(old, r)
	next.Path, next.Reported = r.GetPath(), m.index
	m.haveChunks += countSeen(next)
	b, err := stable.Marshal(next)
	if err != nil {
		return err
	}
	if err := m.tx.Set(append(indexKey(orderKey, m.index), hash...), nil); err != nil {
		return err
	}
	return m.tx.Set(hashKey(startKey, hash), b)
}

// dropOldest forgets the paths reported longest ago until the rest is within the bounds.
func (m *merging) dropOldest() error {
	for m.havePaths > m.paths || m.haveChunks > m.chunks && m.havePaths > 1 {
		var oldest []byte
		err := m.tx.Iterate([]byte{orderKey}, nil, func(key, _ []byte) bool {
			oldest = bytes.Clone(key)
			return false
		})
		if err != nil {
			return err
		}
		hash := string(oldest[9:])
		s, err := readStart(m.tx, hash)
		if err != nil {
			return err
		}
		if err := errors.Join(m.tx.Delete(oldest), m.tx.Delete(hashKey(startKey, hash))); err != nil {
			return err
		}
		m.havePaths--
		m.haveChunks -= countSeen(s)
	}
	return nil
}

// readStart reads what is known of the starts of a path. ErrNotFound.
func readStart(g getter, hashPart string) (*floxv1.StartState, error) {
	b, err := g.Get(hashKey(startKey, hashPart))
	if err != nil {
		return nil, err
	}
	s := &floxv1.StartState{}
	if err := proto.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("starts of %s: %w: %w", hashPart, err, flox.ErrCorrupt)
	}
	return s, nil
}

func countSeen(s *floxv1.StartState) (n uint64) {
	for _, t := range s.GetTrees() {
		n += uint64(len(t.GetChunks()))
	}
	return n
}

// seenKey is a chunk, or a page of a manifest, of a path's starts.
type seenKey struct {
	path   string
	entry  uint32
	offset uint64
	size   uint32
}

// mergeStart is the union of what was known and a report. What the report saw
// gains weight, the rest loses some. A chunk that a second machine saw is
// accepted, and who saw it first is forgotten.
func mergeStart(old *floxv1.StartState, r *floxv1.StartReport) *floxv1.StartState {
	all := make(map[seenKey]*floxv1.SeenChunk)
	each := func(trees []*floxv1.SeenTree, do func(seenKey, *floxv1.SeenChunk)) {
		for _, t := range trees {
			for _, c := range t.GetChunks() {
				do(seenKey{t.GetPath(), c.GetEntry(), c.GetOffset(), c.GetSize()}, c)
			}
		}
	}
	each(old.GetTrees(), func(k seenKey, c *floxv1.SeenChunk) { all[k] = c })
	seen := make(map[seenKey]bool)
	each(r.GetTrees(), func(k seenKey, c *floxv1.SeenChunk) {
		if seen[k] {
			return
		}
		seen[k] = true
		have := all[k]
		if have == nil {
			all[k] = &floxv1.SeenChunk{Entry: k.entry, Offset: k.offset, Size: k.size, Rank: c.GetRank(), Weight: weightNew, Tag: r.GetTag()}
			return
		}
		if !bytes.Equal(have.GetTag(), r.GetTag()) {
			have.Tag = nil
		}
		have.Weight = min(have.GetWeight()+weightGain, weightMost)
		have.Rank = uint32((3*uint64(have.GetRank()) + uint64(c.GetRank())) / 4) //nolint:gosec // between the two
	})
	keys := make([]seenKey, 0, len(all))
	for k, c := range all {
		if !seen[k] {
			c.Weight -= min(c.GetWeight(), max(c.GetWeight()/weightDecay, 1))
		}
		if c.GetWeight() > 0 {
			keys = append(keys, k)
		}
	}
	return keepBest(keys, all)
}

// keepBest keeps the best of keys: accepted ones before others, then by weight,
// then what is read first.
func keepBest(keys []seenKey, all map[seenKey]*floxv1.SeenChunk) *floxv1.StartState {
	slices.SortFunc(keys, func(x, y seenKey) int {
		a, b := all[x], all[y]
		return cmp.Or(cmp.Compare(min(len(a.GetTag()), 1), min(len(b.GetTag()), 1)), cmp.Compare(b.GetWeight(), a.GetWeight()),
			cmp.Compare(a.GetRank(), b.GetRank()), x.compare(y))
	})
	bytes := uint64(0)
	for i, k := range keys {
		if bytes += uint64(k.size); i >= maxStartChunks || bytes > maxStartBytes {
			keys = keys[:i]
			break
		}
	}
	slices.SortFunc(keys, seenKey.compare)
	out := &floxv1.StartState{}
	for _, k := range keys {
		if n := len(out.GetTrees()); n == 0 || out.GetTrees()[n-1].GetPath() != k.path {
			out.Trees = append(out.Trees, &floxv1.SeenTree{Path: k.path})
		}
		t := out.GetTrees()[len(out.GetTrees())-1]
		t.Chunks = append(t.Chunks, all[k])
	}
	return out
}

func (k seenKey) compare(o seenKey) int {
	return cmp.Or(cmp.Compare(k.path, o.path), cmp.Compare(k.entry, o.entry), cmp.Compare(k.offset, o.offset), cmp.Compare(k.size, o.size))
}
