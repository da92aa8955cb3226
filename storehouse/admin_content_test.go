package storehouse

import (
	"context"
	"crypto/sha256"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/members"
)

// collectOver collects by a call, and gives the last progress and all paths named.
func collectOver(t *testing.T, a floxv1connect.AdminClient, q *floxv1.CollectRequest) (last *floxv1.CollectProgress, paths []string, err error) {
	t.Helper()
	stream, err := a.Collect(within(t), connect.NewRequest(q))
	if err != nil {
		return nil, nil, api.FromConnect(err)
	}
	defer stream.Close()
	for stream.Receive() {
		last = stream.Msg()
		paths = append(paths, last.GetPaths()...)
	}
	return last, paths, api.FromConnect(stream.Err())
}

// agedMore is aged for a collection that keeps what is of the last second.
func agedMore() {
	aged()
	aged()
}

func usageOver(t *testing.T, a floxv1connect.AdminClient) *floxv1.UsageResponse {
	t.Helper()
	resp, err := a.Usage(within(t), connect.NewRequest(&floxv1.UsageRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	return resp.Msg
}

// What operators do with content, over the control socket.
func TestOperatorsCollectAndAskWhy(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, func(c *Config) { c.CollectGrace, c.touchEvery = 20*time.Millisecond, time.Millisecond })
	base := makePath(t, "base", 40_000)
	kept := makePath(t, "kept", 40_000, base.info.Path)
	dead := makePath(t, "dead", 300_000)
	for _, p := range []testPath{base, kept, dead} {
		publish(t, s, p)
	}
	keep := &floxv1.KeepPathRequest{Path: s.cfg.StoreDir.Join(kept.info.Path), Reason: "release"}
	if _, err := admin.KeepPath(within(t), connect.NewRequest(keep)); err != nil {
		t.Fatal(err)
	}
	why, err := admin.Why(within(t), connect.NewRequest(&floxv1.WhyRequest{Path: string(base.info.Path), All: true}))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(why.Msg.GetChains(), func(c *floxv1.WhyChain) bool {
		return c.GetRoot().GetKind() == rootKeep && c.GetRoot().GetName() == "release" && slices.Equal(c.GetPaths(), []string{string(kept.info.Path), string(base.info.Path)})
	}) {
		t.Errorf("why: %v, want a chain from what is kept", why.Msg)
	}
	setRoots(t, s, string(s.id.peer), base)
	roots, err := admin.Roots(within(t), connect.NewRequest(&floxv1.RootsRequest{Path: string(base.info.Path)}))
	if err != nil || !slices.ContainsFunc(roots.Msg.GetRoots(), func(r *floxv1.Root) bool { return r.GetKind() == rootMachine && r.GetName() == "test" }) {
		t.Errorf("roots: %v, %v, want the machine by its name", roots, err)
	}
	agedMore()
	collectDead(t, s, admin, base, dead)
	undo := &floxv1.KeepPathRequest{Path: string(kept.info.Path), Undo: true}
	if _, err := admin.KeepPath(within(t), connect.NewRequest(undo)); err != nil {
		t.Fatal(err)
	}
	want := "content.keep content.collect content.collected content.unkeep"
	if got := strings.Join(auditOf(t, admin, &floxv1.AuditRequest{Action: "content."}), " "); got != want {
		t.Errorf("the audit log has %q, want %q", got, want)
	}
	if _, err := admin.Why(within(t), connect.NewRequest(&floxv1.WhyRequest{Path: "/gnu/store/" + string(base.info.Path)})); !errors.Is(api.FromConnect(err), flox.ErrBadInput) {
		t.Errorf("a path of another store: %v", err)
	}
	if _, _, err := collectOver(t, admin, &floxv1.CollectRequest{KeepRecentSeconds: 1 << 62}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("a time that is none: %v", err)
	}
}

// collectDead collects, dry and then for good, where one of three paths is dead.
func collectDead(t *testing.T, s *Server, admin floxv1connect.AdminClient, base, dead testPath) {
	t.Helper()
	dry, listed, err := collectOver(t, admin, &floxv1.CollectRequest{DryRun: true, KeepRecentSeconds: 1})
	if err != nil || !slices.Equal(listed, []string{string(dead.info.Path)}) || dry.GetDeadPaths() != 1 || !dry.GetFinished() {
		t.Errorf("dry run: %q, %v, %v", listed, dry, err)
	}
	checkWhole(t, s, dead)
	if u := usageOver(t, admin); u.GetPaths() != 3 || u.GetCondemnedPaths() != 0 || u.GetCollectedUnix() != 0 || u.GetDiskTotal() == 0 || u.GetUnderPlaced() != 0 {
		t.Errorf("after a dry run: %v", u)
	}
	// What is kept as recent reaches further back than asked for, and that is said.
	if at := time.UnixMilli(dry.GetUsedSinceUnixMs()); !at.Before(time.Now().Add(-time.Second-s.cfg.touchEvery)) || time.Since(at) > time.Hour {
		t.Errorf("what was used since %s stays", at)
	}
	blocks := usageOver(t, admin).GetBlocks()
	got, _, err := collectOver(t, admin, &floxv1.CollectRequest{KeepRecentSeconds: 1})
	if err != nil || got.GetDeadPaths() != 1 || got.GetDeadBytes() != dead.info.NarSize {
		t.Fatalf("%v, %v: want one path gone", got, err)
	}
	if now := usageOver(t, admin).GetBlocks(); now >= blocks {
		t.Errorf("%d blocks, %d before", now, blocks)
	}
	if stillValid(t, s, dead) || !stillValid(t, s, base) {
		t.Error("want dead gone and base there")
	}
	if u := usageOver(t, admin); u.GetPaths() != 2 || u.GetCollectedUnix() == 0 || !strings.HasPrefix(u.GetCollected(), "paths removed: 1,") || u.GetCollecting() != "" {
		t.Errorf("after a collection: %v", u)
	}
}

// A collection ends with its caller, and another goes on with what it condemned;
// meanwhile a second one is told so.
func TestCollectionEndsWithItsCaller(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, func(c *Config) { c.CollectGrace, c.touchEvery = time.Hour, time.Millisecond })
	dead := makePath(t, "dead", 30_000)
	publish(t, s, dead)
	agedMore()
	ctx, cancel := context.WithCancel(within(t))
	defer cancel()
	stream, err := admin.Collect(ctx, connect.NewRequest(&floxv1.CollectRequest{KeepRecentSeconds: 1}))
	if err != nil {
		t.Fatal(err)
	}
	for stream.Receive() && stream.Msg().GetPhase() != phaseWait { //nolint:revive // until it waits
	}
	if u := usageOver(t, admin); u.GetCollecting() != phaseWait || u.GetCondemnedPaths() != 1 {
		t.Errorf("while it waits: %v, %v", u, stream.Err())
	}
	if _, _, err := collectOver(t, admin, &floxv1.CollectRequest{}); !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), phaseWait) {
		t.Errorf("a second one: %v, want ErrBusy and the phase", err)
	}
	cancel()
	_ = stream.Close() // it was cut
	eventually(t, "the collection ended", func() bool { return usageOver(t, admin).GetCollecting() == "" })
	s.cfg.CollectGrace = time.Millisecond
	if got, _, err := collectOver(t, admin, &floxv1.CollectRequest{Resume: true}); err != nil || got.GetDeadPaths() != 1 || stillValid(t, s, dead) {
		t.Errorf("resumed: %v, %v", got, err)
	}
}

