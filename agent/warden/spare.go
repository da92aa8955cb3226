package warden

import (
	"encoding/json"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// spareName is the variable that tells a process that it is a spare. A program
	// that does not know of spares finds no warden then, and ends.
	spareName = "FLOXD_WARDEN_SPARE"
	// spareFD is where a spare is told that it is the child, and how.
	spareFD = 6
)

// Standby is called by a program before anything else it does. In a spare it
// returns when the child before it is gone, and this process is the next one;
// false: it is not needed, and has to end. Elsewhere it is true at once.
//
// To start a program takes longer than all it does until it serves, and so long
// every reader waits when a child dies.
func Standby() bool {
	if _, spare := os.LookupEnv(spareName); !spare {
		return true
	}
	_ = os.Unsetenv(spareName)
	order := os.NewFile(spareFD, "order")
	defer order.Close()
	if _, err := unix.FcntlInt(spareFD, unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		return false
	}
	value, err := io.ReadAll(order)
	return err == nil && len(value) > 0 && os.Setenv(envName, string(value)) == nil
}

// spare is a process of a program that waits to be the next child.
type spare struct {
	*child
	order *os.File
}

// prepareSpare starts a process that waits to be the next child. Without one that
// child is started when it is needed.
func (w *warden) prepareSpare() {
	if w.spare != nil || w.cfg.Unprivileged { // an agent for one command
		return
	}
	reads, order, err := os.Pipe()
	if err != nil {
		w.log.Debug("no spare child", "error", err)
		return
	}
	defer reads.Close()
	c, err := w.startProcess(spareName+"=1", reads)
	if err != nil {
		order.Close()
		w.log.Debug("no spare child", "error", err)
		return
	}
	w.spare = &spare{child: c, order: order}
}

// takeSpare makes the spare the child, if there is one and it lives.
func (w *warden) takeSpare(given *inheritance) *child {
	s := w.spare
	if s == nil {
		return nil
	}
	w.spare = nil
	value, err := json.Marshal(given)
	if err == nil {
		_, err = s.order.Write(value) // less than the pipe holds
	}
	select {
	case <-s.closed:
		err = errors.Join(err, errors.New("it has ended"))
	default:
	}
	if err != nil {
		w.log.Debug("the spare child is of no use", "pid", s.pid, "error", err)
		s.drop()
		return nil
	}
	s.order.Close()
	return s.child
}

// dropSpare ends the spare, if there is one.
func (w *warden) dropSpare() {
	if w.spare != nil {
		w.spare.drop()
		w.spare = nil
	}
}

// drop ends a spare, which has nothing to lose.
func (s *spare) drop() {
	s.order.Close()
	s.kill()
	s.release()
}
