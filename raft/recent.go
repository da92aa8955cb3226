package raft

import (
	"sync"

	"github.com/hashicorp/raft"
)

const (
	// recentEntries is how many of the last entries are kept in memory: they are
	// sent to the other servers and applied right after they are written.
	recentEntries = 512
	// recentBytes is how large an entry may be to be kept.
	recentBytes = 64 << 10
)

// recent is the last entries of the log as they were written. It holds nothing
// that is not in the log.
type recent struct {
	mu   sync.RWMutex
	ring [recentEntries]*raft.Log
}

// keep takes in entries that are in the log now; they are not changed any more.
func (r *recent) keep(logs []*raft.Log) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range logs {
		place := &r.ring[l.Index%recentEntries]
		if *place = l; len(l.Data) > recentBytes {
			*place = nil
		}
	}
}

// get gives an entry, nil if it is not kept.
func (r *recent) get(index uint64) *raft.Log {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if l := r.ring[index%recentEntries]; l != nil && l.Index == index {
		return l
	}
	return nil
}

// clear forgets all entries.
func (r *recent) clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.ring[:])
}
