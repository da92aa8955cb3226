package channel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

const storePath = "00000000000000000000000000000001-exprs"

// log is a replicated log of one server with the processor.
type log struct {
	t    *testing.T
	node *raft.Node
}

func newLog(t *testing.T, p raft.Processor) *log {
	t.Helper()
	node, err := raft.Open(raft.Config{Dir: t.TempDir(), ID: "a", Bootstrap: true, ReserveBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	node.Register(Kind, p)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- node.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if err := node.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	return &log{t, node}
}

// apply proposes a command of a user; "ADMIN" is an admin.
func (l *log) apply(user string, c *floxv1.ChannelsCommand) (*floxv1.ChannelsReply, error) {
	c.Actor, c.Admin = &floxv1.Actor{Machine: "desk", User: user}, user == "ADMIN"
	b, err := proto.Marshal(c)
	if err != nil {
		return nil, err
	}
	reply, _, err := l.node.Propose(l.t.Context(), Kind, b, raft.ProposeOptions{})
	if err != nil {
		return nil, err
	}
	r := &floxv1.ChannelsReply{}
	return r, proto.Unmarshal(reply, r)
}

// must is apply of what may not be refused.
func (l *log) must(c *floxv1.ChannelsCommand) *floxv1.ChannelsReply {
	l.t.Helper()
	r, err := l.apply("ADMIN", c)
	if err != nil {
		l.t.Fatal(err)
	}
	return r
}

func (l *log) view(f func(r *raft.Reader) error) {
	l.t.Helper()
	r, err := l.node.View(l.t.Context(), Kind, raft.Linearizable)
	if err == nil {
		err = errors.Join(f(r), r.Close())
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *log) tracking(name string) (is *floxv1.ChannelTracking) {
	l.t.Helper()
	l.view(func(r *raft.Reader) (err error) {
		is, err = Tracking(r, name)
		return err
	})
	return is
}

func published(name string) *floxv1.ChannelsCommand {
	return &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Publish{Publish: &floxv1.NewChannelVersion{
		Channel: name, Version: &floxv1.ChannelVersion{Source: storePath, Catalogue: storePath, Systems: []string{linux}},
	}}}
}

func tracks(name, url string, every uint32, systems ...string) *floxv1.ChannelsCommand {
	return &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Track{Track: &floxv1.ChannelTracking{Channel: name, Url: url, EveryMinutes: every, Systems: systems}}}
}

func fetched(t *floxv1.ChannelTracking, result, detail string) *floxv1.ChannelsCommand {
	return &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Fetched{Fetched: &floxv1.NoteFetch{
		Channel: t.GetChannel(), Tracking: t.GetIndex(), Fetch: &floxv1.ChannelFetch{Result: result, Detail: detail, Etag: "e"},
	}}}
}

func kept(name, attr, version, drv string) *floxv1.ChannelsCommand {
	return &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Keep{Keep: &floxv1.KeepDerivation{
		Channel: name, Kept: &floxv1.KeptDerivation{Package: &floxv1.CataloguePackage{Attr: attr, Name: attr, Version: version, System: linux, Drv: drv}},
	}}}
}

func expire(name string) *floxv1.ChannelsCommand {
	return &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Expire{Expire: name}}
}

// later is a processor whose commands are entered so many days later than they are.
type later struct {
	Processor
	days *atomic.Int64
}

func (p later) Apply(tx *raft.Tx, command []byte, at time.Time, index uint64) ([]byte, error) {
	return p.Processor.Apply(tx, command, at.Add(time.Duration(p.days.Load())*24*time.Hour), index)
}

// A version of a channel goes when a year has passed in the log's time, but not the newest
// one; and whatever its age when there are a hundred newer ones.
func TestVersionsGo(t *testing.T) {
	t.Parallel()
	p := later{days: &atomic.Int64{}}
	l := newLog(t, p)
	l.must(published("tools"))
	p.days.Store(200)
	l.must(published("tools"))
	l.must(published("tools"))
	if _, err := l.apply("alice", expire("tools")); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("who is no admin: %v", err)
	}
	if _, err := l.apply("ADMIN", expire("none")); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("of no channel: %v", err)
	}
	has := func(first, last uint64) {
		t.Helper()
		l.view(func(r *raft.Reader) error {
			c, err := Find(r, "tools")
			all, err2 := Versions(r, "tools")
			if c.GetFirst() != first || c.GetLast() != last || uint64(len(all)) != last-first+1 || all[0].GetNumber() != last || all[len(all)-1].GetNumber() != first {
				t.Errorf("after %d days %v has %d versions, want %d to %d", p.days.Load(), c, len(all), first, last)
			}
			return errors.Join(err, err2)
		})
	}
	for _, c := range []struct {
		days  int64
		first uint64
	}{{364, 1}, {366, 2}, {564, 2}, {566, 3}, {5000, 3}} {
		p.days.Store(c.days)
		l.must(expire("TOOLS"))
		has(c.first, 3)
	}
	for range 99 {
		l.must(published("tools"))
	}
	has(3, 102)
	l.must(published("tools"))
	has(4, 103)
}

