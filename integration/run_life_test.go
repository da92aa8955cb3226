package integration

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/need"
)

// begun is a floxctl run whose command says what it does, line by line.
type begun struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines *bufio.Reader
}

// start starts floxctl run with a shell script, whose input the test holds.
func (u *stranger) start(t *testing.T, mode, script string, files ...*os.File) *begun {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	r := &begun{cmd: u.command(ctx, u.l.programs.Floxctl, "run", "--quiet", "--mode", mode, u.l.ripgrep(), "--", "sh", "-c", script)}
	r.cmd.ExtraFiles = files
	r.cmd.Cancel = func() error {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			hangs(t, r.cmd.Process.Pid, u.agentLogs())
		}
		return r.cmd.Process.Kill()
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if r.stdin, err = r.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	r.cmd.Stderr = os.Stderr
	r.lines = bufio.NewReader(out)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = r.cmd.Wait()
	})
	return r
}

// says waits for a line of the command's.
func (r *begun) says(t *testing.T) string {
	t.Helper()
	line, err := r.lines.ReadString('\n')
	if err != nil {
		t.Fatalf("the command ended: %v (%q)", err, line)
	}
	return strings.TrimSpace(line)
}

// ends waits for the end, and gives exit code and signal of floxctl.
func (r *begun) ends(t *testing.T) (code int, sig syscall.Signal) {
	t.Helper()
	err := r.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	status, ok := r.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok {
		t.Fatalf("state %T", r.cmd.ProcessState.Sys())
	}
	if status.Signaled() {
		return -1, status.Signal()
	}
	return status.ExitStatus(), 0
}

// gone waits until a process has ended.
func gone(t *testing.T, what, pid string) {
	t.Helper()
	eventually(t, what+" has ended", func() bool {
		b, err := os.ReadFile("/proc/" + pid + "/status")
		return err != nil || strings.Contains(string(b), "\nState:\tZ")
	})
}

// private are the modes with a namespace of their own.
var private = []string{"fuse", "copy"}

// TestRunsAtTheSameTime: two and more runs of one user do not know of each other.
func TestRunsAtTheSameTime(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-many")
	u.invite(t)
	for _, mode := range private {
		var all []*begun
		for range 3 {
			all = append(all, u.start(t, mode, "rg --version | head -n 1; read x; rg --files /nix/store/*ripgrep*/bin; exit $x"))
		}
		for _, r := range all {
			if line := r.says(t); !strings.HasPrefix(line, "ripgrep ") {
				t.Errorf("%s: it says %q", mode, line)
			}
		}
		for i, r := range all {
			if _, err := fmt.Fprintln(r.stdin, 20+i); err != nil {
				t.Fatal(err)
			}
			if line := r.says(t); line != l.world.Ripgrep.Exe {
				t.Errorf("%s: it says %q", mode, line)
			}
			if code, _ := r.ends(t); code != 20+i {
				t.Errorf("%s: exit code %d, want %d", mode, code, 20+i)
			}
		}
	}
	slots, err := filepath.Glob(filepath.Join(u.home, ".local/state/floxd/[0-9]"))
	if err != nil || len(slots) != 3 {
		t.Errorf("caches %v (%v), want the same three for both modes", slots, err)
	}
}

// TestRunPassesSignals: a command hears what its caller is told, ends as it
// wants, and its caller ends the same way.
func TestRunPassesSignals(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-signals")
	u.invite(t)
	for _, mode := range private {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1} {
			r := u.start(t, mode, `trap 'echo heard; exit 7' TERM INT HUP USR1; echo ready; while :; do sleep 0.05; done`)
			if line := r.says(t); line != "ready" {
				t.Fatalf("it says %q", line)
			}
			if err := r.cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if line := r.says(t); line != "heard" {
				t.Errorf("%s, %v: it says %q", mode, sig, line)
			}
			if code, s := r.ends(t); code != 7 || s != 0 {
				t.Errorf("%s, %v: exit code %d, signal %v, want 7", mode, sig, code, s)
			}
		}
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGSEGV} {
			r := u.start(t, mode, fmt.Sprintf("kill -%d $$", sig))
			switch code, s := r.ends(t); {
			case sig == syscall.SIGSEGV && code == 128+int(sig):
			case s != sig:
				t.Errorf("%s: a command killed by %v: exit code %d, signal %v", mode, sig, code, s)
			}
		}
	}
}

