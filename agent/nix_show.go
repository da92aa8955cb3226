package agent

import (
	"fmt"
	"strings"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix/worker"
)

// shownLines is how many lines of a failed builder are shown; Nix 2.8's log-lines.
const shownLines = 10

// failure says why a derivation failed as Nix does (2.8 src/libstore/build/
// derivation-goal.cc); "" if it did not.
func (n *nixSession) failure(drv flox.StorePath, m *floxv1.BuildOutcome) string {
	tail := m.GetTail()
	if len(tail) == 0 || !strings.HasPrefix(m.GetMessage(), "builder for '") {
		return m.GetMessage()
	}
	tail = tail[max(0, len(tail)-shownLines):]
	var b strings.Builder
	fmt.Fprintf(&b, "%s;\nlast %d log lines:\n", m.GetMessage(), len(tail))
	for _, line := range tail {
		b.WriteString("> " + line + "\n")
	}
	fmt.Fprintf(&b, "For full logs, run 'nix log %s'.", n.a.cfg.StoreDir.Join(drv))
	return b.String()
}

// buildShow shows a client what the storehouse does.
type buildShow struct {
	n                *nixSession
	all, builds      *worker.Activity
	running          map[string]*worker.Activity
	asked            map[string]bool // derivations whose failure is the answer
	check            bool
	waited           bool // somebody was told that a build waits
	done, total, bad uint64
}

func newBuildShow(n *nixSession, targets []worker.DerivedPath, mode worker.BuildMode) *buildShow {
	log := n.s.Log()
	s := &buildShow{n: n, running: make(map[string]*worker.Activity), asked: make(map[string]bool, len(targets)), check: mode == worker.BuildCheck}
	for _, t := range targets {
		s.asked[string(t.Path)] = true
	}
	s.all = log.Start(worker.LevelError, worker.ActRealise, "", nil)
	s.builds = log.Start(worker.LevelError, worker.ActBuilds, "", nil)
	return s
}

func (s *buildShow) end() {
	for _, a := range s.running {
		a.Stop()
	}
	s.builds.Stop()
	s.all.Stop()
}

func (s *buildShow) progress() {
	s.builds.Result(worker.ResProgress, worker.Number(s.done), worker.Number(s.total), worker.Number(uint64(len(s.running))), worker.Number(s.bad))
}

// event shows one event; there are as many running as the storehouse builds.
func (s *buildShow) event(m *floxv1.BuildEvent) {
	log := s.n.s.Log()
	switch {
	case m.GetStart() != nil:
		drv := s.n.a.cfg.StoreDir.Join(flox.StorePath(m.GetStart().GetDrv()))
		s.running[m.GetStart().GetDrv()].Stop()
		s.total++
		doing := "building '"
		if s.check && s.asked[m.GetStart().GetDrv()] {
			doing = "checking outputs of '"
		}
		s.running[m.GetStart().GetDrv()] = log.Start(worker.LevelInfo, worker.ActBuild, doing+drv+"'", nil,
			worker.Text(drv), worker.Text(m.GetStart().GetMachine()), worker.Number(1), worker.Number(1))
		s.progress()
	case m.GetStop() != nil:
		drv := m.GetStop().GetDrv()
		s.running[drv].Stop()
		delete(s.running, drv)
		if worker.BuildStatus(m.GetStop().GetOutcome().GetStatus()).Succeeded() {
			s.done++
		} else {
			s.bad++
			if s.n.s.Options().KeepFailed {
				log.Message(worker.LevelError, fmt.Sprintf("note: the build directory of '%s' is not kept (--keep-failed): it was built in the storehouse, where it is gone",
					s.n.a.cfg.StoreDir.Join(flox.StorePath(drv))))
			}
			if !s.asked[drv] { // else the client says it
				why := s.n.failure(flox.StorePath(drv), m.GetStop().GetOutcome())
				log.Message(worker.LevelError, "error: "+strings.ReplaceAll(why, "\n", "\n       "))
			}
		}
		s.progress()
	case m.GetLine() != nil:
		s.running[m.GetLine().GetDrv()].Result(worker.ResBuildLogLine, worker.Text(m.GetLine().GetText()))
	case m.GetPhase() != nil:
		s.running[m.GetPhase().GetDrv()].Result(worker.ResSetPhase, worker.Text(m.GetPhase().GetPhase()))
	case m.GetNote() != nil:
		log.Message(worker.Level(m.GetNote().GetLevel()), m.GetNote().GetText())
	case m.GetWait() != nil:
		level, text := s.waits(m.GetWait())
		log.Message(level, text)
	}
}

// waits says why a build waits: that one of the call does, and what nobody takes, to
// everybody, the rest to those who want to hear more.
func (s *buildShow) waits(w *floxv1.BuildWait) (worker.Level, string) {
	level := worker.LevelTalkative
	if w.GetStuck() || !s.waited {
		level, s.waited = worker.LevelInfo, true
	}
	drv := s.n.a.cfg.StoreDir.Join(flox.StorePath(w.GetDrv()))
	if w.GetWhy() == "" {
		return level, fmt.Sprintf("'%s' waits for a builder, behind %d others", drv, w.GetPlace())
	}
	return level, fmt.Sprintf("'%s' waits for a builder: %s", drv, w.GetWhy())
}
