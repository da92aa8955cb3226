package fuse

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// sums of what a touching process must read.
var (
	bigSum  = sum(noise(3<<20 + 123))
	hungSum = sum(noise(256 << 10))
)

// errnos lists how ops ended.
func errnos(ops []op) []string {
	var list []string
	for _, o := range ops {
		list = append(list, o.Errno)
	}
	return list
}

func repeat(o op, n int) []op { return slices.Repeat([]op{o}, n) }

func TestSecondPassAsksNothing(t *testing.T) {
	m := newMount(t, serveOptions{})
	pass := []op{
		{Do: "stat", Path: ""},
		{Do: "stat", Path: toolsPath},
		{Do: "stat", Path: toolsPath + "/share/crowd/f0007"},
		{Do: "readlink", Path: toolsPath + "/bin/link"},
		{Do: "readlink", Path: linkPath},
		{Do: "readdir", Path: toolsPath},
		{Do: "readdir", Path: toolsPath + "/share/crowd"},
		{Do: "read", Path: filePath},
		{Do: "read", Path: toolsPath + "/share/big"},
		{Do: "read", Path: toolsPath + "/etc/empty"},
		{Do: "mmap", Path: toolsPath + "/share/big"},
		{Do: "read", Path: toolsPath + "/bin/prog"},
		{Do: "exec", Path: toolsPath + "/bin/prog"},
		{Do: "stat", Path: toolsPath + "/missing"},
		{Do: "stat", Path: toolsPath + "/share/missing"},
		{Do: "stat", Path: "lib"},
		{Do: "stat", Path: pollProbe},
		{Do: "access", Path: toolsPath + "/bin/prog"},
		{Do: "xattr", Path: toolsPath + "/bin/prog"},
	}
	want := slices.Concat(slices.Repeat([]string{""}, 13), slices.Repeat([]string{"ENOENT"}, 4), []string{"", "ENOTSUP"})
	first := m.touch(t, pass...)
	if diff := cmp.Diff(want, errnos(first)); diff != "" {
		t.Fatalf("errors of the first pass (-want +got):\n%s", diff)
	}
	if first[8].Text != bigSum || first[10].Text != bigSum || first[6].Count != crowd {
		t.Errorf("read %s, mapped %s, want %s; %d files, want %d", first[8].Text, first[10].Text, bigSum, first[6].Count, crowd)
	}
	// A kernel that takes pages away from files nobody uses just now (DAMON's pageout)
	// asks for those again; what it never keeps, it asks for in every pass.
	const tries = 20
	for try := 1; ; try++ {
		before := m.ask(t, command{Cmd: "stats"}).Stats
		m.touch(t, pass...)
		after := m.ask(t, command{Cmd: "stats"}).Stats
		if before.Total == 0 || before.Total != after.Total && try == tries {
			t.Fatalf("requests before and after pass %d:\n%s", try+1, cmp.Diff(before.Requests, after.Requests))
		}
		if before.Total == after.Total {
			return
		}
	}
}

func TestAttributesAreNixs(t *testing.T) {
	m := newMount(t, serveOptions{})
	paths := []string{toolsPath, toolsPath + "/bin", toolsPath + "/share", toolsPath + "/bin/prog", toolsPath + "/etc/conf", toolsPath + "/bin/link", linkPath, toolsPath + "/share/big"}
	ops := []op{{Do: "stat"}}
	for _, p := range paths {
		ops = append(ops, op{Do: "stat", Path: p})
	}
	got := m.touch(t, ops...)
	self, _ := os.Stat("/proc/self/exe")
	type attr struct {
		Mode         uint32
		Nlink        uint64
		Size, Blocks int64
	}
	want := []attr{
		{unix.S_IFDIR | 0o555, 1, 0, 0},
		{unix.S_IFDIR | 0o555, 5, 0, 0},
		{unix.S_IFDIR | 0o555, 2, 0, 0},
		{unix.S_IFDIR | 0o555, 3, 0, 0},
		{unix.S_IFREG | 0o555, 1, self.Size(), (self.Size() + 511) / 512},
		{unix.S_IFREG | 0o444, 1, 6, 1},
		{unix.S_IFLNK | 0o777, 1, 4, 1},
		{unix.S_IFLNK | 0o777, 1, int64(len(toolsPath + "/etc/conf")), 1},
		{unix.S_IFREG | 0o444, 1, 3<<20 + 123, 6145},
	}
	nodes := append([]uint64{rootNode}, m.ask(t, command{Cmd: "nodes", Paths: paths}).Nodes...)
	for i, o := range got {
		if diff := cmp.Diff(want[i], attr{o.Mode, o.Nlink, o.Size, o.Blocks}); diff != "" || o.Errno != "" {
			t.Errorf("%q (-want +got): %s%s", o.Path, o.Errno, diff)
		}
		if o.Mtime != 1 || o.Ino != nodes[i] {
			t.Errorf("%q: mtime %d, want 1; inode %#x, want %#x", o.Path, o.Mtime, o.Ino, nodes[i])
		}
	}
}