// TestRunLeavesNothing: what a command leaves running ends with it, and all ends
// with whoever was killed.
func TestRunLeavesNothing(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-ends")
	u.invite(t)
	for _, mode := range private {
		r := u.start(t, mode, `setsid sh -c 'trap "" TERM; echo $$; while :; do sleep 0.05; done' & read x`)
		left := r.says(t)
		fmt.Fprintln(r.stdin)
		if code, _ := r.ends(t); code != 0 {
			t.Errorf("%s: exit code %d", mode, code)
		}
		gone(t, "what was left in the background", left)

		r = u.start(t, mode, `echo $$; sleep 1000 & echo $!; echo $PPID; wait`)
		command, left, inner := r.says(t), r.says(t), r.says(t)
		if err := r.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		gone(t, "the command", command)
		gone(t, "its child", left)
		gone(t, "the inner process", inner)
		_ = r.cmd.Wait()

		r = u.start(t, mode, `echo $PPID; echo $$; exec sleep 1000`)
		inner, command = r.says(t), r.says(t)
		n, err := strconv.Atoi(inner)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(n, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		gone(t, "the command of an inner process that was killed", command)
		if code, s := r.ends(t); code == 0 && s == 0 {
			t.Errorf("%s: an inner process that was killed is no failure", mode)
		}
	}
	u.run(t, "-q", l.ripgrep(), "--", "rg", "--version").want(t, 0, "ripgrep ")
}

// TestRunIsTransparent: a command gets what its caller gave it, to the byte, and
// its private agent gets nothing of it.
func TestRunIsTransparent(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-clear")
	u.invite(t)
	const files = `3<"$HOME/file" 7<"$HOME/file" 4>/dev/null`
	const long = 120_000 // a single argument has a limit of its own
	for _, mode := range private {
		script := fmt.Sprintf(`printf "descriptors\n" >"$HOME/file"; exec %s run -q --mode %s %s -- "$@" %s`, l.programs.Floxctl, mode, l.ripgrep(), files)
		run := func(args ...string) result { return u.do(t, append([]string{"sh", "-c", script, "sh"}, args...)...) }

		odd, big := "\xff\"\n<\u2028", strings.Repeat("x", long)
		run("sh", "-c", `printf "%s|%s|" "$#" "$1"; cat | wc -c`, "sh", odd, big, big, big).want(t, 0, "4|"+odd+"|0\n")
		run("sh", "-c", `echo $((${#1} + ${#2}))`, "sh", big, big).want(t, 0, strconv.Itoa(2*long))

		has := []string{"sh", "-c", `cat <&3; exec ls /proc/self/fd`}
		direct := u.do(t, append([]string{"sh", "-c", "exec \"$@\" " + files, "sh"}, has...)...)
		direct.want(t, 0, "descriptors\n", "\n7\n")
		if open := run(has...); open != direct {
			t.Errorf("%s: its descriptors are %q, without floxctl %q", mode, open.out, direct.out)
		}
		if mode == "fuse" {
			u.agentHasNot(t, filepath.Join(u.home, "file"))
		}
		for _, ignored := range []string{"HUP", "INT"} {
			r := u.do(t, "sh", "-c", "trap '' "+ignored+"; "+script, "sh", "sh", "-c", "kill -"+ignored+" $$ $PPID; echo lives")
			r.want(t, 0, "lives")
		}
	}
}

// agentHasNot checks that a private agent has not a file that its caller had open.
func (u *stranger) agentHasNot(t *testing.T, file string) {
	t.Helper()
	in, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	r := u.start(t, "fuse", u.l.programs.Floxctl+` status --json | grep '"pid"'; read x`, in, in, in, in, in, in, in, in)
	fds := fmt.Sprintf("/proc/%s/fd", strings.Trim(strings.TrimPrefix(r.says(t), `"pid":`), " ,"))
	names, err := os.ReadDir(fds)
	if err != nil || len(names) < 5 {
		t.Fatalf("descriptors of the agent: %v, %v", names, err)
	}
	for _, n := range names {
		if to, _ := os.Readlink(filepath.Join(fds, n.Name())); to == file {
			t.Errorf("the agent has descriptor %s of its caller", n.Name())
		}
	}
	fmt.Fprintln(r.stdin)
	r.ends(t)
}

// TestRunLeavesNoRunDirectory: however it ends, at the latest when the next begins.
func TestRunLeavesNoRunDirectory(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-dir")
	u.invite(t)
	dir := filepath.Join(u.host.Dir, "x")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, runUser, runUser)); err != nil {
		t.Fatal(err)
	}
	u.env = []string{"XDG_RUNTIME_DIR=" + dir}
	left := func() []string {
		names, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	begin := func(script string) *begun { return u.start(t, "fuse", script) }
	r := begin("kill -TERM $$")
	if _, s := r.ends(t); s != syscall.SIGTERM || len(left()) > 0 {
		t.Errorf("after a command killed by %v there is %q", s, left())
	}
	r = begin("echo $PPID; read x")
	inner := r.says(t)
	if len(left()) != 1 {
		t.Errorf("while it runs there is %q", left())
	}
	if err := r.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = r.cmd.Wait()
	gone(t, "the inner process", inner)
	r = begin("exit 3")
	if code, _ := r.ends(t); code != 3 || len(left()) > 0 {
		t.Errorf("exit code %d, and after one that was killed there is %q", code, left())
	}
}