// A collection that a server's end cuts short says so: its caller did not stop it.
func TestCollectionSaysThatTheServerEnds(t *testing.T) {
	t.Parallel()
	cfg := quickGC(t.TempDir())
	cfg.CollectGrace, cfg.Socket = time.Hour, filepath.Join(t.TempDir(), "s")
	s, stop := start(t, cfg)
	publish(t, s, makePath(t, "dead", 30_000))
	agedMore()
	stream, err := operatorOf(t, s).Collect(within(t), connect.NewRequest(&floxv1.CollectRequest{KeepRecentSeconds: 1}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for stream.Receive() && stream.Msg().GetPhase() != phaseWait { //nolint:revive // until it waits
	}
	stop()
	for stream.Receive() { //nolint:revive // to its end
	}
	if err := stream.Err(); err == nil || errors.Is(err, context.Canceled) || connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("it ended with %v", err)
	}
}

// plainMember is a machine that joined as an agent, on which alice has no role of her own.
func plainMember(t *testing.T, s *Server, operator floxv1connect.AdminClient) floxv1connect.AdminClient {
	t.Helper()
	alice, _ := agentMember(t, s, operator, "laptop")
	return alice
}

// agentMember is a machine that joined as an agent, with its peer ID.
func agentMember(t *testing.T, s *Server, operator floxv1connect.AdminClient, name string) (floxv1connect.AdminClient, string) {
	t.Helper()
	laptop := newComputer(t)
	joined, err := laptop.join(s, makeInvite(t, operator, &floxv1.MakeInviteRequest{Role: members.Agent}), name)
	if err != nil {
		t.Fatal(err)
	}
	keep, err := api.ParseInvite(joined.GetInvite())
	if err != nil {
		t.Fatal(err)
	}
	laptop.online(s, keep.Secret)
	return floxv1connect.NewAdminClient(laptop.web(s), "http://storehouse"), string(laptop.id())
}

// asAlice makes a request on behalf of a plain member.
func asAlice[T any](m *T) *connect.Request[T] {
	req := connect.NewRequest(m)
	req.Header().Set(UserHeader, "alice")
	return req
}

// toItsEnd reads a stream and gives why it ended.
func toItsEnd[T any](stream *connect.ServerStreamForClient[T], err error) error {
	if err != nil {
		return err
	}
	for stream.Receive() { //nolint:revive // to its end
	}
	return errors.Join(stream.Err(), stream.Close())
}

// A plain member looks at everything and changes nothing, also not by saying that
// a server asked for it.
func TestPlainMemberChangesNothing(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, nil)
	p := makePath(t, "p", 1000)
	publish(t, s, p)
	alice := plainMember(t, s, operator)
	path := string(p.info.Path)
	_, usage := alice.Usage(within(t), asAlice(&floxv1.UsageRequest{}))
	_, servers := alice.Servers(within(t), asAlice(&floxv1.ServersRequest{}))
	_, roots := alice.Roots(within(t), asAlice(&floxv1.RootsRequest{}))
	_, why := alice.Why(within(t), asAlice(&floxv1.WhyRequest{Path: path}))
	if err := errors.Join(usage, servers, roots, why); err != nil {
		t.Errorf("a member may not look: %v", err)
	}
	forged := asAlice(&floxv1.KeepPathRequest{Path: path})
	by, err := forWhom(&floxv1.Actor{Machine: "test", User: "root"})
	if err != nil {
		t.Fatal(err)
	}
	forged.Header().Set(actorHeader, by)
	for what, call := range map[string]func() error{
		"keep": func() error {
			_, err := alice.KeepPath(within(t), asAlice(&floxv1.KeepPathRequest{Path: path}))
			return err
		},
		"keep as if a server asked": func() error { _, err := alice.KeepPath(within(t), forged); return err },
		"gc": func() error {
			return toItsEnd(alice.Collect(within(t), asAlice(&floxv1.CollectRequest{})))
		},
		"import": func() error {
			return toItsEnd(alice.Import(within(t), asAlice(&floxv1.ImportRequest{From: "/etc"})))
		},
		"transfer": func() error { _, err := alice.Transfer(within(t), asAlice(&floxv1.TransferRequest{})); return err },
		"drain": func() error {
			_, err := alice.Drain(within(t), asAlice(&floxv1.DrainRequest{Server: "test"}))
			return err
		},
		"remove": func() error {
			_, err := alice.RemoveServer(within(t), asAlice(&floxv1.RemoveServerRequest{Server: "test", Force: true}))
			return err
		},
	} {
		if err := api.FromConnect(call()); !errors.Is(err, flox.ErrDenied) {
			t.Errorf("%s by a plain member: %v, want ErrDenied", what, err)
		}
	}
	refused := strings.Join(auditOf(t, operator, &floxv1.AuditRequest{}), " ")
	for _, action := range []string{actionKeep, actionCollect, actionImport, actionTransfer, actionDrain, actionRemove} {
		if !strings.Contains(refused, "!"+action) {
			t.Errorf("no refused %s in the audit log: %s", action, refused)
		}
	}
}

