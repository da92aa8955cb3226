package buildfarm

import (
	"bytes"
	"encoding/json"
	"regexp"

	"github.com/floxctl/flox"
)

// EventKind says what an Event is.
type EventKind uint8

// The kinds of events.
const (
	// EventStart and EventStop enclose what Nix does for the derivation.
	EventStart EventKind = iota + 1
	EventStop
	// EventLine is a line the builder printed.
	EventLine
	// EventPhase names the phase the builder says it is in.
	EventPhase
	// EventMessage is what Nix itself says.
	EventMessage
)

// Event is something that happened during a build.
type Event struct {
	Kind  EventKind
	Drv   flox.StorePath // "" = of none in particular
	Text  string
	Level int // of a message: 0 error, 1 warning, 3 information
}

// Numbers in Nix's JSON log (Nix 2.8 src/libutil/logging.hh).
const (
	actBuild        = 105
	resBuildLogLine = 101
	resSetPhase     = 104
)

// maxActivities bounds the activities remembered of one Nix.
const maxActivities = 1 << 12

// maxLine bounds a line of Nix's JSON log; of longer ones the rest is dropped.
const maxLine = 1 << 20

// logReader makes events of what a Nix with --log-format internal-json writes.
type logReader struct {
	dir    flox.StoreDir
	emit   func(Event)
	builds map[uint64]flox.StorePath // activities that build
	line   []byte
	long   bool // the line was cut
}

func newLogReader(dir flox.StoreDir, emit func(Event)) *logReader {
	return &logReader{dir: dir, emit: emit, builds: map[uint64]flox.StorePath{}}
}

// Write is io.Writer. It never fails.
func (l *logReader) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		line, after, ended := bytes.Cut(rest, []byte("\n"))
		if room := maxLine - len(l.line); len(line) > room {
			line, l.long = line[:room], true
		}
		l.line = append(l.line, line...)
		if !ended {
			break
		}
		l.end()
		rest = after
	}
	return len(b), nil
}

// end takes what may be left of a last line.
func (l *logReader) end() {
	if len(l.line) > 0 {
		l.take(l.line)
	}
	l.line, l.long = l.line[:0], false
}

// nixLog is a line of the log.
type nixLog struct {
	Action string `json:"action"`
	ID     uint64 `json:"id"`
	Type   int    `json:"type"`
	Level  int    `json:"level"`
	Text   string `json:"text"`
	Msg    string `json:"msg"`
	RawMsg string `json:"raw_msg"`
	Fields []any  `json:"fields"`
}

func (l *logReader) take(line []byte) {
	text, ok := bytes.CutPrefix(line, []byte("@nix "))
	m := nixLog{}
	if !ok || l.long || json.Unmarshal(text, &m) != nil {
		// What is not of the log is said by something that does not know of it.
		l.emit(Event{Kind: EventMessage, Text: string(line), Level: 3})
		return
	}
	first := ""
	if len(m.Fields) > 0 {
		first, _ = m.Fields[0].(string)
	}
	switch m.Action {
	case "msg":
		if m.RawMsg != "" {
			m.Msg = m.RawMsg
		}
		l.emit(Event{Kind: EventMessage, Text: plain(m.Msg), Level: m.Level})
	case "start":
		if drv, err := l.dir.Parse(first); m.Type == actBuild && err == nil && len(l.builds) < maxActivities {
			l.builds[m.ID] = drv
			l.emit(Event{Kind: EventStart, Drv: drv})
		}
	case "stop":
		if drv, ok := l.builds[m.ID]; ok {
			delete(l.builds, m.ID)
			l.emit(Event{Kind: EventStop, Drv: drv})
		}
	case "result":
		switch m.Type {
		case resBuildLogLine:
			l.emit(Event{Kind: EventLine, Drv: l.builds[m.ID], Text: first})
		case resSetPhase:
			l.emit(Event{Kind: EventPhase, Drv: l.builds[m.ID], Text: first})
		}
	}
}

var escapes = regexp.MustCompile("\x1b\\[[0-9;]*[A-Za-z]")

// plain is text without a terminal's colours.
func plain(text string) string { return escapes.ReplaceAllString(text, "") }
