package fault

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/need"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("FAULT_TEST_WRITE"); dir != "" {
		write(dir)
	}
	goleak.VerifyTestMain(m)
}

// write appends numbered lines: to "synced" each with fsync, to "loose"
// without. It prints a number once it is synced.
func write(dir string) {
	synced, err := os.Create(filepath.Join(dir, "synced"))
	if err != nil {
		panic(err)
	}
	loose, err := os.Create(filepath.Join(dir, "loose"))
	if err != nil {
		panic(err)
	}
	for i := 1; ; i++ {
		fmt.Fprintf(loose, "%08d\n", i)
		fmt.Fprintf(synced, "%08d\n", i)
		if err := synced.Sync(); err != nil {
			os.Exit(3) // never told anybody of this line
		}
		fmt.Println(i)
	}
}

func newDisk(t *testing.T) *Disk {
	t.Helper()
	need.Root(t)
	need.Command(t, "mkfs.ext4")
	d, err := NewDisk(t.Context(), t.TempDir(), 32<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(d.Dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", d.Dir, err)
		}
	})
	return d
}

// TestPowerCutKeepsWhatWasSynced also shows that the cut is one: what was not
// synced is lost.
func TestPowerCutKeepsWhatWasSynced(t *testing.T) {
	d := newDisk(t)
	lost := false
	for range 3 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), "FAULT_TEST_WRITE="+d.Dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		last := 0
		for last < 20 && lines.Scan() {
			if _, err := fmt.Sscan(lines.Text(), &last); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.PowerCut(t.Context(), cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() { // printed before the stop, not read until now
			if _, err := fmt.Sscan(lines.Text(), &last); err != nil {
				t.Fatal(err)
			}
		}
		_ = cmd.Wait()
		synced, err := os.ReadFile(filepath.Join(d.Dir, "synced"))
		if err != nil || last < 20 || !bytes.Contains(synced, fmt.Appendf(nil, "%08d\n", last)) {
			t.Fatalf("line %d was synced and is lost (%v): have %d bytes", last, err, len(synced))
		}
		loose, err := os.ReadFile(filepath.Join(d.Dir, "loose"))
		lost = lost || err != nil || len(loose) < last*9 || bytes.IndexByte(loose, 0) >= 0
	}
	if !lost {
		t.Error("nothing was lost that was not synced: this was no power cut")
	}
}

func TestFillLeavesWhatIsAsked(t *testing.T) {
	d := newDisk(t)
	const leave = 2 << 20
	release, err := Fill(d.Dir, leave)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(d.Dir, &st); err != nil {
		t.Fatal(err)
	}
	if free := int64(st.Bavail) * st.Bsize; free > leave+st.Bsize || free < leave-64*st.Bsize {
		t.Errorf("%d bytes are free, want about %d", free, leave)
	}
	file := filepath.Join(d.Dir, "big")
	if err := os.WriteFile(file, make([]byte, 2*leave), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("writing more than is free: got %v, want no space", err)
	}
	if err := errors.Join(os.Remove(file), release()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, make([]byte, 2*leave), 0o600); err != nil {
		t.Errorf("after the release: %v", err)
	}
}

func TestDiskSizeIsChecked(t *testing.T) {
	need.Root(t)
	if _, err := NewDisk(t.Context(), t.TempDir(), MinDiskSize-1); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("got %v", err)
	}
}

func TestFlipBit(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte{0, 0xff, 0}, 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, bit := range []int64{9, 23} {
		if err := FlipBit(file, bit); err != nil {
			t.Fatal(err)
		}
	}
	after, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(file); !bytes.Equal(got, []byte{0, 0xfd, 0x80}) || err != nil {
		t.Errorf("got %x, %v", got, err)
	}
	if !after.ModTime().Equal(before.ModTime()) {
		t.Error("the time of the last change changed")
	}
	for _, bit := range []int64{-1, 24} {
		if err := FlipBit(file, bit); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("bit %d: got %v", bit, err)
		}
	}
}
