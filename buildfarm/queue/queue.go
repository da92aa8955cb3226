// Package queue is the queue of builds in the replicated state machine: which derivations
// are wanted and by how many, which worker has a lease of which, what became of them, and
// what is remembered of those before. It keeps the rules: a build is leased once at a
// time and after what it needs, and only the lease that counts can end it.
//
// It must not know who should get what (package schedule), how a worker is reached or
// whether it lives, nor what is valid in the store: the leader of the storehouse proposes,
// and this package says whether that may be.
package queue

import (
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/raft"
)

// Kind is that of QueueCommands in the log, and Level the level of the log that they
// belong to.
const (
	Kind  = 8
	Level = 7
)

const processorName = "queue"

// Keys of the state:
//
//	'n'                      counters
//	'b' build key            QueuedBuild
//	'w' want                 BuildWant
//	'm' want 0 build key     the build is of the want
//	'k' worker               FarmWorker
//	'f' build key            BuildFailure
//	'g' log index            its build key, of failures, oldest first
//	't' name                 BuildTime
//	'a' log index            its name, of times, oldest first
//	'u' part, owner          milliseconds that an owner used in a part of the time
//	'h' log index            BuildEvidence, oldest first
//	'c' log index            QueueChange, oldest first
const (
	countsKey   = 'n'
	buildKey    = 'b'
	wantKey     = 'w'
	memberKey   = 'm'
	workerKey   = 'k'
	failureKey  = 'f'
	failuresKey = 'g'
	timeKey     = 't'
	timesKey    = 'a'
	usedKey     = 'u'
	historyKey  = 'h'
	changeKey   = 'c'
)

// Bounds. They are part of the state machine.
const (
	maxBuilds   = 1 << 18 // in the queue
	maxWants    = 1 << 16
	maxWorkers  = 4096
	maxFailures = 1 << 16 // remembered
	maxTimes    = 1 << 16
	maxHistory  = 1 << 14
	maxChanges  = 1 << 14

	// MaxBatch is how many builds one command adds, and MaxKeys how many another is about.
	MaxBatch = 4096
	MaxKeys  = 1024

	maxNeeds    = 4096    // of a build
	maxAllNeeds = 1 << 16 // of those of one command
	maxFeatures = 64
	maxText     = 300
	maxMessage  = 16 << 10
	maxPriority = 100
	leaveStep   = 1024 // builds that leave with one command
)

// maxTries is how often a build is tried that ends with a fault, and firstDelay for how
// long it waits after the first; after each of the others four times as long.
const (
	maxTries   = 5
	firstDelay = time.Second
)

// Window is over how long it is known what owners used, and windowPart in what parts.
const (
	Window     = time.Hour
	windowPart = 5 * time.Minute
)

// checked is behind the derivation in the key of a build that is checked.
const checked = "!check"

// Key names a build of a derivation in the queue.
func Key(drv flox.StorePath, check bool) string {
	if check {
		return string(drv) + checked
	}
	return string(drv)
}

// Split gives what Key was made of. ErrBadInput.
func Split(key string) (drv flox.StorePath, check bool, err error) {
	name, check := strings.CutSuffix(key, checked)
	drv, err = flox.ParseStorePath(name)
	if err == nil && !strings.HasSuffix(name, nix.DrvExtension) {
		err = fmt.Errorf("build %.300q: want the name of a .drv file: %w", key, flox.ErrBadInput)
	}
	return drv, check, err
}

// Delay is how long a build waits before it is tried again that was tried so often.
func Delay(tries uint32) time.Duration {
	d := firstDelay
	for range min(tries, maxTries) - min(tries, 1) {
		d *= 4
	}
	return d
}

// nameOf is under what name it is remembered how long a derivation took: its own, without
// the version (Nix 2.8 src/libexpr/names.cc: what follows a dash and no letter).
func nameOf(drv flox.StorePath) string {
	name := strings.TrimSuffix(drv.Name(), nix.DrvExtension)
	for i := 0; i+1 < len(name); i++ {
		if c := name[i+1] | 0x20; name[i] == '-' && (c < 'a' || c > 'z') {
			return name[:i]
		}
	}
	return name
}

func textKey(kind byte, text string) []byte { return append([]byte{kind}, text...) }

func membersOf(want string) []byte { return append(textKey(memberKey, want), 0) }

func indexKey(kind byte, index uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{kind}, index)
}

// counts are what is counted, and of each list that drops its oldest, up to where.
type counts struct {
	builds, wants, workers                            uint64
	failures, times, history, changes                 uint64
	goneFailures, goneTimes, goneHistory, goneChanges uint64
}

func (c *counts) fields() []*uint64 {
	return []*uint64{
		&c.builds, &c.wants, &c.workers, &c.failures, &c.times, &c.history, &c.changes,
		&c.goneFailures, &c.goneTimes, &c.goneHistory, &c.goneChanges,
	}
}

func loadCounts(g raft.Getter) (c counts, err error) {
	return c, raft.LoadCounts(g, processorName, []byte{countsKey}, c.fields())
}

func load[M proto.Message](g raft.Getter, key []byte, into M) (M, error) {
	return raft.LoadRecord(g, processorName, key, into)
}

// stable writes messages of the state: equal on every server.
var stable = proto.MarshalOptions{Deterministic: true}

// over reports whether nothing more happens to a build.
func over(b *floxv1.QueuedBuild) bool {
	return b.GetState() == floxv1.BuildState_BUILD_STATE_DONE || b.GetState() == floxv1.BuildState_BUILD_STATE_FAILED
}
