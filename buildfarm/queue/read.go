package queue

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// Find gives a build. ErrNotFound.
func Find(g raft.Getter, key string) (*floxv1.QueuedBuild, error) {
	b, err := load(g, textKey(buildKey, key), &floxv1.QueuedBuild{})
	if errors.Is(err, flox.ErrNotFound) {
		return nil, fmt.Errorf("%.300s is not in the queue of builds: %w", key, flox.ErrNotFound)
	}
	return b, err
}

// Holds refuses if a lease of a build does not count any more: ErrClosed.
func Holds(g raft.Getter, key string, token uint64) error {
	b, err := Find(g, key)
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if err != nil || token == 0 || b.GetLease().GetToken() != token {
		return fmt.Errorf("lease %d of %.300s does not count any more: another one does, or nobody wants the build: %w", token, key, flox.ErrClosed)
	}
	return nil
}

// Want gives who wants something. ErrNotFound.
func Want(g raft.Getter, id string) (*floxv1.BuildWant, error) {
	return load(g, textKey(wantKey, id), &floxv1.BuildWant{})
}

// Worker gives a worker. ErrNotFound.
func Worker(g raft.Getter, id string) (*floxv1.FarmWorker, error) {
	return load(g, textKey(workerKey, id), &floxv1.FarmWorker{})
}

// Builds calls yield with the builds behind a key, by key, until it returns false.
func Builds(g raft.Getter, after string, yield func(*floxv1.QueuedBuild) bool) error {
	var from []byte
	if after != "" {
		from = append(textKey(buildKey, after), 0)
	}
	return records(g, []byte{buildKey}, from, yield)
}

// Members calls yield with the keys of the builds of a want, until it returns false.
func Members(g raft.Getter, want string, yield func(key string) bool) error {
	prefix := membersOf(want)
	return g.Iterate(prefix, nil, func(key, _ []byte) bool { return yield(string(key[len(prefix):])) })
}

// Wanted reports whether a build is of a want.
func Wanted(g raft.Getter, want, key string) (bool, error) {
	_, err := g.Get(append(membersOf(want), key...))
	if errors.Is(err, flox.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// Wants calls yield with who wants something, until it returns false.
func Wants(g raft.Getter, yield func(*floxv1.BuildWant) bool) error {
	return records(g, []byte{wantKey}, nil, yield)
}

// Workers gives the workers, by ID.
func Workers(g raft.Getter) (all []*floxv1.FarmWorker, err error) {
	err = records(g, []byte{workerKey}, nil, func(w *floxv1.FarmWorker) bool {
		all = append(all, w)
		return true
	})
	return all, err
}

// Failure gives what is remembered of a build that failed. ErrNotFound.
func Failure(g raft.Getter, key string) (*floxv1.BuildFailure, error) {
	return load(g, textKey(failureKey, key), &floxv1.BuildFailure{})
}

// Used calls yield with what owners used within the Window before a time, and when.
func Used(g raft.Getter, now time.Time, yield func(owner string, at time.Time, took time.Duration)) error {
	first := usedIn(now.Add(-Window), "")
	return g.Iterate([]byte{usedKey}, first, func(key, value []byte) bool {
		if len(key) >= len(first) && len(value) == 8 {
			part := binary.BigEndian.Uint64(key[1:])
			yield(string(key[len(first):]), time.Unix(0, int64(part)*int64(windowPart)), time.Duration(binary.BigEndian.Uint64(value))*time.Millisecond) //nolint:gosec // as written
		}
		return true
	})
}

// History gives what is known of builds that were tried, newest first, at most limit.
func History(g raft.Getter, limit int) (all []*floxv1.BuildEvidence, err error) {
	err = records(g, []byte{historyKey}, nil, func(e *floxv1.BuildEvidence) bool {
		all = append(all, e)
		return true
	})
	slices.Reverse(all)
	return all[:min(len(all), limit)], err
}

// TriesOf gives what is known of a build that was tried, newest first, at most limit.
func TriesOf(g raft.Getter, key string, limit int) (all []*floxv1.BuildEvidence, err error) {
	err = records(g, []byte{historyKey}, nil, func(e *floxv1.BuildEvidence) bool {
		if e.GetKey() == key {
			all = append(all, e)
		}
		return true
	})
	slices.Reverse(all)
	return all[:min(len(all), limit)], err
}

// Changes calls yield with what changed behind a log index. ok is false when that is no
// longer all known: read everything.
func Changes(r *raft.Reader, after uint64, yield func(*floxv1.QueueChange)) (ok bool, err error) {
	c, err := loadCounts(r)
	if err != nil || after < c.goneChanges || after > r.Index() {
		return false, err
	}
	return true, records(r, []byte{changeKey}, indexKey(changeKey, after+1), func(e *floxv1.QueueChange) bool {
		yield(e)
		return true
	})
}

// records calls yield with the messages under a prefix, until it returns false.
func records[T any, M interface {
	*T
	proto.Message
}](g raft.Getter, prefix, from []byte, yield func(M) bool,
) error {
	var bad error
	err := g.Iterate(prefix, from, func(key, value []byte) bool {
		m := M(new(T))
		if bad = raft.DecodeRecord(processorName, key, value, m); bad != nil {
			return false
		}
		return yield(m)
	})
	return errors.Join(bad, err)
}
