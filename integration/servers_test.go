package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/fault"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/ledger"
	"github.com/floxctl/flox/integration/netns"
)

// times is how often a fault happens in a test, in a soak, or as the
// environment says.
func times(t *testing.T, env string, test, soak int) int {
	t.Helper()
	if text := os.Getenv(env); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatalf("%s: %v", env, err)
		}
		return n
	}
	if os.Getenv("FLOX_SOAK") != "" {
		return soak
	}
	return test
}

// house is a storehouse of three servers, each on a host and a disk of its own,
// and what it acknowledged.
type house struct {
	*lab
	t       *testing.T
	servers []*hosts.Storehouse
	disks   []*fault.Disk
	client  *netns.Host
	token   string // file of the upload token
	ledger  *ledger.Ledger
	checked int // so many acknowledged paths were found
}

// newServers starts three servers, each with more flags.
func (l *lab) newServers(t *testing.T, more ...string) *house {
	t.Helper()
	h := &house{lab: l, t: t, client: l.host(t, "clients")}
	size := int64(512 << 20)
	if os.Getenv("FLOX_SOAK") != "" {
		size = 8 << 30
	}
	for i := range 3 {
		host := l.host(t, fmt.Sprint("server", i+1))
		d := disk(t, l, host, size)
		flags := append([]string{"--reserve", "16MiB"}, more...)
		if i == 0 {
			flags = append(flags, "--name", "proof")
		}
		s := hosts.NewServer(l.programs, host, l.dir, d.Dir, flags...)
		h.servers, h.disks = append(h.servers, s), append(h.disks, d)
		t.Cleanup(func() {
			if s.Daemon != nil {
				stop(t, s.Daemon)
			}
		})
	}
	first := h.servers[0]
	must(t, first.Start(t.Context()))
	for _, s := range h.servers[1:] {
		must(t, s.Join(t.Context(), h.invite(0, "server")))
		must(t, s.Launch())
	}
	h.up()
	h.eventually("all three vote", func() bool {
		votes, err := first.Votes(len(h.servers))
		must(t, err)
		return votes
	})
	h.token = filepath.Join(first.State(), "upload-token")
	token, err := os.ReadFile(h.token)
	must(t, err)
	h.ledger = ledger.New(ledger.Config{
		StoreDir: l.world.StoreDir, Token: strings.TrimSpace(string(token)), Client: h.client, Servers: h.servers, Prefix: "proof",
	})
	t.Cleanup(h.ledger.Close)
	return h
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until ok, for at most a minute: elections, catching up and a
// busy machine take their time.
func (h *house) eventually(what string, ok func() bool) {
	h.t.Helper()
	for begun := time.Now(); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Since(begun) > time.Minute {
			h.t.Fatalf("not in a minute: %s", what)
		}
	}
}

// progresses is eventually with a minute for each time that left became less: a soak
// before this made a store of a size of its own.
func (h *house) progresses(what string, left *uint64, ok func() bool) {
	h.t.Helper()
	for begun, least := time.Now(), ^uint64(0); !ok(); time.Sleep(50 * time.Millisecond) {
		if *left < least {
			begun, least = time.Now(), *left
		}
		if time.Since(begun) > time.Minute {
			h.t.Fatalf("not in a minute: %s; %d left", what, *left)
		}
	}
}

// up waits until every server that runs answers.
func (h *house) up() {
	h.t.Helper()
	for _, s := range h.servers {
		must(h.t, s.Await(h.t.Context()))
	}
}

// leader gives the server that leads and its number.
func (h *house) leader() (i int, s *hosts.Storehouse) {
	h.t.Helper()
	h.eventually("somebody leads", func() bool {
		var err error
		s, err = hosts.Leader(h.servers)
		return err == nil
	})
	return slices.Index(h.servers, s), s
}

// writing runs writers until the result is called, which checks that they saw
// nothing but waits.
func (h *house) writing(writers int) (stop func()) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(h.t.Context()))
	done := make(chan error, 1)
	go func() { done <- h.ledger.Write(ctx, writers, 20*time.Millisecond) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			h.t.Errorf("a writer was refused: %v", err)
		}
	}
	h.t.Cleanup(stop)
	return stop
}

// flows waits until a write that begins now is acknowledged, and says how long
// that took.
func (h *house) flows(since time.Time) time.Duration {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	at, err := h.ledger.After(ctx, since)
	must(h.t, err)
	return at.Sub(since)
}

// whole checks that what was acknowledged since the last time is on every server.
// A server that was away may take a while; a wrong answer is never right.
func (h *house) whole() {
	h.t.Helper()
	fresh := h.ledger.Acked(h.checked)
	h.holds(slices.Clone(fresh))
	h.checked += len(fresh)
}

// holds checks paths on every server.
func (h *house) holds(paths []ledger.Path, meanwhile ...func()) {
	h.t.Helper()
	var missing []ledger.Missing
	for begun := time.Now(); ; time.Sleep(200 * time.Millisecond) {
		var err error
		missing, err = h.ledger.Check(h.t.Context(), paths)
		must(h.t, err)
		if len(missing) == 0 {
			return
		}
		wrong := slices.ContainsFunc(missing, func(m ledger.Missing) bool { return errors.Is(m.Err, ledger.ErrWrong) })
		if wrong || time.Since(begun) > time.Minute {
			break
		}
		for _, do := range meanwhile {
			do()
		}
		missed := map[string]bool{}
		for _, m := range missing {
			missed[string(m.Path)] = true
		}
		paths = slices.DeleteFunc(paths, func(p ledger.Path) bool { return !missed[string(p.Info.Path)] })
	}
	for _, m := range missing[:min(len(missing), 10)] {
		h.t.Error(m)
	}
	h.t.Fatalf("%d acknowledged paths are not as they were acknowledged", len(missing))
}

// TestServers: three servers under load survive what happens to one of them or to
// all: nothing that was acknowledged is lost, doubled or different anywhere, and
// nobody has to repair anything. Who reads through the mount of an agent sees
// nothing of leaders that are killed or cut off.
func TestServers(t *testing.T) {
	h := open(t).newServers(t)
	r := h.newReaders(t)
	for _, part := range []struct {
		name string
		do   func()
	}{
		{"Killed", func() { defer r.reading()(); h.kills(r, times(h.t, "FLOX_KILLS", 5, 200)) }},
		{"CutOff", func() { defer r.reading()(); h.cutOff(times(h.t, "FLOX_PARTITIONS", 3, 100)) }},
		{"UploadCut", func() { h.uploadCut(r) }},
		{"ReadersEnd", r.close},
		{"PowerCut", func() { h.powerCuts(times(h.t, "FLOX_CUTS", 10, 1000)) }},
		{"Rot", func() { h.rots(times(h.t, "FLOX_ROT", 24, 1000)) }},
		{"Joined", h.joins},
		{"Entry", h.entry},
		{"Collected", h.collected},   // what no root keeps is gone then
		{"LossIsSeen", h.lossIsSeen}, // the last: nothing is left of the house
	} {
		if !t.Run(part.name, func(t *testing.T) { h.t = t; part.do() }) {
			return // who knows in which state they are
		}
	}
}
