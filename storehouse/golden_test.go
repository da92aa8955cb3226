package storehouse

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/profile/channel"
	cluster "github.com/floxctl/flox/raft"
)

// goldenEnv names a new fixture to be written, as in
//
//	FLOX_GOLDEN=level9 go test -run TestOpensStatesOfOlderPrograms ./storehouse
//
// One is made and committed before each release, and whenever level rises. Those
// that are there stay as they are for ever: a change that does not open one breaks
// servers that are upgraded.
const goldenEnv = "FLOX_GOLDEN"

// goldens are state directories that older programs left, testdata/NAME.tar.gz.
const goldens = "testdata/level*.tar.gz"

// What a fixture holds, by name: makePath makes the same content again. All but
// goldenBehind is in the snapshot, that is in the log alone.
const (
	goldenBase, goldenTop, goldenDrv, goldenBehind = "golden-base", "golden-top", "golden.drv", "golden-behind"
	goldenProfile, goldenChannel                   = "alice/golden", "golden"
	goldenRenamed, goldenFormer                    = "alice/newer", "alice/older" // from level 6 on
	goldenTracked                                  = "http://127.0.0.1:9/golden"  // from level 7 on: nobody answers
	goldenUpstream                                 = "http://cache.golden.invalid"
	goldenRealisation                              = "sha256:0000000000000000000000000000000000000000000000000000000000000001!out"
)

// goldenPaths are the paths of a fixture.
func goldenPaths(t *testing.T) (base, top, drv, behind testPath) {
	t.Helper()
	base = makePath(t, goldenBase, 30_000)
	top = makePath(t, goldenTop, 30_000, base.info.Path)
	return base, top, makePath(t, goldenDrv, 1000), makePath(t, goldenBehind, 1000)
}

