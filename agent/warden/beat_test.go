package warden

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A child that is killed only because it is slow, asleep or looked into is a
// fault of its own.
func TestVigil(t *testing.T) {
	t.Parallel()
	looks := func(n int, each func(i int, p *pulse)) (why string, quiet bool, at int) {
		v, p := vigil{}, pulse{beats: true, state: 'S'}
		for at = range n {
			each(at, &p)
			if why, quiet = v.look(p); why != "" {
				return why, quiet, at
			}
		}
		return why, quiet, at
	}
	const long = 100 * looksPerSilence
	for name, c := range map[string]struct {
		each  func(i int, p *pulse)
		why   string
		quiet bool
		at    int
	}{
		"it speaks": {func(_ int, p *pulse) { p.heard++ }, "", false, long - 1},
		"it speaks now and then": {func(i int, p *pulse) {
			if i%(looksPerSilence-1) == 1 {
				p.heard++
			}
		}, "", true, long - 1},
		"it is older and never spoke":          {func(_ int, p *pulse) { p.beats = false }, "", false, long - 1},
		"it is older and stopped":              {func(_ int, p *pulse) { p.beats, p.state = false, 'T' }, "SIGSTOP", true, looksPerSilence - 1},
		"it stands still":                      {func(int, *pulse) {}, "stood still", true, looksPerSilence - 1},
		"it is stopped":                        {func(_ int, p *pulse) { p.state = 'T' }, "SIGSTOP", true, looksPerSilence - 1},
		"it is debugged":                       {func(_ int, p *pulse) { p.state, p.traced = 't', true }, "", true, long - 1},
		"it is debugged and then left stopped": {func(i int, p *pulse) { p.state, p.traced = 'T', i < 50 }, "SIGSTOP", true, 50 + looksPerSilence - 1},
		"it is slow": {func(i int, p *pulse) {
			if p.work++; i%(2*looksPerSilence) == 0 {
				p.heard++
			}
		}, "", true, long - 1},
		"it turns in circles": {func(_ int, p *pulse) { p.work++ }, "at work", true, workFactor*looksPerSilence - 1},
	} {
		why, quiet, at := looks(long, c.each)
		if (why == "") != (c.why == "") || !strings.Contains(why, c.why) || quiet != c.quiet || at != c.at {
			t.Errorf("%s: %q, quiet %v at look %d; want %q, %v at %d", name, why, quiet, at, c.why, c.quiet, c.at)
		}
	}
}

// A child that is stopped answers nobody, and is replaced as if it had died.
func TestStoppedChildIsReplaced(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.cfg.Silence = 1200 * time.Millisecond
	h.start(t)
	first := h.report(t, 1)
	end := h.reading(t)
	if first.Before != nil {
		t.Errorf("the first child had one before it: %+v", first.Before)
	}
	if err := syscall.Kill(first.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	next := h.report(t, 2)
	if next.Before == nil || !strings.Contains(next.Before.Why, "SIGSTOP") || time.Since(next.Before.At) > time.Minute {
		t.Errorf("the next child heard of the one before it: %+v", next.Before)
	}
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
	end()
	if alive(first.PID) {
		t.Error("the stopped child is still there")
	}
}

// A child that a debugger holds is left alone, also when it was stopped before.
func TestDebuggedChildIsLeftAlone(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.cfg.Silence = 600 * time.Millisecond
	log := &lockedBuffer{}
	h.cfg.Log = newLog(log)
	h.start(t)
	child := h.report(t, 1)
	debugger := exec.Command("/proc/self/exe")
	debugger.Env = []string{modeEnv + "=debugger", fmt.Sprintf("FLOX_WARDEN_PID=%d", child.PID)}
	debugger.Stderr = os.Stderr
	letGo, err := debugger.StdinPipe()
	if err == nil {
		err = debugger.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { debugger.Process.Kill(); debugger.Wait() }()
	for i := 0; !strings.Contains(log.String(), "traced=true"); i++ {
		if i == 6000 {
			t.Fatalf("its silence is not noticed:\n%s", log)
		}
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(3 * h.cfg.Silence) // in which it is to be left alone
	if !alive(child.PID) {
		t.Fatalf("a debugged child was killed:\n%s", log)
	}
	letGo.Close()
	if err := debugger.Wait(); err != nil {
		t.Errorf("the debugger: %v", err)
	}
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
	if _, err := os.Stat(filepath.Join(h.cfg.RunDir, "report-2")); err == nil {
		t.Errorf("it was replaced:\n%s", log)
	}
}

// debugMain stops a process as a debugger does until nobody wants it any more.
func debugMain() error {
	pid, err := strconv.Atoi(os.Getenv("FLOX_WARDEN_PID"))
	if err != nil {
		return err
	}
	runtime.LockOSThread() // whose tracee it is
	if err := unix.PtraceSeize(pid); err != nil {
		return err
	}
	// Its main thread is the debugger's; the others are stopped with SIGSTOP.
	if err := errors.Join(unix.PtraceInterrupt(pid), syscall.Kill(pid, syscall.SIGSTOP)); err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return errors.Join(unix.PtraceDetach(pid), syscall.Kill(pid, syscall.SIGCONT))
}

// A child that is at work, but no longer on what it is for, is replaced later.
func TestWedgedChildIsReplaced(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.cfg.Silence = 600 * time.Millisecond
	h.start(t)
	first := h.report(t, 1)
	h.ask(t, query{Ask: "wedge"})
	next := h.report(t, 2)
	if next.Before == nil || !strings.Contains(next.Before.Why, "it ") || alive(first.PID) {
		t.Errorf("the next child heard of the one before it: %+v", next.Before)
	}
	if got := run(t, "cat %s", h.path("conf")); got != "hello\n" {
		t.Errorf("read %q", got)
	}
}

// Beats asks whether what it is for lives each time, and says nothing to a
// warden that does not want to know.
func TestBeats(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan struct{})
	done := make(chan error, 1)
	c := &Conn{}
	go func() { done <- c.Beats(ctx, func() { close(asked) }) }()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	select {
	case <-asked:
		t.Error("beats for nobody")
	default:
	}
}
