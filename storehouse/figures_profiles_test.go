package storehouse

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/profile"
	"github.com/floxctl/flox/profile/channel"
	cluster "github.com/floxctl/flox/raft"
)

// Those of TestFigureManyProfiles: a hundred generations each, of twenty packages.
const (
	manyGenerations = 100
	manyPackages    = 20
	manyCatalogue   = 100_000 // packages of the channel that is searched
)

func manyName(i int) string { return fmt.Sprintf("user%05d/default", i) }

// fakePath is a path that nobody has.
func fakePath(i int) string { return likeRealPath(i, 1<<20) }

// fillOne makes the profile that all others are copies of.
func fillOne(t *testing.T, s *Server) {
	t.Helper()
	boss := person{Actor: &floxv1.Actor{Machine: "desk", User: "user00000"}, admin: true}
	propose := func(c *floxv1.ProfilesCommand) *floxv1.Profile {
		t.Helper()
		reply, err := s.profiles.propose(within(t), boss, c)
		if err != nil || reply.GetMoved() {
			t.Fatal(reply, err)
		}
		return reply.GetProfile()
	}
	p := propose(&floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Create{Create: &floxv1.NewProfile{Name: manyName(0), Systems: []string{linux}}}})
	propose(&floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Grants{Grants: &floxv1.SetGrants{
		Profile: manyName(0), Grants: []*floxv1.ProfileGrant{{User: "*", Role: profile.Reader}},
	}}})
	for g := range manyGenerations {
		c := &floxv1.NewGeneration{Profile: manyName(0), Live: p.GetLive(), Created: p.GetCreatedIndex(), Kind: "install"}
		c.Environments = []*floxv1.Environment{{System: linux, Path: fakePath(g)}}
		for k := range manyPackages {
			if g == 0 || k == g%manyPackages {
				c.Set = append(c.Set, &floxv1.Package{
					Name: fmt.Sprint("package", k), Version: fmt.Sprint("1.", g), Priority: profile.DefaultPriority,
					Paths: []*floxv1.PackagePaths{{System: linux, Paths: []string{fakePath(1000*g + k)}}},
				})
			}
		}
		p = propose(&floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Change{Change: c}})
	}
}

// fillProfiles gives a server n profiles that are alike but for their names.
func fillProfiles(t *testing.T, cfg Config, n int) {
	t.Helper()
	s, stop := start(t, cfg)
	fillOne(t, s)
	rebuild(t, cfg, s, stop, func(frozen *cluster.State, put func(key, value []byte) error) error {
		c := &copies{n: n, put: put}
		err := frozen.Each(context.Background(), c.record)
		return errors.Join(err, c.flush())
	})
}

// copies writes the records of one profile for n of them, in the order of their keys.
type copies struct {
	n    int
	put  func(key, value []byte) error
	held [][2][]byte // of one kind
}

func (c *copies) record(key, value []byte) error {
	kind, own, ok := cluster.RecordKind(key)
	if ok && kind == profile.Kind && bytes.Contains(own, []byte(manyName(0))) {
		if len(c.held) > 0 && c.held[0][0][len(key)-len(own)] != own[0] {
			if err := c.flush(); err != nil {
				return err
			}
		}
		c.held = append(c.held, [2][]byte{bytes.Clone(key), bytes.Clone(value)})
		return nil
	}
	if err := c.flush(); err != nil {
		return err
	}
	if ok && kind == profile.Kind && len(own) == 1 { // the counts
		value = bytes.Clone(value)
		binary.BigEndian.PutUint64(value, uint64(c.n))
	}
	return c.put(key, value)
}

func (c *copies) flush() error {
	for i := range c.n {
		for _, r := range c.held {
			if err := c.put(bytes.Replace(r[0], []byte(manyName(0)), []byte(manyName(i)), 1), bytes.Replace(r[1], []byte(manyName(0)), []byte(manyName(i)), 1)); err != nil {
				return err
			}
		}
	}
	c.held = nil
	return nil
}

