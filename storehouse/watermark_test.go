package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
)

// loopDisk mounts an ext4 file system of its own.
func loopDisk(t *testing.T, size int64) string {
	t.Helper()
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", image},
		{"mount", "-o", "loop", image, dir},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%v: %v: %s", args, err, out)
			}
			t.Skipf("needs root and a loop device: %v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fillTo makes a disk as full as that, in percent, with a file that is removed
// again by the next call; 0 = just remove it.
func fillTo(t *testing.T, dir string, percent float64) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	// Deleted blocks come back with the journal.
	unix.Sync()
	if percent == 0 {
		return
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	used := float64(st.Blocks - st.Bfree)
	more := int64((percent/100*(used+float64(st.Bavail)) - used)) * st.Bsize
	if more <= 0 {
		t.Fatalf("the disk is fuller than %g %% already", percent)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, more), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// On a disk that fills up uploads are taken, then only what is essential, then
// nothing; each refusal says why. Reads go on all the time, and with space uploads do.
func TestWatermarks(t *testing.T) {
	isRoot(t)
	disk := loopDisk(t, 1<<30)
	cfg := quickGC(filepath.Join(disk, "state"))
	cfg.Watermarks = Watermarks{}
	s, _ := start(t, cfg)
	m := join(t, s.Invite())
	ctx := within(t)
	next := 0
	// publish takes in a new source of some bytes.
	publish := func(ctx context.Context, size int, during func()) (*flox.PathInfo, error) {
		next++
		nar := makePath(t, fmt.Sprintf("source-%d", next), size).nar
		valid, _, err := s.PublishSource(ctx, "source", &duringReader{r: bytes.NewReader(nar), do: during, at: size / 2}, "tester")
		return valid, err
	}
	first, err := publish(ctx, 100_000, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.KeepPath(ctx, first.Path, false, "it is read", "tester"); err != nil {
		t.Fatal(err)
	}
	readable := func() {
		t.Helper()
		info, err := s.Info(ctx, first.Path.HashPart())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Blocks().Get(ctx, info.Manifest); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(err error, words ...string) {
		t.Helper()
		if !errors.Is(err, flox.ErrFull) {
			t.Fatalf("not refused: %v", err)
		}
		for _, w := range append(words, disk, "% full", "collect garbage") {
			if !strings.Contains(err.Error(), w) {
				t.Fatalf("the refusal does not say %q: %v", w, err)
			}
		}
	}

	fillTo(t, disk, 88)
	if _, err := publish(ctx, 3<<20, nil); err != nil {
		t.Fatalf("slowed down, not refused: %v", err)
	}

	fillTo(t, disk, 93)
	_, err = publish(ctx, 10_000, nil)
	refused(err, "93.", "92 %", "only profile changes and running builds")
	_, err = s.Stage(ctx, "tester", "nar/x", makePath(t, "x", 100).reader())
	refused(err, "92 %")
	running, err := publish(Essential(ctx), 10_000, nil)
	if err != nil {
		t.Fatalf("a running build: %v", err)
	}
	textInfo, blocks := textPath(t, "text", []byte("a text"))
	_, err = m.take(ctx, partOf(blocks, textInfo))
	refused(err, "92 %")
	drv := makePath(t, "new.drv", 1).info.Path
	refused(s.builds.begins(ctx, &graph{order: []*node{{path: drv}}}, false), "92 %", string(drv))
	s.builds.flights[buildKey{drv: drv}] = &buildFlight{}
	if err := s.builds.begins(ctx, &graph{order: []*node{{path: drv}}}, false); err != nil {
		t.Errorf("who asks for what is built already: %v", err)
	}
	delete(s.builds.flights, buildKey{drv: drv})
	refused(s.mergeStarts(ctx, &floxv1.MergeStarts{}), "92 %")
	readable()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, s.Invite().HTTPURL+"/nar/"+strings.Repeat("1", 52)+".nar", makePath(t, "x", 100).reader())
	if err != nil {
		t.Fatal(err)
	}
	token, err := os.ReadFile(s.Config().UploadTokenFile)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	text, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if resp.StatusCode != http.StatusInsufficientStorage || !strings.Contains(string(text), "92 %") {
		t.Fatalf("HTTP says %s: %s", resp.Status, text)
	}

	uploaded := makePath(t, "uploaded", 100)
	if _, err := s.Stage(Essential(ctx), "tester", "nar/uploaded", uploaded.reader()); err != nil {
		t.Fatal(err)
	}

	fillTo(t, disk, 98)
	_, err = publish(Essential(ctx), 10_000, nil)
	refused(err, "98.", "97 %", "nothing is taken in")
	_, _, err = s.Commit(ctx, "nar/uploaded", uploaded.info, "tester")
	refused(err, "97 %", string(uploaded.info.Path))
	readable()
	waysOut(t, s, refused, running)

	// A disk that fills up during an upload ends it.
	fillTo(t, disk, 86)
	_, err = publish(ctx, 6<<20, func() { fillTo(t, disk, 94) })
	refused(err, "92 %")

	fillTo(t, disk, 0)
	if _, err := publish(ctx, 100_000, nil); err != nil {
		t.Fatalf("with space again: %v", err)
	}
	readable()
}

// waysOut: on a read-only disk no fact is taken in that lets it grow, and one gets
// out of it all the same: a collection, a machine that is thrown out, another server.
func waysOut(t *testing.T, s *Server, refused func(err error, words ...string), dead *flox.PathInfo) {
	t.Helper()
	ctx := within(t)
	a := &admin{s: s, refusals: &refusals{last: map[string]time.Time{}}}
	who := &floxv1.Actor{User: "test"}
	refused(s.KeepPath(ctx, dead.Path, false, "", "tester"), "97 %")
	_, err := a.makeInvite(ctx, who, &floxv1.MakeInviteRequest{Role: members.Agent})
	refused(err, "97 %")
	refused(s.builds.note(ctx, &floxv1.NoteBuild{}), "97 %")
	refused(s.takesMachines(ctx, members.Worker), "97 %")
	if err := s.takesMachines(ctx, members.Server); err != nil {
		t.Errorf("another server: %v", err)
	}
	lost := addServer(t, s, "lost")
	if _, err := s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: who, Command: &floxv1.MembersCommand_Remove{Remove: &floxv1.RemoveMachine{Peer: lost, Revoked: true, Reason: "stolen"}}}); err != nil {
		t.Errorf("a machine is thrown out: %v", err)
	}
	if _, err := s.setRoots(ctx, "peer", nil); err != nil {
		t.Errorf("what a machine holds on to: %v", err)
	}
	aged()
	if got := collect(t, s, soon); got.GetDeadPaths() == 0 {
		t.Errorf("the collection found nothing: %v", got)
	}
	if _, err := s.Info(ctx, dead.Path.HashPart()); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("what nobody needs is still there: %v", err)
	}
}

// duringReader does something once after so many bytes.
type duringReader struct {
	r  io.Reader
	do func()
	at int
}

func (d *duringReader) Read(b []byte) (int, error) {
	n, err := d.r.Read(b)
	if d.at -= n; d.at <= 0 && d.do != nil {
		d.do()
		d.do = nil
	}
	return n, err
}

// Uploads wait the longer the fuller the disk is.
func TestPace(t *testing.T) {
	t.Parallel()
	w, err := Watermarks{}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	last := time.Duration(-1)
	for usage := 84.9; usage < 91.9; usage += 0.1 {
		pace := w.pace(usage)
		if pace < last || pace > maxPace || usage > 85.1 && pace <= 0 || usage <= 85 && pace != 0 {
			t.Fatalf("%.1f %%: %v after %v", usage, pace, last)
		}
		last = pace
	}
	if last < 10*halfPace {
		t.Fatalf("just below the next watermark only %v", last)
	}
	for _, bad := range []Watermarks{{Slow: -1}, {Slow: 95}, {ReadOnly: 101}, {Essential: 98}} {
		if _, err := New(Config{StateDir: t.TempDir(), Watermarks: bad}); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}
