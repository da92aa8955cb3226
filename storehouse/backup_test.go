package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
	cluster "github.com/floxctl/flox/raft"
)

const testPassphrase = "correct horse battery"

// backUp writes a backup and gives its last progress.
func backUp(t *testing.T, s *Server, to string) *floxv1.BackupProgress {
	t.Helper()
	var last *floxv1.BackupProgress
	err := s.Backup(within(t), BackupOptions{To: to, Passphrase: []byte(testPassphrase)}, func(p *floxv1.BackupProgress) { last = p })
	if err != nil {
		t.Fatal(err)
	}
	if !last.GetFinished() || last.GetName() == "" {
		t.Fatalf("the last that is said: %v", last)
	}
	return last
}

// sealed waits until the keys are in the log.
func sealed(t *testing.T, s *Server) {
	t.Helper()
	eventually(t, "the keys are in the log", func() bool { return s.sealed.Load() > 0 })
}

// verifyBackup verifies the newest backup and gives what is wrong with it.
func verifyBackup(t *testing.T, from string, change func(*VerifyOptions)) (done *VerifiedBackup, found []BackupDamage, err error) {
	t.Helper()
	opts := VerifyOptions{From: from, Passphrase: []byte(testPassphrase), Dir: t.TempDir()}
	if change != nil {
		change(&opts)
	}
	done, err = VerifyBackup(within(t), opts, func(d BackupDamage) { found = append(found, d) })
	if left, _ := os.ReadDir(opts.Dir); len(left) > 0 {
		t.Errorf("verifying left %v", left)
	}
	return done, found, err
}

// wantSound verifies a backup that nothing is wrong with.
func wantSound(t *testing.T, from string, paths int) *VerifiedBackup {
	t.Helper()
	done, found, err := verifyBackup(t, from, nil)
	if err != nil || len(found) > 0 {
		t.Fatalf("verify: %v %v", found, err)
	}
	if int(done.Paths) != paths || !done.KeysOpen || done.Read == 0 || done.LackPaths > 0 {
		t.Fatalf("verified %+v, want %d paths and keys that open", done, paths)
	}
	return done
}