// An import over the control socket, from a directory on the server.
func TestOperatorImports(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, nil)
	f := newFakeCache(t)
	base := makePath(t, "base", 5000)
	top := makePath(t, "top", 5000, base.info.Path)
	other := makePath(t, "other", 5000)
	for _, p := range []testPath{base, top, other} {
		f.add(p, p.nar, true)
	}
	q := &floxv1.ImportRequest{From: f.dir, Paths: []string{s.cfg.StoreDir.Join(top.info.Path)}, Keys: []string{f.key.Public().String()}}
	run := func(q *floxv1.ImportRequest) (last *floxv1.ImportProgress, err error) {
		stream, err := admin.Import(within(t), connect.NewRequest(q))
		if err != nil {
			return nil, api.FromConnect(err)
		}
		defer stream.Close()
		for stream.Receive() {
			last = stream.Msg()
		}
		return last, api.FromConnect(stream.Err())
	}
	got, err := run(q)
	if err != nil || !got.GetFinished() || got.GetDonePaths() != 2 || got.GetFailedPaths() != 0 {
		t.Fatalf("%v, %v: want top and base", got, err)
	}
	checkWhole(t, s, top)
	if stillValid(t, s, other) {
		t.Error("what was not named was imported")
	}
	if _, err := run(&floxv1.ImportRequest{From: "/nowhere/at/all"}); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a directory that is not there: %v", err)
	}
	if _, err := run(&floxv1.ImportRequest{From: f.dir, Jobs: maxJobs + 1}); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("too many jobs: %v", err)
	}
	if got := auditOf(t, admin, &floxv1.AuditRequest{Action: actionImport}); len(got) != 1 {
		t.Errorf("one import began, and the audit log has %q", got)
	}
	if got := redacted("https://me:secret@cache.example.org/x"); strings.Contains(got, "secret") {
		t.Errorf("a password is written down: %s", got)
	}
}