func TestMountFlags(t *testing.T) {
	m := newMount(t, serveOptions{})
	info, err := FindMount(m.Dir)
	if err != nil || info == nil {
		t.Fatal(info, err)
	}
	if diff := cmp.Diff(MountInfo{Dir: m.Dir, Device: m.BDI, FSType: "fuse.floxd", Source: "floxd-test"}, *info); diff != "" {
		t.Error(diff)
	}
	table, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(table)) {
		if strings.Contains(line, m.Dir) {
			for _, flag := range []string{"ro", "nosuid", "nodev", "allow_other"} {
				if !slices.Contains(strings.Split(strings.Fields(line)[3], ","), flag) {
					t.Errorf("mounted without %s: %s", flag, line)
				}
			}
		}
	}
	if got := m.touch(t, op{Do: "create", Path: toolsPath + "/x"}, op{Do: "create", Path: "x"}); got[0].Errno != "EROFS" || got[1].Errno != "EROFS" {
		t.Error(errnos(got))
	}
	// The numbers statfs gives come from memory, also while everything hangs.
	m.ask(t, command{Cmd: "hold", Arg: "lookup " + hungPath})
	c := m.begin(t, op{Do: "stat", Path: hungPath})
	got := m.touch(t, op{Do: "statfs"})[0]
	if got.Errno != "" || got.Size != 1<<39 || got.Blocks != 1<<28 || got.Count != 12345 {
		t.Errorf("statfs: %+v", got)
	}
	c.dies(t, 10*time.Second)
}

func TestMissingNames(t *testing.T) {
	m := newMount(t, serveOptions{})
	for _, c := range []struct {
		name, path string
		requests   uint64 // of ten look-ups after the first
	}{
		{"no store path name is never asked for again", "lib", 0},
		{"inside a store path neither", toolsPath + "/lib", 0},
		{"not valid now is asked for each time", newPath, 10},
	} {
		m.touch(t, op{Do: "stat", Path: toolsPath}, op{Do: "stat", Path: c.path})
		before := m.total(t)
		for _, o := range m.touch(t, repeat(op{Do: "stat", Path: c.path}, 10)...) {
			if o.Errno != "ENOENT" {
				t.Errorf("%s: %s", c.name, o.Errno)
			}
		}
		if n := m.total(t) - before; n != c.requests {
			t.Errorf("%s: %d requests, want %d", c.name, n, c.requests)
		}
	}
	m.ask(t, command{Cmd: "add", Arg: newPath})
	if o := m.touch(t, op{Do: "read", Path: newPath})[0]; o.Text != sum([]byte(newPath)) {
		t.Errorf("a path that became valid: %+v", o)
	}
}

// A name that may be deleted on this machine is gone for the next who asks, with
// all below it.
func TestDeletedNamesAreGone(t *testing.T) {
	m := newMount(t, serveOptions{})
	m.ask(t, command{Cmd: "stage", Arg: newPath})
	below := newPath + "/file"
	if o := m.touch(t, op{Do: "stat", Path: newPath}, op{Do: "read", Path: below}); o[0].Errno != "" || o[1].Text != sum([]byte(newPath)) {
		t.Fatalf("before: %+v", o)
	}
	m.ask(t, command{Cmd: "delete", Arg: newPath})
	for _, o := range m.touch(t, op{Do: "read", Path: below}, op{Do: "stat", Path: below}, op{Do: "stat", Path: newPath}) {
		if o.Errno != "ENOENT" {
			t.Errorf("%s %s after it was deleted: %q", o.Do, o.Path, o.Errno)
		}
	}
}

// The log of a derivation is found by the derivation's name, the newest one each
// time, in a directory that nobody sees.
func TestLogsAreFoundByDerivation(t *testing.T) {
	m := newMount(t, serveOptions{})
	const drv = "0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c-made.drv"
	at := flox.LogsName + "/" + drv
	if o := m.touch(t, op{Do: "stat", Path: at}, op{Do: "stat", Path: flox.LogsName + "/0c"}); o[0].Errno != "ENOENT" || o[1].Errno != "ENOENT" {
		t.Errorf("before there is one: %+v", o)
	}
	m.ask(t, command{Cmd: "add", Arg: drv + ".log"})
	o := m.touch(t, op{Do: "stat", Path: flox.LogsName}, op{Do: "read", Path: at}, op{Do: "readdir", Path: flox.LogsName}, op{Do: "readdir", Path: ""})
	if o[0].Mode != unix.S_IFDIR|0o555 || o[1].Text != sum([]byte(drv+".log")) {
		t.Errorf("the directory, and the log: %+v, %+v", o[0], o[1])
	}
	if o[2].Errno != "" || len(o[2].Names) != 0 || slices.Contains(o[3].Names, flox.LogsName) {
		t.Errorf("listings: %+v, %+v", o[2], o[3])
	}
	m.ask(t, command{Cmd: "delete", Arg: drv + ".log"})
	if o := m.touch(t, op{Do: "read", Path: at}); o[0].Errno != "ENOENT" {
		t.Errorf("after it went: %+v", o)
	}
}

