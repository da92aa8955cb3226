package integration

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox/integration/netns"
)

// touchEnv makes this binary a process that touches the store of a host, one
// request on its standard input after the other. It uses system calls as they
// are: the os package and the shell's tools would hide an EINTR.
const touchEnv = "FLOX_INTEGRATION_TOUCH"

func init() {
	if os.Getenv(touchEnv) != "" {
		runtime.LockOSThread() // signals of a timer go to the main thread first
	}
}

// touch is one request to such a process, and what came of it.
type touch struct {
	Do, Path string

	Errno string        // "" = worked
	Sum   string        // of the bytes read
	Count int           // bytes read, names listed
	Took  time.Duration // that the call took
}

// toucher is a process that touches a host's store.
type toucher struct {
	t    *testing.T
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  chan touch
	gone chan struct{}
}

// newToucher starts one; with tick it gets a signal every 10 ms.
func newToucher(t *testing.T, h *netns.Host, tick bool) *toucher {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &toucher{t: t, cmd: h.Command(t.Context(), self), out: make(chan touch, 1), gone: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), touchEnv+"=quiet")
	if tick {
		p.cmd.Env = append(p.cmd.Env, touchEnv+"=tick")
	}
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the process
		defer close(p.gone)
		defer close(p.out)
		for d := json.NewDecoder(out); ; {
			var o touch
			if d.Decode(&o) != nil {
				_ = p.cmd.Wait()
				return
			}
			p.out <- o
		}
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		for range p.out { //nolint:revive // lets the goroutine go on to its end
		}
		<-p.gone
	})
	return p
}

// begin asks for something.
func (p *toucher) begin(do, path string) {
	p.t.Helper()
	b, _ := json.Marshal(touch{Do: do, Path: path})
	if _, err := fmt.Fprintf(p.in, "%s\n", b); err != nil {
		p.t.Fatal(err)
	}
}

// wait gives what came of it.
func (p *toucher) wait(limit time.Duration) touch {
	p.t.Helper()
	select {
	case o, ok := <-p.out:
		if !ok {
			p.t.Fatal("the touching process ended")
		}
		return o
	case <-time.After(limit):
		p.t.Fatalf("no answer from the touching process in %s", limit)
	}
	return touch{}
}

func (p *toucher) do(do, path string, limit time.Duration) touch {
	p.t.Helper()
	p.begin(do, path)
	return p.wait(limit)
}

// kill kills it and says how long it took to go.
func (p *toucher) kill(limit time.Duration) time.Duration {
	p.t.Helper()
	select {
	case o := <-p.out:
		p.t.Errorf("not waiting any more when it was killed: %+v", o)
	default:
	}
	began := time.Now()
	_ = p.cmd.Process.Kill()
	select {
	case <-p.gone:
	case <-time.After(limit):
		p.t.Errorf("a killed process is still there after %s", limit)
	}
	return time.Since(began)
}

// touchMain is the touching process.
func touchMain() {
	if os.Getenv(touchEnv) == "tick" {
		signal.Notify(make(chan os.Signal, 1), syscall.SIGALRM)
		every := unix.NsecToTimeval(10e6)
		if _, err := unix.Setitimer(unix.ITIMER_REAL, unix.Itimerval{Interval: every, Value: every}); err != nil {
			panic(err)
		}
	}
	in, out := bufio.NewScanner(os.Stdin), json.NewEncoder(os.Stdout)
	for in.Scan() {
		var o touch
		if err := json.Unmarshal(in.Bytes(), &o); err != nil {
			panic(err)
		}
		began := time.Now()
		err := o.run()
		o.Took = time.Since(began)
		var errno syscall.Errno
		switch {
		case errors.As(err, &errno):
			o.Errno = unix.ErrnoName(errno)
		case err != nil:
			o.Errno = err.Error()
		}
		if out.Encode(o) != nil {
			return
		}
	}
}

// mapped is the file a process has mapped.
var mapped struct {
	sync.Mutex
	b []byte
}

func (o *touch) run() error {
	switch o.Do {
	case "stat":
		var st unix.Stat_t
		return unix.Lstat(o.Path, &st)
	case "open":
		fd, err := unix.Open(o.Path, unix.O_RDONLY, 0)
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	case "statfs":
		var st unix.Statfs_t
		return unix.Statfs(o.Path, &st)
	case "readdir":
		return o.readdir()
	case "read":
		return o.read()
	case "map": // and read nothing of it
		return o.mmap()
	case "fault": // every page of what is mapped, one by one
		mapped.Lock()
		defer mapped.Unlock()
		sum := sha256.Sum256(mapped.b)
		o.Sum, o.Count = hex.EncodeToString(sum[:]), len(mapped.b)
		return nil
	}
	return fmt.Errorf("do what? %q", o.Do)
}

func (o *touch) readdir() error {
	fd, err := unix.Open(o.Path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for buf := make([]byte, 32<<10); ; {
		n, err := unix.Getdents(fd, buf)
		if n <= 0 || err != nil {
			return err
		}
		_, count, _ := unix.ParseDirent(buf[:n], -1, nil)
		o.Count += count
	}
}

func (o *touch) read() error {
	fd, err := unix.Open(o.Path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	hash := sha256.New()
	for buf := make([]byte, 64<<10); ; {
		n, err := unix.Read(fd, buf)
		if err != nil {
			return err
		}
		if n == 0 {
			o.Sum = hex.EncodeToString(hash.Sum(nil))
			return nil
		}
		hash.Write(buf[:n])
		o.Count += n
	}
}

func (o *touch) mmap() error {
	fd, err := unix.Open(o.Path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	mapped.Lock()
	defer mapped.Unlock()
	if mapped.b, err = unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_PRIVATE); err != nil {
		return err
	}
	return unix.Madvise(mapped.b, unix.MADV_RANDOM) // faults one by one, without read-ahead
}
