package reap

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if file := os.Getenv("REAP_TEST_FILE"); file != "" {
		child(file)
	}
	goleak.VerifyTestMain(m)
}

// child is a process that is killed while its script waits.
func child(file string) {
	if _, err := Start(`rm "$1"`, file); err != nil {
		panic(err)
	}
	_, _ = os.Stdout.WriteString("ready\n")
	time.Sleep(time.Hour) // not select{}: without cgo the runtime calls that a deadlock
}

func TestCloseRunsTheScriptOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "runs")
	r, err := Start(`echo "$2" >>"$1"`, file, "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the script ran before Close: %v", err)
	}
	for range 2 {
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(file); string(got) != "x\n" {
		t.Errorf("the script wrote %q (%v), want one line", got, err)
	}
}

func TestScriptRunsAfterKill(t *testing.T) {
	file := filepath.Join(t.TempDir(), "leftover")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), "REAP_TEST_FILE="+file)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	// The script inherits this end too: reading it to the end waits for it.
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	cmd.Stderr = write
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = write.Close()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("child printed %q: %v", line, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := read.Read(make([]byte, 1)); err == nil {
		t.Error("the script complained")
	}
	_ = cmd.Wait()
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the script did not run after SIGKILL: %v", err)
	}
}