func TestRootListingIsNeverStale(t *testing.T) {
	m := newMount(t, serveOptions{})
	list := op{Do: "readdir", Path: ""}
	want := []string{toolsPath, filePath, linkPath}
	for range 2 {
		if diff := cmp.Diff(want, m.touch(t, list, list)[1].Names); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	}
	m.ask(t, command{Cmd: "add", Arg: newPath})
	if diff := cmp.Diff(append(want, newPath), m.touch(t, list)[0].Names); diff != "" {
		t.Errorf("after a path became valid (-want +got):\n%s", diff)
	}
}

// A listing that cannot be had is an error, not an empty directory.
func TestFailedListings(t *testing.T) {
	m := newMount(t, serveOptions{ReadTimeout: 200 * time.Millisecond})
	for _, kind := range []string{"unreachable", "corrupt"} {
		m.ask(t, command{Cmd: "fail", Arg: "names", Kind: kind})
		if o := m.touch(t, op{Do: "readdir"})[0]; o.Errno != "EIO" {
			t.Errorf("%s: %q, %d names", kind, o.Errno, o.Count)
		}
	}
}

// The kernel passes on every ioctl(2), such as the isatty(3) with which some
// languages begin to read a file; it must not wait behind anything.
func TestIoctlIsRefusedAtOnce(t *testing.T) {
	m := newMount(t, serveOptions{})
	for _, o := range m.touch(t, repeat(op{Do: "ioctl", Path: toolsPath + "/etc/conf"}, 3)...) {
		if o.Errno != "ENOTTY" {
			t.Errorf("%+v", o)
		}
	}
	if n := m.ask(t, command{Cmd: "stats"}).Stats.Requests["IOCTL"]; n != 3 {
		t.Errorf("%d ioctls arrived, want 3", n)
	}
}

// A listing of very many names takes no memory that grows with them, and each
// is in it once, although getdents reads it in hundreds of pieces.
func TestManyNames(t *testing.T) {
	const n = 200_000
	m := newMount(t, serveOptions{})
	m.touch(t, op{Do: "readdir", Path: ""})
	m.ask(t, command{Cmd: "many", N: n})
	before := m.ask(t, command{Cmd: "heap"}).Heap
	got := m.touch(t, op{Do: "readdir", Path: ""})[0]
	if got.Errno != "" || got.Count != n+3 {
		t.Errorf("%d names, want %d: %s", got.Count, n+3, got.Errno)
	}
	if after := m.ask(t, command{Cmd: "heap"}).Heap; after-before > 16<<10 {
		t.Errorf("memory grew from %d to %d KiB", before, after)
	}
	if info, err := os.Stat(m.table); err != nil || info.Size() != int64(tableHeader) {
		t.Errorf("a listing gave inode numbers away: %v", info.Size())
	}
}

func TestDeadlines(t *testing.T) {
	const lookup, read = 200 * time.Millisecond, 1500 * time.Millisecond
	m := newMount(t, serveOptions{LookupTimeout: lookup, ReadTimeout: read})
	hung := toolsPath + "/share/hung"
	m.ask(t, command{Cmd: "hold", Arg: "lookup " + hungPath})
	m.ask(t, command{Cmd: "hold", Arg: "read " + hung})
	got := m.touch(t, op{Do: "stat", Path: hungPath}, op{Do: "read", Path: hung})
	if got[0].Errno != "EIO" || got[0].Took < lookup || got[1].Errno != "EIO" || got[1].Took < read {
		t.Errorf("hung: %+v", got)
	}
	// The kernel's read-ahead waits first; its reader must not wait once more.
	if got[1].Took >= 2*read {
		t.Errorf("a read failed after %v, twice its deadline", got[1].Took)
	}
	m.ask(t, command{Cmd: "fail", Arg: "lookup " + newPath, Kind: "unreachable"})
	m.ask(t, command{Cmd: "fail", Arg: "read " + toolsPath + "/etc/conf", Kind: "unreachable"})
	m.ask(t, command{Cmd: "fail", Arg: "read " + toolsPath + "/share/big", Kind: "corrupt"})
	got = m.touch(t, op{Do: "stat", Path: newPath}, op{Do: "read", Path: toolsPath + "/etc/conf"}, op{Do: "read", Path: toolsPath + "/share/big"})
	if diff := cmp.Diff([]string{"EIO", "EIO", "EIO"}, errnos(got)); diff != "" {
		t.Error(diff)
	}
	if got[1].Took < read {
		t.Errorf("a reader was given up after %v although help could have come until %v", got[1].Took, read)
	}
	// Nothing of that is remembered by the kernel.
	m.ask(t, command{Cmd: "release", Arg: "read " + hung})
	m.ask(t, command{Cmd: "release", Arg: "lookup " + hungPath})
	m.ask(t, command{Cmd: "add", Arg: hungPath})
	got = m.touch(t, op{Do: "sleep", Len: 1100}, op{Do: "stat", Path: hungPath}, op{Do: "read", Path: hung})
	if got[1].Errno != "" || got[2].Text != hungSum {
		t.Errorf("afterwards: %+v", got)
	}
}

