package raft

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// A follower that refuses ends the pipeline to it, also for a sender that raft's own
// would let wait for somebody who listens no more.
func TestRefusalEndsThePipeline(t *testing.T) {
	t.Parallel()
	var ends [2]*raft.NetworkTransport
	for i := range ends {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{Stream: tcpStream{l}, MaxPool: 1, Timeout: time.Minute})
		defer ends[i].Close()
	}
	over := make(chan struct{})
	defer close(over)
	go func() {
		for {
			select {
			case rpc := <-ends[1].Consumer():
				rpc.Respond(&raft.AppendEntriesResponse{}, nil)
			case <-over:
				return
			}
		}
	}()
	p, err := standing{NetworkTransport: ends[0]}.AppendEntriesPipeline("b", ends[1].LocalAddr())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	failed := make(chan error, 1)
	go func() {
		for {
			if _, err := p.AppendEntries(&raft.AppendEntriesRequest{}, &raft.AppendEntriesResponse{}); err != nil {
				failed <- err
				return
			}
		}
	}()
	if a := <-p.Consumer(); a.Response().Success {
		t.Error("the follower refused, and the answer says otherwise")
	}
	// As raft does it, nothing more is read.
	select {
	case err := <-failed:
		if !errors.Is(err, raft.ErrPipelineShutdown) && !errors.Is(err, net.ErrClosed) {
			t.Errorf("sending ended with %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("who sends waits for ever")
	}
}

// tcpStream is a raft.StreamLayer.
type tcpStream struct{ net.Listener }

func (s tcpStream) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout("tcp", string(to), timeout)
}
