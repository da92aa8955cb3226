package integration

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
)

const (
	// holeLookup and holeRead are the deadlines of the agent in the black hole.
	holeLookup = 6 * time.Second
	holeRead   = 8 * time.Second
	// holeKill bounds the death of a killed process: far below the deadlines, so
	// that they are not what ends it.
	holeKill = 4 * time.Second
	// holeLater bounds the return to normal, which takes a second or two, and
	// holeHere what needs nobody, which takes none: what waits for the network ends
	// in an error before.
	holeLater, holeHere = time.Minute, time.Minute
)

// holeFor is how long nothing comes through: ten minutes in `make soak`.
func holeFor() time.Duration {
	if os.Getenv("FLOX_SOAK") != "" {
		return 10 * time.Minute
	}
	return 20 * time.Second
}

// hole is one machine that falls into a black hole.
type hole struct {
	*lab
	t     *testing.T
	host  *netns.Host
	agent *hosts.Agent
	cold  []string // files whose names are here and whose bytes are not, large first
	next  int      // of the names nobody knows
}

// TestBlackHole: packets are swallowed, nothing is refused. What is here reads on,
// mapped files wait, everything else ends at its deadline, no living process
// sees a signal as an error, the killed die at once, and afterwards all goes on.
func TestBlackHole(t *testing.T) {
	l := open(t)
	b := &hole{lab: l, t: t, host: l.host(t, "hole")}
	b.agent = l.agent(t, b.host, "--lookup-timeout", holeLookup.String(), "--read-timeout", holeRead.String(), "--prefetch=false", "--list", "valid")
	await(t, b.agent, "follows the storehouse", connected)
	l.runs(t, b.host)
	l.same(t, b.host, l.files(t, l.world.Ripgrep.Path)...)
	b.findCold()

	program, plain, ticking := newToucher(t, b.host, false), newToucher(t, b.host, false), newToucher(t, b.host, true)
	b.works(program.do("map", b.cold[0], time.Minute))
	if err := b.host.BlackHole(t.Context()); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	program.begin("fault", "")
	b.deadlines(plain, ticking)
	b.said(program.cmd.Process.Pid, "READ", b.cold[0])
	name := b.unknown()
	plain.begin("stat", name)
	b.said(plain.cmd.Process.Pid, "LOOKUP", name)
	plain.wait(time.Minute)
	b.killed()
	for first := true; first || time.Since(began) < holeFor(); first = false {
		b.unaffected()
		select {
		case o := <-program.out:
			t.Fatalf("the mapped file did not wait: %+v", o)
		case <-time.After(time.Second):
		}
	}
	if err := b.host.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.back(program, plain)
}

// findCold makes the names of a closure known without reading any of its files.
func (b *hole) findCold() {
	b.t.Helper()
	needed := b.closure(b.world.Ripgrep.Path)
	for _, p := range b.closure(b.world.Unused.Path) {
		if slices.Contains(needed, p) {
			continue
		}
		do(b.t, b.host, "ls", "-R", b.world.StoreDir.Join(p)).want(b.t, 0)
		for _, f := range b.files(b.t, p) {
			if info, err := os.Stat(b.original(f)); err == nil && info.Size() > 16<<10 {
				b.cold = append(b.cold, f)
			}
		}
	}
	size := func(f string) int64 {
		info, err := os.Stat(b.original(f))
		if err != nil {
			b.t.Fatal(err)
		}
		return info.Size()
	}
	slices.SortFunc(b.cold, func(x, y string) int { return int(size(y) - size(x)) })
	if len(b.cold) < 5 {
		b.t.Fatalf("only %d cold files", len(b.cold))
	}
}

// works checks that something went as if nothing had happened.
func (b *hole) works(o touch) {
	b.t.Helper()
	if o.Errno != "" {
		b.t.Errorf("%s %s: %s after %s", o.Do, o.Path, o.Errno, o.Took)
	}
}

// right checks every byte of what was read.
func (b *hole) right(o touch, file string) {
	b.t.Helper()
	b.works(o)
	content, err := os.ReadFile(b.original(file))
	if err != nil {
		b.t.Fatal(err)
	}
	if sum := sha256.Sum256(content); o.Sum != hex.EncodeToString(sum[:]) {
		b.t.Errorf("%s: wrong bytes, %d of %d", file, o.Count, len(content))
	}
}

// unknown is another store path name that nobody here knows.
func (b *hole) unknown() string {
	b.next++
	return b.world.StoreDir.Join("") + fmt.Sprintf("%032d-nobody", b.next)
}