// The leader collects by itself once it is due, and not before.
func TestStorehouseCollectsByItself(t *testing.T) {
	t.Parallel()
	s, admin := closedHouse(t, func(c *Config) {
		c.CollectGrace, c.touchEvery, c.CollectEvery = time.Millisecond, time.Millisecond, 200*time.Millisecond
	})
	eventually(t, "it collected", func() bool { return usageOver(t, admin).GetCollectedUnix() > 0 })
	stream, err := admin.Audit(within(t), connect.NewRequest(&floxv1.AuditRequest{Action: actionCollected}))
	if err != nil || !stream.Receive() {
		t.Fatal(err, stream.Err())
	}
	defer stream.Close()
	if by := stream.Msg().GetRecords()[0].GetActor(); by.GetPeer() != string(s.id.peer) || by.GetUser() != "" {
		t.Errorf("it was collected by %v, want the server itself", by)
	}
	if due, err := s.collectDue(within(t), time.Hour); due || err != nil {
		t.Errorf("due an hour after the last already: %v, %v", due, err)
	}
	if due, err := s.collectDue(within(t), time.Nanosecond); !due || err != nil {
		t.Errorf("not due long after the last: %v, %v", due, err)
	}
}

// The one machine of an embedded storehouse collects as Nix does: what is recent goes
// at once, but not what it or an operator keeps, nor the derivations of that. Where
// another machine is a member, or the storehouse is no machine's own, it is refused.
func TestTheOneMachineCollects(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, func(c *Config) { c.CollectGrace, c.Embedded = time.Hour, true })
	a, peer := agentMember(t, s, operator, "laptop")
	drv := makePath(t, "live.drv", 10_000)
	publish(t, s, drv)
	live, dead, user := makePath(t, "live", 40_000), makePath(t, "dead", 40_000), testPath{}
	live.info.Deriver = drv.info.Path
	publish(t, s, live)
	publish(t, s, dead)
	user = makePath(t, "user", 40_000, dead.info.Path)
	publish(t, s, user)
	setRoots(t, s, peer, user) // an older set than what it says now
	machine := func(paths ...testPath) *floxv1.CollectRequest {
		m := &floxv1.MachineCollection{Roots: []string{string(live.info.Path)}}
		for _, p := range paths {
			m.Paths = append(m.Paths, string(p.info.Path))
		}
		return &floxv1.CollectRequest{Machine: m}
	}
	if _, gone, err := collectOver(t, a, machine(dead, live)); err != nil || len(gone) > 0 {
		t.Errorf("what is referred to or kept: %q went, %v", gone, err)
	}
	dry := machine()
	dry.DryRun = true
	both := []string{string(dead.info.Path), string(user.info.Path)}
	_, would, err := collectOver(t, a, dry)
	slices.Sort(would)
	slices.Sort(both)
	if err != nil || !slices.Equal(would, both) {
		t.Errorf("dry: %q, %v, want %q", would, err, both)
	}
	little := machine()
	little.Machine.MaxFreedBytes = 1
	if last, gone, err := collectOver(t, a, little); err != nil || !slices.Equal(gone, []string{string(user.info.Path)}) || last.GetDeadBytes() != user.info.NarSize {
		t.Errorf("at least a byte: %q went, %v, %v", gone, last, err)
	}
	if u := usageOver(t, operator); u.GetCondemnedPaths() != 0 {
		t.Errorf("%d paths are condemned, want none", u.GetCondemnedPaths())
	}
	if _, gone, err := collectOver(t, a, machine(dead)); err != nil || !slices.Equal(gone, []string{string(dead.info.Path)}) || stillValid(t, s, dead) {
		t.Errorf("named: %q went, %v", gone, err)
	}
	if _, gone, err := collectOver(t, a, machine()); err != nil || len(gone) > 0 || !stillValid(t, s, drv) || !stillValid(t, s, live) {
		t.Errorf("nothing is dead: %q went, %v", gone, err)
	}
	if _, _, err := collectOver(t, operator, machine()); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("who is no agent: %v", err)
	}
	_, _ = agentMember(t, s, operator, "other")
	if _, _, err := collectOver(t, a, machine()); !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "other") {
		t.Errorf("with another machine: %v", err)
	}
}

