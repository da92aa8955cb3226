package warden

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

// farFuture keeps a scan result good for the whole test.
var farFuture = time.Now().Add(time.Hour)

// lockedBuffer may be written and read at once.
type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newLog(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }

// line joins a Conn with a clerk, both in this process.
func line(t *testing.T, k *clerk) *Conn {
	t.Helper()
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	c := &Conn{}
	if err := c.attach(theirs); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	ctx, cancel := context.WithCancel(context.Background())
	served, ended := make(chan struct{}), make(chan error, 1)
	go func() { defer close(served); k.serve(ctx, ours, func(question) {}) }()
	go func() { ended <- c.Run(context.Background()) }()
	t.Cleanup(func() {
		cancel()
		<-served
		if err := <-ended; !errors.Is(err, flox.ErrClosed) {
			t.Errorf("Run ended with %v when the warden was gone", err)
		}
		if _, err := c.Exe(context.Background(), 1); !errors.Is(err, flox.ErrClosed) {
			t.Errorf("a question when the warden was gone: %v", err)
		}
		if c.Mapped(context.Background(), 1, 1) {
			t.Error("waits for a mapped file when the warden was gone")
		}
	})
	return c
}

// More inodes than fit into a message arrive, while others ask too.
func TestLongAnswers(t *testing.T) {
	want := usage{open: map[uint64]struct{}{}, mapped: map[uint64]struct{}{}}
	for range 3*maxNodes + 5 {
		want.open[rand.Uint64()] = struct{}{}
		want.mapped[rand.Uint64()] = struct{}{}
	}
	k := &clerk{mountDir: "/nix/store", log: slog.New(slog.DiscardHandler), scans: &scanner{last: want, at: farFuture}}
	c := line(t, k)
	done := make(chan error)
	go func() {
		_, err := c.Exe(context.Background(), uint32(os.Getpid()))
		done <- err
	}()
	got, err := c.InUse(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	mapped, err := c.MappedNodes(context.Background())
	if err != nil || len(mapped) != len(want.mapped) {
		t.Errorf("%d inodes mapped, want %d: %v", len(mapped), len(want.mapped), err)
	}
	for _, node := range mapped {
		if _, ok := want.mapped[node]; !ok {
			t.Fatalf("inode %d is not mapped", node)
		}
	}
	maps.Copy(want.open, want.mapped)
	if !maps.Equal(got, want.open) {
		t.Errorf("%d inodes, want %d", len(got), len(want.open))
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := c.InUse(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a question given up: %v", err)
	}
}

// A warden that reads nothing holds nobody up who has given up.
func TestWardenThatDoesNotRead(t *testing.T) {
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	c := &Conn{}
	if err := c.attach(theirs); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	ended := make(chan error, 1)
	go func() { ended <- c.Run(context.Background()) }()
	given := errors.New("given up")
	ctx, cancel := context.WithCancelCause(context.Background())
	failed := make(chan error)
	const asking = 1000 // the kernel keeps fewer messages than that
	for range asking {
		go func() {
			_, _, err := c.RootTarget(ctx, "/"+strings.Repeat("x", maxLink/2))
			failed <- err
		}()
	}
	time.Sleep(100 * time.Millisecond) // until the line is full
	cancel(given)
	for range asking {
		select {
		case err := <-failed:
			if !errors.Is(err, given) {
				t.Fatal(err)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("a question that was given up waits on")
		}
	}
	// Without anybody giving up it ends as well, and says so.
	if err := c.Ready("v1"); !errors.Is(err, flox.ErrUnreachable) {
		t.Errorf("told: %v", err)
	}
	if !c.Mapped(ctx, 1, 1) {
		t.Error("a file may be mapped when nobody says that it is not")
	}
	ours.Close()
	if err := <-ended; !errors.Is(err, flox.ErrClosed) {
		t.Error(err)
	}
}

func TestParseQuestionRefuses(t *testing.T) {
	for _, s := range []string{
		``, `{}`, `[]`, `{"Ask":"rm"}`, `{"Ask":"exe"}`, `{"Ask":"exe","PID":-1}`, `{"Ask":"exe","PID":99999999}`,
		`{"Ask":"root"}`, `{"Ask":"root","Link":"a"}`, `{"Ask":"root","Link":"/a/../b"}`, `{"Ask":"root","Link":"/a\u0000"}`,
		`{"Ask":"root","Link":"/` + strings.Repeat("x", maxLink) + `"}`, `{"Ask":"readahead","KiB":-1}`, `{"Ask":"readahead","KiB":5000}`,
		`{"Ask":"inuse"`, `{"Ask":"pages"}`, `{"Ask":"pages","PID":99999999}`,
	} {
		if _, err := parseQuestion([]byte(s)); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%.60s: %v", s, err)
		}
	}
}

func FuzzParseQuestion(f *testing.F) {
	f.Add([]byte(`{"ID":1,"Ask":"exe","PID":5}`))
	f.Add([]byte(`{"ID":2,"Ask":"root","Link":"/home/u/result"}`))
	f.Add([]byte(`{"ID":3,"Ask":"readahead","KiB":64}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseQuestion(b)
		if err == nil && q.Ask == askRoot && (strings.Contains(q.Link, "..") && strings.Contains(q.Link, "/../") || q.Link[0] != '/') {
			t.Errorf("accepted %q", q.Link)
		}
		if a := refusal(q.ID, io.EOF); a.err() == nil {
			t.Error("a refusal is no error")
		}
	})
}

func TestErrorsSurviveTheLine(t *testing.T) {
	for _, want := range []error{flox.ErrNotFound, flox.ErrDenied, flox.ErrBadInput, flox.ErrBusy} {
		if err := refusal(1, want).err(); !errors.Is(err, want) {
			t.Errorf("%v became %v", want, err)
		}
	}
	if err := refusal(1, io.ErrUnexpectedEOF).err(); err == nil || !strings.Contains(err.Error(), "unexpected EOF") {
		t.Error(err)
	}
}

func TestMaps(t *testing.T) {
	const table = `55d0c8a00000-55d0c8a21000 r--p 00000000 00:2f 9223372036854775807          /nix/store/x/bin/y
55d0c8a21000-55d0c8a30000 r-xp 00021000 00:2f 4294967297                 /nix/store/x/bin/with blank
7f0000000000-7f0000021000 rw-p 00000000 00:00 0
7f2a4c000000-7f2a4c021000 r--p 00000000 fe:00 4294967298                 /usr/lib/libc.so.6
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
55d0c8a21000-55d0c8a30000 r-xp 00021000 00:2f 12 /` + "long"
	s := &scanner{major: 0, minor: 0x2f}
	got := map[uint64]struct{}{}
	s.maps(strings.NewReader(table+strings.Repeat("g 00:2f 99", 2000)+"\n"), got)
	if diff := cmp.Diff([]uint64{12, 4294967297, 9223372036854775807}, slices.Sorted(maps.Keys(got))); diff != "" {
		t.Error(diff)
	}
}

func FuzzMaps(f *testing.F) {
	f.Add("7f00-7f01 r--p 00000000 00:2f 12 /nix/store/x\n")
	f.Fuzz(func(_ *testing.T, table string) {
		(&scanner{minor: 0x2f}).maps(strings.NewReader(table), map[uint64]struct{}{})
	})
}
