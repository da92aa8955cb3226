package raft

import (
	"net"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// Answers to entries that go through a pipeline say that this server led when it sent
// them, as answers to heartbeats do: a leader that writes all the time may read.
func TestPipelinedAnswersCount(t *testing.T) {
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
	go func() {
		for _, term := range []uint64{7, 8} { // the second follows another leader by then
			rpc := <-ends[1].Consumer()
			rpc.Respond(&raft.AppendEntriesResponse{Term: term, Success: true}, nil)
		}
	}()
	n := &Node{}
	p, err := standing{NetworkTransport: ends[0], node: n}.AppendEntriesPipeline("b", ends[1].LocalAddr())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	send := func() raft.AppendFuture {
		if _, err := p.AppendEntries(&raft.AppendEntriesRequest{Term: 7}, &raft.AppendEntriesResponse{}); err != nil {
			t.Fatal(err)
		}
		return <-p.Consumer()
	}
	servers := []raft.Server{{ID: "a"}, {ID: "b"}, {ID: "c"}}
	before := time.Now()
	first := send()
	if !n.acks.majority(servers, "a", before) || n.acks.majority(servers, "a", first.Start().Add(1)) {
		t.Error("an answer counts from when what it answers was sent")
	}
	before = time.Now()
	send()
	if n.acks.majority(servers, "a", before) {
		t.Error("an answer of another term counts")
	}
}
