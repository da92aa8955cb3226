package storehouse

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/members"
)

// link is what the two servers of TestFigureNewServer have between them: 1 Gb/s, in
// bytes per second.
const link = 1e9 / 8

// TestFigureNewServer measures how fast a server that joins, a process of its own,
// gets what the others have, against the slower of a link of 1 Gb/s and a copy of
// the same files on the same disk, and how late its confirmations are meanwhile:
// two servers vote, so the leader needs every one of them.
func TestFigureNewServer(t *testing.T) {
	report := measures(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8)) // as floxd does on a machine of two cores
	mib := sized(t, "FIGURE_STORE_MIB", 5<<10)
	h := newHouse(t, 1)
	first := h.servers[0]
	const each = 64
	for i := range (mib + each - 1) / each {
		p := makePath(t, fmt.Sprint("big-", i), each<<20)
		if _, _, err := first.Publish(context.Background(), p.info, p.reader(), "tester"); err != nil {
			t.Fatal(err)
		}
	}
	size := float64(mib) * (1 << 20)
	peer := copyRate(t, filepath.Join(first.cfg.StateDir, "packs"), t.TempDir())

	cfg := clusterConfig(t.TempDir())
	h.tell(cfg)
	second := startFigureServer(t, cfg.StateDir)
	begin := time.Now()
	_, err := first.proposeMembers(within(t), &floxv1.MembersCommand{Command: &floxv1.MembersCommand_Add{Add: second.machine}})
	if err != nil {
		t.Fatal(err)
	}
	var waits []time.Duration
	want := first.packs.Stat().Blocks
	for second.blocks.Load() < want {
		from := time.Now()
		if _, err := first.node.ReadIndex(context.Background()); err != nil { // a round of heartbeats
			t.Fatal(err)
		}
		waits = append(waits, time.Since(from))
		time.Sleep(20 * time.Millisecond)
		if time.Since(begin) > 30*time.Minute {
			t.Fatalf("%d of %d blocks after %s", second.blocks.Load(), want, time.Since(begin))
		}
	}
	ours := size / time.Since(begin).Seconds()
	slices.Sort(waits)
	t.Logf("%d rounds of heartbeats: %s (p50), %s (p90), %s (p99), %s (max)", len(waits), waits[len(waits)/2], waits[len(waits)*9/10], waits[len(waits)*99/100], waits[len(waits)-1])
	report(figure{Name: fmt.Sprintf("new server of a store of %d MiB", mib), Unit: "MiB/s", Ours: ours / (1 << 20), Peer: min(peer, link) / (1 << 20)})
	report(figure{Name: "round of heartbeats meanwhile, p99", Unit: "ms", Ours: waits[len(waits)*99/100].Seconds() * 1e3})
}

// figureServer is a server that joins, in a process of its own.
type figureServer struct {
	machine *floxv1.Machine
	blocks  atomic.Uint64 // it has
}

// figureServerEnv names the state directory of a figureServer's process.
const figureServerEnv = "STOREHOUSE_TEST_FIGURE"

// runFigureServer is that process: it says who it is, and then how many blocks it has.
func runFigureServer(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	runtime.GOMAXPROCS(8) // as floxd does on a machine of two cores
	cfg := clusterConfig(dir)
	cfg.CatchUpRate = link
	s, err := New(cfg)
	fail(err)
	_, public, err := sealKey(s.id.machine)
	fail(err)
	b, err := protojson.Marshal(&floxv1.Machine{
		Peer: string(s.id.peer), Name: "s2", Role: members.Server, RaftAddress: s.line.Addr().String(), Addrs: s.swarm.Addrs(), SealKey: public[:],
	})
	fail(err)
	fmt.Println(string(b))
	go func() {
		for range time.Tick(50 * time.Millisecond) {
			fmt.Println(s.packs.Stat().Blocks)
		}
	}()
	fail(s.Run(context.Background()))
}

func startFigureServer(t *testing.T, dir string) *figureServer {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), figureServerEnv+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	done := make(chan struct{})
	t.Cleanup(func() { cmd.Process.Kill(); <-done; cmd.Wait() })
	f := &figureServer{machine: &floxv1.Machine{}}
	line, err := lines.ReadBytes('\n')
	if err == nil {
		err = protojson.Unmarshal(line, f.machine)
	}
	go func() {
		defer close(done)
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				return
			}
			if n, err := strconv.ParseUint(strings.TrimSpace(line), 10, 64); err == nil {
				f.blocks.Store(n)
			}
		}
	}()
	if err != nil {
		t.Fatalf("the server that joins says %q: %v", line, err)
	}
	return f
}

// copyRate gives bytes per second of copying a directory's files, synced one by one.
func copyRate(t *testing.T, from, to string) float64 {
	t.Helper()
	begin, total := time.Now(), int64(0)
	err := filepath.WalkDir(from, func(name string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		in, err := os.Open(name)
		if err != nil {
			return err
		}
		defer in.Close()
		out, err := os.Create(filepath.Join(to, filepath.Base(name)))
		if err != nil {
			return err
		}
		defer out.Close()
		n, err := io.Copy(struct{ io.Writer }{out}, in)
		total += n
		if err != nil {
			return err
		}
		return out.Sync()
	})
	if err != nil {
		t.Fatal(err)
	}
	return float64(total) / time.Since(begin).Seconds()
}
