package worker

import (
	"io"
	"net"
	"testing"
	"time"
)

// TestInputNoticesWhoHangsUp: also behind many short questions, in the middle of an
// operation that does not read; and what came meanwhile is not lost.
func TestInputNoticesWhoHangsUp(t *testing.T) {
	t.Parallel()
	for _, ahead := range []string{"", "next question"} {
		here, there := net.Pipe()
		if err := here.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		over := make(chan error, 1)
		in := newInput(there, func(err error) { over <- err })
		b := make([]byte, 1)
		for range 1000 {
			go func() { _, _ = here.Write([]byte("q")) }()
			if _, err := io.ReadFull(in, b); err != nil {
				t.Fatal(err)
			}
		}
		if ahead != "" { // taken though nobody reads
			if _, err := io.WriteString(here, ahead); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(ahead))
			if _, err := io.ReadFull(in, got); err != nil || string(got) != ahead {
				t.Errorf("%q %v, want %q", got, err, ahead)
			}
		}
		if err := here.Close(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-over:
		case <-time.After(time.Minute):
			t.Error("nobody noticed that the client hung up")
		}
		if _, err := in.Read(b); err == nil {
			t.Error("there is more to read")
		}
		there.Close()
		in.close()
	}
}
