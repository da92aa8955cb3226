package raft

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// acks are when the heartbeats and entries were sent that other servers answered last. Raft's own
// question whether it leads still takes any answer for a yes, also one that lay in a
// socket while this process stood still and the others elected another leader.
type acks struct {
	mu   sync.Mutex
	sent map[raft.ServerID]time.Time // of servers of the cluster, see majority
	late time.Duration               // in tests: how much longer every answer took
}

// note records that what was sent then was answered.
func (a *acks) note(id raft.ServerID, sent time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sent == nil {
		a.sent = map[raft.ServerID]time.Time{}
	}
	if sent = sent.Add(-a.late); sent.After(a.sent[id]) {
		a.sent[id] = sent
	}
}

// majority reports whether self led at asked or later: most voters answered what
// was sent since. That they answered one a moment before would say too little: they vote for
// another whom this leader handed over to, and when they have restarted.
func (a *acks) majority(servers []raft.Server, self string, asked time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	voters, yes := 0, 0
	known := make(map[raft.ServerID]time.Time, len(servers))
	for _, s := range servers {
		sent, ok := a.sent[s.ID]
		if ok {
			known[s.ID] = sent
		}
		if s.Suffrage != raft.Voter {
			continue
		}
		voters++
		if string(s.ID) == self || ok && !sent.Before(asked) {
			yes++
		}
	}
	a.sent = known
	return yes > voters/2
}

// AppendEntries is raft.Transport; heartbeats go this way, entries through pipelines too.
func (s standing) AppendEntries(id raft.ServerID, target raft.ServerAddress, q *raft.AppendEntriesRequest, a *raft.AppendEntriesResponse) error {
	sent := time.Now()
	err := s.NetworkTransport.AppendEntries(id, target, q, a)
	if err == nil && a.Success && a.Term == q.Term {
		s.node.acks.note(id, sent)
	}
	return err
}