const aURL = "https://example.org/nixexprs.tar.xz"

// Admins say what a channel tracks, also one that has no version yet; what a fetch came to
// is noted for what is tracked now, and goes with it.
func TestTracking(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{})
	if _, err := l.apply("alice", tracks("Tools", aURL, 60, linux)); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("who is no admin: %v", err)
	}
	for what, bad := range map[string]*floxv1.ChannelsCommand{
		"name": tracks("no name", aURL, 60, linux), "URL": tracks("tools", "file:///x", 60, linux), "never": tracks("tools", aURL, 0, linux),
		"too often": tracks("tools", aURL, 5, linux), "no system": tracks("tools", aURL, 60), "system": tracks("tools", aURL, 60, "x y"),
	} {
		if _, err := l.apply("ADMIN", bad); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: %v", what, err)
		}
	}
	first := l.must(tracks("Tools", aURL, 60, linux)).GetTracking()
	if first.GetIndex() == 0 || first.GetSinceUnixMs() == 0 || first.GetActor().GetUser() != "ADMIN" || first.GetLast() != nil {
		t.Errorf("tracked: %v", first)
	}
	if _, err := l.apply("alice", fetched(first, FetchFailed, "")); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("a person's word of a fetch: %v", err)
	}
	if _, err := l.apply("ADMIN", fetched(first, FetchFailed, strings.Repeat("x", maxText+1))); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("in too many words: %v", err)
	}
	for n := range 2 {
		if last := l.must(fetched(first, FetchFailed, "gone")).GetTracking().GetLast(); last.GetFailures() != uint32(n)+1 || last.GetTimeUnixMs() == 0 { //nolint:gosec // small
			t.Errorf("failed: %v", last)
		}
	}
	if last := l.must(fetched(first, FetchUnchanged, "")).GetTracking().GetLast(); last.GetFailures() != 0 || last.GetEtag() != "e" {
		t.Errorf("fetched: %v", last)
	}
	l.must(published("tools")) // in other letters: it is the first to make the channel
	second := l.must(tracks("TOOLS", aURL, 120, linux)).GetTracking()
	if second.GetLast() != nil || second.GetChannel() != "tools" {
		t.Errorf("tracked anew: %v", second)
	}
	if r := l.must(fetched(first, FetchFailed, "")); !r.GetMoved() || l.tracking("tools").GetLast() != nil {
		t.Errorf("of what it tracked before: %v", r)
	}
	l.must(&floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Delete{Delete: "Tools"}})
	if is := l.tracking("tools"); is != nil {
		t.Errorf("a deleted channel tracks %v", is)
	}
	l.must(tracks("other", aURL, 60, linux))
	if was := l.must(tracks("Other", "", 0)).GetTracking(); was.GetUrl() != aURL || l.tracking("other") != nil {
		t.Errorf("no more: it was %v", was)
	}
	if _, err := l.apply("ADMIN", tracks("other", "", 0)); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("what tracks nothing: %v", err)
	}
	for i := range maxTracked {
		l.must(tracks(fmt.Sprint("c", i), aURL, 60, linux))
	}
	if _, err := l.apply("ADMIN", tracks("more", aURL, 60, linux)); !errors.Is(err, flox.ErrFull) {
		t.Errorf("one more than may be: %v", err)
	}
	l.must(tracks("C1", aURL, 60, linux)) // no more than before
}

