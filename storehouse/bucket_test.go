package storehouse

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/pack/bucket/s3test"
)

// A storehouse whose content lives in a bucket serves everything after its content
// directory is lost, takes nothing while the bucket is away, and says why.
func TestContentInBucket(t *testing.T) {
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