// writeGolden makes a fixture of what this program writes: something of every
// processor of the log, a snapshot, and entries behind it.
func writeGolden(t *testing.T, file string) {
	t.Helper()
	cfg := testConfig(t.TempDir())
	cfg.noFarm = true // it would end what nobody waits for
	cfg.OpenMembership, cfg.Socket = false, filepath.Join(t.TempDir(), "s.sock")
	s, stop := start(t, cfg)
	admin := operatorOf(t, s)
	sealed(t, s)
	base, top, drv, behind := goldenPaths(t)
	infos := []*flox.PathInfo{publish(t, s, base), publish(t, s, top)}
	publish(t, s, drv)
	if err := s.KeepPath(within(t), top.info.Path, false, "for ever", "tester"); err != nil {
		t.Fatal(err)
	}
	agree(t, s, traceOf(t, s, infos[1], infos[0]))
	set := &floxv1.UpstreamsCommand_Set{Set: &floxv1.Upstream{Url: goldenUpstream, Keys: []string{s.PublicKey()}, Priority: 7}}
	if _, err := s.proposeUpstream(within(t), &floxv1.UpstreamsCommand{Command: set}); err != nil {
		t.Fatal(err)
	}
	err := s.builds.note(within(t), &floxv1.NoteBuild{
		Drv: string(drv.info.Path),
		Outputs: []*floxv1.BuiltOutput{{
			Name: "out", Path: string(top.info.Path), Id: goldenRealisation,
			Realisation: &floxv1.Realisation{Id: goldenRealisation, Path: string(top.info.Path)},
		}},
		Record: &floxv1.BuildRecord{Drv: string(drv.info.Path), Log: string(base.info.Path), AskedBy: "tester", Outputs: []string{string(top.info.Path)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	laptop := newComputer(t)
	if _, err := laptop.join(s, makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent}), "laptop"); err != nil {
		t.Fatal(err)
	}
	setRoots(t, s, string(laptop.id()), base)
	gone := newComputer(t)
	if _, err := gone.join(s, makeInvite(t, admin, &floxv1.MakeInviteRequest{Role: members.Agent, Ephemeral: true}), "gone"); err != nil {
		t.Fatal(err)
	}
	s.seen.heard([]string{string(gone.id())})
	if err := s.recordSeen(within(t)); err != nil {
		t.Fatal(err)
	}
	newProfile(t, s, goldenProfile)
	for i, p := range []testPath{base, top} { // which have the same files
		pkg := asPackage(fmt.Sprint("p", i), "1", p)
		pkg.Priority += uint32(i)
		install(t, s, goldenProfile, pkg)
	}
	newProfile(t, s, goldenFormer)
	install(t, s, goldenFormer, asPackage("p", "1", base))
	renamed := &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Rename{Rename: &floxv1.RenameProfile{Profile: goldenFormer, To: goldenRenamed}}}
	tagged := &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Tag{Tag: &floxv1.TagGeneration{Profile: goldenRenamed, Name: "v1", Generation: 1}}}
	assigned := &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Assign{Assign: &floxv1.AssignProfile{
		Profile: goldenRenamed, Add: []*floxv1.ProfileAssignment{{Label: "site", Value: "berlin"}},
	}}}
	for _, c := range []*floxv1.ProfilesCommand{renamed, tagged, assigned} {
		if _, err := s.profiles.propose(within(t), adminPerson(), c); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		install(t, s, goldenRenamed, asPackage("p", fmt.Sprint("1.", i), base))
	}
	version := &floxv1.ChannelVersion{Source: string(base.info.Path), Catalogue: string(top.info.Path), Systems: []string{linux}, Packages: 1}
	published := &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Publish{Publish: &floxv1.NewChannelVersion{Channel: goldenChannel, Version: version}}}
	if _, err := s.channels.propose(within(t), adminPerson(), published); err != nil {
		t.Fatal(err)
	}
	enqueueGolden(t, s)
	tracked := &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Track{Track: &floxv1.ChannelTracking{
		Channel: goldenChannel, Url: goldenTracked, EveryMinutes: 60, Systems: []string{linux},
	}}}
	kept := &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Keep{Keep: &floxv1.KeepDerivation{
		Channel: goldenChannel, Kept: &floxv1.KeptDerivation{Package: &floxv1.CataloguePackage{Attr: "old", Name: "old", Version: "1", System: linux, Drv: string(drv.info.Path)}},
	}}}
	for _, c := range []*floxv1.ChannelsCommand{tracked, kept} {
		if _, err := s.channels.propose(within(t), adminPerson(), c); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.node.Snapshot(within(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.channels.propose(within(t), adminPerson(), published); err != nil {
		t.Fatal(err)
	}
	finishGolden(t, s)
	if _, err := s.profiles.rollback(within(t), alice(), &floxv1.RollbackProfileRequest{Name: goldenProfile}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.profiles.retain(within(t), alice(), &floxv1.SetProfileRetentionRequest{Name: goldenRenamed, Keep: 1}); err != nil {
		t.Fatal(err)
	}
	publish(t, s, behind)
	if _, err := admin.RemoveMachine(within(t), connect.NewRequest(&floxv1.RemoveMachineRequest{Machine: "gone", Reason: "stolen"})); err != nil {
		t.Fatal(err)
	}
	stop()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	if err := errors.Join(w.AddFS(os.DirFS(cfg.StateDir)), w.Close(), z.Close(), os.WriteFile(file, b.Bytes(), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// unpackGolden puts a fixture into a new directory, whose files have holes where
// they are zero.
func unpackGolden(t *testing.T, file string) (dir string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if h.FileInfo().IsDir() {
			err = os.MkdirAll(path, 0o700)
		} else {
			err = errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), writeSparse(path, r, h.Size))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func writeSparse(path string, r io.Reader, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = f.Truncate(size)
	block, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for at := int64(0); err == nil && at < size; at += int64(len(block)) {
		part := block[:min(int64(len(block)), size-at)]
		if _, err = io.ReadFull(r, part); err == nil && !bytes.Equal(part, zero[:len(part)]) {
			_, err = f.WriteAt(part, at)
		}
	}
	return errors.Join(err, f.Close())
}

// A server that is upgraded finds everything its old program left: facts, content,
// keys, members, the audit log, roots, traces, caches and builds, in its state as in
// log and snapshot alone; and it goes on.
func TestOpensStatesOfOlderPrograms(t *testing.T) {
	t.Parallel()
	if name := os.Getenv(goldenEnv); name != "" {
		writeGolden(t, filepath.Join("testdata", name+".tar.gz"))
	}
	files, err := filepath.Glob(goldens)
	if err != nil || len(files) == 0 {
		t.Fatalf("fixtures %v, %v", files, err)
	}
	for _, file := range files {
		for _, lost := range []string{"nothing", "state"} {
			t.Run(filepath.Base(file)+" "+lost+" lost", func(t *testing.T) {
				t.Parallel()
				cfg := testConfig(unpackGolden(t, file))
				checkParts(t, cfg.StateDir)
				if err := os.RemoveAll(filepath.Join(cfg.StateDir, "raft", lost)); err != nil {
					t.Fatal(err)
				}
				cfg.noFarm = true // it would end what nobody waits for
				cfg.OpenMembership, cfg.Socket = false, filepath.Join(t.TempDir(), "s.sock")
				for range 2 { // and what this program made of it
					s, stop := start(t, cfg)
					checkGolden(t, s)
					if file >= "testdata/level5" {
						checkGoldenProfile(t, s)
					}
					if file >= "testdata/level6" {
						checkGoldenRenamed(t, s)
					}
					if file >= "testdata/level7" {
						checkGoldenTracked(t, s)
						checkGoldenQueue(t, s)
					}
					stop()
				}
			})
		}
	}
}

// checkParts: each part is in the fixture, or the test shows less than it says.
func checkParts(t *testing.T, dir string) {
	t.Helper()
	for _, part := range []string{"raft/log/*.wal", "raft/log/wal-meta.db", "raft/snapshots/*/meta.json", "raft/snapshots/*/data/MANIFEST-*", "raft/state/*/MANIFEST-*", "packs/packs/*.pack", "keys/machine.key"} {
		if found, err := iofs.Glob(os.DirFS(dir), part); err != nil || len(found) == 0 {
			t.Errorf("fixture without %s: %v", part, err)
		}
	}
}

// checkGoldenMembers checks who is a member, and what the audit log says of them.
func checkGoldenMembers(t *testing.T, admin floxv1connect.AdminClient) {
	t.Helper()
	list, err := admin.ListMachines(within(t), connect.NewRequest(&floxv1.ListMachinesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range list.Msg.GetMachines() {
		names = append(names, m.GetMachine().GetName())
	}
	if slices.Sort(names); !slices.Equal(names, []string{"laptop", "test"}) {
		t.Errorf("members %v, want the server and the laptop", names)
	}
	log := auditOf(t, admin, &floxv1.AuditRequest{})
	for action, want := range map[string]int{"machine.join": 2, "machine.revoke": 1, "invite.make": 2} {
		if got := len(slices.DeleteFunc(slices.Clone(log), func(a string) bool { return a != action })); got != want {
			t.Errorf("the audit log has %s %d times, want %d: %v", action, got, want, log)
		}
	}
}

// checkGoldenProfile checks the profile and the channel of fixtures that have them.
func checkGoldenProfile(t *testing.T, s *Server) {
	t.Helper()
	admin := operatorOf(t, s)
	now, err := admin.ShowProfile(within(t), connect.NewRequest(&floxv1.ShowProfileRequest{Name: goldenProfile}))
	if err != nil {
		t.Fatal(err)
	}
	if p := now.Msg.GetProfile(); p.GetLive() != 1 || p.GetLast() != 2 || !p.GetHeld() {
		t.Errorf("profile %v, want the first of two generations, held", p)
	}
	history, err := admin.ProfileHistory(within(t), connect.NewRequest(&floxv1.ProfileHistoryRequest{Name: goldenProfile}))
	if err != nil || len(history.Msg.GetEvents()) != 4 {
		t.Errorf("history %v, %v, want four events", history, err)
	}
	channel, err := admin.ShowChannel(within(t), connect.NewRequest(&floxv1.ShowChannelRequest{Channel: goldenChannel}))
	if err != nil || channel.Msg.GetChannel().GetLast() != 2 || len(channel.Msg.GetVersions()) != 2 || channel.Msg.GetVersions()[1].GetPackages() != 1 {
		t.Errorf("channel %v, %v, want two versions", channel, err)
	}
	for _, n := range []uint64{1, 2} {
		g, err := admin.ShowProfile(within(t), connect.NewRequest(&floxv1.ShowProfileRequest{Name: goldenProfile, Generation: n}))
		if err != nil || len(g.Msg.GetGeneration().GetPackages()) != int(n) { //nolint:gosec // small
			t.Errorf("generation %d: %v, %v, want as many packages", n, g, err)
		}
		linksOf(t, s, g.Msg.GetGeneration())
	}
}

// checkGoldenRenamed checks what fixtures have from level 6 on.
func checkGoldenRenamed(t *testing.T, s *Server) {
	t.Helper()
	admin := operatorOf(t, s)
	now, err := admin.ShowProfile(within(t), connect.NewRequest(&floxv1.ShowProfileRequest{Name: goldenRenamed}))
	p := now.Msg.GetProfile()
	if err != nil || p.GetLive() != 4 || len(now.Msg.GetGeneration().GetPackages()) != 1 || p.GetFirst() != 4 || p.GetOlder() != 2 || p.GetKeep() != 1 || len(p.GetTags()) != 1 || len(p.GetAssigned()) != 1 {
		t.Errorf("the renamed profile %v, %v", now, err)
	}
	if _, err := admin.ShowProfile(within(t), connect.NewRequest(&floxv1.ShowProfileRequest{Name: goldenRenamed, Generation: 2})); err == nil || !strings.Contains(err.Error(), "was dropped") {
		t.Errorf("a generation that was dropped: %v", err)
	}
	if _, err := admin.ShowProfile(within(t), connect.NewRequest(&floxv1.ShowProfileRequest{Name: goldenFormer})); err == nil || !strings.Contains(err.Error(), "renamed to "+goldenRenamed) {
		t.Errorf("by its old name: %v", err)
	}
}

// checkGoldenTracked checks what fixtures have of channels from level 7 on.
func checkGoldenTracked(t *testing.T, s *Server) {
	t.Helper()
	_, _, drv, _ := goldenPaths(t)
	at, err := operatorOf(t, s).ShowChannel(within(t), connect.NewRequest(&floxv1.ShowChannelRequest{Channel: goldenChannel}))
	if err != nil || at.Msg.GetTracking().GetUrl() != goldenTracked || at.Msg.GetTracking().GetEveryMinutes() != 60 {
		t.Errorf("what the channel tracks: %v, %v", at, err)
	}
	err = s.channels.view(within(t), cluster.Linearizable, func(r *cluster.Reader) error {
		kept, err := channel.Kept(r, goldenChannel)
		if len(kept) != 1 || kept[0].GetPackage().GetDrv() != string(drv.info.Path) {
			t.Errorf("kept derivations %v", kept)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// checkGolden checks that a server has what writeGolden left, and goes on with it.
func checkGolden(t *testing.T, s *Server) {
	t.Helper()
	base, top, drv, behind := goldenPaths(t)
	for _, p := range []testPath{base, top, drv, behind} {
		checkWhole(t, s, p)
	}
	if secrets, err := openSecrets(s.roster.now.Load().secrets, s.id.peer, s.id.machine); err != nil || len(secrets.GetSwarmSecrets()) == 0 {
		t.Errorf("the cluster's secrets: %v, %v", secrets, err)
	}
	admin := operatorOf(t, s)
	checkGoldenMembers(t, admin)
	listed, err := s.upstreams.list(within(t))
	if err != nil || len(listed.GetUpstreams()) != 1 || listed.GetUpstreams()[0].GetUpstream().GetUrl() != goldenUpstream || listed.GetUpstreams()[0].GetUpstream().GetPriority() != 7 {
		t.Errorf("upstreams %v, %v", listed, err)
	}
	why, err := s.Why(within(t), base.info.Path, true)
	// The laptop's set is given up in its time, as that of a machine that nobody sees.
	if text := fmt.Sprint(why); err != nil || !strings.Contains(text, "for ever") {
		t.Errorf("%s stays because of %v, %v; want who keeps what refers to it", base.info.Path, why, err)
	}
	awaitMade(t, s, top.info.Path)
	if traces := askTraces(t, s, top.info.Path); len(traces) != 1 || len(traces[0].GetTrees()) != 2 {
		t.Errorf("start traces %v, want one of two trees", traces)
	}
	err = s.read(within(t), cluster.Linearizable, func(r *cluster.Reader) error {
		record, err := readRecord(r, drv.info.Path.HashPart())
		if err == nil && record.GetAskedBy() != "tester" {
			t.Errorf("record %v", record)
		}
		real, err2 := readRealisation(r, goldenRealisation)
		if err2 == nil && real.GetPath() != string(top.info.Path) {
			t.Errorf("realisation %v", real)
		}
		return errors.Join(err, err2)
	})
	if err != nil {
		t.Errorf("what is known of builds: %v", err)
	}
	// And it goes on, with all this program knows.
	fresh := makePath(t, fmt.Sprint("fresh-", s.node.Applied()), 1000, top.info.Path)
	publish(t, s, fresh)
	checkWhole(t, s, fresh)
	if err := s.node.Snapshot(within(t)); err != nil {
		t.Error(err)
	}
}
