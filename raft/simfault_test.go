package raft

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anishathalye/porcupine"
)

// newSim is called in the bubble: five servers that all vote.
func newSim(t *testing.T, dir string, seed uint64) *sim {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := &sim{t: t, rng: rng, net: newSimNet(rand.New(rand.NewPCG(seed, 2))), dir: dir, started: time.Now(), faults: map[string]int{}}
	for i := range simServers {
		v := &simServer{cfg: s.config(i == 0)}
		s.servers = append(s.servers, v)
		s.boot(v)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	first := s.servers[0].node
	if err := first.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	for _, v := range s.servers[1:] {
		if err := first.AddServer(ctx, v.cfg.ID, v.cfg.Address, true); err != nil {
			t.Fatal(err)
		}
	}
	s.voters(ctx, simServers)
	return s
}

// voters waits until there are as many healthy voters.
func (s *sim) voters(ctx context.Context, want int) {
	for ctx.Err() == nil {
		list, _ := s.servers[0].node.Servers(ctx)
		have := 0
		for _, m := range list {
			if m.Voter && m.Healthy {
				have++
			}
		}
		if have == want {
			return
		}
		time.Sleep(time.Second)
	}
	s.t.Errorf("not %d healthy voters", want)
}

// harm does one thing that goes wrong in real life.
func (s *sim) harm(ctx context.Context) {
	ids := make([]string, len(s.servers))
	for i, v := range s.servers {
		ids[i] = v.cfg.Address
	}
	s.rng.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
	leader := ""
	for _, v := range s.servers {
		if v.node != nil && v.node.Status().State == "leader" {
			leader = v.cfg.Address
		}
	}
	switch what := s.rng.IntN(12); {
	case what < 2: // a minority, or two, alone
		s.faults["partition"]++
		for _, a := range ids[:1+s.rng.IntN(2)] {
			for _, b := range ids[2:] {
				s.net.sever(a, b)
				s.net.sever(b, a)
			}
		}
	case what < 4: // one way
		s.faults["one way"]++
		for range 1 + s.rng.IntN(6) {
			a, b := s.rng.IntN(len(ids)), s.rng.IntN(len(ids))
			s.net.sever(ids[a], ids[b])
		}
	case what < 6 && leader != "": // the leader is not heard, or hears nobody
		s.faults["leader half deaf"]++
		deaf := s.rng.IntN(2) == 0
		for _, b := range ids {
			if deaf {
				s.net.sever(b, leader)
			} else {
				s.net.sever(leader, b)
			}
		}
	case what < 9: // the leader or another one crashes, perhaps two
		for _, i := range s.rng.Perm(len(s.servers))[:1+s.rng.IntN(2)] {
			if v := s.servers[i]; v.node != nil {
				s.faults["crash"]++
				s.crash(v)
			}
		}
	case what < 10:
		s.faults["transfer"]++
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		_ = s.any(s.rng).Transfer(short, "") // may fail, as everything now
		cancel()
	default:
		s.replace(ctx)
	}
}

// replace loses a server with its disk; the operator removes it and adds another.
func (s *sim) replace(ctx context.Context) {
	i := s.rng.IntN(len(s.servers))
	v := s.servers[i]
	if v.node != nil {
		s.crash(v)
	}
	if err := os.RemoveAll(v.cfg.Dir); err != nil {
		s.t.Error(err)
	}
	s.mend()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	fresh := &simServer{cfg: s.config(false)}
	if err := s.any(s.rng).ForceRemoveServer(ctx, v.cfg.ID); err != nil {
		s.t.Errorf("remove a server that is gone: %v", err)
	}
	s.mu.Lock()
	s.servers[i] = fresh
	s.mu.Unlock()
	by := s.any(s.rng)
	s.boot(fresh)
	if err := by.AddServer(ctx, fresh.cfg.ID, fresh.cfg.Address, true); err != nil {
		s.t.Errorf("add a server: %v", err)
	}
	s.faults["replaced"]++
}

// mend ends what goes wrong and gives the servers time to agree.
func (s *sim) mend() {
	s.net.heal()
	for _, v := range s.servers {
		if v.node == nil && v.result != nil {
			if _, err := os.Stat(v.cfg.Dir); err == nil {
				s.boot(v)
			}
		}
	}
	time.Sleep(10 * time.Second)
}

// run lets clients work while things go wrong, and gives their history.
func (s *sim) run(length time.Duration) []porcupine.Operation {
	ctx, cancel := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	for i := range simClients {
		rng := rand.New(rand.NewPCG(uint64(i), s.rng.Uint64()))
		clients.Go(func() { s.client(ctx, i, rng) })
	}
	for time.Since(s.started) < length {
		s.harm(ctx)
		time.Sleep(time.Duration(2+s.rng.IntN(20)) * time.Second)
		s.mend()
		time.Sleep(time.Duration(s.rng.IntN(10)) * time.Second)
	}
	cancel()
	clients.Wait()
	s.agree()
	for _, v := range s.servers {
		v.cancel()
		if err := <-v.result; err != nil {
			s.t.Errorf("server %s: %v", v.cfg.ID, err)
		}
	}
	return s.history
}

// agree reads every key of the last epochs on every server into the history,
// when all is over.
func (s *sim) agree() {
	last := int(time.Since(s.started) / simEpoch)
	for epoch := max(0, last-5); epoch <= last; epoch++ {
		for k := range simKeys {
			op := simOp{key: fmt.Sprintf("e%d-%d", epoch, k)}
			for i, v := range s.servers {
				call := time.Now()
				n, ok := s.read(v.node, op.key)
				if !ok {
					s.t.Errorf("server %s does not answer when all is over", v.cfg.ID)
					continue
				}
				s.record(simClients+i, op, simAnswer{count: n}, call)
			}
		}
	}
}

// simDir is where crashes cost nothing, if there is such a place: a simulated
// crash loses what a process holds, not what a kernel does.
func simDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "raft-sim-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Five servers over two hours (HOURS=250 for the long form) of partitions, also
// one-way ones, crashes that lose unwritten state, snapshots, hand-overs, and
// servers that are replaced: no acknowledged write is lost, doubled or out of
// order, and every read is linearizable.
func TestSimulation(t *testing.T) {
	length := 2 * time.Hour
	if testing.Short() { // as under the race detector
		length = 12 * time.Minute
	}
	if h, err := strconv.ParseFloat(os.Getenv("HOURS"), 64); err == nil {
		length = time.Duration(h * float64(time.Hour))
	}
	seed := uint64(time.Now().UnixNano())
	if n, err := strconv.ParseUint(os.Getenv("SEED"), 10, 64); err == nil {
		seed = n
	}
	t.Logf("SEED=%d", seed)       // of the faults; the order of goroutines is the scheduler's
	const stretch = 2 * time.Hour // a new cluster for each, so that histories stay in memory
	for done := time.Duration(0); done < length && !t.Failed(); done += stretch {
		dir := filepath.Join(simDir(t), fmt.Sprint(done.Hours()))
		var s *sim
		synctest.Test(t, func(t *testing.T) {
			s = newSim(t, dir, seed+uint64(done))
			s.run(min(stretch, length-done))
		})
		checkSim(t, s, porcupine.Ok)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}
}

// checkSim has the history judged.
func checkSim(t *testing.T, s *sim, want porcupine.CheckResult) {
	t.Helper()
	acked, unknown := 0, 0
	for _, o := range s.history {
		if o.Output.(simAnswer).unknown {
			unknown++
		} else {
			acked++
		}
	}
	t.Logf("%d operations answered, %d not, faults: %v", acked, unknown, s.faults)
	if acked == 0 || len(s.faults) < 3 {
		t.Error("nothing happened")
	}
	if got := porcupine.CheckOperationsTimeout(simModel(), s.history, 10*time.Minute); got != want {
		t.Errorf("history is %s, want %s", got, want)
	}
}

// The negative control: clients that repeat themselves without a session count
// twice, and the checker says so.
func TestSimulationCanFail(t *testing.T) {
	var s *sim
	dir := simDir(t)
	synctest.Test(t, func(t *testing.T) {
		s = newSim(t, dir, 7)
		s.blind = true
		s.run(20 * time.Minute)
	})
	checkSim(t, s, porcupine.Illegal)
}
