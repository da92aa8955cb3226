// Package reap cleans up after this process, however it ends: a shell script
// that waits in a session of its own and runs when asked to, or when the
// process is gone, be it through a panic, Ctrl-C or SIGKILL.
package reap

import (
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
)

// Reaper is a waiting script.
type Reaper struct {
	cmd     *exec.Cmd
	waiting *os.File // the end whose closing wakes the script and all who wait on Life
	life    *os.File
	once    sync.Once
	err     error
}

// Start starts a POSIX shell script with arguments $1, $2, …; it begins to run
// when Close is called or this process ends. It must be fit to run when half of
// what it cleans up is gone already.
func Start(script string, args ...string) (*Reaper, error) {
	life, waiting, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	// Ctrl-C reaches only the foreground's processes: a session of its own keeps
	// the script out of that.
	cmd := exec.Command("sh", append([]string{"-c", "trap '' INT TERM HUP\ncat >/dev/null\n" + script, "reap"}, args...)...) //nolint:noctx // must outlive every context
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Dir = "/"
	cmd.Stdin = life
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		_ = life.Close()
		_ = waiting.Close()
		return nil, fmt.Errorf("start the clean-up script: %w", err)
	}
	return &Reaper{cmd: cmd, waiting: waiting, life: life}, nil
}

// Life is a file that reads end-of-file when the script begins to run: the
// standard input of a process that should end by then.
func (r *Reaper) Life() *os.File { return r.life }

// Close runs the script and waits for it. Later calls give the same result.
func (r *Reaper) Close() error {
	r.once.Do(func() {
		_ = r.waiting.Close()
		_ = r.life.Close()
		if err := r.cmd.Wait(); err != nil {
			r.err = fmt.Errorf("clean-up script: %w", err)
		}
	})
	return r.err
}
