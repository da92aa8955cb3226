package storehouse

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/pack/bucket/s3test"
)

// A storehouse whose content lives in a bucket serves everything after its content
// directory is lost, takes nothing while the bucket is away, and says why.
func TestContentInBucket(t *testing.T) {
	t.Parallel()
	s3 := s3test.Start(t)
	cfg := testConfig(t.TempDir())
	cfg.Bucket = s3.URL()
	s, stop := start(t, cfg)
	first, second := makePath(t, "first", 300_000), makePath(t, "second", 200_000)
	publish(t, s, first)
	stop()
	if err := os.RemoveAll(filepath.Join(cfg.StateDir, "packs")); err != nil {
		t.Fatal(err)
	}
	s, stop = start(t, cfg)
	checkWhole(t, s, first)
	s3.Kill()
	checkWhole(t, s, first) // is here by now
	if _, _, err := s.Publish(within(t), second.info, second.reader(), "tester"); !errors.Is(err, flox.ErrUnreachable) {
		t.Fatalf("with the bucket away: %v", err)
	}
	s3.Restart()
	for {
		_, _, err := s.Publish(within(t), second.info, second.reader(), "tester")
		if err == nil {
			break
		}
		if !errors.Is(err, flox.ErrUnreachable) {
			t.Fatal(err)
		}
	}
	checkWhole(t, s, second)
	stop()
	cfg.Bucket = ""
	if _, err := New(cfg); !errors.Is(err, flox.ErrBadInput) {
		t.Fatalf("without its bucket: %v", err)
	}
}

// Of three servers with one bucket each serves what another has put there, with
// nothing of it on its own disk, and a collection frees what is dead of all of them.
func TestServersShareBucket(t *testing.T) {
	t.Parallel()
	s3 := s3test.Start(t)
	h := newHouse(t, 3, func(c *Config) {
		c.Bucket, c.CollectGrace, c.touchEvery = s3.URL(), 20*time.Millisecond, time.Millisecond
	})
	var kept, dead []testPath
	for i, s := range h.servers {
		kept, dead = append(kept, makePath(t, fmt.Sprint("kept-", i), 50_000)), append(dead, makePath(t, fmt.Sprint("dead-", i), 400_000))
		publish(t, s, kept[i])
		publish(t, s, dead[i])
		if err := s.KeepPath(within(t), kept[i].info.Path, false, "", ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range h.servers {
		for i := range kept {
			eventually(t, "it is known everywhere", func() bool { return stillValid(t, s, kept[i]) && stillValid(t, s, dead[i]) })
			checkWhole(t, s, kept[i])
			checkWhole(t, s, dead[i])
		}
		// What came for a path that is not valid yet is held for longer than this test.
		if err := s.held.close(); err != nil {
			t.Fatal(err)
		}
	}
	aged()
	if got := collect(t, h.servers[0], soon); got.GetDeadPaths() != 3 {
		t.Errorf("%v, want three paths gone", got)
	}
	condemned, err := filepath.Glob(filepath.Join(s3.Objects(), "condemned", "*", "*"))
	if err != nil || len(condemned) == 0 {
		t.Errorf("no pack in the bucket is to go, though what most of them hold is dead: %v, %v", condemned, err)
	}
	// One that lost what it kept of the bucket, and all at once.
	h.stops[2]()
	if err := os.RemoveAll(stateFile(h.servers[2], "packs")); err != nil {
		t.Fatal(err)
	}
	h.start(2)
	for _, s := range h.servers {
		for i := range kept {
			eventually(t, "it is gone", func() bool { return !stillValid(t, s, dead[i]) })
			checkWhole(t, s, kept[i])
		}
	}
}
