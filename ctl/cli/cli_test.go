package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
)

// Scripts depend on the exit codes, and --help must list every one of them.
func TestExitCodes(t *testing.T) {
	tests := []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), 1},
		{Usage("x"), 2},
		{fmt.Errorf("a: %w", flox.ErrBadInput), 2},
		{fmt.Errorf("a: %w", flox.ErrNotFound), 3},
		{fmt.Errorf("a: %w", flox.ErrUnreachable), 4},
		{flox.ErrClosed, 4},
		{context.DeadlineExceeded, 4},
		{flox.ErrDenied, 5},
		{flox.ErrUntrusted, 5},
		{flox.ErrCorrupt, 6},
		{flox.ErrFull, 7},
		{Explain(flox.ErrBusy, "x"), 8},
		{context.Canceled, 130},
		{fmt.Errorf("%w: %w", ErrInterrupted, flox.ErrCorrupt), 130},
		{Said(flox.ErrCorrupt), 6},
		{Exited(7, "x"), 7},
		{Exited(-1, "killed"), 1},
	}
	for _, test := range tests {
		if got := ExitCode(test.err); got != test.want {
			t.Errorf("ExitCode(%v) = %d, want %d", test.err, got, test.want)
		}
		if line := fmt.Sprintf("\n  %-3d  ", test.want); !bytes.Contains([]byte(ExitCodes), []byte(line)) {
			t.Errorf("--help does not list exit code %d", test.want)
		}
	}
}

func TestFormatBytes(t *testing.T) {
	tests := map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 1536: "1.50 KiB", 10239: "10.0 KiB", 10 << 10: "10.0 KiB",
		102348: "99.9 KiB", 102399: "100 KiB", 1048575: "1.00 MiB", 20 << 30: "20.0 GiB", 1 << 63: "8.00 EiB", 1<<64 - 1: "16.0 EiB",
	}
	for n, want := range tests {
		if got := FormatBytes(n); got != want {
			t.Errorf("FormatBytes(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestParseBytes(t *testing.T) {
	good := map[string]uint64{
		"0": 0, "4096": 4096, "500MiB": 500 << 20, "20 GiB": 20 << 30, "20g": 20 << 30, "1.5k": 1536, "1TB": 1e12, "7b": 7,
	}
	for s, want := range good {
		if got, err := ParseBytes(s); err != nil || got != want {
			t.Errorf("ParseBytes(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "lots", "-1", "1XB", "1MiBs", "99EiB", "NaN", "Inf", "1e400", "0x10"} {
		if got, err := ParseBytes(s); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("ParseBytes(%q) = %d, %v, want bad input", s, got, err)
		}
	}
}

// Sizes come from configuration and command lines; no text may panic or
// overflow.
func FuzzParseBytes(f *testing.F) {
	for _, s := range []string{"20GiB", "1.5k", "-1", "9e99", "ib", "1i"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseBytes(s); err == nil && n > 1<<63-1 {
			t.Errorf("ParseBytes(%q) = %d, more than an int64 holds", s, n)
		}
	})
}

func TestFormatDuration(t *testing.T) {
	tests := map[time.Duration]string{
		0: "0 ms", 850 * time.Millisecond: "850 ms", 1290 * time.Millisecond: "1.2 s", 59 * time.Second: "59 s",
		time.Minute: "1 min", 185 * time.Second: "3 min 5 s", 26*time.Hour + time.Minute: "1 d 2 h", -2 * time.Second: "-2.0 s",
	}
	for d, want := range tests {
		if got := FormatDuration(d); got != want {
			t.Errorf("FormatDuration(%s) = %q, want %q", d, got, want)
		}
	}
}

func TestFormatCount(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := FormatCount(n); got != want {
			t.Errorf("FormatCount(%d) = %q, want %q", n, got, want)
		}
	}
}

// An error is printed once, with the program's name, and usage errors say
// where help is.
func TestRunReports(t *testing.T) {
	build := func(fail error) (*cobra.Command, *bytes.Buffer) {
		root := &cobra.Command{Use: "prog"}
		root.AddCommand(&cobra.Command{
			Use: "sub", Args: Args(0, 1, "FILE"),
			RunE: func(*cobra.Command, []string) error { return fail },
		})
		out := &bytes.Buffer{}
		root.SetErr(out)
		root.SetOut(out)
		return root, out
	}
	tests := []struct {
		name string
		args []string
		fail error
		code int
		want string
	}{
		{"success", []string{"sub"}, nil, 0, ""},
		{"failure", []string{"sub"}, errors.New("it broke"), 1, "prog: it broke\n"},
		{"said already", []string{"sub"}, Said(flox.ErrCorrupt), 6, ""},
		{"interrupted", []string{"sub"}, context.Canceled, 130, "prog: interrupted\n"},
		{"answered no", []string{"sub"}, Explain(ErrInterrupted, "nothing was changed"), 130, "prog: nothing was changed\n"},
		{"explained and interrupted", []string{"sub"}, fmt.Errorf("%w: %w", ErrInterrupted, Explain(flox.ErrBusy, "it is in use")), 130, "prog: interrupted\n"},
		{"too many", []string{"sub", "a", "b"}, nil, 2, "prog: sub: unexpected argument \"b\"\nTry 'prog sub --help'.\n"},
		{"flag", []string{"sub", "--x"}, nil, 2, "prog: unknown flag: --x\nTry 'prog sub --help'.\n"},
		{"command", []string{"sup"}, nil, 2, "prog: unknown command \"sup\" for \"prog\"; did you mean sub?\nTry 'prog --help'.\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			root, out := build(test.fail)
			if got := Run(root, test.args); got != test.code {
				t.Errorf("exit code %d, want %d", got, test.code)
			}
			if diff := cmp.Diff(test.want, out.String()); diff != "" {
				t.Errorf("printed (-want +got):\n%s", diff)
			}
		})
	}
}

// Whoever is told that a port is in use must be told by whom.
func TestPortOwner(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only linux tells who holds a port")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	owner, known := PortOwner(port)
	if !known || owner.PID != os.Getpid() {
		t.Errorf("PortOwner(%d) = %v, %v, want this process, %d", port, owner, known, os.Getpid())
	}
	l.Close()
	if owner, known := PortOwner(port); known {
		t.Errorf("PortOwner of a free port = %v", owner)
	}
}
