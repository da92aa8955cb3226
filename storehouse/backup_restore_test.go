package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/pack/bucket/s3test"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
)

// restore restores the newest backup.
func restore(t *testing.T, cfg Config, from string, change func(*RestoreOptions)) (*Restored, []BackupDamage, error) {
	t.Helper()
	opts := RestoreOptions{From: from, Passphrase: []byte(testPassphrase)}
	if change != nil {
		change(&opts)
	}
	var found []BackupDamage
	done, err := Restore(within(t), cfg, opts, func(d BackupDamage) { found = append(found, d) })
	return done, found, err
}

// A storehouse whose servers are all lost comes back from a backup: paths, members
// and keys, under the same identity; in a new epoch, that everybody who trusted the
// old one follows; without the other servers; and no invite of then lets anybody in.
func TestRestoredStorehouseGoesOn(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	s, stop := start(t, cfg)
	sealed(t, s)
	agent := join(t, s.Invite())
	invite := s.Invite()
	app := makePath(t, "app", 300_000)
	publish(t, s, app)
	addServer(t, s, "lost")
	for _, add := range []*floxv1.MembersCommand{
		{Command: &floxv1.MembersCommand_Add{Add: &floxv1.Machine{Peer: string(agent.host.ID()), Name: "laptop", Role: members.Agent}}},
		{Command: &floxv1.MembersCommand_MakeInvite{MakeInvite: &floxv1.InviteRecord{
			Id: "LANWINDOW", Role: members.Agent, Lan: true, Uses: 9, ExpiresUnixMs: time.Now().Add(time.Hour).UnixMilli(),
		}}},
	} {
		if _, err := s.proposeMembers(within(t), add); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the list names both servers", func() bool { return len(newest(t, s).Voters) == 2 })
	before := newest(t, s)
	place := t.TempDir()
	backUp(t, s, place)
	late := makePath(t, "late", 1000)
	publish(t, s, late)
	was := s.node.Applied()
	stop()

	cfg.StateDir = filepath.Join(t.TempDir(), "again")
	done, found, err := restore(t, cfg, place, nil)
	if err != nil || len(found) > 0 || done.Paths != 1 || done.Peer != invite.Storehouse[0].ID {
		t.Fatalf("restored %+v %v %v", done, found, err)
	}
	s, stop = startChanged(t, cfg, func(s *Server) {
		if list := s.roster.servers(); len(list) != 2 || s.servers.allowed(p2p.PeerID(list[0].GetPeer())) && s.servers.allowed(p2p.PeerID(list[1].GetPeer())) {
			t.Errorf("before its epoch began, one of the servers of before is let in: %v", list)
		}
	})
	checkWhole(t, s, app)
	if _, err := s.Info(within(t), late.info.Path.HashPart()); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("what came after the backup: %v", err)
	}
	after := newest(t, s)
	if err := content.Restored(before, after); err != nil || after.Epoch <= before.Epoch || len(after.Voters) != 1 {
		t.Errorf("trust list %+v behind %+v: %v", after, before, err)
	}
	if m, ok := s.roster.machine(agent.host.ID()); !ok || m.GetName() != "laptop" {
		t.Errorf("the member is %v", m)
	}
	if list := s.roster.servers(); len(list) != 1 || list[0].GetPeer() != done.Peer {
		t.Errorf("servers %v", list)
	}
	if s.windowOpen() {
		t.Error("a window that was open when the backup was written is open again")
	}
	if !bytes.Equal(s.Invite().Secret, invite.Secret) || s.Invite().NixKey != invite.NixKey || s.node.Applied() <= done.Index || was == 0 {
		t.Errorf("another storehouse: %+v", s.Invite())
	}
	token, err := os.ReadFile(s.cfg.UploadTokenFile)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.CheckToken(strings.TrimSpace(string(token))); err != nil {
		t.Error(err)
	}
	publish(t, s, late)
	m := join(t, s.Invite())
	m.token = strings.TrimSpace(string(token))
	next := makePath(t, "next", 5000, app.info.Path)
	if _, err := m.upload(within(t), next); err != nil {
		t.Error(err)
	}
	stop()
	s, stop = start(t, cfg) // it is one like any other
	checkWhole(t, s, next)
	if newest(t, s).Epoch != after.Epoch {
		t.Error("the next start began another epoch")
	}
	backUp(t, s, place)
	wantSound(t, place, 3)
	stop()
}

