package ctl

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// TestTerminal runs floxctl on a terminal of its own.
func TestTerminal(t *testing.T) {
	testscript.Run(t, scriptParams("testdata/terminal", map[string]func(*testscript.TestScript, bool, []string){"terminal": runTerminal}))
}

// terminalPatience is how long a program on a terminal may take before it
// counts as hung.
const terminalPatience = 60 * time.Second

// runTerminal is the script command `terminal CODE KEY program args...`: it runs
// a program on a terminal, presses q or ctrl-c once something is on the screen
// ("-" presses nothing), checks the exit code, and leaves what was shown in the
// file screen.
func runTerminal(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: terminal CODE q|ctrl-c|- program args...")
	}
	control, tty, err := openPTY()
	ts.Check(err)
	defer control.Close()
	path, err := exec.LookPath(args[2])
	ts.Check(err)
	ctx, cancel := context.WithTimeout(context.Background(), terminalPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args[3:]...)
	cmd.Dir = ts.MkAbs(".")
	for _, name := range []string{"FLOXD_SOCKET", "NO_COLOR", "HOME"} {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	cmd.Env = append(cmd.Env, "TERM=xterm", "PATH="+os.Getenv("PATH"))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	ts.Check(cmd.Start())
	tty.Close()
	screen := watchScreen(control, map[string]string{"q": "q", "ctrl-c": "\x03", "-": ""}[args[1]])
	err = cmd.Wait()
	if ctx.Err() != nil {
		ts.Fatalf("%s hangs; the screen shows %q", strings.Join(args[2:], " "), <-screen)
	}
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	}
	shown := <-screen
	if strconv.Itoa(got) != args[0] {
		ts.Fatalf("%s exited %d, want %s; the screen shows %q", strings.Join(args[2:], " "), got, args[0], shown)
	}
	ts.Check(os.WriteFile(filepath.Join(cmd.Dir, "screen"), shown, 0o600))
}

// watchScreen collects what the terminal shows until the program is gone, and
// presses key once something appears.
func watchScreen(control *os.File, key string) <-chan []byte {
	screen := make(chan []byte, 1)
	go func() {
		var all bytes.Buffer
		buf := make([]byte, 4096)
		for {
			n, err := control.Read(buf)
			all.Write(buf[:n])
			if err != nil { // EIO: nobody has the terminal open any more
				screen <- all.Bytes()
				return
			}
			if key != "" { // once: the second Ctrl-C is for programs that hang
				_, _ = control.WriteString(key)
				key = ""
			}
		}
	}()
	return screen
}

// openPTY makes a terminal of 120 by 30 (Linux man page pts(4)).
func openPTY() (control, tty *os.File, err error) {
	control, err = os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	fd := int(control.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: 120, Row: 30})
	}
	if err == nil {
		tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	}
	if err != nil {
		control.Close()
		return nil, nil, err
	}
	return control, tty, nil
}
