package storehouse

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// simUpstreamEpochs is how many epochs clients stay with the same upstreams: there
// may not be many.
const simUpstreamEpochs = 8

// simUpstreams are one upstream.
type simUpstreams struct{}

// upstreamAsk sets its priority; 0 = it is removed.
type upstreamAsk struct{ priority uint32 }

// upstreamState is that there is one, of a priority.
type upstreamState struct {
	is       bool
	priority uint32
}

func (simUpstreams) url(subject simSubject) string {
	return fmt.Sprintf("https://%d.example.org", subject.serial)
}

func (p simUpstreams) ask(rng *rand.Rand, subject simSubject, _ uint64) (any, simCommand) {
	if rng.IntN(2) == 0 {
		c := &floxv1.UpstreamsCommand{Command: &floxv1.UpstreamsCommand_Remove{Remove: &floxv1.RemoveUpstream{Url: p.url(subject)}}}
		return upstreamAsk{}, simCommand{upstreamsKind, upstreamsLevel, c}
	}
	a := upstreamAsk{1 + rng.Uint32N(1000)}
	u := &floxv1.Upstream{Url: p.url(subject), Keys: []string{"a:a"}, Priority: a.priority}
	return a, simCommand{upstreamsKind, upstreamsLevel, &floxv1.UpstreamsCommand{Command: &floxv1.UpstreamsCommand_Set{Set: u}}}
}

// What is said is whether one was replaced.
func (simUpstreams) heard(_ simSubject, _ any, reply []byte) (any, uint64, error) {
	r := &floxv1.UpstreamsReply{}
	err := proto.Unmarshal(reply, r)
	return r.GetReplaced(), 0, err
}

func (p simUpstreams) read(r *cluster.Reader, subject simSubject) (any, error) {
	u := &floxv1.Upstream{}
	err := readMessage(r, upstreamAt(p.url(subject)), u)
	if errors.Is(err, flox.ErrNotFound) {
		return upstreamState{}, nil
	}
	return upstreamState{true, u.GetPriority()}, err
}

func (simUpstreams) next(state, ask any, _ uint64) []simNext {
	s := state.(upstreamState)
	if ask == (simLook{}) {
		return []simNext{{s, s}}
	}
	a := ask.(upstreamAsk)
	switch {
	case a.priority != 0:
		return []simNext{{upstreamState{true, a.priority}, s.is}}
	case !s.is:
		return []simNext{{s, flox.ErrNotFound}}
	}
	return []simNext{{upstreamState{}, false}}
}

// simStarts are the starts of one program. What becomes of a report is as the
// storehouse's own function has it: the model says which reports there were, and in
// which order.
type simStarts struct{}

// startsAsk is a report, and startsState what is known (without when), marshaled.
type (
	startsAsk   struct{ report string }
	startsState struct{ known string }
)

func (simStarts) path(subject simSubject) flox.StorePath {
	return asPath(fmt.Sprint("s", subject.serial), nil).info.Path
}

func (p simStarts) ask(rng *rand.Rand, subject simSubject, _ uint64) (any, simCommand) {
	path := string(p.path(subject))
	tree := &floxv1.SeenTree{Path: path}
	for i := range rng.IntN(3) {
		tree.Chunks = append(tree.Chunks, &floxv1.SeenChunk{Entry: rng.Uint32N(4), Size: 10, Rank: uint32(i)})
	}
	report := &floxv1.StartReport{Path: path, Tag: []byte{0, 0, 0, byte(rng.IntN(3))}, Trees: []*floxv1.SeenTree{tree}}
	b, err := stable.Marshal(report)
	if err != nil {
		panic(err) // of what was made above
	}
	merge := &floxv1.MergeStarts{Reports: []*floxv1.StartReport{report}}
	return startsAsk{string(b)}, simCommand{tracesKind, 0, &floxv1.TracesCommand{Command: &floxv1.TracesCommand_Merge{Merge: merge}}}
}

// What is said is how many reports were merged.
func (simStarts) heard(_ simSubject, _ any, reply []byte) (any, uint64, error) {
	r := &floxv1.TracesReply{}
	err := proto.Unmarshal(reply, r)
	return r.GetMerged(), 0, err
}

func (p simStarts) read(r *cluster.Reader, subject simSubject) (any, error) {
	s, err := readStart(r, p.path(subject).HashPart())
	if errors.Is(err, flox.ErrNotFound) {
		return startsState{}, nil
	}
	if err != nil {
		return nil, err
	}
	s.Reported = 0
	b, err := stable.Marshal(s)
	return startsState{string(b)}, err
}

func (simStarts) next(state, ask any, _ uint64) []simNext {
	s := state.(startsState)
	if ask == (simLook{}) {
		return []simNext{{s, s}}
	}
	old, report := &floxv1.StartState{}, &floxv1.StartReport{}
	err := errors.Join(proto.Unmarshal([]byte(s.known), old), proto.Unmarshal([]byte(ask.(startsAsk).report), report))
	if err != nil {
		return nil
	}
	known := mergeStart(old, report)
	known.Path = report.GetPath()
	b, err := stable.Marshal(known)
	if err != nil {
		return nil
	}
	return []simNext{{startsState{string(b)}, uint32(1)}}
}

// simSalt is the salt of the reports' tags: the first one stays. There is one for all.
type simSalt struct{}

type (
	saltAsk   struct{ salt byte }
	saltState struct{ salt string }
)

func (simSalt) ask(rng *rand.Rand, _ simSubject, _ uint64) (any, simCommand) {
	a := saltAsk{byte('a' + rng.IntN(26))}
	return a, simCommand{tracesKind, 0, &floxv1.TracesCommand{Command: &floxv1.TracesCommand_Salt{Salt: a.whole()}}}
}

func (a saltAsk) whole() []byte { return bytes.Repeat([]byte{a.salt}, saltLen) }

// What is said is the salt in force.
func (simSalt) heard(_ simSubject, _ any, reply []byte) (any, uint64, error) {
	r := &floxv1.TracesReply{}
	err := proto.Unmarshal(reply, r)
	return saltState{string(r.GetSalt())}, 0, err
}

func (simSalt) read(r *cluster.Reader, _ simSubject) (any, error) {
	salt, err := r.Get([]byte{saltKey})
	if errors.Is(err, flox.ErrNotFound) {
		err = nil
	}
	return saltState{string(salt)}, err
}

func (simSalt) next(state, ask any, _ uint64) []simNext {
	s := state.(saltState)
	if a, ok := ask.(saltAsk); ok && s.salt == "" {
		s.salt = string(a.whole())
	}
	return []simNext{{s, s}}
}
