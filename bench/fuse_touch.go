package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox/integration/netns"
)

// touchEnv makes this program a process that touches one file in the way it says,
// and then says how many nanoseconds that took. With touchTick it gets a signal
// every 10 ms meanwhile.
const (
	touchEnv  = "FLOX_BENCH_TOUCH"
	touchTick = ",tick"
)

// What such a process may wait for.
const (
	touchStat = "stat"
	touchRead = "read"
	touchMap  = "map" // its page faults
)

func init() {
	if os.Getenv(touchEnv) != "" {
		runtime.LockOSThread() // signals of a timer go to the main thread first
	}
}

// touchMain is that process. It uses system calls as they are: the os package
// would hide an EINTR.
func touchMain(how, path string) error {
	how, tick := strings.CutSuffix(how, touchTick)
	if tick {
		signal.Notify(make(chan os.Signal, 1), syscall.SIGALRM)
		every := unix.NsecToTimeval(10e6)
		if _, err := unix.Setitimer(unix.ITIMER_REAL, unix.Itimerval{Interval: every, Value: every}); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	began := time.Now()
	err := touchOne(how, path)
	if err == nil {
		fmt.Println(time.Since(began).Nanoseconds())
	}
	return err
}

func touchOne(how, path string) error {
	if how == touchStat {
		var st unix.Stat_t
		return unix.Lstat(path, &st)
	}
	fd, err := unix.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if how == touchMap {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		b, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_PRIVATE)
		if err != nil {
			return err
		}
		sum := byte(0)
		for i := 0; i < len(b); i += 4096 {
			sum += b[i]
		}
		runtime.KeepAlive(sum) // or the reads could be left out
		return unix.Munmap(b)
	}
	for buf := make([]byte, 64<<10); ; {
		n, err := unix.Read(fd, buf)
		if n <= 0 || err != nil {
			return err
		}
	}
}

// toucher is such a process, on a host.
type toucher struct {
	cmd *exec.Cmd
	out *bufio.Reader
}

// touch starts one and returns when it is about to touch the file.
func touch(ctx context.Context, h *netns.Host, how, path string) (*toucher, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	t := &toucher{cmd: h.Command(ctx, self, path)}
	t.cmd.Env = append(t.cmd.Env, touchEnv+"="+how)
	t.cmd.Stderr = os.Stderr
	out, err := t.cmd.StdoutPipe()
	if err == nil {
		err = t.cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	t.out = bufio.NewReader(out)
	if line, err := t.out.ReadString('\n'); line != "ready\n" {
		_ = t.cmd.Process.Kill()
		_ = t.cmd.Wait()
		return nil, fmt.Errorf("%s of %s said %q: %w", how, path, line, err)
	}
	return t, nil
}

// kill kills it and says how long it took to be gone. It must wait for something.
func (t *toucher) kill() (time.Duration, error) {
	began := time.Now()
	if err := t.cmd.Process.Kill(); err != nil {
		return 0, err
	}
	said, err := io.ReadAll(t.out)
	if err != nil {
		return 0, err
	}
	_ = t.cmd.Wait() // it was killed
	took := time.Since(began)
	if ws, ok := t.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL || len(said) > 0 {
		return 0, fmt.Errorf("it did not wait when it was killed: %s, said %q", t.cmd.ProcessState, said)
	}
	return took, nil
}

// took waits for its end and gives the time it measured.
func (t *toucher) took() (time.Duration, error) {
	var ns int64
	_, scanErr := fmt.Fscan(t.out, &ns)
	if err := t.cmd.Wait(); err != nil {
		return 0, err
	}
	return time.Duration(ns), scanErr
}
