package load

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const page = 4096

// forget makes the kernel forget a part of a file, 0 = to its end, as far as
// nobody has it mapped.
func forget(f *os.File, off, length int64) error {
	return os.NewSyscallError("fadvise", unix.Fadvise(int(f.Fd()), off, length, unix.FADV_DONTNEED))
}

// read hashes a file with read(2).
func (l *loader) read(path string, cold bool) (sum string, size int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	if cold {
		if err := forget(f, 0, 0); err != nil {
			return "", 0, err
		}
	}
	hash := sha256.New()
	n, err := io.CopyBuffer(hash, struct{ io.Reader }{f}, make([]byte, 128<<10))
	return hex.EncodeToString(hash.Sum(nil)), int(n), err
}

// mapped hashes a file through a mapping. A SIGBUS is an error.
func (l *loader) mapped(path string, cold bool) (sum string, size int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	if info.Size() == 0 {
		return l.read(path, false)
	}
	if cold {
		if err := forget(f, 0, 0); err != nil {
			return "", 0, err
		}
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return "", 0, os.NewSyscallError("mmap", err)
	}
	defer func() { _ = unix.Munmap(b) }()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("SIGBUS: %v", v)
		}
	}()
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:]), len(b), nil
}

// runTimeout bounds a program of the load: nothing may hang.
const runTimeout = 2 * time.Minute

// runProgram runs a program to its end.
func runProgram(p Program) error {
	ctx, cancel := context.WithTimeout(context.Background(), runTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.Argv[0], p.Argv[1:]...)
	cmd.Env = []string{"PATH=/nonexistent"}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), p.Want) {
		return fmt.Errorf("%s: %w: %.200s", strings.Join(p.Argv, " "), errors.Join(err, ctx.Err()), out)
	}
	return nil
}

// walk lists everything below a directory.
func walk(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), runTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "find", dir)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil || said.Len() > 0 {
		return fmt.Errorf("find %s: %w: %.200s", dir, errors.Join(err, ctx.Err()), said.String())
	}
	return nil
}

// echo has a program repeat lines while its pages are taken away.
func (l *loader) echo(ctx context.Context) error {
	cmd := exec.Command(l.spec.Echo[0], l.spec.Echo[1:]...) //nolint:noctx // ends with its input
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewReader(out)
	for n := 0; ctx.Err() == nil && err == nil; n++ {
		line, got := fmt.Sprintf("line %d\n", n), ""
		if _, err = io.WriteString(in, line); err == nil {
			got, err = lines.ReadString('\n')
		}
		if err == nil && got != line {
			err = fmt.Errorf("it repeats %q as %q", line, got)
		}
		if err == nil {
			err = pageOut(cmd.Process.Pid, filepath.Dir(filepath.Dir(l.spec.Echo[0])))
		}
		l.lines.Add(1)
		_ = sleep(ctx, l.spec.Pause)
	}
	_ = in.Close()
	// Ended by a signal, it says which.
	return errors.Join(err, cmd.Wait())
}

// pageOut takes the pages of what a process has mapped below a directory from
// it, as the kernel does when memory is short.
func pageOut(pid int, below string) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(fd)
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line)
		var from, to uintptr
		if len(fields) < 6 || !strings.HasPrefix(fields[5], below+"/") {
			continue
		}
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &from, &to); err != nil {
			return err
		}
		iov := struct{ base, length uintptr }{from, to - from}
		_, _, errno := unix.Syscall6(unix.SYS_PROCESS_MADVISE, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1, unix.MADV_PAGEOUT, 0, 0)
		if errno != 0 {
			return os.NewSyscallError("process_madvise", errno)
		}
	}
	return nil
}

// probe reads a page the kernel does not have and looks up a name nobody asked
// for, again and again, and notes the longest time that took.
func (l *loader) probe(ctx context.Context) {
	f, err := os.Open(l.spec.Probe)
	if err != nil {
		l.fail("probe: %v", err)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		l.fail("probe: %v", err)
		return
	}
	pages := max(info.Size()/page, 1)
	b := make([]byte, page)
	for n := int64(0); ctx.Err() == nil; n++ {
		off := n % pages * page
		if err := forget(f, off, page); err != nil {
			l.fail("probe: %v", err)
			return
		}
		begun := time.Now()
		_, err := f.ReadAt(b, off)
		l.waited(begun)
		if err != nil && !errors.Is(err, io.EOF) {
			l.fail("probe: %v", err)
		}
		begun = time.Now()
		_, err = os.Lstat(fmt.Sprintf("%s/no-%d-%d", filepath.Dir(l.spec.Probe), os.Getpid(), n))
		l.waited(begun)
		if !errors.Is(err, os.ErrNotExist) {
			l.fail("probe: a name that is not there: %v", err)
		}
		l.probes.Add(1)
		_ = sleep(ctx, time.Millisecond)
	}
}

// waited notes a wait that began then.
func (l *loader) waited(begun time.Time) {
	took := int64(time.Since(begun))
	for {
		longest := l.longest.Load()
		if took <= longest || l.longest.CompareAndSwap(longest, took) {
			return
		}
	}
}