func TestMappedFilesWaitWithoutDeadline(t *testing.T) {
	m := newMount(t, serveOptions{ReadTimeout: 100 * time.Millisecond})
	hung := toolsPath + "/share/hung"
	m.ask(t, command{Cmd: "mapped", N: 1})
	m.ask(t, command{Cmd: "hold", Arg: "read " + hung})
	c := m.begin(t, op{Do: "mmap", Path: hung})
	m.awaitWait(t, "READ")
	time.Sleep(500 * time.Millisecond)
	m.ask(t, command{Cmd: "release", Arg: "read " + hung})
	if got := c.wait(t, 10*time.Second)[0]; got.Text != hungSum || got.Took < 500*time.Millisecond {
		t.Errorf("%+v", got)
	}
}

// To find out whether a file is mapped may take long on a busy machine: what
// comes meanwhile is used, and the killed still die.
func TestAReadGoesOnWhileItsMappingsAreLookedFor(t *testing.T) {
	for name, n := range map[string]int{"given up": 2, "never": 3} {
		t.Run(name, func(t *testing.T) { readWhileLookedFor(t, n) })
	}
}

func readWhileLookedFor(t *testing.T, mapped int) {
	m := newMount(t, serveOptions{ReadTimeout: 100 * time.Millisecond})
	hung := toolsPath + "/share/hung"
	m.ask(t, command{Cmd: "mapped", N: mapped})
	m.ask(t, command{Cmd: "hold", Arg: "read " + hung})
	c := m.begin(t, op{Do: "mmap", Path: hung})
	m.awaitWait(t, "READ") // of c: what it took is counted from before that
	killed := m.begin(t, op{Do: "mmap", Path: hung, Len: 1})
	time.Sleep(500 * time.Millisecond)
	killed.dies(t, 10*time.Second)
	m.ask(t, command{Cmd: "release", Arg: "read " + hung})
	if got := c.wait(t, 10*time.Second)[0]; got.Text != hungSum || got.Took < 500*time.Millisecond {
		t.Errorf("%+v", got)
	}
}