// What another NAR a machine was offered for a valid path is listed, once a machine; the
// first NAR stays.
func TestMachinesReportDifferences(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, nil)
	p := makePath(t, "p", 1000)
	publish(t, s, p)
	other := sha256.Sum256([]byte("other"))
	report := func(hash [32]byte, by string) bool {
		t.Helper()
		recorded, err := s.reported(within(t), &floxv1.ReportDifferenceRequest{Path: string(p.info.Path), NarHash: hash[:]}, by)
		if err != nil {
			t.Fatal(err)
		}
		return recorded
	}
	if report(p.info.NarHash, "machine a") || !report(other, "machine a") || report(other, "machine a") || !report(other, "machine b") {
		t.Error("want the same NAR not recorded, another one once for each machine")
	}
	got, err := operator.Differences(within(t), connect.NewRequest(&floxv1.DifferencesRequest{Path: string(p.info.Path)}))
	if err != nil || len(got.Msg.GetDifferences()) != 2 || got.Msg.GetDifferences()[1].GetPublisher() != "machine a" || [32]byte(got.Msg.GetDifferences()[1].GetOfferedNarHash()) != other {
		t.Errorf("listed: %v, %v", got, err)
	}
	checkWhole(t, s, p)
	absent := makePath(t, "absent", 1000)
	if _, err := s.reported(within(t), &floxv1.ReportDifferenceRequest{Path: string(absent.info.Path), NarHash: other[:]}, "machine a"); !errors.Is(err, flox.ErrNotFound) || stillValid(t, s, absent) {
		t.Errorf("of what is not valid: %v", err)
	}
}
