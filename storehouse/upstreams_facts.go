package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	cluster "github.com/floxctl/flox/raft"
)

// upstreamsKind is the kind of UpstreamsCommand in the log. Kinds are never reused.
const upstreamsKind = 5

// upstreamsLevel is the level of UpstreamsCommand.
const upstreamsLevel = 3

// Bounds of what is known of upstreams. They are part of the state machine.
const (
	maxUpstreams        = 32
	maxUpstreamKeys     = 16
	maxUpstreamKey      = 512 // bytes
	maxUpstreamURL      = 2048
	maxUpstreamPriority = 1 << 16
)

// upstreamKey begins the keys of the state: 'u' URL = Upstream.
const upstreamKey = 'u'

func upstreamAt(url string) []byte { return append([]byte{upstreamKey}, url...) }

// upstreamFacts is the processor of UpstreamsCommand. All state is in the transaction.
type upstreamFacts struct{}

var _ cluster.Processor = upstreamFacts{}

// Apply is raft.Processor.
func (upstreamFacts) Apply(tx *cluster.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	c := &floxv1.UpstreamsCommand{}
	if err := cluster.DecodeCommand("upstreams", command, c); err != nil {
		return nil, err
	}
	reply := &floxv1.UpstreamsReply{}
	var err error
	switch c := c.GetCommand().(type) {
	case *floxv1.UpstreamsCommand_Set:
		c.Set.AddedUnixMs, c.Set.ChangedIndex = at.UnixMilli(), index
		reply.Replaced, err = setUpstream(tx, c.Set)
	case *floxv1.UpstreamsCommand_Remove:
		err = removeUpstream(tx, c.Remove.GetUrl())
	default:
		err = fmt.Errorf("upstreams: no command inside: %w", cluster.ErrUnknownCommand)
	}
	if err != nil {
		return nil, err
	}
	return stable.Marshal(reply)
}

// setUpstream adds an upstream, or replaces the one with its URL.
func setUpstream(tx *cluster.Tx, u *floxv1.Upstream) (replaced bool, err error) {
	if err := checkUpstream(u); err != nil {
		return false, err
	}
	others := 0
	err = tx.Iterate([]byte{upstreamKey}, nil, func(key, _ []byte) bool {
		if string(key[1:]) == u.GetUrl() {
			replaced = true
		} else {
			others++
		}
		return true
	})
	if err != nil {
		return false, err
	}
	if others >= maxUpstreams {
		return false, fmt.Errorf("upstream %s: there are %d already: remove one first: %w", u.GetUrl(), others, flox.ErrFull)
	}
	b, err := stable.Marshal(u)
	if err != nil {
		return false, err
	}
	return replaced, tx.Set(upstreamAt(u.GetUrl()), b)
}

// checkUpstream refuses what no server could keep. What a URL means is checked
// before it gets here.
func checkUpstream(u *floxv1.Upstream) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("upstream %.100q: %s: %w", u.GetUrl(), fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	switch n := len(u.GetKeys()); {
	case u.GetUrl() == "" || len(u.GetUrl()) > maxUpstreamURL:
		return bad("a URL of %d bytes, want 1 to %d", len(u.GetUrl()), maxUpstreamURL)
	case n == 0 || n > maxUpstreamKeys:
		return bad("%d keys, want 1 to %d", n, maxUpstreamKeys)
	case slices.ContainsFunc(u.GetKeys(), func(k string) bool { return k == "" || len(k) > maxUpstreamKey }):
		return bad("a key that is empty, or longer than %d bytes", maxUpstreamKey)
	case u.GetPriority() > maxUpstreamPriority:
		return bad("priority %d, want at most %d", u.GetPriority(), maxUpstreamPriority)
	}
	return nil
}

func removeUpstream(tx *cluster.Tx, url string) error {
	if _, err := tx.Get(upstreamAt(url)); err != nil {
		if errors.Is(err, flox.ErrNotFound) {
			return notAdded(url)
		}
		return err
	}
	return tx.Delete(upstreamAt(url))
}

func notAdded(url string) error {
	return fmt.Errorf("%.200s is no upstream; see: floxctl upstream list: %w", url, flox.ErrNotFound)
}

// readUpstreams gives the upstreams in the order in which they are asked.
func (s *Server) readUpstreams(ctx context.Context, c cluster.Consistency) (list []*floxv1.Upstream, err error) {
	r, err := s.view(ctx, upstreamsKind, c)
	if err != nil {
		return nil, err
	}
	var bad error
	err = r.Iterate([]byte{upstreamKey}, nil, func(key, value []byte) bool {
		u := &floxv1.Upstream{}
		if err := proto.Unmarshal(value, u); err != nil {
			bad = fmt.Errorf("facts of upstream %.100q: %w: %w", key[1:], err, flox.ErrCorrupt)
			return false
		}
		list = append(list, u)
		return true
	})
	if err := errors.Join(err, bad, r.Close()); err != nil {
		return nil, err
	}
	slices.SortStableFunc(list, func(a, b *floxv1.Upstream) int {
		if a.GetPriority() != b.GetPriority() {
			return int(a.GetPriority()) - int(b.GetPriority())
		}
		return strings.Compare(a.GetUrl(), b.GetUrl())
	})
	return list, nil
}

// knowUpstreams waits a moment until every server is known to know upstreams. ErrBusy
// if one does not.
func (s *Server) knowUpstreams(ctx context.Context) error {
	for try := 1; s.node.ClusterLevel() < upstreamsLevel; try++ {
		if try == changeTries {
			return fmt.Errorf("a server runs an older program, which would not know it: upgrade it (see floxctl storehouse servers): %w: %w", cluster.ErrLevel, flox.ErrBusy)
		}
		select {
		case <-time.After(changePause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// proposeUpstream puts an upstreams command into the log.
func (s *Server) proposeUpstream(ctx context.Context, c *floxv1.UpstreamsCommand) (*floxv1.UpstreamsReply, error) {
	reply := &floxv1.UpstreamsReply{}
	return reply, s.proposed(ctx, upstreamsLevel, upstreamsKind, c, reply)
}