// With a key of its own the restored server is another machine, with all keys of the
// storehouse all the same.
func TestRestoreAsAnotherMachine(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	s, stop := start(t, cfg)
	sealed(t, s)
	app := makePath(t, "app", 1000)
	publish(t, s, app)
	place, nixKey, peer := t.TempDir(), s.PublicKey(), string(s.id.peer)
	backUp(t, s, place)
	stop()
	cfg.StateDir = t.TempDir()
	done, _, err := restore(t, cfg, place, func(o *RestoreOptions) { o.NewKey = true })
	if err != nil || done.Peer == peer {
		t.Fatalf("restored %+v, %v; it was %s", done, err, peer)
	}
	s, _ = start(t, cfg)
	checkWhole(t, s, app)
	if list := s.roster.servers(); len(list) != 1 || list[0].GetPeer() != done.Peer || s.PublicKey() != nixKey {
		t.Errorf("servers %v, key %s; want %s alone, with %s", list, s.PublicKey(), done.Peer, nixKey)
	}
}

// What cannot be restored is refused; what was interrupted goes on, and until it is
// finished no server starts.
func TestRestoreRefuses(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	s, stop := start(t, cfg)
	sealed(t, s)
	app := makePath(t, "app", 300_000)
	publish(t, s, app)
	place := t.TempDir()
	backUp(t, s, place)
	stop()

	for name, c := range map[string]struct {
		change func(*Config, *RestoreOptions)
		kind   error
		words  string
	}{
		"the same directory": {func(c *Config, _ *RestoreOptions) { c.StateDir = cfg.StateDir }, flox.ErrBusy, "empty"},
		"another store":      {func(c *Config, _ *RestoreOptions) { c.StoreDir = "/other/store" }, flox.ErrBadInput, "/other/store"},
		"another name":       {func(c *Config, _ *RestoreOptions) { c.Name = "another" }, flox.ErrBadInput, "another"},
		"no such backup":     {func(_ *Config, o *RestoreOptions) { o.Backup = "20260101T000000Z-1" }, flox.ErrNotFound, "20260101T000000Z-1"},
		"no name of one":     {func(_ *Config, o *RestoreOptions) { o.Backup = "../x" }, flox.ErrBadInput, "../x"},
		"no backups":         {func(c *Config, o *RestoreOptions) { o.From = filepath.Dir(c.StateDir) }, flox.ErrNotFound, "holds no backups"},
		"no passphrase":      {func(_ *Config, o *RestoreOptions) { o.Passphrase = nil }, flox.ErrBadInput, "passphrase"},
		"wrong passphrase":   {func(_ *Config, o *RestoreOptions) { o.Passphrase = []byte("another passphrase") }, flox.ErrDenied, "passphrase"},
	} {
		t.Run(name, func(t *testing.T) {
			to, opts := testConfig(filepath.Join(t.TempDir(), "state")), RestoreOptions{From: place, Passphrase: []byte(testPassphrase)}
			c.change(&to, &opts)
			_, err := Restore(within(t), to, opts, func(BackupDamage) {})
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("got %v, want %v with %q", err, c.kind, c.words)
			}
		})
	}

	for _, part := range []string{"content", "backups"} {
		t.Run("damaged "+part, func(t *testing.T) {
			to := testConfig(filepath.Join(t.TempDir(), "state"))
			for _, file := range filesOf(t, filepath.Join(place, part)) {
				whole, err := os.ReadFile(filepath.Join(place, part, file))
				if err != nil {
					t.Fatal(err)
				}
				bad := bytes.Clone(whole)
				bad[len(bad)/2] ^= 1
				if err := os.WriteFile(filepath.Join(place, part, file), bad, 0o600); err != nil {
					t.Fatal(err)
				}
				_, found, err := restore(t, to, place, nil)
				if !errors.Is(err, flox.ErrCorrupt) && !errors.Is(err, flox.ErrDenied) {
					t.Errorf("%s: %v", file, err)
				}
				if said := fmt.Sprint(found, err); !strings.Contains(said, strings.TrimSuffix(file, "/manifest.json")) && !strings.HasSuffix(file, "keys") {
					t.Errorf("%s is not named: %s", file, said)
				}
				if s, err := New(to); !errors.Is(err, flox.ErrBusy) && !strings.HasSuffix(file, "manifest.json") {
					t.Errorf("a server starts on what is restored in part: %v", err)
					if err == nil {
						s.Close()
					}
				}
				if err := os.WriteFile(filepath.Join(place, part, file), whole, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if _, _, err := restore(t, to, place, nil); err != nil {
				t.Fatal(err)
			}
			s, stop := start(t, to)
			checkWhole(t, s, app)
			stop()
		})
	}
}

// An interrupted restore goes on with the content that it has.
func TestRestoreGoesOn(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	cfg.backupObject = 64 << 10
	s, stop := start(t, cfg)
	sealed(t, s)
	app := makePath(t, "app", 2<<20)
	publish(t, s, app)
	place := t.TempDir()
	backUp(t, s, place)
	stop()
	cfg.StateDir = t.TempDir()
	for i := range 3 {
		ctx, cancel := context.WithCancel(within(t))
		steps := 0
		_, err := Restore(ctx, cfg, RestoreOptions{From: place, Passphrase: []byte(testPassphrase), Progress: func(phase string, _, _ uint64) {
			if steps++; steps > 1+3*i && phase == phaseContent || i == 2 && phase == phaseFacts {
				cancel()
			}
		}}, func(d BackupDamage) { t.Errorf("damage %+v", d) })
		cancel()
		if i < 2 && !errors.Is(err, context.Canceled) {
			t.Fatalf("round %d: %v", i, err)
		}
		if _, err := New(cfg); i < 2 && !errors.Is(err, flox.ErrBusy) {
			t.Fatalf("a server starts on what is restored in part: %v", err)
		}
	}
	if _, err := os.Stat(filepath.Join(cfg.StateDir, restoringName)); err == nil {
		if _, _, err := restore(t, cfg, place, nil); err != nil {
			t.Fatal(err)
		}
	}
	s, _ = start(t, cfg)
	checkWhole(t, s, app)
}

// What a backup is of stays until it is written, though it is removed from the facts
// and swept meanwhile; then it goes.
func TestBackupDuringCollection(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	sealed(t, s)
	gone, stays := makePath(t, "gone", 400_000), makePath(t, "stays", 100_000)
	publish(t, s, gone)
	publish(t, s, stays)
	place, swept := t.TempDir(), false
	blocks := s.packs.Stat().Blocks
	err := s.Backup(within(t), BackupOptions{To: place, Passphrase: []byte(testPassphrase)}, func(p *floxv1.BackupProgress) {
		if p.GetPhase() != phaseContent || swept {
			return
		}
		swept = true
		removePaths(t, s, gone.info.Path)
		publish(t, s, makePath(t, "new", 100_000))
		if _, err := s.sweep(within(t), func(_, _ uint64) {}); err != nil {
			t.Errorf("sweep: %v", err)
		}
	})
	if err != nil || !swept {
		t.Fatalf("swept %v, %v", swept, err)
	}
	wantSound(t, place, 2)
	if n := s.packs.Stat().Blocks; n <= blocks {
		t.Errorf("%d blocks, %d before: the sweep did not leave what the backup is of alone", n, blocks)
	}
	before := s.packs.Stat().Blocks
	if _, err := s.sweep(within(t), func(_, _ uint64) {}); err != nil || s.packs.Stat().Blocks >= before {
		t.Errorf("%d blocks stay of %d, %v", s.packs.Stat().Blocks, before, err)
	}
	cfg := testConfig(t.TempDir())
	if _, _, err := restore(t, cfg, place, nil); err != nil {
		t.Fatal(err)
	}
	again, _ := start(t, cfg)
	checkWhole(t, again, gone)
}

// A path that is damaged here is left out and named, the others are saved; and no
// older backup goes for one that is not whole.
func TestBackupOfDamagedContent(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	s, stop := start(t, cfg)
	sealed(t, s)
	hurt, sound := makePath(t, "hurt", 200_000), makePath(t, "sound", 100_000)
	publish(t, s, hurt)
	publish(t, s, sound)
	stop()
	flipIn(t, cfg.StateDir, hurt.nar[100_000:100_064])
	s, _ = start(t, cfg)
	place := t.TempDir()
	err := s.Backup(within(t), BackupOptions{To: place, Passphrase: []byte(testPassphrase), Keep: 1}, nil)
	if !errors.Is(err, flox.ErrCorrupt) || !strings.Contains(err.Error(), string(hurt.info.Path)) || strings.Contains(err.Error(), string(sound.info.Path)) {
		t.Fatalf("got %v, want ErrCorrupt that names %s alone", err, hurt.info.Path)
	}
	done, found, err := verifyBackup(t, place, nil)
	if err != nil || len(found) != 1 || found[0].Path != hurt.info.Path || done.LackPaths != 1 {
		t.Errorf("verify: %+v %v", found, err)
	}
}

// kill -9 of a storehouse that writes a backup leaves the place valid: what was
// there before is whole, and the next backup goes on.
func TestKillDuringBackup(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	s, stop := start(t, cfg)
	sealed(t, s)
	for i := range 4 {
		publish(t, s, makePath(t, fmt.Sprint("first", i), 100_000))
	}
	place := t.TempDir()
	first := backUp(t, s, place)
	for i := range 30 {
		publish(t, s, makePath(t, fmt.Sprint("second", i), 200_000))
	}
	stop()
	content := filepath.Join(place, "content")
	for round := range 4 {
		had := len(filesOf(t, content))
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), "STOREHOUSE_TEST_DIR="+cfg.StateDir, "STOREHOUSE_TEST_BACKUP="+place)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		t.Cleanup(func() { cmd.Process.Kill() }) //nolint:errcheck // it has ended
		more := func() bool { return len(filesOf(t, content)) >= had+3+5*round }
		for over := false; !over && !more(); {
			select {
			case err := <-ended: // it was quicker
				if ended <- nil; err != nil {
					t.Fatalf("round %d: %v", round, err)
				}
				over = true
			case <-time.After(time.Millisecond):
			}
		}
		cmd.Process.Signal(syscall.SIGKILL) //nolint:errcheck // its end is checked
		<-ended
		if list, err := Backups(within(t), place, nil); err != nil || len(list) == 0 || list[0].Err != nil {
			t.Fatalf("round %d: backups %+v, %v", round, list, err)
		}
		_, found, err := verifyBackup(t, place, func(o *VerifyOptions) { o.Backup, o.Passphrase = first.GetName(), nil })
		if err != nil || len(found) > 0 {
			t.Fatalf("round %d: the backup before: %v %v", round, found, err)
		}
	}
	s, _ = start(t, cfg)
	last := backUp(t, s, place)
	if n := last.GetNewBytes(); n > 5<<20 {
		t.Errorf("the last backup wrote %d bytes: nothing of those that were killed was used", n)
	}
	wantSound(t, place, 34)
}

