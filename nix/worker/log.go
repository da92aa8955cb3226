package worker

import (
	"sync"
)

// Level is how much a client wants to read.
type Level uint64

// The levels of Nix 2.8 src/libutil/error.hh.
const (
	LevelError     Level = 0
	LevelWarn      Level = 1
	LevelNotice    Level = 2
	LevelInfo      Level = 3
	LevelTalkative Level = 4
	LevelChatty    Level = 5
	LevelDebug     Level = 6
	LevelVomit     Level = 7
)

// ActivityType says what an activity is about.
type ActivityType uint64

// The types of Nix 2.8 src/libutil/logging.hh, with the fields that Start
// takes for them.
const (
	ActUnknown       ActivityType = 0
	ActCopyPath      ActivityType = 100 // path, from, to
	ActFileTransfer  ActivityType = 101 // URI
	ActRealise       ActivityType = 102
	ActCopyPaths     ActivityType = 103
	ActBuilds        ActivityType = 104
	ActBuild         ActivityType = 105 // derivation, machine or "", round, rounds
	ActOptimiseStore ActivityType = 106
	ActVerifyPaths   ActivityType = 107
	ActSubstitute    ActivityType = 108 // path, URI
	ActQueryPathInfo ActivityType = 109 // path, URI
	ActPostBuildHook ActivityType = 110 // derivation
	ActBuildWaiting  ActivityType = 111
)

// ResultType says what an activity tells.
type ResultType uint64

// The types of Nix 2.8 src/libutil/logging.hh, with their fields.
const (
	ResFileLinked       ResultType = 100 // bytes, blocks
	ResBuildLogLine     ResultType = 101 // line without its end
	ResUntrustedPath    ResultType = 102 // path
	ResCorruptedPath    ResultType = 103 // path
	ResSetPhase         ResultType = 104 // phase
	ResProgress         ResultType = 105 // done, expected, running, failed
	ResSetExpected      ResultType = 106 // activity type, number
	ResPostBuildLogLine ResultType = 107 // line without its end
)

// Field is a number or a text that goes with an activity or result.
type Field struct {
	IsText bool
	Number uint64
	Text   string
}

// Number makes a Field.
func Number(n uint64) Field { return Field{Number: n} }

// Text makes a Field.
func Text(s string) Field { return Field{IsText: true, Text: s} }

// pendingMessages bounds what is said between two operations.
const pendingMessages = 64

// Log is the log stream of a connection. A frame may be written only between
// an operation's request and its reply; a message at another time waits for
// the next such window, an activity is dropped. Safe for many goroutines.
type Log struct {
	mu      sync.Mutex
	out     *encoder
	open    bool
	level   Level
	pending []string
	lastID  uint64
	running map[uint64]struct{} // started in this window, not stopped
}

// maxActivities bounds Log.running.
const maxActivities = 10_000

func newLog(out *encoder) *Log {
	return &Log{out: out, level: LevelInfo, running: make(map[uint64]struct{})}
}

// Message shows text, a line or several without the last line's end, if the
// client wants to read that level.
func (l *Log) Message(level Level, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case level > l.level:
	case l.open:
		l.next(text)
		l.send()
	case len(l.pending) < pendingMessages:
		l.pending = append(l.pending, text)
	}
}

func (l *Log) next(text string) {
	l.out.u64(tagNext)
	l.out.str(text + "\n")
}

// send hands frames to the client at once. Its error stays in the encoder and
// ends the connection behind the operation.
func (l *Log) send() { _ = l.out.flush() }

// Activity is something that goes on and may be shown. The nil Activity is
// one nobody sees.
type Activity struct {
	log *Log
	id  uint64
}

// Start tells of an activity; parent may be nil. Text is what the client shows
// at that level.
func (l *Log) Start(level Level, typ ActivityType, text string, parent *Activity, fields ...Field) *Activity {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.open || len(l.running) >= maxActivities {
		return nil
	}
	l.lastID++
	a := &Activity{log: l, id: l.lastID}
	l.running[a.id] = struct{}{}
	l.out.u64(tagStart)
	l.out.u64(a.id)
	l.out.u64(uint64(level))
	l.out.u64(uint64(typ))
	l.out.str(text)
	l.out.fields(fields)
	l.out.u64(parent.number())
	l.send()
	return a
}

func (a *Activity) number() uint64 {
	if a == nil {
		return 0
	}
	return a.id
}

// Result tells something of the activity.
func (a *Activity) Result(typ ResultType, fields ...Field) {
	if a == nil {
		return
	}
	a.log.mu.Lock()
	defer a.log.mu.Unlock()
	if _, ok := a.log.running[a.id]; !ok {
		return
	}
	a.log.out.u64(tagRes)
	a.log.out.u64(a.id)
	a.log.out.u64(uint64(typ))
	a.log.out.fields(fields)
	a.log.send()
}

// Stop tells that the activity ended. An operation's end stops what is left.
func (a *Activity) Stop() {
	if a == nil {
		return
	}
	a.log.mu.Lock()
	defer a.log.mu.Unlock()
	if _, ok := a.log.running[a.id]; ok {
		a.log.stop(a.id)
		a.log.send()
	}
}

func (l *Log) stop(id uint64) {
	delete(l.running, id)
	l.out.u64(tagStop)
	l.out.u64(id)
}

// begin opens the window.
func (l *Log) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open = true
	for _, text := range l.pending {
		l.next(text)
	}
	if len(l.pending) > 0 {
		l.send()
	}
	l.pending = nil
}

// end closes the window: by LAST, or by ERROR if err is not nil. It reports
// whether the window was open.
func (l *Log) end(version Version, err error) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.open
	l.open = false
	for id := range l.running {
		l.stop(id)
	}
	if err == nil {
		l.out.u64(tagLast)
		return was
	}
	l.out.u64(tagError)
	if version < v26 {
		l.out.str(text(err))
		l.out.u64(1) // exit status
		return was
	}
	l.out.str("Error") // what it is
	l.out.u64(uint64(LevelError))
	l.out.str("Error") // its name, unused
	l.out.str(text(err))
	l.out.u64(0) // no position
	l.out.u64(0) // no traces
	return was
}

// data sends bytes in the window, for ExportPath.
func (l *Log) data(p []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out.u64(tagWrite)
	l.out.str(string(p))
	return l.out.err
}

func (l *Log) setLevel(level Level) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.level = level
}
