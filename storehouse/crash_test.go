package storehouse

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
)

// runChild is a storehouse process of its own. It is killed.
func runChild(dir string) {
	cfg := testConfig(dir)
	collect, backupTo := os.Getenv("STOREHOUSE_TEST_COLLECT"), os.Getenv("STOREHOUSE_TEST_BACKUP")
	if backupTo != "" {
		cfg.backupObject = 64 << 10
	}
	if collect != "" {
		cfg = quickGC(dir)
	}
	s, err := New(cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go func() {
		if err := s.Ready(context.Background()); err == nil {
			fmt.Println("ready")
			if backupTo != "" {
				if err := s.Backup(context.Background(), BackupOptions{To: backupTo, Passphrase: []byte(testPassphrase)}, nil); err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				os.Exit(0) // it was quicker than the kill
			}
			if collect != "" {
				collectAndDie(s, collect)
			}
		}
	}()
	fmt.Fprintln(os.Stderr, s.Run(context.Background()))
	os.Exit(1)
}

// startChild starts a storehouse process and waits until it answers.
func startChild(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), "STOREHOUSE_TEST_DIR="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the storehouse says %q, %v", line, err)
	}
	return cmd
}

// kill -9 of a storehouse while four machines publish leaves every path whole
// or absent, and what was acknowledged is there; the next start needs no help.
func TestKillDuringPublish(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const publishers, rounds = 4, 3
	var all []testPath
	acked := map[flox.StorePath]bool{}
	for round := range rounds {
		cmd := startChild(t, dir)
		inv, err := api.LoadInvite(filepath.Join(dir, "invite.json"))
		if err != nil {
			t.Fatal(err)
		}
		token, err := os.ReadFile(filepath.Join(dir, "upload-token"))
		if err != nil {
			t.Fatal(err)
		}
		m := join(t, inv)
		m.token = strings.TrimSpace(string(token))

		ctx, cancel := context.WithCancel(within(t))
		var mu sync.Mutex
		var group sync.WaitGroup
		var done atomic.Int32
		for p := range publishers {
			group.Go(func() {
				var before []flox.StorePath
				for i := 0; ctx.Err() == nil; i++ {
					path := makePath(t, fmt.Sprintf("r%d-p%d-%d", round, p, i), 30_000+i*7000, before...)
					mu.Lock()
					all = append(all, path)
					mu.Unlock()
					if _, err := m.upload(ctx, path); err != nil {
						return // killed; what an error says is the business of other tests
					}
					before = []flox.StorePath{path.info.Path}
					mu.Lock()
					acked[path.info.Path] = true
					mu.Unlock()
					if done.Add(1) == int32(8+5*round) {
						cmd.Process.Signal(syscall.SIGKILL) //nolint:errcheck // its end is checked below
					}
				}
			})
		}
		cmd.Wait()
		cancel()
		group.Wait()
		if got := cmd.ProcessState.Sys().(syscall.WaitStatus); got.Signal() != syscall.SIGKILL {
			t.Fatalf("round %d: the storehouse ended by itself: %v", round, cmd.ProcessState)
		}
		checkAfterKill(t, dir, all, acked)
	}
}

// checkAfterKill opens the directory and looks at every path ever sent.
func checkAfterKill(t *testing.T, dir string, all []testPath, acked map[flox.StorePath]bool) {
	t.Helper()
	s, stop := start(t, testConfig(dir))
	defer stop()
	whole := 0
	for _, p := range all {
		_, err := s.Info(within(t), p.info.Path.HashPart())
		switch {
		case err == nil:
			checkWhole(t, s, p)
			whole++
		case !errors.Is(err, flox.ErrNotFound):
			t.Error(err)
		case acked[p.info.Path]:
			t.Errorf("%s was acknowledged and is gone", p.info.Path)
		}
	}
	if counts, _, err := s.counts(within(t)); err != nil || counts.paths != uint64(whole) {
		t.Errorf("counts %+v %v, want %d paths", counts, err, whole)
	}
	if err := s.packs.Scrub(within(t), func(id flox.CID, err error) { t.Errorf("scrub: %s: %v", id, err) }); err != nil {
		t.Error(err)
	}
}

// A full disk refuses uploads with ErrFull and says so, loses nothing, goes on
// serving reads, and starts again.
func TestDiskFull(t *testing.T) {
	isRoot(t)
	disk := t.TempDir()
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=160m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(disk, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	cfg := testConfig(filepath.Join(disk, "state"))
	cfg.ReserveBytes = 24 << 20
	s, stop := start(t, cfg)
	defer stop()
	var kept []testPath
	var full error
	for i := range 40 {
		p := makePath(t, fmt.Sprint("p", i), 6<<20)
		if _, _, full = s.Publish(within(t), p.info, p.reader(), "tester"); full != nil {
			break
		}
		kept = append(kept, p)
	}
	if !errors.Is(full, flox.ErrFull) || len(kept) == 0 {
		t.Fatalf("after %d paths: %v, want ErrFull", len(kept), full)
	}
	if _, err := s.Stage(within(t), "tester", "k", makePath(t, "s", 6<<20).reader()); !errors.Is(err, flox.ErrFull) {
		t.Errorf("stage: %v, want ErrFull", err)
	}
	// Facts of content that is here can still be written: the reserve of the log
	// is behind that of the packs.
	again := kept[0]
	info := *again.info
	info.Path = makePath(t, "copy", 1).info.Path
	again.info = &info
	publish(t, s, again)
	// Somebody else takes the rest of the disk.
	hog, err := os.Create(filepath.Join(disk, "hog"))
	if err != nil {
		t.Fatal(err)
	}
	defer hog.Close()
	piece := make([]byte, 1<<20)
	for err == nil {
		_, err = hog.Write(piece)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	info2 := *kept[0].info
	info2.Path = makePath(t, "copy2", 1).info.Path
	if _, _, err := s.Publish(within(t), &info2, kept[0].reader(), "tester"); !errors.Is(err, flox.ErrFull) {
		t.Errorf("facts on a full disk: %v, want ErrFull", err)
	}
	for _, p := range kept {
		checkWhole(t, s, p)
	}
	if err := errors.Join(hog.Close(), os.Remove(hog.Name())); err != nil {
		t.Fatal(err)
	}
	stop()
	s, stop2 := start(t, cfg)
	defer stop2()
	for _, p := range append(kept, again) {
		checkWhole(t, s, p)
	}
}
