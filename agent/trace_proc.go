package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process gives the process a thread belongs to. The thread may be gone by now:
// then it is taken for one itself, as most are that start.
func (r *startRecorder) process(tid uint32, now time.Time) uint32 {
	if t, ok := r.threads[tid]; ok && now.Sub(t.at) < processKnown {
		return t.pid
	}
	pid := r.status(tid, "Tgid")
	if pid == 0 {
		pid = tid
	}
	if len(r.threads) >= maxProcesses {
		clear(r.threads)
	}
	r.threads[tid] = thread{pid, now}
	return pid
}

// parent gives the parent of a process, 0 if it is gone.
func (r *startRecorder) parent(pid uint32) uint32 { return r.status(pid, "PPid") }

// status reads a number of /proc/PID/status, 0 if there is none.
func (r *startRecorder) status(pid uint32, field string) uint32 {
	b, err := os.ReadFile(filepath.Join(r.proc, strconv.FormatUint(uint64(pid), 10), "status"))
	if err != nil {
		return 0
	}
	_, rest, _ := bytes.Cut(b, []byte("\n"+field+":"))
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	n, err := strconv.ParseUint(string(bytes.TrimSpace(line)), 10, 32)
	if err != nil {
		return 0
	}
	return uint32(n)
}

// userHZ is in what /proc/PID/stat counts time, per second, on every Linux.
const userHZ = 100

// young reports whether a process was made a short while ago.
func (r *startRecorder) young(pid uint32) bool {
	b, err := os.ReadFile(filepath.Join(r.proc, strconv.FormatUint(uint64(pid), 10), "stat"))
	if err != nil {
		return false
	}
	// pid (name) state ppid …: the 22nd is when it began; a name may hold anything.
	end := bytes.LastIndexByte(b, ')')
	if end < 0 {
		return false
	}
	fields := strings.Fields(string(b[end+1:]))
	if len(fields) < 20 {
		return false
	}
	ticks, err := strconv.ParseInt(fields[19], 10, 64)
	var now unix.Timespec
	if err != nil || unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
		return false
	}
	return time.Duration(now.Nano())-time.Duration(ticks)*(time.Second/userHZ) < startAge
}