// deadlines: reads and look-ups end when they should, with EIO, with and without
// signals; several who want one name wait once.
func (b *hole) deadlines(plain, ticking *toucher) {
	b.t.Helper()
	name := b.unknown()
	others := []*toucher{newToucher(b.t, b.host, true), newToucher(b.t, b.host, false), newToucher(b.t, b.host, false)}
	for _, p := range others {
		p.begin("open", name)
	}
	plain.begin("read", b.cold[1])
	ticking.begin("read", b.cold[2])
	for _, p := range []*toucher{plain, ticking} {
		// Its read-ahead and the read itself are two requests.
		if o := p.wait(time.Minute); o.Errno != "EIO" || o.Took < holeRead || o.Took > 5*holeRead {
			b.t.Errorf("read in the black hole: %q after %s, want EIO after %s", o.Errno, o.Took, holeRead)
		}
	}
	for _, p := range others {
		if o := p.wait(time.Minute); o.Errno != "EIO" || o.Took > 3*holeLookup-time.Second {
			b.t.Errorf("look-up in the black hole: %q after %s, want EIO after %s", o.Errno, o.Took, holeLookup)
		}
	}
	ticking.begin("stat", b.unknown())
	if o := ticking.wait(time.Minute); o.Errno != "EIO" || o.Took < holeLookup || o.Took > 5*holeLookup {
		b.t.Errorf("look-up with a timer's signals: %q after %s, want EIO after %s", o.Errno, o.Took, holeLookup)
	}
}

// said: floxctl watch says who waits for what, how long, and why.
func (b *hole) said(pid int, operation, path string) {
	b.t.Helper()
	type state struct {
		Reads []struct {
			PID           int
			Command, Path string
			Operation     string
			Reason        string
		}
		Storehouse struct {
			Connected bool
			Error     string
		}
	}
	var s state
	eventually(b.t, "watch names the program that waits, and why", func() bool {
		out := do(b.t, b.host, b.programs.Floxctl, "watch", "--once", "--json").out
		s = state{}
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			b.t.Fatalf("%v in %s", err, out)
		}
		for _, r := range s.Reads {
			if r.Path == path && r.PID == pid && r.Operation == operation && r.Reason != "" && r.Command != "" {
				b.t.Logf("watch says: %s[%d] waits for %s (%s): %s", r.Command, r.PID, filepath.Base(r.Path), r.Operation, r.Reason)
				return !s.Storehouse.Connected && s.Storehouse.Error != ""
			}
		}
		return false
	})
}

// killed: whatever a process waits for, it dies when it is killed.
func (b *hole) killed() {
	b.t.Helper()
	lookup, ticking, read, fault := newToucher(b.t, b.host, false), newToucher(b.t, b.host, true), newToucher(b.t, b.host, false), newToucher(b.t, b.host, true)
	b.works(fault.do("map", b.cold[4], time.Minute))
	lookup.begin("stat", b.unknown())
	ticking.begin("stat", b.unknown())
	read.begin("read", b.cold[3])
	fault.begin("fault", "")
	time.Sleep(500 * time.Millisecond)
	for what, p := range map[string]*toucher{"look-up": lookup, "look-up with signals": ticking, "read": read, "page fault with signals": fault} {
		b.t.Logf("killed in a %s: gone after %s", what, p.kill(holeKill))
	}
}

// unaffected: what is here, the listing of the store and df go on as before,
// beside a look-up that hangs.
func (b *hole) unaffected() {
	b.t.Helper()
	stuck, p := newToucher(b.t, b.host, false), newToucher(b.t, b.host, true)
	stuck.begin("stat", b.unknown())
	time.Sleep(100 * time.Millisecond)
	b.runs(b.t, b.host)
	b.right(p.do("read", b.world.Ripgrep.Exe, holeHere), b.world.Ripgrep.Exe)
	store := strings.TrimSuffix(b.world.StoreDir.Join(""), "/")
	b.works(p.do("statfs", store, holeHere))
	if o := p.do("readdir", store, holeHere); o.Errno != "" || o.Count == 0 {
		b.t.Errorf("listing of the store: %q, %d names", o.Errno, o.Count)
	}
	if o := p.do("stat", store+"/lib", holeHere); o.Errno != "ENOENT" {
		b.t.Errorf("a name that is no store path: %q", o.Errno)
	}
	select {
	case o := <-stuck.out:
		if o.Errno != "EIO" || o.Took < holeLookup { // the machine is slow, or the look-up did not hang
			b.t.Errorf("the look-up did not hang meanwhile: %+v", o)
		}
	default:
		stuck.kill(holeKill)
	}
}

// back: when packets come through again, everything goes on by itself.
func (b *hole) back(program, plain *toucher) {
	b.t.Helper()
	began := time.Now()
	o := plain.do("read", b.cold[1], holeLater)
	b.t.Logf("a read is through %s after the return", time.Since(began))
	for o.Errno == "EIO" && time.Since(began) < holeLater {
		o = plain.do("read", b.cold[1], holeLater)
	}
	b.right(o, b.cold[1])
	b.right(program.wait(holeLater), b.cold[0])
	b.t.Logf("the mapped file is read %s after the return", time.Since(began))
	if o := plain.do("stat", b.unknown(), holeLater); o.Errno != "ENOENT" {
		b.t.Errorf("a name nobody has: %q after %s", o.Errno, o.Took)
	}
	b.t.Logf("look-ups are answered %s after the return", time.Since(began))
	await(b.t, b.agent, "follows the storehouse again", connected)
	b.t.Logf("the storehouse is followed %s after the return", time.Since(began))
	for _, f := range b.cold[2:5] {
		b.right(plain.do("read", f, holeLater), f)
	}
}
