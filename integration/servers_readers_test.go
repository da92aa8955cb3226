package integration

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/ledger"
)

// patient lets a look-up and a read of an agent wait for longer than any election
// on a busy machine takes: what fails then was not waited for rightly.
var patient = []string{"--lookup-timeout", "1m", "--read-timeout", "1m"}

// readers are two machines with an agent each, whose mounts are read while
// something is done to the servers.
type readers struct {
	h      *house
	agents []*hosts.Agent
}

func (h *house) newReaders(t *testing.T) *readers {
	t.Helper()
	r := &readers{h: h}
	for i := range 2 {
		host := h.host(t, "reader")
		must(t, hosts.Join(t.Context(), h.programs, host, h.invite(i, "agent"), "--name", fmt.Sprint("reader", i)))
		a, err := hosts.StartAgent(t.Context(), h.programs, host, h.dir, keptInvite, patient...)
		must(t, err)
		t.Cleanup(func() { stop(t, a.Daemon) })
		await(t, a, "follows the storehouse", connected)
		r.agents = append(r.agents, a)
	}
	return r
}

// reading reads what was acknowledged through every mount until the result is
// called, which checks that nobody saw an error or a wrong byte.
func (r *readers) reading() (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.h.t.Context()))
	var group sync.WaitGroup
	fresh, old := make([]int, len(r.agents)), make([]int, len(r.agents))
	failed := make([]error, len(r.agents))
	for i := range r.agents {
		group.Go(func() { fresh[i], old[i], failed[i] = r.read(ctx, i) })
	}
	t := r.h.t
	return func() {
		t.Helper()
		cancel()
		group.Wait()
		for i, a := range r.agents {
			if failed[i] != nil {
				t.Errorf("a reader on %s: %v\n%s", a.Host.Name, failed[i], a.Tail())
			}
			if fresh[i] < 5 {
				t.Errorf("%d paths were read on %s: that shows nothing", fresh[i], a.Host.Name)
			}
		}
		t.Logf("read through the agents' mounts without an error: %v paths new to them, %v known ones", fresh, old)
	}
}

// read reads, in turn, the newest acknowledged path, which this machine has
// nothing of, and one it has read before, until ctx ends or something is wrong.
func (r *readers) read(ctx context.Context, agent int) (fresh, old int, err error) {
	var known []ledger.Path
	for ctx.Err() == nil {
		n := r.h.ledger.Len()
		if n == 0 {
			rest(ctx)
			continue
		}
		p := r.h.ledger.Acked(n - 1)[0]
		if len(known) == 0 || known[len(known)-1].File != p.File {
			known = append(known, p)
			fresh++
		} else {
			p = known[rand.IntN(len(known))]
			old++
		}
		if err := r.one(ctx, agent, p); err != nil {
			return fresh, old, err
		}
		rest(ctx)
	}
	return fresh, old, nil
}

// rest is the pause between two reads.
func rest(ctx context.Context) {
	select {
	case <-time.After(20 * time.Millisecond):
	case <-ctx.Done():
	}
}

// one reads a path's file as any program does. A read that is under way when ctx
// ends has to end well too.
func (r *readers) one(ctx context.Context, agent int, p ledger.Path) error {
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
	defer cancel()
	got, err := r.run(limited, agent, "cat", "--", p.File)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, p.Content()) {
		return fmt.Errorf("%s: wrong bytes: %d of %d", p.File, len(got), len(p.Content()))
	}
	return nil
}

// add uploads a file through one agent, as anybody does, once, and reads it back
// through the mount of another one.
func (r *readers) add(ctx context.Context, agent int, file string) error {
	limited, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	out, err := r.run(limited, agent, r.h.programs.Floxctl, "store", "add", file, "--token-file", r.h.token)
	if err != nil {
		return err
	}
	got, err := r.run(limited, (agent+1)%len(r.agents), "cat", "--", strings.TrimSpace(string(out)))
	if err != nil {
		return err
	}
	want, err := os.ReadFile(file)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%s: wrong bytes: %d of %d", file, len(got), len(want))
	}
	return err
}

// run runs a program on the host of an agent and gives what it prints.
func (r *readers) run(ctx context.Context, agent int, name string, args ...string) ([]byte, error) {
	var said strings.Builder
	cmd := r.agents[agent].Host.Command(ctx, name, args...)
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", name, err, said.String())
	}
	return out, err
}

// close ends the agents.
func (r *readers) close() {
	for _, a := range r.agents {
		must(r.h.t, a.Stop())
	}
}
