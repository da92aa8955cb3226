package raft

import (
	"bytes"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"runtime"

	"github.com/hashicorp/go-hclog"
)

// newRaftLog shows log to hashicorp's libraries. What they call information is
// about every election and snapshot: debugging, for us.
func newRaftLog(log *slog.Logger) hclog.Logger { return raftLog{log: log} }

type raftLog struct {
	log  *slog.Logger
	name string
	args []any
}

var _ hclog.Logger = raftLog{}

// levels maps hclog's levels to ours.
var levels = map[hclog.Level]slog.Level{
	hclog.Trace: slog.LevelDebug - 4, hclog.Debug: slog.LevelDebug - 4, hclog.Info: slog.LevelDebug,
	hclog.Warn: slog.LevelWarn, hclog.Error: slog.LevelError,
}

func (l raftLog) Log(level hclog.Level, msg string, args ...any) {
	for i, a := range args {
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			args[i] = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
	}
	if msg == electionMessage {
		level = hclog.Info // every start of a single server begins with it
	}
	logAt(l.log, levels[level], msg, args...)
}

// electionMessage is raft's warning that nobody leads yet.
const electionMessage = "heartbeat timeout reached, starting election"

func (l raftLog) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l raftLog) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l raftLog) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l raftLog) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l raftLog) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l raftLog) IsTrace() bool                  { return false }
func (l raftLog) IsDebug() bool                  { return false }
func (l raftLog) IsInfo() bool                   { return true }
func (l raftLog) IsWarn() bool                   { return true }
func (l raftLog) IsError() bool                  { return true }
func (l raftLog) GetLevel() hclog.Level          { return hclog.Info }
func (l raftLog) SetLevel(hclog.Level)           {}
func (l raftLog) ImpliedArgs() []any             { return l.args }
func (l raftLog) Name() string                   { return l.name }
func (l raftLog) Named(n string) hclog.Logger    { return raftLog{l.log.With("part", n), n, l.args} }
func (l raftLog) ResetNamed(string) hclog.Logger { return l }
func (l raftLog) With(args ...any) hclog.Logger {
	return raftLog{l.log.With(args...), l.name, append(l.args[:len(l.args):len(l.args)], args...)}
}

func (l raftLog) StandardLogger(*hclog.StandardLoggerOptions) *stdlog.Logger {
	return stdlog.New(l.StandardWriter(nil), "", 0)
}

func (l raftLog) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return lineWriter{l} }

// lineWriter logs every line written to it.
type lineWriter struct{ log raftLog }

func (w lineWriter) Write(b []byte) (int, error) {
	w.log.Info(string(bytes.TrimSpace(b)))
	return len(b), nil
}

// pebbleLog shows a logger to Pebble. Fatal is told when Pebble gives up.
type pebbleLog struct {
	log   *slog.Logger
	fatal func(error)
}

func (l pebbleLog) Infof(format string, args ...any) {
	if l.log.Enabled(nil, slog.LevelDebug-4) { //nolint:staticcheck // handlers may not need a context
		logAt(l.log, slog.LevelDebug-4, "pebble", "message", fmt.Sprintf(format, args...))
	}
}

func (l pebbleLog) Errorf(format string, args ...any) {
	l.log.Error("pebble", "message", fmt.Sprintf(format, args...))
}

// Fatalf must not return: Pebble calls it when its own state may no longer be
// believed, for example after a failed write of its log. It ends the server, not
// the process. Nothing is lost, since the replicated log holds all that was
// acknowledged.
func (l pebbleLog) Fatalf(format string, args ...any) {
	l.fatal(fmt.Errorf(format, args...)) //nolint:err113 // the library's words
	runtime.Goexit()
}
