package p2p

import (
	"bytes"
	"io"
	"testing"
	"time"
)

// A server that refuses early and closes while the caller still sends must not
// leave the caller waiting for ever, and its last words must arrive.
func TestCloseWithUnreadDataFreesTheWriter(t *testing.T) {
	t.Parallel()
	a, b := start(t, 340, nil), start(t, 341, nil)
	l, err := a.Listen("/flox/test/1")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, "refused")
		_ = c.Close()
		_ = c.Close() // twice is harmless
	}()
	if err := b.AddPeer(addrOf(a)); err != nil {
		t.Fatal(err)
	}
	c, err := b.Dial(within(t, time.Minute), a.ID(), "/flox/test/1")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		piece := bytes.Repeat([]byte("x"), 64<<10)
		for { // far more than any window; slowly enough to be sending still when the linger ends
			if _, err := c.Write(piece); err != nil {
				ended <- err
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	if got, err := io.ReadAll(c); err != nil || string(got) != "refused" {
		t.Errorf("the last words arrived as %q, %v", got, err)
	}
	select {
	case <-ended:
	case <-time.After(linger + 20*time.Second):
		t.Error("the writer still waits for somebody to read")
	}
	if err := c.Close(); err != nil {
		t.Logf("close after the reset: %v", err)
	}
}