// A channel is fetched as often as was said, later and later while that fails, and at once
// when it is new.
func TestNextFetch(t *testing.T) {
	t.Parallel()
	now := time.UnixMilli(1_800_000_000_000)
	last := func(ago time.Duration, failures uint32) *floxv1.ChannelTracking {
		return &floxv1.ChannelTracking{EveryMinutes: 120, SinceUnixMs: now.Add(-time.Hour).UnixMilli(), Last: &floxv1.ChannelFetch{TimeUnixMs: now.Add(-ago).UnixMilli(), Failures: failures}}
	}
	for what, c := range map[string]struct {
		t    *floxv1.ChannelTracking
		want time.Duration // from now
	}{
		"new":           {&floxv1.ChannelTracking{EveryMinutes: 120, SinceUnixMs: now.UnixMilli()}, 0},
		"fetched":       {last(0, 0), 2 * time.Hour},
		"due":           {last(3*time.Hour, 0), -time.Hour},
		"failed":        {last(0, 1), 5 * time.Minute},
		"failed thrice": {last(0, 3), 20 * time.Minute},
		"failed often":  {last(0, 10), 2 * time.Hour},
		"for ever":      {last(0, 1<<31), 2 * time.Hour},
		"a wrong clock": {last(-time.Hour, 0), 0},
	} {
		if got := NextFetch(c.t, now).Sub(now); got != c.want {
			t.Errorf("%s: in %v, want %v", what, got, c.want)
		}
	}
}

// What packages were made of is kept beside the channel, the last of each; beyond a bound
// the oldest goes, and all of it with the channel.
func TestKeptDerivations(t *testing.T) {
	t.Parallel()
	l := newLog(t, Processor{maxKept: 3})
	drv := func(n int) string { return fmt.Sprintf("0000000000000000000000000000000%d-x.drv", n) }
	if _, err := l.apply("ADMIN", kept("tools", "x", "1", drv(1))); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("without the channel: %v", err)
	}
	l.must(published("Tools"))
	if _, err := l.apply("alice", kept("tools", "x", "1", drv(1))); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("by a person: %v", err)
	}
	if _, err := l.apply("ADMIN", kept("tools", "x", "1", "no path")); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("no derivation: %v", err)
	}
	if _, err := l.apply("ADMIN", kept("tools", "x", strings.Repeat("1", maxKeptBytes), drv(1))); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("too much: %v", err)
	}
	has := func(want ...string) {
		t.Helper()
		var got []string
		l.view(func(r *raft.Reader) error {
			all, err := Kept(r, "TOOLS")
			for _, k := range all {
				got = append(got, fmt.Sprint(k.GetPackage().GetAttr(), " ", k.GetPackage().GetVersion(), " ", k.GetPackage().GetDrv()[31:32]))
			}
			return err
		})
		if !slices.Equal(got, want) {
			t.Errorf("kept are %q, want %q", got, want)
		}
	}
	l.must(kept("tools", "x", "1", drv(1)))
	l.must(kept("tools", "x", "2", drv(2)))
	l.must(kept("tools", "y", "1", drv(3)))
	has("y 1 3", "x 2 2", "x 1 1")
	l.must(kept("tools", "x", "1", drv(4)))
	has("x 1 4", "y 1 3", "x 2 2")
	l.must(kept("tools", "z", "1", drv(5)))
	has("z 1 5", "x 1 4", "y 1 3")
	l.must(&floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Delete{Delete: "tools"}})
	has()
}

// A name means among what is kept what it means in a catalogue.
func TestFindKept(t *testing.T) {
	t.Parallel()
	var all []*floxv1.KeptDerivation
	for _, p := range [][3]string{{"python310", "python3", "3.10.14"}, {"python3", "python3", "3.9.2"}, {"python39", "python3", "3.9.7"}, {"tools.jq", "jq", "1.6"}, {"old", "jq", "1.7"}} {
		all = append(all, &floxv1.KeptDerivation{Package: &floxv1.CataloguePackage{Attr: p[0], Name: p[1], Version: p[2], System: linux}})
	}
	for word, want := range map[string]string{"python3@3.9": "python3", "python3@3.10": "python310", "jq@1": "old", "tools.jq@1": "tools.jq", "jq@2": "", "python3@3.1": ""} {
		name, version, _ := strings.Cut(word, "@")
		if got := FindKept(all, name, version, linux).GetAttr(); got != want {
			t.Errorf("%s is %q, want %q", word, got, want)
		}
	}
	if p := FindKept(all, "jq", "1.6", arm); p != nil {
		t.Errorf("for another system: %v", p)
	}
}

// Programs that do not know what is tracked and kept are not asked to apply it.
func TestLevels(t *testing.T) {
	t.Parallel()
	levels := []uint32{Level(published("x")), Level(tracks("x", "", 0)), Level(fetched(nil, "", "")), Level(kept("x", "", "", "")), Level(expire("x"))}
	if !slices.Equal(levels, []uint32{5, 7, 7, 7, 8}) {
		t.Errorf("levels %v", levels)
	}
}