// fillChannel publishes a channel of many packages, as if they had been evaluated.
func fillChannel(t *testing.T, s *Server) {
	t.Helper()
	words := []string{"server", "library", "client", "tool", "parser", "compiler", "editor", "viewer", "daemon", "toolkit"}
	entries := make([]channel.Entry, manyCatalogue)
	for i := range entries {
		name := fmt.Sprintf("%s-%s%d", words[i%10], words[i/10%10], i)
		entries[i] = channel.Entry{
			Attr: name, Name: name, Version: fmt.Sprint("1.", i%30), System: linux, Drv: fakePath(i) + ".drv", Outputs: []string{"out"}, Paths: []string{fakePath(i)},
			Description: fmt.Sprintf("A %s with a %s for every %s", words[i%10], words[i/10%10], words[i/100%10]),
		}
	}
	path, err := s.channels.store(within(t), entries)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.channels.propose(within(t), person{Actor: &floxv1.Actor{User: "boss"}, admin: true}, &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Publish{
		Publish: &floxv1.NewChannelVersion{Channel: "big", Version: &floxv1.ChannelVersion{Source: string(path), Catalogue: string(path), Systems: []string{linux}, Packages: manyCatalogue}},
	}})
	if err != nil {
		t.Fatal(err)
	}
}

// quantile of durations, in milliseconds.
func quantile(took []time.Duration, q float64) float64 {
	slices.Sort(took)
	return took[min(len(took)-1, int(q*float64(len(took))))].Seconds() * 1e3
}

// TestFigureManyProfiles measures what people ask of profiles where there are many.
func TestFigureManyProfiles(t *testing.T) {
	report := measures(t)
	n := sized(t, "FIGURE_PROFILES", 10_000)
	cfg := testConfig(t.TempDir())
	fillProfiles(t, cfg, n)
	_, stop := start(t, cfg) // takes the snapshot in
	stop()
	s, _ := start(t, cfg)
	fillChannel(t, s)
	ask := adminOf(t, join(t, s.Invite()))
	random := rand.New(rand.NewPCG(1, 8))
	measure := func(name string, calls int, call func() (found int, err error)) {
		t.Helper()
		var took []time.Duration
		for range calls {
			begun := time.Now()
			found, err := call()
			if err != nil || found == 0 {
				t.Fatal(name, found, err)
			}
			took = append(took, time.Since(begun))
		}
		report(figure{Name: fmt.Sprintf("%s, p99 of %d calls; %d profiles, %d generations", name, calls, n, n*manyGenerations), Unit: "ms", Ours: quantile(took, 0.99)})
		report(figure{Name: fmt.Sprintf("%s, p50; %d profiles", name, n), Unit: "ms", Ours: quantile(took, 0.5)})
	}
	measure("listing of 1,000 profiles", 500, func() (int, error) {
		out, err := ask.ListProfiles(t.Context(), connect.NewRequest(&floxv1.ListProfilesRequest{After: manyName(random.IntN(max(1, n-1000)))}))
		if err != nil {
			return 0, err
		}
		return len(out.Msg.GetProfiles()), nil
	})
	measure("listing of one's own profiles", 2000, func() (int, error) {
		out, err := ask.ListProfiles(t.Context(), connect.NewRequest(&floxv1.ListProfilesRequest{Owner: strings.TrimSuffix(manyName(random.IntN(n)), "/default")}))
		if err != nil {
			return 0, err
		}
		return len(out.Msg.GetProfiles()), nil
	})
	measure("history of a profile, 100 events", 2000, func() (int, error) {
		out, err := ask.ProfileHistory(t.Context(), connect.NewRequest(&floxv1.ProfileHistoryRequest{Name: manyName(random.IntN(n))}))
		if err != nil {
			return 0, err
		}
		return len(out.Msg.GetEvents()), nil
	})
	measure("packages of an old generation", 2000, func() (int, error) {
		out, err := ask.ShowProfile(t.Context(), connect.NewRequest(&floxv1.ShowProfileRequest{Name: manyName(random.IntN(n)), Generation: uint64(1 + random.IntN(manyGenerations))}))
		if err != nil {
			return 0, err
		}
		return len(out.Msg.GetGeneration().GetPackages()), nil
	})
	terms := []string{"server", "toolkit4", "parser editor", "every daemon", "client-viewer7777"}
	measure(fmt.Sprintf("search among %d packages", manyCatalogue), 500, func() (int, error) {
		out, err := ask.SearchPackages(t.Context(), connect.NewRequest(&floxv1.SearchPackagesRequest{Term: terms[random.IntN(len(terms))], System: linux}))
		if err != nil {
			return 0, err
		}
		return len(out.Msg.GetPackages()), nil
	})
}

