package integration

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/ledger"
)

// damages is how many files rot at once.
const damages = 8

// rots damages so many files of single servers while these are stopped: bits flip
// and ends go missing in the log, the facts and the packs. The server gives right
// answers or none until it is whole again, which it is by itself.
func (h *house) rots(n int) {
	seed := uint64(time.Now().UnixNano())
	h.t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	defer h.writing(2)()
	seen := 0
	var bad *hosts.Storehouse
	for round, done := 0, 0; done < n; round++ {
		h.flows(time.Now())
		if round%10 == 0 { // another one, when nobody else is damaged
			h.whole()
			h.vote()
			bad = h.servers[rng.IntN(3)]
		}
		must(h.t, bad.Stop())
		for range min(damages, n-done) {
			h.t.Log(h.spoil(rng, bad))
			done++
		}
		must(h.t, bad.Launch())
		h.recovers(bad)
		// What it comes across later ends it as well, as it says: once for what it read, once
		// for what it reads to mend that.
		ends := 0
		h.holds(h.ledger.Acked(max(0, h.ledger.Len()-200)), func() {
			if bad.Running() {
				return
			}
			if ends++; ends > 3 {
				h.t.Fatalf("%s does not stay up:\n%s", bad.Host.Name, bad.Tail())
			}
			must(h.t, bad.Launch())
		})
		for _, words := range []string{"damaged", "rotted", "lost here", "failed before"} {
			if line, err := bad.Said(words); err == nil && line != "" {
				seen++
				break
			}
		}
	}
	h.holds(h.ledger.Acked(0))
	if n >= damages && seen == 0 {
		h.t.Errorf("%d damages, and no server said a word: none was found, or there was none", n)
	}
	for i := range h.servers {
		h.verifies(i)
	}
	h.t.Logf("%d damages, of which something was said in %d restarts: no wrong answer, nothing lost", n, seen)
}

// verifies waits until a server that is stopped holds no damaged block, with no
// other server's help, and starts it again.
func (h *house) verifies(i int) {
	h.t.Helper()
	s, said := h.servers[i], ""
	defer func() {
		if said != "" {
			h.t.Logf("%s had to mend first: %s", s.Host.Name, said)
		}
	}()
	// It mends while it runs: what a pack lost that was cut short takes its time.
	for left := time.Second; ; left *= 2 {
		must(h.t, s.Stop())
		r := do(h.t, s.Host, h.programs.Floxd, "storehouse", "verify", "--state-dir", h.disks[i].Dir)
		must(h.t, s.Launch())
		must(h.t, s.Await(h.t.Context()))
		switch {
		case r.code == 0 && strings.Contains(r.out, " 0 damaged, 0 paths hurt"):
			return
		case r.code == 0:
			h.t.Fatalf("verify of %s says:\n%s", s.Host.Name, r.out)
		case left > time.Minute:
			h.t.Fatalf("%s still holds what is damaged", s.Host.Name)
		}
		said = string(tail([]byte(r.out)))
		time.Sleep(left)
	}
}

// vote waits until every server votes and is up to date.
func (h *house) vote() {
	h.t.Helper()
	h.eventually("all servers vote", func() bool {
		resp, err := h.servers[0].Admin().Servers(h.t.Context(), connect.NewRequest(&floxv1.ServersRequest{}))
		return err == nil && len(resp.Msg.GetServers()) == len(h.servers) &&
			!slices.ContainsFunc(resp.Msg.GetServers(), func(s *floxv1.ServerState) bool { return !s.GetVoter() || !s.GetHealthy() })
	})
}

// recovers starts a server again each time it ends because of what it found, as
// its supervisor does, until it answers. What it answers meanwhile is right.
func (h *house) recovers(s *hosts.Storehouse) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 2*time.Minute)
	defer cancel()
	known := h.ledger.Acked(max(0, h.ledger.Len()-20))
	for ends := 0; ; {
		if !s.Running() {
			if ends++; ends > 3 {
				h.t.Fatalf("%s does not stay up:\n%s", s.Host.Name, s.Tail())
			}
			must(h.t, s.Launch())
		}
		missing, err := h.ledger.Check(ctx, known)
		if err != nil {
			h.t.Fatalf("%s is not whole again: %v\n%s", s.Host.Name, err, s.Tail())
		}
		for _, m := range missing {
			if errors.Is(m.Err, ledger.ErrWrong) {
				h.t.Fatal(m)
			}
		}
		if len(missing) == 0 {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// spoil flips a bit of a file of a stopped server, or cuts it short.
func (h *house) spoil(rng *rand.Rand, s *hosts.Storehouse) string {
	h.t.Helper()
	var files []string
	// Beside these there is what names the machine and its storehouse, which nobody else
	// has, and the second copy of who the others are.
	for _, dir := range []string{"raft", "packs", "staged", "placed.json", "scrub.json", "servers.json"} {
		err := filepath.WalkDir(filepath.Join(s.State(), dir), func(path string, d iofs.DirEntry, err error) error {
			if errors.Is(err, os.ErrNotExist) {
				return nil // yet
			}
			if err == nil && d.Type().IsRegular() && d.Name() != "lock" && !strings.Contains(path, "/damaged/") {
				files = append(files, path)
			}
			return err
		})
		must(h.t, err)
	}
	for {
		name := files[rng.IntN(len(files))]
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		must(h.t, err)
		said := spoilFile(rng, f)
		must(h.t, f.Close())
		if said != "" {
			return said + " of " + strings.TrimPrefix(name, s.State()+"/") + " of " + s.Host.Name
		}
	}
}

// spoilFile says what it did; "" when there is nothing to spoil.
func spoilFile(rng *rand.Rand, f *os.File) string {
	st, err := f.Stat()
	if err != nil || st.Size() == 0 {
		return ""
	}
	// Files are mostly zero behind their content, where nothing can be wrong.
	var b [1]byte
	at := int64(0)
	for range 400 {
		if at = rng.Int64N(st.Size()); rng.IntN(2) == 0 {
			at = rng.Int64N(min(st.Size(), 64<<10))
		}
		if _, err := f.ReadAt(b[:], at); err != nil {
			return ""
		}
		if b[0] != 0 {
			break
		}
	}
	if rng.IntN(4) == 0 {
		if f.Truncate(at) != nil {
			return ""
		}
		return fmt.Sprintf("cut at %d", at)
	}
	b[0] ^= 1 << rng.IntN(8)
	if _, err := f.WriteAt(b[:], at); err != nil {
		return ""
	}
	return fmt.Sprintf("bit flipped at %d", at)
}