// TestRunSurvivesItsAgent: the private agent may die as the machine's may.
func TestRunSurvivesItsAgent(t *testing.T) {
	l := open(t)
	u := l.stranger(t, "run-kill")
	u.invite(t)
	r := u.start(t, "fuse", `rg --version | head -n 1; `+l.programs.Floxctl+` status --json | grep '"pid"'; read x
		find /nix/store/*ripgrep*/ -type f -exec cat {} + >/dev/null && echo read`)
	if line := r.says(t); !strings.HasPrefix(line, "ripgrep ") {
		t.Fatalf("it says %q", line)
	}
	pid := strings.Trim(strings.TrimPrefix(r.says(t), `"pid":`), " ,")
	n, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(n, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(r.stdin)
	if line := r.says(t); line != "read" {
		t.Errorf("it says %q", line)
	}
	if code, _ := r.ends(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestRunOnATerminal: Ctrl-C is for the command alone, once, and leaves it what
// it has not read yet of the store.
func TestRunOnATerminal(t *testing.T) {
	need.Command(t, "perl")
	l := open(t)
	u := l.stranger(t, "run-tty")
	u.invite(t)
	exe, err := os.Stat(l.original(l.world.Ripgrep.Exe))
	if err != nil {
		t.Fatal(err)
	}
	read := fmt.Sprintf("read %d", exe.Size())
	for _, mode := range private {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		file := filepath.Join(u.host.Dir, "command")
		// A shell runs its trap once for two signals of a moment; Perl counts.
		command := `$| = 1; $SIG{INT} = sub { $n++ }; print "ready\n"; select(undef, undef, undef, 0.1) for 1..20; print "heard $n\n";
			open(my $f, "<", $ARGV[0]) or print "lost: $!\n"; local $/; my $b = <$f>; print "read ", length($b), "\n"; exit 9`
		if err := os.WriteFile(file, []byte(command), 0o644); err != nil {
			t.Fatal(err)
		}
		script := fmt.Sprintf("exec %s run -q --mode %s %s -- perl %s %s", l.programs.Floxctl, mode, l.ripgrep(), file, l.world.Ripgrep.Exe)
		cmd := u.command(ctx, "script", "--quiet", "--return", "--command", script, "/dev/null")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		var said []string
		for lines.Scan() {
			said = append(said, strings.TrimSpace(lines.Text()))
			if said[len(said)-1] == "ready" {
				time.Sleep(300 * time.Millisecond)
				_, _ = in.Write([]byte{3})
			}
		}
		err = cmd.Wait()
		cancel()
		all := strings.Join(said, "\n")
		if code := cmd.ProcessState.ExitCode(); code != 9 || !strings.Contains(all, "heard 1") || !strings.Contains(all, read) {
			t.Errorf("%s: exit code %d (%v), and it said %q", mode, code, err, said)
		}
	}
}
