package staging

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// childEnv makes the test binary add paths until it is killed.
const childEnv = "STAGING_CRASH_DIR"

// crashData is the content of the i-th path: most are small, some in packs.
func crashData(i int) []byte {
	if i%9 == 0 {
		return random(uint64(i), 600<<10)
	}
	return random(uint64(i), 100+i%5000)
}

func crashChild(dir string) {
	ctx := context.Background()
	s, err := Open(Config{Dir: dir, StoreDir: storeDir, Reserve: 1})
	start, _ := strconv.Atoi(os.Getenv("STAGING_CRASH_START"))
	var before []flox.StorePath
	for i := start; err == nil; i++ {
		var p *Path
		if i%2 == 0 || os.Getenv("STAGING_CRASH_TEXTS") != "" {
			p, err = s.AddText(ctx, fmt.Sprint("text", i), crashData(i), before)
		} else {
			p, err = s.AddAddressed(ctx, fmt.Sprint("file", i), nix.CAFlat, nix.SHA256, nil, bytes.NewReader(crashData(i)))
		}
		if err == nil {
			before = []flox.StorePath{p.Info.Path}
			fmt.Println("added", i, p.Info.Path)
		}
		if err == nil && i%40 == 39 { // a crash while paths go, too
			_, err = s.Collect(ctx, func(p *Path) bool { return !strings.Contains(p.Info.Path.Name(), "9") })
			before = nil
			fmt.Println("collected", i, "-")
		}
	}
	fmt.Println("error", 0, err)
	os.Exit(1)
}

// After kill -9 in the middle of adds, what was acknowledged is there and whole,
// and so is everything else that is there.
func TestKillDuringAdds(t *testing.T) {
	dir := t.TempDir()
	next, checked := 0, 0
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 8 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir, "STAGING_CRASH_START="+strconv.Itoa(next))
		if round%2 == 1 { // which share their syncs
			cmd.Env = append(cmd.Env, "STAGING_CRASH_TEXTS=yes")
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var acked []flox.StorePath
		stop := 10 + rng.IntN(80)
		for in := bufio.NewScanner(out); in.Scan(); {
			f := strings.SplitN(in.Text(), " ", 3)
			if f[0] == "error" {
				t.Errorf("child: %s", in.Text())
				break
			}
			if f[0] == "added" {
				next, _ = strconv.Atoi(f[1])
				acked = append(acked, flox.StorePath(f[2]))
			}
			if stop--; stop == 0 {
				_ = cmd.Process.Kill()
			}
		}
		_ = cmd.Wait()
		s := open(t, dir, nil)
		for _, p := range acked {
			// A collection may have taken these.
			if _, err := s.Path(p); err != nil && !strings.Contains(p.Name(), "9") {
				t.Errorf("%s was acknowledged: %v", p, err)
			}
		}
		if err := s.List(t.Context(), "", func(p *Path) bool {
			whole(t, s, p)
			for _, ref := range p.Info.References {
				if _, err := s.Path(ref); err != nil {
					t.Errorf("%s refers to %s: %v", p.Info.Path, ref, err)
				}
			}
			checked++
			return true
		}); err != nil {
			t.Fatal(err)
		}
		next++
		if err := s.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if checked < 100 {
		t.Fatalf("only %d paths were looked at: the test proves nothing", checked)
	}
}

// What an add that never ended left in packs is found by the next process.
func TestLeftoversAreSweptAfterARestart(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, nil)
	nar := fileNar(t, random(7, 3<<20))
	if _, err := s.AddAddressed(t.Context(), "cut", nix.CANar, nix.SHA256, nil, bytes.NewReader(nar[:len(nar)-100])); err == nil {
		t.Fatal("half a NAR was added")
	}
	if err := s.Close(); err != nil { // before it could sweep
		t.Fatal(err)
	}
	s = open(t, dir, nil)
	if s.packs.Stat().Blocks == 0 {
		t.Fatal("the add left nothing: this shows nothing")
	}
	select {
	case <-s.swept:
	default:
		t.Fatalf("%d bytes are left, and nobody looks for them", s.Stat().Bytes)
	}
	if err := s.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := s.packs.Stat().Blocks; n != 0 {
		t.Errorf("%d blocks are left", n)
	}
}