// A full disk at the place is said, and hurts no earlier backup.
func TestBackupToAFullDisk(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	sealed(t, s)
	publish(t, s, makePath(t, "small", 100_000))
	disk := loopDisk(t, 8<<20)
	place := filepath.Join(disk, "place")
	first := backUp(t, s, place)
	publish(t, s, makePath(t, "large", 12<<20))
	err := s.Backup(within(t), BackupOptions{To: place, Passphrase: []byte(testPassphrase)}, nil)
	if !errors.Is(err, flox.ErrFull) || !strings.Contains(err.Error(), place) {
		t.Fatalf("got %v, want ErrFull that names %s", err, place)
	}
	if done := wantSound(t, place, 1); done.Name != first.GetName() {
		t.Errorf("the newest is %s, want %s", done.Name, first.GetName())
	}
	if left := filesOf(t, filepath.Join(place, "locks")); len(left) > 0 {
		t.Errorf("locks %v are left", left)
	}
}

// All of it on a real S3 server, which also goes away in between.
func TestBackupToS3(t *testing.T) {
	t.Parallel()
	server := s3test.Start(t)
	cfg := testConfig(t.TempDir())
	s, stop := start(t, cfg)
	sealed(t, s)
	app := makePath(t, "app", 1<<20)
	publish(t, s, app)
	backUp(t, s, server.URL())
	if again := backUp(t, s, server.URL()); again.GetNewBytes() != 0 {
		t.Errorf("a backup of nothing new wrote %d bytes", again.GetNewBytes())
	}
	wantSound(t, server.URL(), 1)
	publish(t, s, makePath(t, "more", 200_000))
	server.Kill()
	if err := s.Backup(within(t), BackupOptions{To: server.URL(), Passphrase: []byte(testPassphrase)}, nil); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("while the server is away: %v", err)
	}
	server.Restart()
	if err := s.Backup(within(t), BackupOptions{To: server.URL(), Passphrase: []byte(testPassphrase), Keep: 1}, nil); err != nil {
		t.Fatal(err)
	}
	wantSound(t, server.URL(), 2)
	stop()
	cfg.StateDir = t.TempDir()
	if _, found, err := restore(t, cfg, server.URL(), nil); err != nil {
		t.Fatal(found, err)
	}
	s, _ = start(t, cfg)
	checkWhole(t, s, app)
	// A flipped bit in one of its files.
	file := filesOf(t, filepath.Join(server.Objects(), "content"))[0]
	name := filepath.Join(server.Objects(), "content", file)
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 4
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, found, err := verifyBackup(t, server.URL(), nil); err != nil || !strings.Contains(fmt.Sprint(found), file) {
		t.Errorf("%s is damaged: %v %v", file, found, err)
	}
}
