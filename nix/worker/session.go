package worker

import (
	"maps"
	"sync"
	"time"
)

// Trust says whether a client is believed.
type Trust uint64

// The words of the handshake since 1.35.
const (
	TrustUnknown Trust = 0
	Trusted      Trust = 1
	NotTrusted   Trust = 2
)

// Peer is who is at the other end, found out by whoever accepted the
// connection.
type Peer struct {
	Trust Trust
	UID   uint32
	GID   uint32
	PID   int32 // 0 = unknown
}

// Options are a client's settings, from SetOptions.
type Options struct {
	KeepFailed     bool
	KeepGoing      bool
	TryFallback    bool
	Level          Level
	MaxBuildJobs   uint64
	MaxSilent      time.Duration // 0 = for ever
	Timeout        time.Duration // of a build, one of Settings; 0 = for ever
	VerboseBuild   bool
	Cores          uint64 // 0 = all
	UseSubstitutes bool   // false also where Settings name no substituter
	// Settings are those set away from their defaults, by name. Of a client
	// that is not trusted only those it may set are here.
	Settings map[string]string
}

// Session is what holds for one connection. Safe for many goroutines.
type Session struct {
	peer    Peer
	version Version
	log     *Log

	mu      sync.Mutex
	options Options
}

func newSession(peer Peer, version Version, log *Log) *Session {
	return &Session{peer: peer, version: version, log: log, options: Options{Level: LevelInfo, UseSubstitutes: true}}
}

// Peer is who is at the other end.
func (s *Session) Peer() Peer { return s.peer }

// Trusted reports whether the client is trusted.
func (s *Session) Trusted() bool { return s.peer.Trust == Trusted }

// Version is the lower of both sides' protocol versions.
func (s *Session) Version() Version { return s.version }

// Log is shown to the client.
func (s *Session) Log() *Log { return s.log }

// Options are what the client set last.
func (s *Session) Options() Options {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.options
	o.Settings = maps.Clone(o.Settings)
	return o
}

func (s *Session) setOptions(o Options) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.options = o
	s.log.setLevel(o.Level)
}

// notForDaemons are settings that never concern a daemon (Nix src/libstore/daemon.cc).
var notForDaemons = map[string]bool{"ssh-auth-sock": true, "experimental-features": true, "extra-experimental-features": true, "plugin-files": true}

// forEverybody are settings a client may set without being trusted. Which
// substituters it may name is for the store to decide.
var forEverybody = map[string]bool{
	"timeout": true, "build-timeout": true, "max-silent-time": true, "build-max-silent-time": true, "build-repeat": true,
	"build-poll-interval": true, "connect-timeout": true,
	"substituters": true, "binary-caches": true, "extra-substituters": true, "extra-binary-caches": true,
}

// restrict takes out of settings what the client may not set, and gives the
// names of those it has to be told of.
func restrict(settings map[string]string, trusted bool) (ignored []string) {
	for name, value := range settings {
		switch {
		case notForDaemons[name]:
			delete(settings, name)
		case trusted, forEverybody[name], name == "builders" && value == "":
		default:
			delete(settings, name)
			ignored = append(ignored, name)
		}
	}
	return ignored
}