// adminOf asks the storehouse over the member's connection, as people's programs do.
func adminOf(t *testing.T, m *member) floxv1connect.AdminClient {
	t.Helper()
	transport := &http.Transport{DisableCompression: true, DialContext: m.dial}
	t.Cleanup(transport.CloseIdleConnections)
	return floxv1connect.NewAdminClient(&http.Client{Transport: transport}, "http://house")
}

// TestFigureWatchers measures how soon a thousand machines that look at one profile hear
// of a change.
func TestFigureWatchers(t *testing.T) {
	report := measures(t)
	watchers, changes := sized(t, "FIGURE_WATCHERS", 1000), 30
	s, _ := start(t, testConfig(t.TempDir()))
	fillOne(t, s)
	var mu sync.Mutex
	var took []time.Duration
	sent := map[uint64]time.Time{} // by generation
	ready := make(chan struct{}, watchers)
	group, ctx := errgroup.WithContext(within(t))
	for range (watchers + 49) / 50 {
		m := join(t, s.Invite())
		for range min(50, watchers) {
			group.Go(func() error {
				stream, err := m.store.WatchProfiles(ctx, connect.NewRequest(&floxv1.WatchProfilesRequest{Asked: []string{manyName(0)}}))
				if err != nil {
					return err
				}
				for stream.Receive() {
					for _, p := range stream.Msg().GetPut() {
						now, number := time.Now(), p.GetLive().GetNumber()
						if number == manyGenerations {
							ready <- struct{}{}
							continue
						}
						mu.Lock()
						took = append(took, now.Sub(sent[number]))
						mu.Unlock()
						if number == uint64(manyGenerations+changes) {
							return stream.Close()
						}
					}
				}
				return fmt.Errorf("a stream ended: %w", errors.Join(stream.Err(), flox.ErrClosed))
			})
		}
	}
	for range watchers {
		select {
		case <-ready:
		case <-ctx.Done():
			t.Fatal(group.Wait())
		}
	}
	change := changer(t, s)
	for i := range changes {
		mu.Lock()
		sent[uint64(manyGenerations+i+1)] = time.Now()
		mu.Unlock()
		change()
		time.Sleep(300 * time.Millisecond) // each change by itself: what is asked is how soon all hear of it
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(took) != watchers*changes {
		t.Errorf("%d changes were heard, want %d", len(took), watchers*changes)
	}
	report(figure{Name: fmt.Sprintf("change to heard by %d watchers, p99 of %d changes", watchers, changes), Unit: "ms", Ours: quantile(took, 0.99)})
	report(figure{Name: fmt.Sprintf("change to heard by %d watchers, p50", watchers), Unit: "ms", Ours: quantile(took, 0.5)})
}

// changer makes one more generation of the first profile with every call.
func changer(t *testing.T, s *Server) func() {
	t.Helper()
	boss := person{Actor: &floxv1.Actor{User: "boss"}, admin: true}
	live, created := uint64(manyGenerations), uint64(0)
	err := s.profiles.view(within(t), cluster.Linearizable, func(r *cluster.Reader) error {
		p, err := profile.Find(r, manyName(0))
		created = p.GetCreatedIndex()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		reply, err := s.profiles.propose(within(t), boss, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Change{Change: &floxv1.NewGeneration{
			Profile: manyName(0), Live: live, Created: created, Kind: "install", Environments: []*floxv1.Environment{{System: linux, Path: fakePath(int(live))}}, //nolint:gosec // few
			Set: []*floxv1.Package{{Name: "package0", Version: fmt.Sprint("2.", live), Priority: profile.DefaultPriority, Paths: []*floxv1.PackagePaths{{System: linux, Paths: []string{fakePath(7)}}}}},
		}}})
		if err != nil || reply.GetMoved() {
			t.Fatal(reply, err)
		}
		live = reply.GetProfile().GetLive()
	}
}