// filesOf lists the files below a directory.
func filesOf(t *testing.T, dir string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			rel, _ := filepath.Rel(dir, name)
			files = append(files, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// sizeOf is how many bytes the files below a directory have.
func sizeOf(t *testing.T, dir string) (n int64) {
	t.Helper()
	for _, f := range filesOf(t, dir) {
		st, err := os.Stat(filepath.Join(dir, f))
		if err != nil {
			t.Fatal(err)
		}
		n += st.Size()
	}
	return n
}

// A second backup writes what is new and nothing else, and both are whole. Old ones
// go when told so, with what only they needed.
func TestBackupIsIncremental(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	sealed(t, s)
	var large []testPath
	for i := range 8 {
		large = append(large, makePath(t, fmt.Sprint("large", i), 1<<20))
		publish(t, s, large[i])
	}
	to := filepath.Join(t.TempDir(), "place")
	first := backUp(t, s, to)
	if n := first.GetNewBytes(); n < 8<<20 || n > 10<<20 || first.GetPaths() != 8 {
		t.Errorf("the first backup wrote %d bytes of %d paths, want 8 MiB of 8", n, first.GetPaths())
	}
	wantSound(t, to, 8)

	if again := backUp(t, s, to); again.GetNewBytes() != 0 {
		t.Errorf("a backup of nothing new wrote %d bytes", again.GetNewBytes())
	}
	publish(t, s, makePath(t, "small", 50_000))
	before := sizeOf(t, filepath.Join(to, "content"))
	third := backUp(t, s, to)
	if n := third.GetNewBytes(); n < 50_000 || n > 100_000 || sizeOf(t, filepath.Join(to, "content")) != before+int64(n) {
		t.Errorf("one small path more: %d bytes written, content of %d and %d bytes", n, before, sizeOf(t, filepath.Join(to, "content")))
	}
	wantSound(t, to, 9)
	list, err := Backups(within(t), to, nil)
	if err != nil || len(list) != 3 || list[2].Name != third.GetName() || list[0].Manifest.Paths != 8 {
		t.Fatalf("backups: %+v %v", list, err)
	}

	// What is not valid any more goes with the last backup that has it.
	removePaths(t, s, large[0].info.Path, large[1].info.Path)
	var last *floxv1.BackupProgress
	err = s.Backup(within(t), BackupOptions{To: to, Passphrase: []byte(testPassphrase), Keep: 1}, func(p *floxv1.BackupProgress) { last = p })
	if err != nil || len(last.GetRemoved()) != 3 {
		t.Fatalf("removed %v, %v; want three", last.GetRemoved(), err)
	}
	if list, err := Backups(within(t), to, nil); err != nil || len(list) != 1 {
		t.Fatalf("backups: %+v %v", list, err)
	}
	wantSound(t, to, 7)
	removePaths(t, s, large[2].info.Path, large[3].info.Path, large[4].info.Path, large[5].info.Path, large[6].info.Path, large[7].info.Path)
	if err = s.Backup(within(t), BackupOptions{To: to, Passphrase: []byte(testPassphrase), Keep: 1}, nil); err != nil {
		t.Fatal(err)
	}
	wantSound(t, to, 1)
	if n := sizeOf(t, filepath.Join(to, "content")); n > 100_000 {
		t.Errorf("%d bytes of content stay for one small path", n)
	}
}

// removePaths makes paths invalid.
func removePaths(t *testing.T, s *Server, paths ...flox.StorePath) {
	t.Helper()
	c := &floxv1.RemovePaths{}
	for _, p := range paths {
		c.Paths = append(c.Paths, string(p))
	}
	if _, err := propose(within(t), s.node.NewSession(), &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Remove{Remove: c}}); err != nil {
		t.Fatal(err)
	}
}

// Whatever file of a place is damaged, verifying finds it and names it.
func TestVerifyFindsEveryDamage(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	sealed(t, s)
	for i := range 3 {
		publish(t, s, makePath(t, fmt.Sprint("path", i), 100_000))
	}
	place := filepath.Join(t.TempDir(), "place")
	backUp(t, s, place)
	publish(t, s, makePath(t, "later", 100_000))
	backUp(t, s, place) // needs objects of both
	newest, err := Backups(within(t), place, nil)
	if err != nil {
		t.Fatal(err)
	}
	name := newest[1].Name
	damages := map[string]func(b []byte) []byte{
		"a bit is flipped at the start": func(b []byte) []byte { b[0] ^= 1; return b },
		"a bit is flipped within":       func(b []byte) []byte { b[len(b)/2] ^= 16; return b },
		"a bit is flipped at the end":   func(b []byte) []byte { b[len(b)-1] ^= 128; return b },
		"it is a byte short":            func(b []byte) []byte { return b[:len(b)-1] },
		"it is empty":                   func([]byte) []byte { return nil },
		"it is a byte longer":           func(b []byte) []byte { return append(b, 0) },
		"it is gone":                    nil,
	}
	tried := 0
	for _, file := range filesOf(t, place) {
		if strings.HasPrefix(file, "backups/") && !strings.HasPrefix(file, "backups/"+name+"/") || file == "flox-backup.json" {
			continue // of the other backup; and of none
		}
		whole, err := os.ReadFile(filepath.Join(place, file))
		if err != nil {
			t.Fatal(err)
		}
		for what, damage := range damages {
			tried++
			if damage == nil {
				err = os.Remove(filepath.Join(place, file))
			} else {
				err = os.WriteFile(filepath.Join(place, file), damage(bytes.Clone(whole)), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			_, found, err := verifyBackup(t, place, func(o *VerifyOptions) {
				if o.Backup = name; !strings.HasSuffix(file, "/keys") {
					o.Passphrase = nil // which costs time on purpose
				}
			})
			said := fmt.Sprint(found, err)
			if len(found) == 0 && err == nil || err != nil && !errors.Is(err, flox.ErrCorrupt) && !errors.Is(err, flox.ErrNotFound) && !errors.Is(err, flox.ErrDenied) {
				t.Errorf("%s: %s: verify says %s", file, what, said)
			}
			want := file
			if strings.HasSuffix(file, "/manifest.json") {
				want = name
			}
			if !strings.Contains(said, want) && !errors.Is(err, flox.ErrDenied) {
				t.Errorf("%s: %s: it is not named: %s", file, what, said)
			}
			if strings.HasPrefix(file, "content/") && !slices.ContainsFunc(found, func(d BackupDamage) bool { return d.Path != "" }) {
				t.Errorf("%s: %s: no path is named: %s", file, what, said)
			}
		}
		if err := os.WriteFile(filepath.Join(place, file), whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if tried < 4*len(damages) {
		t.Fatalf("only %d damages were tried", tried)
	}
	wantSound(t, place, 4)
	// The next backup writes what damaged objects held once more.
	for _, file := range filesOf(t, filepath.Join(place, "content")) {
		if err := os.Truncate(filepath.Join(place, "content", file), 100); err != nil {
			t.Fatal(err)
		}
	}
	backUp(t, s, place)
	wantSound(t, place, 4)
}

// The keys open with the passphrase alone, and nothing in the place gives a secret away.
func TestBackupKeepsSecrets(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	sealed(t, s)
	publish(t, s, makePath(t, "path", 1000))
	verifier := []byte("a verifier of thirty-two bytes!!")
	_, err := s.proposeMembers(within(t), &floxv1.MembersCommand{Actor: s.actor(), Command: &floxv1.MembersCommand_MakeInvite{MakeInvite: &floxv1.InviteRecord{
		Id: "ABCDEFGHIJ", Verifier: verifier, Role: members.Agent, Uses: 3, ExpiresUnixMs: time.Now().Add(time.Hour).UnixMilli(),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	place := t.TempDir()
	if err := s.Backup(within(t), BackupOptions{To: place, Passphrase: []byte("short")}, nil); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("a short passphrase: %v", err)
	}
	backUp(t, s, place)
	_, _, err = verifyBackup(t, place, func(o *VerifyOptions) { o.Passphrase = []byte("another passphrase") })
	if !errors.Is(err, flox.ErrDenied) {
		t.Errorf("another passphrase: %v", err)
	}
	done, found, err := verifyBackup(t, place, func(o *VerifyOptions) { o.Passphrase = nil })
	if err != nil || len(found) > 0 || done.KeysOpen {
		t.Errorf("without a passphrase: %+v %v %v", done, found, err)
	}

	have, err := s.id.ring.get()
	if err != nil {
		t.Fatal(err)
	}
	_, seed, _ := strings.Cut(have.nix[0].String(), ":")
	secrets := map[string][]byte{
		"Nix key": []byte(seed), "swarm secret": have.all.GetSwarmSecrets()[0], "token": []byte(have.all.GetUploadToken()),
		"machine key": s.id.machine.Seed(), "verifier": verifier,
	}
	var all bytes.Buffer
	p, closePlace, err := openPlace(within(t), place, nil)
	if err != nil {
		t.Fatal(err)
	}
	m, err := p.Manifest(within(t), "")
	if err != nil {
		t.Fatal(err)
	}
	invites := 0
	err = p.ReadFacts(within(t), m, func(key, value []byte) error {
		all.Write(key)
		all.Write(value)
		if kind, own, ok := cluster.RecordKind(key); ok && kind == members.Kind && strings.HasSuffix(string(own), "ABCDEFGHIJ") {
			invites++
		}
		return nil
	})
	if err = errors.Join(err, closePlace()); err != nil || invites != 1 {
		t.Fatalf("%d invites in the facts, %v", invites, err)
	}
	for _, f := range filesOf(t, place) {
		b, err := os.ReadFile(filepath.Join(place, f))
		if err != nil {
			t.Fatal(err)
		}
		all.Write(b)
	}
	for what, secret := range secrets {
		if len(secret) < 16 || bytes.Contains(all.Bytes(), secret) {
			t.Errorf("the %s stands in the backup", what)
		}
	}
}

// Two do not write to one place at once; who was killed keeps nobody away for long,
// itself not at all.
func TestBackupPlaceHasOneWriter(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	sealed(t, s)
	publish(t, s, makePath(t, "path", 1000))
	place := t.TempDir()
	backUp(t, s, place)
	lock := func(id string, age time.Duration) string {
		t.Helper()
		file := filepath.Join(place, "locks", "L"+id)
		text := fmt.Sprintf(`{"id":%q,"name":"server %s","since":"2026-01-02T03:04:05Z"}`, id, id)
		err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(text), 0o600))
		if err = errors.Join(err, os.Chtimes(file, time.Time{}, time.Now().Add(-age))); err != nil {
			t.Fatal(err)
		}
		return file
	}
	other := lock("other", time.Minute)
	err := s.Backup(within(t), BackupOptions{To: place, Passphrase: []byte(testPassphrase)}, nil)
	if !errors.Is(err, flox.ErrBusy) || !strings.Contains(err.Error(), "server other writes") || !strings.Contains(err.Error(), "2026-01-02") {
		t.Errorf("while another server writes: %v", err)
	}
	if left := filesOf(t, filepath.Join(place, "locks")); len(left) != 1 {
		t.Errorf("locks %v, want the other's alone", left)
	}
	if err := os.Chtimes(other, time.Time{}, time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	lock(string(s.id.peer), 0) // of its own earlier life
	backUp(t, s, place)
	if left := filesOf(t, filepath.Join(place, "locks")); len(left) != 0 {
		t.Errorf("locks %v are left", left)
	}
	wantSound(t, place, 1)
}

// A place in what it is a backup of, or among other files, is refused.
func TestBackupRefusesWrongPlaces(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	sealed(t, s)
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "somebody's"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(s.cfg.StateDir, link); err != nil {
		t.Fatal(err)
	}
	for to, words := range map[string]string{
		s.cfg.StateDir: "lies in", filepath.Join(s.cfg.StateDir, "backups"): "lies in", link + "/backups": "lies in",
		"relative": "absolute", "ftp://host/x": "s3://", full: "somebody's", filepath.Join(full, "somebody's"): "no directory", "file://" + full: "somebody's",
	} {
		err := s.Backup(within(t), BackupOptions{To: to, Passphrase: []byte(testPassphrase)}, nil)
		if !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v, want %q", to, err, words)
		}
	}
	if _, err := os.Stat(filepath.Join(s.cfg.StateDir, "backups")); err == nil {
		t.Error("a directory was made in the state directory")
	}
	if _, err := Backups(context.Background(), full, nil); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("backups of a directory that holds none: %v", err)
	}
}
