package raft

import (
	"fmt"
	"reflect"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/hashicorp/raft"
)

// hashicorp/raft reads the leader's lease anew at every look at it, but lets only the
// other timeouts be changed while it runs (ReloadableConfig, v1.7.3): without that a
// leader whose voters are further away than the lease gives up before the first of them
// can have answered. So the value is replaced where raft keeps it, atomically, as raft
// itself does. Nothing else may call ReloadConfig at the same time.

// raftConfig is where raft keeps its configuration.
func raftConfig(r *raft.Raft) (*atomic.Value, error) {
	f := reflect.ValueOf(r).Elem().FieldByName("conf")
	if !f.IsValid() || f.Type() != reflect.TypeFor[atomic.Value]() {
		return nil, fmt.Errorf("raft keeps its configuration elsewhere than this program knows")
	}
	return (*atomic.Value)(unsafe.Pointer(f.UnsafeAddr())), nil //nolint:gosec // see above
}

// leaseOf is how long a leader waits for a majority; 0 = not known.
func leaseOf(r *raft.Raft) time.Duration {
	v, err := raftConfig(r)
	if err != nil {
		return 0
	}
	c, _ := v.Load().(raft.Config)
	return c.LeaderLeaseTimeout
}

// setLease changes it.
func setLease(r *raft.Raft, lease time.Duration) error {
	v, err := raftConfig(r)
	if err != nil {
		return err
	}
	c, ok := v.Load().(raft.Config)
	if !ok {
		return fmt.Errorf("raft keeps %T as its configuration", v.Load())
	}
	c.LeaderLeaseTimeout = lease
	if err := raft.ValidateConfig(&c); err != nil {
		return err
	}
	v.Store(c)
	return nil
}