// awaitWait waits until somebody waits for op, and gives it.
func (m *mount) awaitWait(t *testing.T, op string) Wait {
	t.Helper()
	for range 500 {
		for _, w := range m.ask(t, command{Cmd: "waiting"}).Waiting {
			if w.Op == op {
				return w
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("nobody waits for %s", op)
	return Wait{}
}

func TestWaitingSaysWhoWaitsForWhat(t *testing.T) {
	m := newMount(t, serveOptions{})
	hung := toolsPath + "/share/hung"
	m.ask(t, command{Cmd: "hold", Arg: "lookup " + hungPath})
	m.ask(t, command{Cmd: "hold", Arg: "read " + hung})
	a := m.begin(t, op{Do: "stat", Path: hungPath})
	w := m.awaitWait(t, "LOOKUP")
	if int(w.PID) != a.cmd.Process.Pid || w.Name != hungPath || w.Node != rootNode || w.Since.IsZero() {
		t.Errorf("%+v", w)
	}
	b := m.begin(t, op{Do: "read", Path: hung})
	w = m.awaitWait(t, "READ")
	if nodes := m.ask(t, command{Cmd: "nodes", Paths: []string{hung}}).Nodes; int(w.PID) != b.cmd.Process.Pid || w.Node != nodes[0] {
		t.Errorf("%+v", w)
	}
	a.dies(t, 10*time.Second)
	b.dies(t, 10*time.Second)
}

func TestKilledProcessesAreFreed(t *testing.T) {
	hung := toolsPath + "/share/hung"
	tick := op{Do: "tick", Len: 10}
	for _, c := range []struct {
		name string
		max  int
		wait string
		ops  []op
	}{
		{"look-up", 0, "LOOKUP", []op{{Do: "stat", Path: hungPath}}},
		{"read", 0, "READ", []op{{Do: "read", Path: hung}}},
		{"page fault", 0, "READ", []op{{Do: "mmap", Path: hung}}},
		{"page fault without read-ahead", 0, "READ", []op{{Do: "mmap", Path: hung, Len: 1}}},
		{"look-up after another signal", 0, "LOOKUP", []op{tick, {Do: "stat", Path: hungPath}}},
		{"page fault after another signal", 0, "READ", []op{tick, {Do: "mmap", Path: hung, Len: 1}}},
		{"when nothing more is read from the kernel", 1, "LOOKUP", []op{{Do: "stat", Path: hungPath}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMount(t, serveOptions{MaxInFlight: c.max, LookupTimeout: time.Minute, ReadTimeout: time.Minute})
			m.ask(t, command{Cmd: "hold", Arg: "lookup " + hungPath})
			m.ask(t, command{Cmd: "hold", Arg: "read " + hung})
			if c.max > 0 { // one more, so that nobody is left to read
				other := m.begin(t, op{Do: "read", Path: hung})
				m.awaitWait(t, "READ")
				defer other.dies(t, 10*time.Second)
			}
			p := m.begin(t, c.ops...)
			m.awaitWait(t, c.wait)
			if r := m.ask(t, command{Cmd: "waiting"}); r.Full != (c.max > 0) || r.Full && r.Limit != c.max {
				t.Errorf("full of %d: %v", r.Limit, r.Full)
			}
			time.Sleep(50 * time.Millisecond) // lets the timer tick
			p.dies(t, 10*time.Second)         // usually at once, and never by a deadline
			for range 100 {
				if !slices.ContainsFunc(m.ask(t, command{Cmd: "waiting"}).Waiting, func(w Wait) bool { return w.Op == c.wait }) {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
			if c.wait == "LOOKUP" { // a read-ahead may go on for the next reader
				t.Error("the request of the dead is still worked on")
			}
		})
	}
}

// A signal that kills nobody ends nothing: no EINTR, no request sent twice.
func TestSignalsInterruptNothing(t *testing.T) {
	m := newMount(t, serveOptions{})
	hung := toolsPath + "/share/hung"
	m.ask(t, command{Cmd: "hold", Arg: "lookup " + hungPath})
	m.ask(t, command{Cmd: "hold", Arg: "read " + hung})
	a := m.begin(t, op{Do: "tick", Len: 10}, op{Do: "stat", Path: hungPath})
	b := m.begin(t, op{Do: "tick", Len: 10}, op{Do: "mmap", Path: hung, Len: 1})
	c := m.begin(t, op{Do: "tick", Len: 10}, op{Do: "read", Path: hung})
	m.awaitWait(t, "LOOKUP")
	m.awaitWait(t, "READ")
	time.Sleep(400 * time.Millisecond)
	st := m.ask(t, command{Cmd: "stats"}).Stats
	if st.Requests["INTERRUPT"] == 0 {
		t.Error("no INTERRUPT was sent: the test tests nothing")
	}
	if st.Requests["READ"] > 8 {
		t.Errorf("%d READs while nothing could be read", st.Requests["READ"])
	}
	m.ask(t, command{Cmd: "add", Arg: hungPath})
	m.ask(t, command{Cmd: "release", Arg: "lookup " + hungPath})
	m.ask(t, command{Cmd: "release", Arg: "read " + hung})
	for _, p := range []*toucher{a, b, c} {
		got := p.wait(t, 10*time.Second)
		if got[0].Errno != "" || got[1].Errno != "" || (got[1].Do != "stat" && got[1].Text != hungSum) {
			t.Errorf("%+v", got)
		}
	}
	if n := m.ask(t, command{Cmd: "stats"}).Stats.Interrupted; n != 0 {
		t.Errorf("%d requests were answered EINTR", n)
	}
}

func TestHungLookupBlocksNobodyElse(t *testing.T) {
	m := newMount(t, serveOptions{LookupTimeout: time.Minute, ReadTimeout: time.Minute})
	hung := toolsPath + "/share/hung"
	m.ask(t, command{Cmd: "hold", Arg: "lookup " + hungPath})
	m.ask(t, command{Cmd: "hold", Arg: "read " + hung})
	var stuck []*toucher
	for range 12 {
		stuck = append(stuck, m.begin(t, op{Do: "stat", Path: hungPath}), m.begin(t, op{Do: "read", Path: hung}))
	}
	m.awaitWait(t, "LOOKUP")
	m.awaitWait(t, "READ")
	var ops []op
	for i := range 50 {
		name := fmt.Sprintf("5c2y7sqz9mdkmv3xhbqf1r8gwn6jip%02d-more", i)
		m.ask(t, command{Cmd: "add", Arg: name})
		ops = append(ops, op{Do: "read", Path: name})
	}
	ops = append(ops, op{Do: "readdir"}, op{Do: "read", Path: toolsPath + "/share/big"}, op{Do: "exec", Path: toolsPath + "/bin/prog"}, op{Do: "stat", Path: newPath})
	got := m.touch(t, ops...)
	for _, o := range got[:53] {
		if o.Errno != "" {
			t.Errorf("%s %s: %s", o.Do, o.Path, o.Errno)
		}
	}
	if got[50].Count != 53 || got[53].Errno != "ENOENT" {
		t.Errorf("%d names; %s", got[50].Count, got[53].Errno)
	}
	// Those who look up the same name wait for the first of them inside the kernel.
	for _, p := range stuck {
		p.cmd.Process.Kill()
	}
	for _, p := range stuck {
		p.gone(t, 10*time.Second)
	}
}

// While nobody serves, as between two processes of an agent, what the kernel
// knows is answered as ever; what must be asked waits, df too, and whoever waits
// can be killed.
func TestWhileNobodyServes(t *testing.T) {
	m := newMount(t, serveOptions{})
	known := []op{
		{Do: "stat", Path: toolsPath + "/etc/conf"},
		{Do: "readdir", Path: toolsPath + "/share/crowd"},
		{Do: "read", Path: toolsPath + "/share/big"},
		{Do: "exec", Path: toolsPath + "/bin/prog"},
		{Do: "readlink", Path: toolsPath + "/bin/link"},
		{Do: "stat", Path: toolsPath + "/missing"},
	}
	want := []string{"", "", "", "", "", "ENOENT"}
	var got []op
	for try := 1; got == nil; try++ {
		m.touch(t, append(known, op{Do: "stat", Path: toolsPath + "/share/hung"})...)
		m.touch(t, op{Do: "read", Path: toolsPath + "/bin/prog"}) // a start reads what chance wants
		m.touch(t, known...)
		m.srv.kill()
		p := m.begin(t, known...)
		select {
		case err := <-p.done:
			p.done <- err
			got = p.wait(t, time.Second)
		case <-time.After(20 * time.Second): // a machine short of memory forgets what it knew
			if try == 3 {
				t.Fatal("what the kernel knew was asked for, three times")
			}
			m.start(t)
			p.wait(t, time.Minute)
		}
	}
	if diff := cmp.Diff(want, errnos(got)); diff != "" || got[2].Text != bigSum {
		t.Errorf("with nobody serving, what the kernel has (-want +got):\n%s", diff)
	}
	df, look := m.begin(t, op{Do: "statfs"}), m.begin(t, op{Do: "stat", Path: filePath})
	killed := []*toucher{
		m.begin(t, op{Do: "statfs"}), m.begin(t, op{Do: "stat", Path: linkPath}), m.begin(t, op{Do: "readdir"}),
		m.begin(t, op{Do: "read", Path: toolsPath + "/share/hung"}), m.begin(t, op{Do: "mmap", Path: toolsPath + "/share/hung", Len: 1}),
	}
	time.Sleep(300 * time.Millisecond)
	for _, p := range killed {
		p.dies(t, 10*time.Second)
	}
	m.start(t)
	for _, p := range []*toucher{df, look} {
		if o := p.wait(t, 10*time.Second)[0]; o.Errno != "" {
			t.Errorf("%s begun while nobody served: %s", o.Do, o.Errno)
		}
	}
}

// A server that ends, in either way, takes nobody with it, whether the kernel
// sends its requests again or the journal has them.
func TestServerIsReplacedWithoutErrors(t *testing.T) {
	for _, how := range []string{"kill -9", "stop"} {
		for _, without := range []bool{false, true} {
			name := how
			if without {
				name += " without resend"
			}
			t.Run(name, func(t *testing.T) { replaceServer(t, how, without) })
		}
	}
}

func replaceServer(t *testing.T, how string, without bool) {
	m := newMount(t, serveOptions{WithoutResend: without})
	hung := toolsPath + "/share/hung"
	m.touch(t, op{Do: "read", Path: toolsPath + "/etc/conf"})
	nodes := m.ask(t, command{Cmd: "nodes", Paths: []string{hung}}).Nodes
	m.ask(t, command{Cmd: "hold", Arg: "read " + hung})
	m.ask(t, command{Cmd: "hold", Arg: "lookup " + hungPath})
	// A running program mapped from the mount, and readers of all kinds.
	running := m.runProg(t)
	waiters := []*toucher{
		m.begin(t, op{Do: "read", Path: hung}), m.begin(t, op{Do: "mmap", Path: hung}),
		m.begin(t, op{Do: "stat", Path: hungPath}),
	}
	m.awaitWait(t, "LOOKUP")
	for begun := time.Now(); !slices.ContainsFunc(m.ask(t, command{Cmd: "waiting"}).Waiting, func(w Wait) bool { return w.Op == "READ" && w.Node == nodes[0] }); {
		if time.Since(begun) > 20*time.Second {
			t.Fatal("nobody reads the file that hangs")
		}
		time.Sleep(5 * time.Millisecond)
	}
	if how == "stop" {
		b := fmt.Sprintf("{%q:%q}\n", "Cmd", "stop")
		fmt.Fprint(m.srv.in, b)
		var r reply
		if err := m.srv.out.Decode(&r); err != nil || r.Err != "context canceled" {
			t.Errorf("Run ended with %q, %v", r.Err, err)
		}
	}
	m.srv.kill()
	late := m.begin(t, op{Do: "read", Path: toolsPath + "/share/big"})
	m.start(t) // whose store holds nothing up, and has no hungPath
	for _, p := range []*toucher{waiters[0], waiters[1], running} {
		for _, o := range p.wait(t, 10*time.Second) {
			if o.Errno != "" || (o.Path == hung && o.Text != hungSum) {
				t.Errorf("%+v", o)
			}
		}
	}
	if o := waiters[2].wait(t, 10*time.Second)[0]; o.Errno != "ENOENT" {
		t.Errorf("look-up of a path the new server does not have: %q", o.Errno)
	}
	if o := late.wait(t, 10*time.Second)[0]; o.Text != bigSum {
		t.Errorf("read begun while nobody served: %+v", o)
	}
	if again := m.ask(t, command{Cmd: "nodes", Paths: []string{hung}}).Nodes; !cmp.Equal(nodes, again) {
		t.Errorf("inode numbers changed: %x to %x", nodes, again)
	}
	// How many READs there were is the kernel's choice: the two readers may share.
	took := m.ask(t, command{Cmd: "takeover"}).Took
	if took.Resend == without || took.Journal != without || without && took.Resumed < 2 || !without && took.Resumed != 0 || took.Problem != "" {
		t.Errorf("taken over by %+v", took)
	}
}

// runProg starts the program in the mount, which sleeps, and then touches the
// mount through its own mapped pages.
func (m *mount) runProg(t *testing.T) *toucher {
	t.Helper()
	cmd := exec.Command(filepath.Join(m.Dir, toolsPath, "bin/prog"))
	cmd.Env = []string{
		modeEnv + "=touch", "FLOX_FUSE_DIR=" + m.Dir,
		`FLOX_FUSE_OPS=[{"Do":"sleep","Len":700},{"Do":"read","Path":"` + toolsPath + `/etc/conf"}]`,
	}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &toucher{cmd: cmd, out: &out, done: make(chan error, 1)}
	go func() { c.done <- cmd.Wait() }()
	return c
}

func TestDropPagesCostsOneRead(t *testing.T) {
	m := newMount(t, serveOptions{})
	conf := toolsPath + "/etc/conf"
	read := op{Do: "read", Path: conf, Len: 6}
	reads := func() uint64 { return m.ask(t, command{Cmd: "stats"}).Stats.Requests["READ"] }
	m.touch(t, read)
	before := reads()
	m.touch(t, repeat(read, 100)...)
	if n := reads() - before; n != 0 {
		t.Errorf("%d READs of a cached file", n)
	}
	m.ask(t, command{Cmd: "drop", Paths: []string{conf}})
	m.touch(t, repeat(read, 100)...)
	if n := reads() - before; n != 1 {
		t.Errorf("%d READs after its pages were dropped, want 1", n)
	}
	// A file that is being read is in use: dropping must not wait for it.
	hung := toolsPath + "/share/hung"
	m.ask(t, command{Cmd: "hold", Arg: "read " + hung})
	p := m.begin(t, op{Do: "read", Path: hung})
	m.awaitWait(t, "READ")
	m.ask(t, command{Cmd: "drop", Paths: []string{hung, conf}})
	if n := m.ask(t, command{Cmd: "stats"}).Stats.Dropped; n != 2 {
		t.Errorf("dropped %d, want 2", n)
	}
	p.dies(t, 10*time.Second)
}

func TestOverlayOnTop(t *testing.T) {
	m := newMount(t, serveOptions{})
	top := t.TempDir()
	for _, d := range []string{"up", "work", "all"} {
		if err := os.Mkdir(filepath.Join(top, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	all := filepath.Join(top, "all")
	// upperdir must not be on an overlay itself, as a container's /tmp is.
	if err := unix.Mount("tmpfs", top, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(top, unix.MNT_DETACH) })
	script := fmt.Sprintf(`set -e; cd %s; mkdir up work all
mount -t overlay overlay -o lowerdir=%s,upperdir=up,workdir=work all
cat all/%s/etc/conf; chmod u+w all/%s/etc; echo more >> all/%s/etc/conf; echo new > all/%s/etc/new; cat all/%s/etc/conf all/%s/etc/new; umount all`,
		top, m.Dir, toolsPath, toolsPath, toolsPath, toolsPath, toolsPath, toolsPath)
	out, err := exec.Command("sh", "-c", script).CombinedOutput()
	unix.Unmount(all, unix.MNT_DETACH)
	if err != nil || string(out) != "hello\nhello\nmore\nnew\n" {
		t.Errorf("%v: %s", err, out)
	}
}

func TestUnmountEndsRun(t *testing.T) {
	m := newMount(t, serveOptions{})
	if err := Unmount(m.Dir); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(m.srv.in, "{%q:%q}\n", "Cmd", "ended")
	var r reply
	if err := m.srv.out.Decode(&r); err != nil || r.Err != "<nil>" {
		t.Errorf("Run ended with %q, %v", r.Err, err)
	}
	if info, err := FindMount(m.Dir); info != nil || err != nil {
		t.Errorf("still mounted: %v, %v", info, err)
	}
}

func TestUnmountOfABusyMountIsLazy(t *testing.T) {
	m := newMount(t, serveOptions{})
	p := m.runProg(t)
	m.touch(t, op{Do: "stat", Path: toolsPath})
	if err := Unmount(m.Dir); err != nil {
		t.Fatal(err)
	}
	if info, err := FindMount(m.Dir); info != nil || err != nil {
		t.Errorf("still mounted: %v, %v", info, err)
	}
	p.cmd.Process.Kill()
	<-p.done
}

// Readers, look-ups, listings and starting programs go on while one server
// after another is killed under them.
func TestKillsUnderLoad(t *testing.T) {
	for name, opts := range map[string]serveOptions{"resend": {}, "journal": {WithoutResend: true}} {
		t.Run(name, func(t *testing.T) { killUnderLoad(t, opts) })
	}
}

func killUnderLoad(t *testing.T, opts serveOptions) {
	m := newMount(t, opts)
	var ops []op
	for i := range crowd {
		ops = append(ops, op{Do: "read", Path: fmt.Sprintf("%s/share/crowd/f%04d", toolsPath, i)})
		switch i % 100 {
		case 0:
			ops = append(ops, op{Do: "readdir", Path: toolsPath + "/share/crowd"}, op{Do: "sleep", Len: 50})
		case 20:
			ops = append(ops, op{Do: "exec", Path: toolsPath + "/bin/prog"})
		case 40:
			ops = append(ops, op{Do: "read", Path: toolsPath + "/share/big", Off: int64(i) * 2000, Len: 20_000})
		}
	}
	var readers []*toucher
	for i := range 4 {
		at := i * len(ops) / 4 // not all in step
		readers = append(readers, m.begin(t, slices.Concat(ops[at:], ops[:at])...))
	}
	kills, resumed := 0, 0
	for len(readers[0].done) == 0 && kills < 20 {
		time.Sleep(20 * time.Millisecond)
		m.srv.kill()
		m.start(t)
		kills++
		took := m.ask(t, command{Cmd: "takeover"}).Took
		if resumed += took.Resumed; took.Problem != "" {
			t.Error(took.Problem)
		}
	}
	for _, p := range readers {
		for _, o := range p.wait(t, 90*time.Second) {
			i := 0
			if o.Errno != "" {
				t.Errorf("%s %s: %s", o.Do, o.Path, o.Errno)
			}
			if _, err := fmt.Sscanf(filepath.Base(o.Path), "f%d", &i); err == nil && o.Text != sum(bytes.Repeat([]byte{byte(i)}, i%700)) {
				t.Errorf("%s has other content", o.Path)
			}
		}
	}
	if kills < 5 {
		t.Errorf("only %d kills", kills)
	}
	t.Logf("%d servers were killed, %d requests came from their journals", kills, resumed)
}

// BenchmarkFirstMiss is how long a program waits for the first look-up of a
// name that a store path does not have.
func BenchmarkFirstMiss(b *testing.B) {
	m := newMount(b, serveOptions{})
	var took time.Duration
	n := 0
	for b.Loop() {
		ops := []op{{Do: "stat", Path: toolsPath + "/share"}}
		for range 2000 {
			n++
			ops = append(ops, op{Do: "stat", Path: fmt.Sprintf("%s/share/missing-%d", toolsPath, n)})
		}
		for _, o := range m.touch(b, ops...)[1:] {
			took += o.Took
		}
	}
	b.ReportMetric(float64(took.Microseconds())/float64(n), "µs/miss")
}
