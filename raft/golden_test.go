package raft

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

var update = flag.Bool("update", false, "write testdata/format1.tar.gz anew")

// What programs of format 1 left on disk. It is never written again: a change
// that does not open and apply it breaks every server that is upgraded.
const format1 = "testdata/format1.tar.gz"

// writeFormat1 makes the fixture: a snapshot, entries behind it, sessions, a refusal.
func writeFormat1(t *testing.T) {
	dir := t.TempDir()
	n, stop := start(t, Config{Dir: dir, ID: "a", Bootstrap: true, ReserveBytes: 1, Hooks: &Hooks{SegmentBytes: 4096}})
	if err := n.Ready(within(t)); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		add(t, n, "before", ProposeOptions{Session: "s", Sequence: uint64(i + 1)})
	}
	db, err := n.machine.state.acquire()
	if err == nil {
		err = errors.Join(db.Flush(), db.release()) // so that there is a table, too
	}
	if err == nil {
		err = n.Snapshot(within(t))
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 7 {
		add(t, n, "behind", ProposeOptions{})
	}
	if _, _, err := n.Propose(within(t), testKind, []byte("fail bob"), ProposeOptions{Session: "s", Sequence: 21}); !errors.Is(err, flox.ErrDenied) {
		t.Fatal(err)
	}
	if _, err := n.proposeHere(within(t), n.decide(drainOf("gone"))); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), z.Close(), os.MkdirAll("testdata", 0o755), os.WriteFile(format1, b.Bytes(), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// unpackFixture puts the fixture into a new directory.
func unpackFixture(t *testing.T) string {
	t.Helper()
	f, err := os.Open(format1)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	r := tar.NewReader(z)
	for {
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
			var b []byte
			if b, err = io.ReadAll(r); err == nil {
				err = errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, b, 0o600))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Directories of format 1 open, with the state as it was left, and with log and
// snapshot alone; sessions are still known, and the log goes on.
func TestOpensFormat1(t *testing.T) {
	if *update {
		writeFormat1(t)
	}
	for _, lost := range []string{"nothing", "state"} {
		t.Run(lost+" lost", func(t *testing.T) {
			dir := unpackFixture(t)
			if err := os.RemoveAll(filepath.Join(dir, lost)); err != nil {
				t.Fatal(err)
			}
			n, stop := single(t, dir)
			if a, b := count(t, n, Linearizable, "before"), count(t, n, Local, "behind"); a != 20 || b != 7 {
				t.Errorf("counts %d and %d, want 20 and 7", a, b)
			}
			reply, _, err := n.Propose(within(t), testKind, []byte("add before"), ProposeOptions{Session: "s", Sequence: 20})
			if err == nil && binary.BigEndian.Uint64(reply) != 20 {
				err = fmt.Errorf("answered %d", binary.BigEndian.Uint64(reply))
			}
			if err != nil && !errors.Is(err, ErrSessionExpired) && !errors.Is(err, flox.ErrClosed) {
				t.Errorf("retry from before the upgrade: %v", err) // the session is too old by today's clock, never applied again
			}
			if got := count(t, n, Local, "before"); got != 20 {
				t.Errorf("a retry from before the upgrade was applied again: %d", got)
			}
			if got := add(t, n, "behind", ProposeOptions{}); got != 8 {
				t.Errorf("the log goes on with %d, want 8", got)
			}
			if err := n.Snapshot(within(t)); err != nil {
				t.Error(err)
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
	}
	// Each part is in the fixture, or the test shows less than it says.
	dir := unpackFixture(t)
	for _, part := range []string{"log/*.wal", "log/wal-meta.db", "snapshots/*/meta.json", "snapshots/*/data/*.sst", "state/*/MANIFEST-*"} {
		if found, err := fs.Glob(os.DirFS(dir), part); err != nil || len(found) == 0 {
			t.Errorf("fixture without %s: %v", part, err)
		}
	}
}

// drainOf is a command about a server.
func drainOf(id string) *floxv1.ServersCommand {
	return &floxv1.ServersCommand{Command: &floxv1.ServersCommand_Drain{Drain: &floxv1.ServerDrain{Id: id, On: true}}}
}
