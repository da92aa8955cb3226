package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content/cache"
)

func hashPart(i int) string { return fmt.Sprintf("%032d", i) }

func storePath(t *testing.T, i int) flox.StorePath {
	t.Helper()
	p, err := flox.ParseStorePath(fmt.Sprintf("%s-p%d", hashPart(i), i))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestNegativeAnswersAreUsedOnlyWhileTheStreamIsCurrent(t *testing.T) {
	t.Parallel()
	n := newNegatives()
	n.remember(hashPart(1), 10)
	if n.holds(hashPart(1)) {
		t.Error("answered from memory before the stream was current")
	}
	n.setCurrent(true)
	if !n.holds(hashPart(1)) {
		t.Error("not answered from memory while the stream is current")
	}
	n.setCurrent(false)
	if n.holds(hashPart(1)) {
		t.Error("answered from memory after the stream was lost")
	}
}

func TestAnAdditionBeatsTheAnswerThatCrossedIt(t *testing.T) {
	t.Parallel()
	n := newNegatives()
	n.setCurrent(true)
	n.add(hashPart(1), 11)      // the stream is ahead …
	n.remember(hashPart(1), 10) // … of an answer read before the addition
	if n.holds(hashPart(1)) {
		t.Error("a path that is valid is said not to be")
	}
	n.remember(hashPart(2), 10)
	n.add(hashPart(2), 12)
	if n.holds(hashPart(2)) {
		t.Error("an addition did not take the negative answer back")
	}
	n.remember(hashPart(2), 13) // removed again
	if !n.holds(hashPart(2)) {
		t.Error("a newer answer is not remembered")
	}
}

func TestAnAnswerOlderThanTheAdditionsRememberedIsDropped(t *testing.T) {
	t.Parallel()
	n := newNegatives()
	n.setCurrent(true)
	for i := range recentAdds + 10 {
		n.add(hashPart(i), uint64(100+i))
	}
	n.remember(hashPart(0), 99) // its addition, at 100, is no longer remembered
	if n.holds(hashPart(0)) {
		t.Error("an answer from before the remembered additions was taken")
	}
	if len(n.added) > recentAdds {
		t.Errorf("%d additions remembered, want at most %d", len(n.added), recentAdds)
	}
	n.reset(5000)
	n.remember(hashPart(1), 4999)
	if n.holds(hashPart(1)) {
		t.Error("an answer from before the reset was taken")
	}
}

func TestNegativesAreBounded(t *testing.T) {
	t.Parallel()
	n := newNegatives()
	n.setCurrent(true)
	for i := range maxNegatives + 100 {
		n.remember(hashPart(i), 1)
	}
	if len(n.names) != maxNegatives || n.order.Len() != maxNegatives {
		t.Errorf("%d names and %d in order, want %d", len(n.names), n.order.Len(), maxNegatives)
	}
	if n.holds(hashPart(0)) || !n.holds(hashPart(maxNegatives+99)) {
		t.Error("the newest answers are not the ones kept")
	}
}

func TestExecutedPathsAreNewestFirstBoundedAndSurviveARestart(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "executed.json")
	e := loadExecuted(file)
	for i := range maxExecuted + 5 {
		e.touch(storePath(t, i))
	}
	paths, changed := e.changed()
	if !changed || len(paths) != maxExecuted || paths[0] != storePath(t, maxExecuted+4) {
		t.Fatalf("changed %v, %d paths, first %s", changed, len(paths), paths[0])
	}
	if _, again := e.changed(); again {
		t.Error("said to have changed twice")
	}
	old := paths[maxExecuted-1]
	e.touch(old)
	paths, changed = e.changed()
	if !changed || paths[0] != old || len(paths) != maxExecuted {
		t.Errorf("an old path used again is not in front: %s", paths[0])
	}
	if err := e.save(paths); err != nil {
		t.Fatal(err)
	}
	got, _ := loadExecuted(file).changed()
	if diff := cmp.Diff(paths, got); diff != "" {
		t.Errorf("after a restart (-saved +loaded):\n%s", diff)
	}
	if err := os.WriteFile(file, []byte("{torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, _ := loadExecuted(file).changed(); len(got) != 0 {
		t.Errorf("a damaged list gave %d paths", len(got))
	}
}

func TestOverlayCopiesExactlyWhatOverlaps(t *testing.T) {
	t.Parallel()
	data := []byte("abcdefgh") // at 10..18
	for off := int64(5); off < 22; off++ {
		for n := 1; n < 12; n++ {
			p := make([]byte, n)
			overlay(p, off, data, 10)
			for i := range p {
				want := byte(0)
				if at := off + int64(i); at >= 10 && at < 18 {
					want = data[at-10]
				}
				if p[i] != want {
					t.Fatalf("read of %d at %d: byte %d is %q, want %q", n, off, i, p[i], want)
				}
			}
		}
	}
}

func TestFetchedPiecesAreNotReadFromTheCacheAgain(t *testing.T) {
	t.Parallel()
	at := func(off int64, size uint32) piece {
		return piece{file: cache.File{Size: 100}, off: off, chunk: flox.Chunk{Size: size}}
	}
	pieces := []piece{at(10, 10), at(30, 10)}
	for _, c := range []struct {
		at, next int64
		covered  bool
	}{{0, 10, false}, {10, 20, true}, {15, 20, true}, {20, 30, false}, {35, 38, true}} {
		if next, covered := fetchedUpTo(pieces, c.at, 38); next != c.next || covered != c.covered {
			t.Errorf("at %d: %d %v, want %d %v", c.at, next, covered, c.next, c.covered)
		}
	}
	if next, covered := fetchedUpTo(pieces, 40, 50); next != 50 || covered {
		t.Errorf("behind all pieces: %d %v", next, covered)
	}
}

func TestReasonsAreSaidInOneLine(t *testing.T) {
	t.Parallel()
	err := because(errors.New("dial:\n  * one\n  * two"), nil, flox.ErrUnreachable, errors.New("dial:\n  * one\n  * two"))
	if got, want := oneLine(err), "dial: * one * two"; got != want || !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("%q, want %q, and still unreachable", got, want)
	}
	if because(nil, nil) != nil {
		t.Error("no reason is an error")
	}
}
