package room

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// leaveTime is how long what a command left behind may take to end by itself.
const leaveTime = 2 * time.Second

// endOthers ends what the command left running: it has this process's mounts,
// which are about to go. Children of this process are not the command's.
func endOthers() {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		told := map[int]bool{}
		for end := time.Now().Add(leaveTime); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			left := others()
			if len(left) == 0 {
				return
			}
			for _, pid := range left {
				if !told[pid] {
					told[pid] = true
					_ = syscall.Kill(pid, sig)
				}
			}
		}
	}
}

// others lists the processes that share this one's mounts and are neither it nor
// its children.
func others() (pids []int) {
	self, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil
	}
	links, err := filepath.Glob("/proc/[0-9]*/ns/mnt")
	if err != nil {
		return nil
	}
	for _, link := range links {
		pid, err := strconv.Atoi(strings.Split(link, "/")[2])
		if err != nil || pid == os.Getpid() || parent(pid) == os.Getpid() {
			continue
		}
		if ns, err := os.Readlink(link); err == nil && ns == self {
			pids = append(pids, pid)
		}
	}
	return pids
}

// parent is the parent of a process, 0 if that is gone.
func parent(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// "pid (name) S ppid …"; the name may hold anything.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	n, err := strconv.Atoi(fields[1])
	if err != nil {
		return 0
	}
	return n
}
